"""Map raw user and item ids to internal indices."""

from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.errors import InputError, shown

_INTEGER = r"(?:0|-?[1-9][0-9]{0,18})"  # 007 is text, as in the files of data sets
_RULE = "ids are integers or text"
MAX_ITEMS = 2**31 - 1  # their indices are int32


def check_item_count(items: int) -> None:
    """Raise InputError if there are more items than int32 indices."""
    if items > MAX_ITEMS:
        raise InputError(f"the data has {items:,} items, at most {MAX_ITEMS:,} are possible; raise dataset.min_item")


class Ids:
    """Raw ids, all integers or all text, in the order of their indices from 0."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids  # (n,) int64 or text

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.ids)

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.ids)

    def indices(self, given: Any, what: str) -> np.ndarray:
        """Return the index of each given id, -1 if it is unknown, shape (len(given),); 7 and "7" are the same id.

        Raises:
            InputError: `given` is not a list of ids, or an id is missing; `what` names the list in the message.
        """
        ids = as_id_array(given, what)
        if self.ids.dtype.kind != "i":
            return self._index.get_indexer(pd.Index(ids if ids.dtype.kind == "U" else ids.astype(str)))
        if ids.dtype.kind == "U":
            text = pd.Series(ids)
            is_integer = _is_integer_text(text)
            indices = np.full(len(ids), -1)
            indices[is_integer] = self._index.get_indexer(pd.Index(text[is_integer].astype(np.int64)))
            return indices
        return self._index.get_indexer(pd.Index(ids))


def as_id_array(given: Any, what: str) -> np.ndarray:
    """Return the ids as an array of integers or of text.

    Raises:
        InputError: `given` is not a list of ids, or an id is missing; `what` names the list in the message.
    """
    if isinstance(given, (str, Number)):
        bare = shown(given).strip("'")
        raise InputError(f"{what}={shown(given)} is not a list of ids; write [{bare}]")
    if isinstance(given, (bytes, bytearray, memoryview, dict)) or not hasattr(given, "__len__"):
        raise InputError(f"{what} is a {type(given).__name__}, not a list of ids; give a list")
    dimensions = given.nlevels if isinstance(given, pd.MultiIndex) else getattr(given, "ndim", 1)
    if dimensions != 1:
        raise InputError(
            f"{what} is a {type(given).__name__} of {dimensions} dimensions, not a list of ids; give one column"
        )
    try:
        values = pd.Series(list(given) if isinstance(given, (set, frozenset)) else given)
    except UnicodeEncodeError as error:
        raise InputError(f"{what} contains text that is not Unicode ({error}); {_RULE}") from error
    except (TypeError, ValueError, NotImplementedError) as error:  # what pandas cannot take as a column
        raise InputError(f"{what} is a {type(given).__name__}, not a list of ids ({error}); give a list") from error
    if values.isna().any():
        raise InputError(f"{what}: id {int(values.isna().argmax()) + 1} of {len(values)} is missing; remove or fill it")
    return _typed_ids(plain_values(values).infer_objects(), what)


def _typed_ids(values: pd.Series, what: str) -> np.ndarray:
    """Return values without gaps as an array of integers or of text."""
    if pd.api.types.is_bool_dtype(values):
        raise InputError(f"{what} contains booleans; {_RULE}")
    if pd.api.types.is_integer_dtype(values):
        numbers = values.to_numpy(np.uint64 if pd.api.types.is_unsigned_integer_dtype(values) else np.int64)
        if numbers.dtype == np.uint64 and (wide := numbers[numbers >= 2**63]).size:
            raise InputError(f"{what} contains {wide[0]}; integer ids must fit in 64 bits, so give it as text")
        return numbers.astype(np.int64)
    if pd.api.types.is_float_dtype(values):  # integers of a column with a gap, which pandas reads as floats
        return _from_floats(values.to_numpy(np.float64), what)
    if not pd.api.types.is_string_dtype(values):  # which a column of objects is if all of them are text
        for value in values:
            _check_id(value, what)
    try:
        return values.astype(str).to_numpy(str)
    except UnicodeEncodeError as error:
        raise InputError(f"{what} contains text that is not Unicode ({error}); {_RULE}") from error


def _check_id(value: Any, what: str) -> None:
    """Raise InputError unless a value is text or a number that fits an id."""
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 10**1000:  # Python refuses to print integers of more than 4,300 digits
            raise InputError(f"{what} contains an integer of more than 1,000 digits; give it as text")
    elif isinstance(value, bool) or not isinstance(value, (str, Number)):
        raise InputError(f"{what} contains {shown(value)}; {_RULE}")


def plain_values(column: pd.Series) -> pd.Series:
    """Return the values of a categorical column; any other column unchanged."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column
    return column.astype(object if column.isna().any() else column.cat.categories.dtype)


def _from_floats(numbers: np.ndarray, what: str) -> np.ndarray:
    if (broken := numbers[numbers != numbers.round()]).size or (broken := numbers[np.isinf(numbers)]).size:
        raise InputError(f"{what} contains {broken[0]}; {_RULE}")
    if (broken := numbers[(numbers >= 2**63) | (numbers < -(2**63))]).size:
        raise InputError(f"{what} contains {broken[0]}; integer ids must fit in 64 bits, so give it as text")
    return numbers.astype(np.int64)


def to_int_if_all_integers(text: pd.Series) -> pd.Series:
    """Return ids in text as integers if all of them are written as such, or else unchanged."""
    return text.astype(np.int64) if _is_integer_text(text).all() else text


def _is_integer_text(text: pd.Series) -> np.ndarray:
    """Return which texts are integers of 64 bits."""
    is_integer = np.array(text.str.fullmatch(_INTEGER).eq(True), bool)
    longest = np.flatnonzero(is_integer & (text.str.len().fillna(0).to_numpy() >= 19))
    is_integer[longest] = [-(2**63) <= int(word) < 2**63 for word in text.iloc[longest]]
    return is_integer
