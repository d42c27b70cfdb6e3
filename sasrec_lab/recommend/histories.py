"""User histories as flat arrays of known items: the input of recommendation."""

from dataclasses import dataclass
from numbers import Number

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.data.cleaning import to_seconds
from sasrec_lab.data.ids import Ids, as_id_array, plain_values
from sasrec_lab.data.sequences import Sequences, concatenate_ranges
from sasrec_lab.errors import InputError, shown, warn

USERS_PER_CHUNK = 8192  # bounds the memory of has_seen_all
# names that pandas gives to numbers, also in a column of objects
_NUMERIC_TYPES = ("integer", "floating", "mixed-integer-float", "decimal")


@dataclass(frozen=True)
class Histories:
    """`items[offsets[u]:offsets[u + 1]]` are the known items (1..num_items) of user u in time order, maybe none."""

    users: Ids
    items: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (num_users + 1,) int64
    times: np.ndarray | None = None  # (N,) integers, seconds since 1970, for a model that reads times
    asked: np.ndarray | None = None  # (num_users,) when each user asks, in seconds; None: at the newest item

    @staticmethod
    def from_sequences(sequences: Sequences, items: Ids, reads_times: bool = False) -> "Histories":
        """Return the histories in a data set, without the items that the model does not know.

        Raises:
            InputError: the model reads times, and there are none or these are not dates.
        """
        users, offsets, times = Ids(sequences.user_ids), np.asarray(sequences.offsets), None
        if reads_times:
            if sequences.times is None:
                raise InputError(
                    f"{sequences.file} is read without times (dataset.time=null), but the model reads them; pass the"
                    " histories as interactions"
                )
            times = to_seconds(sequences.times, sequences.file)
        indices = items.indices(sequences.item_ids, "items") + 1  # 0 for an unknown item
        if np.array_equal(indices, np.arange(1, len(indices) + 1)):
            return Histories(users, sequences.items, offsets, times)
        return _drop_unknown(users, indices[sequences.items - 1], offsets, times)

    @staticmethod
    def from_table(table: pd.DataFrame, dataset: DatasetConfig, items: Ids, reads_times: bool = False) -> "Histories":
        """Return the histories in a table of interactions; its columns are those of `Recommender.recommend`.

        Raises:
            InputError: a column or a value is missing, or the model reads times and there are none.
        """
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"interactions must be a pandas DataFrame, not a {type(table).__name__}")
        user = find_column(table, (dataset.user, "user_id"))
        item = find_column(table, (dataset.item, "item_id"))
        if table.empty:
            raise InputError("interactions has no rows; give at least one, or omit it to use the data set's")
        users = as_id_array(table[user], f"interactions, column {user}")
        indices = items.indices(table[item], f"interactions, column {item}") + 1
        codes, distinct = pd.factorize(users)
        times = read_times(table, dataset)
        if times is None:
            _report_no_times(dataset, reads_times)
        keys = [codes] if times is None else [times.to_numpy(), codes]
        order = np.lexsort(keys)  # stable, so that rows of equal time keep their order
        offsets = np.append(0, np.cumsum(np.bincount(codes, minlength=len(distinct))))
        seconds = None
        if reads_times and times is not None:
            seconds = seconds_of(times, f"interactions, column {times.name}")[order]
        return _drop_unknown(Ids(np.asarray(distinct)), indices[order], offsets, seconds)

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of known items of each user, shape (num_users,)."""
        return np.diff(self.offsets)

    def has_seen_all(self, users: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return whether each user has seen every item i with `wanted[i]`; `wanted` has shape (num_items + 1,)."""
        seen_all = self.lengths[users] >= wanted.sum()
        long = np.flatnonzero(seen_all)
        for part in np.split(long, range(USERS_PER_CHUNK, len(long), USERS_PER_CHUNK)):
            rows, items = self.user_item_pairs(users[part])
            pairs = np.unique((rows * len(wanted) + items)[wanted[items]])
            seen_all[part] = np.bincount(pairs // len(wanted), minlength=len(part)) == wanted.sum()
        return seen_all

    def user_item_pairs(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and items of all interactions of some users, in order; row r is `users[r]`."""
        starts, ends = self.offsets[users], self.offsets[users + 1]
        return np.repeat(np.arange(len(users)), ends - starts), self.items[concatenate_ranges(starts, ends)]


def _drop_unknown(users: Ids, items: np.ndarray, offsets: np.ndarray, times: np.ndarray | None) -> Histories:
    """Return histories without the items 0."""
    kept = items > 0
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    times = None if times is None else times[kept]
    return Histories(users, items[kept].astype(np.int32), kept_before[offsets], times)


def find_column(table: pd.DataFrame, names: tuple[str, ...], key: str = "interactions") -> str:
    """Return the first of the names that the table has as a column; `key` is the argument that is the table."""
    for name in names:
        if name in table:
            _check_unique(table, name, key)
            return name
    wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
    columns = ", ".join(map(str, table.columns)) or "none"
    raise InputError(f"{key} must have a column {wanted}; its columns are {columns}; rename one")


def _check_unique(table: pd.DataFrame, name: str, key: str) -> None:
    """Raise InputError if several columns have this name."""
    if list(table.columns).count(name) > 1:
        raise InputError(f"{key}: column {name!r} appears twice; remove one of the two")


def _report_no_times(dataset: DatasetConfig, reads_times: bool) -> None:
    """Warn that a table of interactions has no times, or raise InputError if the model reads them."""
    line = f"interactions has no column {dataset.time or 'datetime'}"
    if reads_times:
        raise InputError(f"{line}, but the model reads times; add the time of each interaction")
    warn(f"{line}, so each user's rows count as in time order")


def seconds_of(times: pd.Series, what: str) -> np.ndarray:
    """Return times as `read_times` gives them as seconds since 1970; `what` names them in messages."""
    if pd.api.types.is_numeric_dtype(times):
        return to_seconds(times.to_numpy(), what)
    if times.dt.tz is not None:
        times = times.dt.tz_convert(None)
    return times.to_numpy("datetime64[s]").astype(np.int64)


def read_times(table: pd.DataFrame, dataset: DatasetConfig, key: str = "interactions") -> pd.Series | None:
    """Return the time of each row as a sortable number or date, None without a column of times.

    `key` is the argument that is the table.
    """
    name = next((name for name in (dataset.time, "datetime") if name in table), None)
    if name is None:
        return None
    _check_unique(table, name, key)
    given = plain_values(table[name])
    times = given.infer_objects()
    if not pd.api.types.is_integer_dtype(times) and pd.api.types.infer_dtype(times) in _NUMERIC_TYPES:
        try:
            times = times.astype(float)  # integer columns are not converted, because large integers would become equal
        except OverflowError as error:
            raise InputError(f"{key}, column {name} has an integer too large for a time; correct it") from error
    if not pd.api.types.is_numeric_dtype(times) and not pd.api.types.is_datetime64_any_dtype(times):
        dates = given.mask(given.map(lambda value: isinstance(value, Number))) if given.dtype == object else given
        times = pd.to_datetime(dates, format="ISO8601", utc=True, errors="coerce")
    if (broken := times.isna()).any():
        row = int(broken.argmax())
        what = "has no time" if given.isna().iloc[row] else f"has {shown(given.iloc[row])}, which is not an ISO date"
        raise InputError(f"{key}, column {name}: row {row + 1} {what}; give only numbers or only ISO dates")
    return times
