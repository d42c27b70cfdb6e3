"""When users ask for recommendations, for a model that reads times."""

from datetime import datetime
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.model import QueryTime
from sasrec_lab.data.cleaning import describe_time, read_time
from sasrec_lab.errors import InputError, first_few, shown
from sasrec_lab.recommend.histories import Histories, find_column, read_times, seconds_of
from sasrec_lab.recommend.inputs import expand_home, read_table

KEY = "query_time"
_RULE = (
    "last (the time of each user's newest item), a date as text such as 2021-05-11 or seconds since 1970, or a table"
)


def read_query_times(given: Any, dataset: DatasetConfig) -> Any:
    """Return the table in the file that `query_time` names, or anything else as it is given.

    Raises:
        InputError: the file cannot be read.
    """
    if not isinstance(given, str) or Path(given).suffix not in (".csv", ".parquet", ".gz"):
        return given
    return read_table(expand_home(given), KEY, (dataset.user, "user_id"))


def find_query_times(
    given: Any, histories: Histories, users: np.ndarray, default: QueryTime, dataset: DatasetConfig
) -> tuple[np.ndarray | None, str]:
    """Return when each of all users asks (num_users,), None for at the newest item, and that in words.

    Only the times of `users`, indices of the histories, are those of `given`. Without it the model's own `default`
    counts: `target`, the time of a target which is not known yet, becomes the newest time of the histories.

    Raises:
        InputError: `given` is not a time or a table of times, or a user has none.
    """
    assert histories.times is not None
    if not len(users):
        return None, ""
    if given is None and default is QueryTime.target:
        newest = int(histories.times.max())
        text = f"asked at {describe_time(newest, 'seconds')}, the newest time of the histories; {KEY}=... sets another"
        return np.full(len(histories.users), newest), text
    if given is None or (isinstance(given, str) and given == "last"):
        return None, "asked at the time of each user's newest item"
    if isinstance(given, pd.DataFrame):
        asked = _of_table(given, histories, users, dataset)
        _check_not_earlier(KEY, asked, histories, users)
        return asked, f"asked at the times of {KEY}"
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (str, Number, datetime)):
        raise InputError(f"{KEY}={shown(given)} must be {_RULE}")
    time = _read(given, histories.times)
    asked = np.full(len(histories.users), time)
    _check_not_earlier(f"{KEY}={given}", asked, histories, users)
    return asked, f"asked at {describe_time(time, 'seconds')}"


def _check_not_earlier(name: str, asked: np.ndarray, histories: Histories, users: np.ndarray) -> None:
    """Raise InputError, for the argument of this name, if a user asks before the newest item that the model reads."""
    assert histories.times is not None
    early = users[asked[users] < histories.times[histories.offsets[users + 1] - 1]]
    if len(early):
        raise InputError(
            f"{name} is before the newest item of {len(early):,} of {len(users):,} users"
            f" ({first_few(histories.users.ids[early])}); give a later time, or pass interactions without later items"
        )


def _read(given: Any, times: np.ndarray) -> int:
    """Return one time of asking, in seconds; a date is the end of its day."""
    try:
        time = read_time(KEY, str(given), times, ends_day=True)
    except InputError as error:
        raise InputError(f"{KEY}={given} must be {_RULE}") from error
    return int(time)


def _of_table(table: pd.DataFrame, histories: Histories, users: np.ndarray, dataset: DatasetConfig) -> np.ndarray:
    """Return the times of a table with the columns user_id and datetime, one row per user."""
    user = find_column(table, (dataset.user, "user_id"), KEY)
    if table.empty:
        raise InputError(f"{KEY} has no rows; give the time at which each user asks, or omit it")
    times = read_times(table, dataset, KEY)
    if times is None:
        raise InputError(f"{KEY} must have a column {dataset.time or 'datetime'}; add the time at which each user asks")
    rows = histories.users.indices(table[user], f"{KEY}, column {user}")
    known = rows >= 0
    repeated = rows[known][pd.Series(rows[known]).duplicated().to_numpy()]
    if len(repeated):
        several = first_few(histories.users.ids[repeated])
        raise InputError(f"{KEY} must have one row per user, but has several for {several}; keep one")
    asked = np.full(len(histories.users), np.iinfo(np.int64).min)
    asked[rows[known]] = seconds_of(times, f"{KEY}, column {times.name}")[known]
    missing = users[asked[users] == np.iinfo(np.int64).min]
    if len(missing):
        lacking = first_few(histories.users.ids[missing])
        raise InputError(f"{KEY} has no row for {len(missing):,} of {len(users):,} users ({lacking}); add their times")
    return asked
