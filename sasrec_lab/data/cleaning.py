"""Keep what the data set's config keeps, in the order in which a user made the interactions."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig, Repeats
from sasrec_lab.data.order import in_order
from sasrec_lab.errors import InputError


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
    table = in_order(table)
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
