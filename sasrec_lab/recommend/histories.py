"""What users have had, as flat arrays of the items that a model knows: what its lists are made from."""

import warnings
from dataclasses import dataclass
from numbers import Number

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.data.ids import Ids, as_id_array, plain_values
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.errors import InputError, InputWarning

_AT_ONCE = 8192  # users whose items are looked through
# what pandas calls numbers, also in a column of objects
_NUMBERS = ("integer", "floating", "mixed-integer-float", "decimal")


@dataclass(frozen=True)
class Histories:
    """`items[offsets[u]:offsets[u + 1]]` are the known items (1..num_items) of user u in time order, maybe none."""

    users: Ids
    items: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (num_users + 1,) int64

    @staticmethod
    def of_sequences(sequences: Sequences, items: Ids) -> "Histories":
        numbers = items.numbers(sequences.item_ids, "items") + 1  # 0 for an item that the model does not know
        if np.array_equal(numbers, np.arange(1, len(numbers) + 1)):
            return Histories(Ids(sequences.user_ids), sequences.items, np.asarray(sequences.offsets))
        return _known(Ids(sequences.user_ids), numbers[sequences.items - 1], np.asarray(sequences.offsets))

    @staticmethod
    def of_table(table: pd.DataFrame, dataset: DatasetConfig, items: Ids) -> "Histories":
        """Of interactions that the run has not seen; columns as `Recommender.recommend` says.

        Raises:
            InputError: a column or a value is missing.
        """
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"interactions is a {type(table).__name__}, no pandas DataFrame")
        user = _column(table, (dataset.user, "user_id"))
        item = _column(table, (dataset.item, "item_id"))
        if table.empty:
            raise InputError("interactions has no rows; give at least one, or leave it out")
        users = as_id_array(table[user], f"interactions, column {user}")
        numbers = items.numbers(table[item], f"interactions, column {item}") + 1
        codes, different = pd.factorize(users)
        keys = [codes] if (times := _times(table, dataset)) is None else [times, codes]
        order = np.lexsort(keys)  # stable: of equal times the rows' order stands
        offsets = np.append(0, np.cumsum(np.bincount(codes, minlength=len(different))))
        return _known(Ids(np.asarray(different)), numbers[order], offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)  # (num_users,)

    def had_all(self, users: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Which of these users have had every item i of which wanted[i] (num_items + 1,) is true."""
        had = self.lengths[users] >= wanted.sum()
        long = np.flatnonzero(had)
        for part in np.split(long, range(_AT_ONCE, len(long), _AT_ONCE)):
            rows, items = self.places(users[part])
            pairs = np.unique((rows * len(wanted) + items)[wanted[items]])
            had[part] = np.bincount(pairs // len(wanted), minlength=len(part)) == wanted.sum()
        return had

    def places(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each item of these users: which of them had it, in order, and its number."""
        starts, lengths = self.offsets[users], self.offsets[users + 1] - self.offsets[users]
        rows = np.repeat(np.arange(len(users)), lengths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return rows, self.items[np.repeat(starts, lengths) + within]


def _known(users: Ids, items: np.ndarray, offsets: np.ndarray) -> Histories:
    kept = items > 0
    moved = np.concatenate([[0], np.cumsum(kept)])
    return Histories(users, items[kept].astype(np.int32), moved[offsets])


def _column(table: pd.DataFrame, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table:
            _check_single(table, name)
            return name
    wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
    raise InputError(f"interactions: no column {wanted}; it has {', '.join(map(str, table.columns)) or 'none'}")


def _check_single(table: pd.DataFrame, name: str) -> None:
    if list(table.columns).count(name) > 1:
        raise InputError(f"interactions: column {name!r} stands there twice; leave one of the two out")


def _times(table: pd.DataFrame, dataset: DatasetConfig) -> np.ndarray | None:
    name = next((name for name in (dataset.time, "datetime") if name in table), None)
    if name is None:
        line = f"interactions has no column {dataset.time or 'datetime'}: a user's rows are taken in their order"
        warnings.warn(line, InputWarning, stacklevel=5)
        return None
    _check_single(table, name)
    given = plain_values(table[name])
    times = given.infer_objects()
    if not pd.api.types.is_integer_dtype(times) and pd.api.types.infer_dtype(times) in _NUMBERS:
        times = times.astype(float)  # never whole numbers, of which large ones would become equal
    if not pd.api.types.is_numeric_dtype(times) and not pd.api.types.is_datetime64_any_dtype(times):
        dates = given.mask(given.map(lambda value: isinstance(value, Number))) if given.dtype == object else given
        times = pd.to_datetime(dates, format="ISO8601", utc=True, errors="coerce")
    if (broken := times.isna()).any():
        row = int(broken.argmax())
        value = given.iloc[row]
        shown = repr(value) if isinstance(value, str) else value
        what = "has no time" if pd.isna(value) else f"has {shown}, which is no ISO date"
        raise InputError(f"interactions, column {name}: row {row + 1} {what}; give all as numbers or all as dates")
    return times.to_numpy()
