"""Read a file of interactions into a table, every value checked: one row per interaction, in the order of the file.

Columns: `user` and `item` (int64, or pandas `str` for text), `time` (int64 or float64; dates become seconds since
1970, UTC), `rating` (int64 or float64) and `weight` (float32); the last three only if the data set has them.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, WeightConfig
from sasrec_lab.data import source
from sasrec_lab.data.columns import Column, check_not_blank, cut_header, read_lists, read_table
from sasrec_lab.errors import InputError

_FIX = "correct or remove the line"
_NOT_A_NUMBER = ("not a number", _FIX)
_MAX_THREADS = 8  # more would wait for the one that reads the file
_TIME_TYPES = (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


def read_file(path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions of a file; read it in blocks if that suffices, or else as a whole.

    Raises:
        InputError: the file cannot be read, or a column or a value is missing or is not what the config says.
    """
    table = _read_blocks(source.blocks(path), path, dataset) if _is_simple(dataset) else None
    return read_interactions(source.read(path, None)[0], path, dataset) if table is None else table


def read_interactions(data: bytes, path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions in file order, each value checked; `path` is only for messages.

    Raises:
        InputError: a column or a value is missing or is not what the data set's config says.
    """
    check_not_blank(data, path)
    columns = read_lists(data, path, dataset) if dataset.format is Format.lists else read_table(data, path, dataset)
    table = {
        "user": _ids(columns["user"], dataset.user_type, "dataset.user_type"),
        "item": _ids(columns["item"], dataset.item_type, "dataset.item_type"),
    }
    return pd.DataFrame(table | _value_columns(columns, dataset), copy=False)


# Blocks of a few million bytes are parsed on all cores while the next ones are read, which is several times faster and
# needs less than half the memory. A block knows nothing of the others, so this is only for files in which all give the
# same types: integer ids and one type of time. Any other file, above all one with an invalid value, goes to
# `read_interactions`, which explains what is wrong.


def _is_simple(dataset: DatasetConfig) -> bool:
    return dataset.format is Format.table and IdType.str not in (dataset.user_type, dataset.item_type)


def _read_blocks(blocks: Iterator[bytes], path: Path, dataset: DatasetConfig) -> pd.DataFrame | None:
    """Return the table, with integers as int32 if they fit; None if the file must be read as a whole."""
    cut = cut_header(next(blocks, b""), path, dataset)
    if cut is None:
        return None
    names, first = cut
    dataset = replace(dataset, names=names)
    threads = min(pa.cpu_count(), _MAX_THREADS)
    parts: list[dict[str, np.ndarray]] = []
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for block in chain([first], blocks):
            pending.append(pool.submit(_read_block, block, path, dataset))
            if len(pending) > threads:  # one more block than threads keeps them busy and memory small
                parts.append(pending.popleft().result())
                if parts[-1] is None:
                    return None
        parts += [future.result() for future in pending]
    if None in parts or len({part.pop("time type", None) for part in parts}) > 1:
        return None
    return pd.DataFrame(
        {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}, copy=False
    )


def _read_block(block: bytes, path: Path, dataset: DatasetConfig) -> dict | None:
    try:
        columns = read_table(block, path, dataset)
        if not len(columns["user"].values):  # blank lines
            return None
        ids = {role: _plain_integers(columns[role].values) for role in ("user", "item")}
        if ids["user"] is None or ids["item"] is None:
            return None
        time_type = {"time type": _time_type(columns["time"])} if "time" in columns else {}
        values = ids | _value_columns(columns, dataset)
        return {name: _narrow(column) for name, column in values.items()} | time_type
    except InputError:
        return None


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return int64 as int32 if every value fits."""
    narrow = values.astype(np.int32) if values.dtype == np.int64 else values
    return narrow if np.array_equal(narrow, values) else values


# Values: text -> ids, times, numbers, weights


def _value_columns(columns: dict[str, Column], dataset: DatasetConfig) -> dict[str, np.ndarray]:
    """Return the columns other than the ids."""
    values = {}
    if "time" in columns:
        values["time"] = _times(columns["time"])
    if "rating" in columns:
        values["rating"] = _numbers(columns["rating"])
    if "weight" in columns:
        values["weight"] = _weights(columns["weight"], dataset.weight)
    return values


def _plain_integers(values: pa.StringArray) -> np.ndarray | None:
    """Return the values if each is an integer as Python writes it ("7", not "007", " 7" or "0x7"), or else None.

    Any other decimal form of an integer is longer, so it suffices to compare the total length, which is faster than
    writing out the integers.
    """
    cast = _cast(values, pa.int64())
    if cast is None or b"x" in (text := values.buffers()[2].to_pybytes()) or b"X" in text:
        return None
    integers = cast.to_numpy()
    size, largest = np.abs(integers), max(int(integers.max()), -int(integers.min()))
    digits = sum(np.count_nonzero(size >= 10**power) for power in range(1, len(str(largest))))
    length = len(integers) + digits + np.count_nonzero(integers < 0)
    return integers if length == pc.sum(pc.binary_length(values)).as_py() else None


def _ids(column: Column, kind: IdType, key: str) -> np.ndarray | pd.Series:
    encoded = column.values.dictionary_encode()
    ids, codes = encoded.dictionary, encoded.indices.to_numpy()  # ids in order of first appearance
    if (missing := ids.index("").as_py()) >= 0:
        raise column.error(int(np.argmax(codes == missing)), "", f"every interaction needs one; {_FIX}")
    if kind is IdType.str or (kind is IdType.auto and not _are_integers(column, ids, codes, key)):
        return column.values.to_pandas()
    wrong = pc.match_substring_regex(ids, r"^-?[0-9]+$").index(False).as_py()
    integers = _cast(ids, pa.int64()) if wrong < 0 else None
    if integers is None:
        wrong = wrong if wrong >= 0 else _first_invalid(ids, pa.int64())
        row = int(np.argmax(codes == wrong))
        raise column.error(row, "not an integer (of 64 bits)", f"use {key}=str")
    return integers.to_numpy()[codes]


def _are_integers(column: Column, ids: pa.StringArray, codes: np.ndarray, key: str) -> bool:
    """Return whether `auto` reads these as integers; "007" is text, because as an integer it would come back as "7"."""
    if pc.all(pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]*)$")).as_py():
        return _cast(ids, pa.int64()) is not None
    decimal = pc.match_substring(ids, ".")
    if pc.any(decimal).as_py() and pc.all(pc.match_substring_regex(ids, r"^[+-]?[0-9]+\.?[0-9]*$")).as_py():
        row = int(np.argmax(codes == decimal.index(True).as_py()))
        raise column.error(row, "a decimal number", f"use {key}=str to take it as text")
    return False


