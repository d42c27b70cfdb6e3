"""External ids, as the user writes them, and the numbers they have inside."""

from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.errors import InputError

_WHOLE = r"(?:0|-?[1-9][0-9]{0,18})"  # 007 is text, as where the data set is read


class Ids:
    """Ids in the order of their numbers from 0: whole numbers, or text."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids  # (n,) int64 or text

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.ids)

    def numbers(self, given: Any, what: str) -> np.ndarray:
        """The number of each given id, -1 where there is none; 7 and "7" are the same id.

        Raises:
            InputError: `given` is no list of ids, or one is missing in it; `what` names it.
        """  # (len(given),) int64
        ids = as_id_array(given, what)
        if self.ids.dtype.kind != "i":
            return self._index.get_indexer(pd.Index(ids if ids.dtype.kind == "U" else ids.astype(str)))
        if ids.dtype.kind == "U":
            text = pd.Series(ids)
            whole = _is_integer_text(text)
            numbers = np.full(len(ids), -1)
            numbers[whole] = self._index.get_indexer(text[whole].astype(np.int64))
            return numbers
        return self._index.get_indexer(ids)


def as_id_array(given: Any, what: str) -> np.ndarray:
    """The ids as an array of whole numbers or of text.

    Raises:
        InputError: `given` is no list, or an id is missing or is no id.
    """
    if isinstance(given, (str, Number)):
        raise InputError(f"{what}={given!r} is no list of ids; write [{given}]")
    if isinstance(given, (bytes, dict)) or not hasattr(given, "__len__"):
        raise InputError(f"{what} is a {type(given).__name__}, no list of ids; give a list")
    if getattr(given, "ndim", 1) != 1:
        raise InputError(
            f"{what} is a {type(given).__name__} of {given.ndim} dimensions, no list of ids; give one column"
        )
    values = pd.Series(list(given) if isinstance(given, (set, frozenset)) else given)
    if values.isna().any():
        raise InputError(f"{what}: id number {int(values.isna().argmax()) + 1} is missing; leave it out")
    values = plain_values(values).infer_objects()
    if pd.api.types.is_bool_dtype(values):
        raise InputError(f"{what} holds true and false, which are no ids")
    if pd.api.types.is_integer_dtype(values):
        numbers = values.to_numpy(np.uint64 if pd.api.types.is_unsigned_integer_dtype(values) else np.int64)
        if numbers.dtype == np.uint64 and (wide := numbers[numbers >= 2**63]).size:
            raise InputError(f"{what} holds {wide[0]}, which has more than 64 bits")
        return numbers.astype(np.int64)
    if pd.api.types.is_float_dtype(values):  # whole numbers that stood in a column with a gap
        return _from_floats(values.to_numpy(np.float64), what)
    if not pd.api.types.is_string_dtype(values):  # an object's is one where all its values are text
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (str, Number)):
                raise InputError(f"{what} holds {value!r}, which is neither a number nor text")
    return values.astype(str).to_numpy(str)


def plain_values(column: pd.Series) -> pd.Series:
    """Of a category its values."""
    return column.astype(column.cat.categories.dtype) if isinstance(column.dtype, pd.CategoricalDtype) else column


def _from_floats(numbers: np.ndarray, what: str) -> np.ndarray:
    if (broken := numbers[np.isinf(numbers)]).size:
        raise InputError(f"{what} holds {broken[0]}, which is no id")
    if (broken := numbers[numbers != numbers.round()]).size:
        raise InputError(f"{what} holds {broken[0]}, a decimal number and no id")
    if (broken := numbers[(numbers >= 2**63) | (numbers < -(2**63))]).size:
        raise InputError(f"{what} holds {broken[0]}, which has more than 64 bits")
    return numbers.astype(np.int64)


def to_int_if_all_integers(text: pd.Series) -> pd.Series:
    """Ids in text as whole numbers where every one is written as such."""
    return text.astype(np.int64) if _is_integer_text(text).all() else text


def _is_integer_text(text: pd.Series) -> np.ndarray:
    """Which of them are whole numbers of 64 bits."""
    whole = np.array(text.str.fullmatch(_WHOLE).eq(True), bool)
    longest = np.flatnonzero(whole & (text.str.len().fillna(0).to_numpy() >= 19))
    whole[longest] = [-(2**63) <= int(word) < 2**63 for word in text.iloc[longest]]
    return whole
