"""Keep what the data set's config keeps, in the order in which a user made the interactions."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd

from sasrec_lab.config import DatasetConfig, InputError, Repeats

_DAY = 86_400  # seconds


def clean(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    """The interactions that the data set keeps, sorted by user and time; ties stay in file order.

    In this order: ratings below `min_rating` go, then times outside `since` and `until` (both inclusive, a date as
    `until` with its whole day), then with `repeats=drop` all but a user's earliest interaction with an item, then the
    items with fewer than `min_item` interactions, then the users with fewer than `min_user` of those left; the last
    two once, or again and again with `until_stable` until nothing more goes.

    Raises:
        InputError: nothing is left, or fewer than two items.
    """
    if dataset.min_rating is not None:
        keep = table["rating"] >= dataset.min_rating
        table = _keep(table, keep, "rating", f"dataset.min_rating={dataset.min_rating}")
    if dataset.since is not None:
        keep = table["time"] >= _bound("dataset.since", dataset.since)
        table = _keep(table, keep, "time", f"dataset.since={dataset.since}")
    if dataset.until is not None:
        keep = table["time"] <= _bound("dataset.until", dataset.until)
        table = _keep(table, keep, "time", f"dataset.until={dataset.until}")
    order = stable_order(table["user"], table.get("time"))
    table = pd.DataFrame({name: column.array.take(order) for name, column in table.items()}, copy=False)
    if dataset.repeats is Repeats.drop:
        table = table.drop_duplicates(["user", "item"])
    table = _drop_rare(table, dataset)
    if (table["item"] == table["item"].iloc[0]).all():
        raise InputError(f"dataset {dataset.name}: 1 item is left after cleaning; a ranking needs at least two")
    return table.drop(columns="rating", errors="ignore").reset_index(drop=True)


def _keep(table: pd.DataFrame, keep: pd.Series, column: str, key: str) -> pd.DataFrame:
    if not keep.any():
        low, high = table[column].min(), table[column].max()
        raise InputError(f"{key} leaves none of {len(table)} interactions; {column} goes from {low} to {high}")
    return table[keep]


def _bound(key: str, text: str) -> float:
    """A bound as a number; a date in seconds since 1970, the last microsecond of the day for `until`."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{key}={text} is neither a number nor an ISO date; write it like 2021-05-11") from error
    if key == "dataset.until" and len(text) == len("2021-05-11"):
        date += timedelta(days=1, microseconds=-1)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def stable_order(users: pd.Series, times: pd.Series | None) -> np.ndarray:
    """Row numbers sorted by user, then time where there is one, then row.

    User and time become one whole number, sorted 16 bits at a time from the lowest, for numpy sorts 16 bits in linear
    time by counting: 5.9 million rows of KION, 29 bits, take 0.15 s (np.lexsort 1.8 s, scipy's COO to CSR 0.22 s).
    """
    key, size = _from_zero(users)
    if times is not None:
        time, span = _from_zero(times)
        if not (time % _DAY).any():  # dates without hours
            time, span = time // _DAY, (span - 1) // _DAY + 1
        key, size = key * span + time, size * span
    order = np.argsort(key.astype(np.uint16), kind="stable").astype(np.int32 if len(key) < 2**31 else np.int64)
    for shift in range(16, (size - 1).bit_length(), 16):
        digits = (key >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _from_zero(values: pd.Series) -> tuple[np.ndarray, int]:
    """Whole numbers from 0 in the order of the values, at most 32 bits each; and one more than the largest."""
    whole = pd.api.types.is_integer_dtype(values)
    low, high = (int(values.min()), int(values.max())) if whole else (0, 2**64)
    if high - low < 2**32:
        return (values.to_numpy(np.int64) - low).view(np.uint64), high - low + 1
    ranks, different = pd.factorize(values, sort=True)
    return ranks.view(np.uint64), len(different)


def _drop_rare(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    if dataset.min_item <= 1 and dataset.min_user <= 1:
        return table
    while True:
        left = table[_count(table["item"]) >= dataset.min_item]
        left = left[_count(left["user"]) >= dataset.min_user]
        if left.empty:
            raise InputError(
                f"dataset.min_item={dataset.min_item} and dataset.min_user={dataset.min_user} leave none of"
                f" {len(table)} interactions; lower them"
            )
        if len(left) == len(table) or not dataset.until_stable:
            return left
        table = left


def _count(ids: pd.Series) -> np.ndarray:
    """For each row, how many rows have its id."""
    codes = pd.factorize(ids)[0]
    return np.bincount(codes)[codes]