def _times(column: Column) -> np.ndarray:
    """Return numbers, or dates as seconds since 1970; the first row decides which."""
    time_type = _time_type(column)
    if time_type == pa.float64():
        return _numbers(column)
    times = _cast(column.values, time_type)
    if times is None:
        row = _first_invalid(column.values, time_type)
        raise column.error(row, f"not an ISO date like {column.values[0]} above", _FIX)
    microseconds = times.cast(pa.int64()).to_numpy()
    seconds, rest = np.divmod(microseconds, 1_000_000)
    return microseconds / 1_000_000 if rest.any() else seconds


def _time_type(column: Column) -> pa.DataType:
    first = column.values[:1]
    time_type = next((each for each in _TIME_TYPES if _cast(first, each) is not None), None)
    if time_type is None:
        raise column.error(
            0, "neither a number nor an ISO date", "correct it, or name the column of the times: dataset.time=..."
        )
    return time_type


def _numbers(column: Column) -> np.ndarray:
    integers = _cast(column.values, pa.int64())
    if integers is not None:
        return integers.to_numpy()
    numbers = _cast(column.values, pa.float64())
    if numbers is None:
        raise column.error(_first_invalid(column.values, pa.float64()), *_NOT_A_NUMBER)
    numbers = numbers.to_numpy()
    if not np.isfinite(numbers).all():
        raise column.error(int(np.argmin(np.isfinite(numbers))), *_NOT_A_NUMBER)
    return numbers


def _weights(column: Column, weight: WeightConfig) -> np.ndarray:
    if weight.above is None:
        numbers = _numbers(column)
        if (numbers < 0).any():
            raise column.error(int(np.argmax(numbers < 0)), "a weight below 0", _FIX)
        return numbers.astype(np.float32)
    values = pc.if_else(pc.equal(column.values, ""), pa.scalar(None, pa.string()), column.values)
    numbers = _cast(values, pa.float64())
    if numbers is None:
        raise column.error(_first_invalid(values, pa.float64()), *_NOT_A_NUMBER)
    above = numbers.to_numpy(zero_copy_only=False) > weight.above  # a missing value is not above
    return np.where(above, np.float32(weight.then), np.float32(weight.otherwise))


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return None


def _first_invalid(values: pa.Array, kind: pa.DataType) -> int:
    """Return the first row that does not cast, in a column that as a whole does not.

    Bisection, because Arrow does not report the row.
    """
    good, bad = 0, len(values)  # all rows before `good` cast; not all before `bad` do
    while bad - good > 1:
        middle = (good + bad) // 2
        if _cast(values[good:middle], kind) is None:
            bad = middle
        else:
            good = middle
    return good
