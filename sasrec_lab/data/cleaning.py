"""Filter interactions by the data set's config and sort them by user and time."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa

from sasrec_lab.config.dataset import DatasetConfig, Repeats
from sasrec_lab.errors import InputError

_DAY = 86_400  # seconds
_PART_BITS = 4  # rows are sorted in 2 ** 4 parts; more parts take longer to gather than sorting them in parallel saves


def clean(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions that the data set keeps, sorted by user and time; ties stay in file order.

    Filters apply in this order: ratings from `min_rating`; times from `since` to `until` (both inclusive; a date as
    `until` includes its whole day); with `repeats=drop` only a user's earliest interaction with an item; items with at
    least `min_item` interactions; users with at least `min_user` of those left. The last two run once, or with
    `until_stable` until nothing more is dropped.

    Raises:
        InputError: nothing is left, or only one item.
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
    table = sort_interactions(table)
    if dataset.repeats is Repeats.drop:
        table = table.drop_duplicates(["user", "item"])
    table = _drop_rare(table, dataset)
    if (table["item"] == table["item"].iloc[0]).all():
        raise InputError(f"dataset {dataset.name}: 1 item is left after cleaning; a ranking needs at least two")
    return table.drop(columns="rating", errors="ignore").reset_index(drop=True)


def _keep(table: pd.DataFrame, keep: pd.Series, column: str, key: str) -> pd.DataFrame:
    if not keep.any():
        low, high = table[column].min(), table[column].max()
        raise InputError(f"{key} keeps none of {len(table)} interactions; {column} ranges from {low} to {high}")
    return table[keep]


def _bound(key: str, text: str) -> float:
    """Return a bound as a number; a date as seconds since 1970, for `until` the last microsecond of its day."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{key}={text} must be a number or an ISO date; write it like 2021-05-11") from error
    if key == "dataset.until" and len(text) == len("2021-05-11"):
        date += timedelta(days=1, microseconds=-1)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _drop_rare(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    if dataset.min_item <= 1 and dataset.min_user <= 1:
        return table
    while True:
        kept = table[_occurrences(table["item"]) >= dataset.min_item]
        kept = kept[_occurrences(kept["user"]) >= dataset.min_user]
        if kept.empty:
            raise InputError(
                f"dataset.min_item={dataset.min_item} and dataset.min_user={dataset.min_user} keep none of"
                f" {len(table)} interactions; lower them"
            )
        if len(kept) == len(table) or not dataset.until_stable:
            return kept
        table = kept


def _occurrences(ids: pd.Series) -> np.ndarray:
    """Return for each row the number of rows with its id."""
    codes = pd.factorize(ids)[0]
    return np.bincount(codes)[codes]


# Sorting


def sort_interactions(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows sorted by user, then by time if there is one, then as they were, with a new index.

    User and time become one integer key with as few bits as possible (KION: 21 for the user, 8 for the day). The
    highest bits divide the rows into parts, which are sorted in parallel; this is several times faster than np.lexsort.
    """
    key, bits = _sort_key(table)
    low = max(0, bits - _PART_BITS)
    part = (key >> low).astype(np.uint8)
    ends = np.cumsum(np.bincount(part, minlength=1 << _PART_BITS))
    rows = np.empty(len(key), np.int32 if len(key) < 2**31 else np.int64)
    columns = {name: column.to_numpy() for name, column in table.items() if isinstance(column.dtype, np.dtype)}
    ordered = {name: np.empty_like(column) for name, column in columns.items()}

    def sort_part(number: int, start: int, end: int) -> None:
        inside = np.flatnonzero(part == number)
        order = _counting_sort_order(key[inside], low)
        for name, column in columns.items():
            ordered[name][start:end] = column[inside][order]
        rows[start:end] = inside[order]

    with ThreadPoolExecutor(pa.cpu_count()) as pool:  # threads help, because numpy releases the GIL in sort and take
        list(pool.map(sort_part, range(len(ends)), [0, *ends[:-1]], ends))
    texts = {name: table[name].array.take(rows) for name in table if name not in columns}
    return pd.DataFrame({name: (ordered | texts)[name] for name in table}, copy=False)


def _sort_key(table: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Return one integer per row that sorts by user and time, and how many bits it needs, at most 64."""
    key, size = _from_zero(table["user"])
    if "time" in table:
        time, span = _from_zero(table["time"])
        if not (time[:1000] % _DAY).any() and not (time % _DAY).any():  # dates without hours
            time, span = time // _DAY, (span - 1) // _DAY + 1
        size *= span
        key = key.astype(np.uint32 if size < 2**32 else np.uint64) * span + time
    return key, (size - 1).bit_length()


def _from_zero(values: pd.Series) -> tuple[np.ndarray, int]:
    """Return 32-bit integers from 0 in the order of the values, and one more than the largest."""
    is_integer = pd.api.types.is_integer_dtype(values)
    low, high = (int(values.min()), int(values.max())) if is_integer else (0, 2**64)
    if high - low < 2**32:
        return values.to_numpy().astype(np.uint32) - np.uint32(low % 2**32), high - low + 1  # exact, modulo 2**32
    ranks, distinct = pd.factorize(values, sort=True)
    return ranks.astype(np.uint32), len(distinct)


def _counting_sort_order(key: np.ndarray, bits: int) -> np.ndarray:
    """Return the stable order of integers of `bits` bits, 16 bits at a time: numpy sorts those by counting."""
    order = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digits = (key >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
