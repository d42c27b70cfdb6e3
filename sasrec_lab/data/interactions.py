"""Read a file of interactions into a table, every value checked: one row an interaction, in the order of the file.

Columns: `user` and `item` (int64, or pandas `str` for text), `time` (int64 or float64; dates become seconds since
1970, UTC), `rating` (int64 or float64) and `weight` (float32); the last three only where the data set has them.
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
from sasrec_lab.data.columns import Column, cut_header, read_lists, read_table, refuse_blank
from sasrec_lab.errors import InputError

_MOST_THREADS = 8  # more wait for the one that reads the file
_KINDS_OF_TIME = (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


def read_file(path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """What `read_interactions` gives of the file's content, block by block where that will do.

    Raises:
        InputError: the file cannot be read, or a column or a value is missing or is not what the config says.
    """
    table = _read_blocks(source.blocks(path), path, dataset) if _is_simple(dataset) else None
    return read_interactions(source.read(path, None)[0], path, dataset) if table is None else table


def read_interactions(data: bytes, path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """The interactions in file order, each value checked; `path` serves the messages.

    Raises:
        InputError: a column or a value is missing or is not what the data set's config says.
    """
    refuse_blank(data, path)
    columns = read_lists(data, path, dataset) if dataset.format is Format.lists else read_table(data, path, dataset)
    table = {
        "user": _ids(columns["user"], dataset.user_type, "dataset.user_type"),
        "item": _ids(columns["item"], dataset.item_type, "dataset.item_type"),
    }
    return pd.DataFrame(table | _facts(columns, dataset), copy=False)


# Blocks: the same values from a few million bytes at a time, on all cores, while the next are read. 5.9 million rows of
# KION's schema (193 MB) take 0.6 to 0.9 s on two cores, at once 2.3 to 3 s; memory peaks at 385 MB, not at 930. A block
# knows nothing of the others, so this is for files where each decides alike: whole numbers as ids and one kind of time.
# Anything else, a value to be refused above all, sends the file to `read_interactions`, which says what is wrong.


def _is_simple(dataset: DatasetConfig) -> bool:
    return dataset.format is Format.table and IdType.str not in (dataset.user_type, dataset.item_type)


def _read_blocks(blocks: Iterator[bytes], path: Path, dataset: DatasetConfig) -> pd.DataFrame | None:
    """The table, its whole numbers as int32 where they fit; None where only the whole file can settle something."""
    cut = cut_header(next(blocks, b""), path, dataset)
    if cut is None:
        return None
    names, first = cut
    dataset = replace(dataset, names=names)
    threads = min(pa.cpu_count(), _MOST_THREADS)
    parts: list[dict[str, np.ndarray]] = []
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for block in chain([first], blocks):
            pending.append(pool.submit(_read_block, block, path, dataset))
            if len(pending) > threads:  # one waits, so that no thread has to, and no more, to hold few bytes at once
                parts.append(pending.popleft().result())
                if parts[-1] is None:
                    return None
        parts += [future.result() for future in pending]
    if None in parts or len({part.pop("kind of time", None) for part in parts}) > 1:
        return None
    return pd.DataFrame(
        {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}, copy=False
    )


def _read_block(block: bytes, path: Path, dataset: DatasetConfig) -> dict | None:
    try:
        columns = read_table(block, path, dataset)
        if not len(columns["user"].values):  # blank lines
            return None
        ids = {role: _plain_whole(columns[role].values) for role in ("user", "item")}
        if ids["user"] is None or ids["item"] is None:
            return None
        kind = {"kind of time": _kind_of_time(columns["time"])} if "time" in columns else {}
        values = ids | _facts(columns, dataset)
        return {name: _narrow(column) for name, column in values.items()} | kind
    except InputError:
        return None


def _narrow(values: np.ndarray) -> np.ndarray:
    """int64 as int32 where that holds every value."""
    narrow = values.astype(np.int32) if values.dtype == np.int64 else values
    return narrow if np.array_equal(narrow, values) else values


# Values: text -> ids, times, numbers, weights


def _facts(columns: dict[str, Column], dataset: DatasetConfig) -> dict[str, np.ndarray]:
    """The columns besides the ids."""
    facts = {}
    if "time" in columns:
        facts["time"] = _times(columns["time"])
    if "rating" in columns:
        facts["rating"] = _numbers(columns["rating"])
    if "weight" in columns:
        facts["weight"] = _weights(columns["weight"], dataset.weight)
    return facts


def _plain_whole(values: pa.StringArray) -> np.ndarray | None:
    """The values where each is a whole number as Python writes it ("7", not "007", " 7" or "0x7"), else None.

    Any other decimal writing of a number is longer, so the lengths need only add up: a sixth of the time of writing
    the numbers out to compare (0.02 s and 0.12 s for 6 million).
    """
    whole = _cast(values, pa.int64())
    if whole is None or b"x" in (text := values.buffers()[2].to_pybytes()) or b"X" in text:
        return None
    whole = whole.to_numpy()
    size, largest = np.abs(whole), max(int(whole.max()), -int(whole.min()))
    digits = sum(np.count_nonzero(size >= 10**power) for power in range(1, len(str(largest))))
    length = len(whole) + digits + np.count_nonzero(whole < 0)
    return whole if length == pc.sum(pc.binary_length(values)).as_py() else None


def _ids(column: Column, kind: IdType, key: str) -> np.ndarray | pd.Series:
    encoded = column.values.dictionary_encode()
    ids, codes = encoded.dictionary, encoded.indices.to_numpy()  # ids in order of first appearance
    if (missing := ids.index("").as_py()) >= 0:
        raise column.refuse(int(np.argmax(codes == missing)), "", "every interaction has one; leave the line out")
    if kind is IdType.str or (kind is IdType.auto and not _are_whole(column, ids, codes, key)):
        return column.values.to_pandas()
    wrong = pc.match_substring_regex(ids, r"^-?[0-9]+$").index(False).as_py()
    whole = _cast(ids, pa.int64()) if wrong < 0 else None
    if whole is None:
        wrong = wrong if wrong >= 0 else _first_refused(ids, pa.int64())
        row = int(np.argmax(codes == wrong))
        raise column.refuse(row, "not a whole number (of 64 bits)", f"use {key}=str")
    return whole.to_numpy()[codes]


def _are_whole(column: Column, ids: pa.StringArray, codes: np.ndarray, key: str) -> bool:
    """Whether `auto` takes these for numbers: "007" is text, or else it would come back as "7"."""
    if pc.all(pc.match_substring_regex(ids, r"^(0|-?[1-9][0-9]*)$")).as_py():
        return _cast(ids, pa.int64()) is not None
    decimal = pc.match_substring(ids, ".")
    if pc.any(decimal).as_py() and pc.all(pc.match_substring_regex(ids, r"^[+-]?[0-9]+\.?[0-9]*$")).as_py():
        row = int(np.argmax(codes == decimal.index(True).as_py()))
        raise column.refuse(row, "a decimal number and no id", f"use {key}=str to take it as text")
    return False


def _times(column: Column) -> np.ndarray:
    """Numbers, or dates in seconds since 1970: the first row shows which."""
    kind = _kind_of_time(column)
    if kind == pa.float64():
        return _numbers(column)
    times = _cast(column.values, kind)
    if times is None:
        row = _first_refused(column.values, kind)
        raise column.refuse(row, f"not an ISO date like {column.values[0]} above", "correct the line or leave it out")
    microseconds = times.cast(pa.int64()).to_numpy()
    seconds, rest = np.divmod(microseconds, 1_000_000)
    return microseconds / 1_000_000 if rest.any() else seconds


def _kind_of_time(column: Column) -> pa.DataType:
    kind = next((kind for kind in _KINDS_OF_TIME if _cast(column.values[:1], kind) is not None), None)
    if kind is None:
        raise column.refuse(
            0, "neither a number nor an ISO date", "correct it, or give the column of the times: dataset.time=..."
        )
    return kind


def _numbers(column: Column) -> np.ndarray:
    whole = _cast(column.values, pa.int64())
    if whole is not None:
        return whole.to_numpy()
    numbers = _cast(column.values, pa.float64())
    if numbers is None:
        raise column.refuse(_first_refused(column.values, pa.float64()), *_NUMBER)
    numbers = numbers.to_numpy()
    if not np.isfinite(numbers).all():
        raise column.refuse(int(np.argmin(np.isfinite(numbers))), *_NUMBER)
    return numbers


_NUMBER = ("not a number", "correct the line or leave it out")


def _weights(column: Column, weight: WeightConfig) -> np.ndarray:
    if weight.above is None:
        numbers = _numbers(column)
        if (numbers < 0).any():
            raise column.refuse(int(np.argmax(numbers < 0)), "a weight below 0", _NUMBER[1])
        return numbers.astype(np.float32)
    values = pc.if_else(pc.equal(column.values, ""), pa.scalar(None, pa.string()), column.values)
    numbers = _cast(values, pa.float64())
    if numbers is None:
        raise column.refuse(_first_refused(values, pa.float64()), *_NUMBER)
    above = numbers.to_numpy(zero_copy_only=False) > weight.above  # a missing value is not above
    return np.where(above, np.float32(weight.then), np.float32(weight.otherwise))


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return None


def _first_refused(values: pa.Array, kind: pa.DataType) -> int:
    """The first row that does not cast; the whole column is known not to. Halving, as Arrow does not say which."""
    good, bad = 0, len(values)  # rows before `good` cast, those before `bad` do not all
    while bad - good > 1:
        middle = (good + bad) // 2
        if _cast(values[good:middle], kind) is None:
            bad = middle
        else:
            good = middle
    return good
