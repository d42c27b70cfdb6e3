"""Read a file of interactions into a table, every value checked: one row per interaction, in the order of the file.

Columns: `user` and `item` (int64, or pandas `str` for text), `time` (int64 or float64; dates become seconds since
1970, UTC), `rating` (int64 or float64) and `weight` (float32); the last three only if the data set has them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, WeightConfig
from sasrec_lab.data import parquet, source
from sasrec_lab.data.columns import (
    FIX,
    Column,
    cast_values,
    check_is_text,
    check_not_blank,
    cut_header,
    read_lists,
    read_table,
    without_marks,
)
from sasrec_lab.data.id_checks import IdTest, are_integers
from sasrec_lab.errors import InputError

_NOT_A_NUMBER = ("not a number", FIX)
_MAX_THREADS = 8  # more would wait for the one that reads the file
_TIME_TYPES = (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


def read_file(path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions of a text or Parquet file; read it in parts if that suffices, or else as a whole.

    Raises:
        InputError: the file cannot be read, or a column or a value is missing or is not what the config says.
    """
    if parquet.is_parquet(path):
        parts = parquet.read_parts(parquet.find_layout(path, dataset)) if _has_integer_ids(dataset) else None
        table = None if parts is None else _read_in_parts(parts, path, dataset)
        return _to_table(parquet.read_columns(path, dataset), dataset) if table is None else table
    table = _read_blocks(path, dataset) if _is_simple(dataset) else None
    return read_interactions(source.content(path), path, dataset) if table is None else table


def read_interactions(data: bytes, path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions in a text file's content in file order, each value checked; `path` is for messages.

    Raises:
        InputError: a column or a value is missing or is not what the data set's config says.
    """
    check_is_text(data, path)
    check_not_blank(data, path)
    read = read_lists if dataset.format is Format.lists else read_table
    return _to_table(read(data, path, dataset), dataset)


def _to_table(columns: dict[str, Column], dataset: DatasetConfig) -> pd.DataFrame:
    table = {
        "user": _ids(columns["user"], dataset.user_type, "dataset.user_type", dataset.check_ids),
        "item": _ids(columns["item"], dataset.item_type, "dataset.item_type", dataset.check_ids),
    }
    return pd.DataFrame(table | value_columns(columns, dataset), copy=False)


# Parts of a few million bytes are parsed on all cores while the next ones are read, which is several times faster and
# needs less than half the memory. A part knows nothing of the others, so this is only for files in which all give the
# same types: integer ids and one type of time. Any other file, above all one with an invalid value, is read as a whole,
# which explains what is wrong.


def _has_integer_ids(dataset: DatasetConfig) -> bool:
    return IdType.str not in (dataset.user_type, dataset.item_type)


def _is_simple(dataset: DatasetConfig) -> bool:
    return dataset.format is Format.table and _has_integer_ids(dataset)


def _read_blocks(path: Path, dataset: DatasetConfig) -> pd.DataFrame | None:
    """Return the table in blocks of text, with integers as int32 if they fit; None if it must be read as a whole."""
    found = blocks_of_rows(path, dataset)
    if found is None:
        return None
    rows, dataset = found
    return _read_in_parts((partial(read_table, block, path, dataset) for block in rows), path, dataset)


def blocks_of_rows(path: Path, dataset: DatasetConfig) -> tuple[Iterator[bytes], DatasetConfig] | None:
    """Return the blocks of a text file below its header, and the config with `names` from the header.

    None if the header is not one plain line, so that the file must be read as a whole.

    Raises:
        InputError: the first block is not text.
    """
    blocks = source.blocks(path)
    first = next(blocks, b"")
    check_is_text(first, path)
    cut = cut_header(first, path, dataset)
    if cut is None:
        return None
    names, first = cut
    rows = chain([first], blocks) if dataset.names else without_marks(chain([first], blocks))
    return rows, replace(dataset, names=names)


def _read_in_parts(
    parts: Iterator[Callable[[], dict[str, Column]]], path: Path, dataset: DatasetConfig
) -> pd.DataFrame | None:
    """Return the table in parts that are parsed in parallel; None if it must be read as a whole."""
    threads, limit, size = min(pa.cpu_count(), _MAX_THREADS), source.most_bytes(), 0
    tables: list[dict[str, Any]] = []
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[dict[str, Any] | None]] = deque()
        for part in parts:
            pending.append(pool.submit(_read_part, part, dataset))
            if len(pending) > threads:  # one more part than threads keeps them busy and memory small
                table = pending.popleft().result()
                if table is None:
                    return None
                size += _bytes_of(table)
                source.check_size(size, limit, path)
                tables.append(table)
        for future in pending:
            table = future.result()
            if table is None:
                return None
            tables.append(table)
    if not tables or len({table.pop("time type", None) for table in tables}) > 1:
        return None
    return pd.DataFrame(
        {name: np.concatenate([table.pop(name) for table in tables]) for name in list(tables[0])}, copy=False
    )


def _read_part(read: Callable[[], dict[str, Column]], dataset: DatasetConfig) -> dict[str, Any] | None:
    try:
        columns = read()
        if not len(columns["user"].values):  # blank lines
            return None
        users, items = (plain_integers(columns[role].values) for role in ("user", "item"))
        if users is None or items is None:
            return None
        time_type = {"time type": _time_type(columns["time"])} if "time" in columns else {}
        values = {"user": users, "item": items} | value_columns(columns, dataset)
        return {name: _narrow(column) for name, column in values.items()} | time_type
    except InputError:
        return None


def _bytes_of(table: dict[str, Any]) -> int:
    return sum(column.nbytes for column in table.values() if isinstance(column, np.ndarray))


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return int64 as int32 if every value fits."""
    narrow = values.astype(np.int32) if values.dtype == np.int64 else values
    return narrow if np.array_equal(narrow, values) else values


# Values: text -> ids, times, numbers, weights


def value_columns(
    columns: dict[str, Column], dataset: DatasetConfig, first: Column | None = None
) -> dict[str, np.ndarray]:
    """Return the columns other than the ids. `first` has the file's first time, if these are not its first rows."""
    values = {}
    if "time" in columns:
        values["time"] = _times(columns["time"], first or columns["time"])
    if "rating" in columns:
        values["rating"] = _numbers(columns["rating"])
    if dataset.weight is not None:
        values["weight"] = _weights(columns["weight"], dataset.weight)
    return values


def plain_integers(values: pa.Array) -> np.ndarray | None:
    """Return the values if each is an integer as Python writes it ("7", not "007", " 7" or "0x7"), or else None.

    Any other decimal form of an integer is longer, so it suffices to compare the total length, which is faster than
    writing out the integers.
    """
    if pa.types.is_int64(values.type):
        return values.to_numpy()
    cast = cast_values(values, pa.int64()) if pa.types.is_string(values.type) else None
    if cast is None or b"x" in (text := values.buffers()[2].to_pybytes()) or b"X" in text:
        return None
    integers = cast.to_numpy()
    size, largest = np.abs(integers), max(int(integers.max()), -int(integers.min()))
    digits = sum(np.count_nonzero(size >= 10**power) for power in range(1, len(str(largest))))
    length = len(integers) + digits + np.count_nonzero(integers < 0)
    return integers if length == pc.sum(pc.binary_length(values)).as_py() else None


def _ids(column: Column, kind: IdType, key: str, check: bool) -> np.ndarray | pd.Series:
    if pa.types.is_int64(column.values.type):
        if kind is not IdType.str:
            return column.values.to_numpy()
        try:
            column = replace(column, values=column.values.cast(pa.string()))
        except pa.ArrowException as error:
            raise InputError(f"{key}=str: column {column.name} has over 2 GiB of text; use {key}=auto") from error
    encoded = column.values.dictionary_encode()
    ids, codes = encoded.dictionary, encoded.indices.to_numpy()  # ids in order of first appearance

    def find(is_wrong: IdTest) -> tuple[Callable[[str, str], InputError], int] | None:
        wrong = is_wrong(ids).to_numpy(zero_copy_only=False)
        if not wrong.any():
            return None
        rows = np.flatnonzero(wrong[codes])
        return partial(column.error, int(rows[0])), len(rows)

    if are_integers(find, kind, key, check):
        return ids.cast(pa.int64()).to_numpy()[codes]
    return column.values.to_pandas()


def _times(column: Column, first: Column) -> np.ndarray:
    """Return numbers, or dates as seconds since 1970; the first row of `first` decides which."""
    time_type = _time_type(first)
    if time_type == pa.float64():
        return _numbers(column)
    times = cast_values(column.values, time_type)
    if times is None:
        row = _first_invalid(column.values, time_type)
        raise column.error(row, f"not an ISO date like {first.values[0]} above", FIX)
    microseconds = times.cast(pa.int64()).to_numpy()
    seconds, rest = np.divmod(microseconds, 1_000_000)
    return microseconds / 1_000_000 if rest.any() else seconds


def _time_type(column: Column) -> pa.DataType:
    if not pa.types.is_string(column.values.type):
        return column.values.type if pa.types.is_timestamp(column.values.type) else pa.float64()
    first = column.values[:1]
    time_type = next((each for each in _TIME_TYPES if cast_values(first, each) is not None), None)
    if time_type is None:
        raise column.error(
            0, "neither a number nor an ISO date", "correct it, or name the column of the times: dataset.time=..."
        )
    return time_type


def _numbers(column: Column) -> np.ndarray:
    integers = cast_values(column.values, pa.int64())
    if integers is not None:
        return integers.to_numpy()
    cast = cast_values(column.values, pa.float64())
    if cast is None:
        raise column.error(_first_invalid(column.values, pa.float64()), *_NOT_A_NUMBER)
    numbers: np.ndarray = cast.to_numpy()
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers)))
        is_written = any(character.isdigit() for character in str(column.values[row].as_py()))  # not inf or nan
        raise column.error(row, "a number of more than 64 bits" if is_written else _NOT_A_NUMBER[0], FIX)
    return numbers


def _weights(column: Column, weight: WeightConfig) -> np.ndarray:
    if weight.above is None:
        numbers = _numbers(column)
        if (numbers < 0).any():
            raise column.error(int(np.argmax(numbers < 0)), "a weight below 0", FIX)
        return numbers.astype(np.float32)
    values = column.values
    if pa.types.is_string(values.type):
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
    cast = cast_values(values, pa.float64())
    if cast is None:
        raise column.error(_first_invalid(values, pa.float64()), *_NOT_A_NUMBER)
    above = cast.to_numpy(zero_copy_only=False) > weight.above  # a missing value is not above
    return np.where(above, np.float32(weight.then), np.float32(weight.otherwise))


def _first_invalid(values: pa.Array, kind: pa.DataType) -> int:
    """Return the first row that does not cast, in a column that as a whole does not.

    Bisection, because Arrow does not report the row.
    """
    good, bad = 0, len(values)  # all rows before `good` cast; not all before `bad` do
    while bad - good > 1:
        middle = (good + bad) // 2
        if cast_values(values[good:middle], kind) is None:
            bad = middle
        else:
            good = middle
    return good
