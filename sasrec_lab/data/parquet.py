"""Read the columns of a Parquet file, as a whole or in parts, so that they become what the equal CSV becomes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from sasrec_lab.config.dataset import DatasetConfig, Format
from sasrec_lab.data.columns import TOO_LONG, Column, find_columns, in_one
from sasrec_lab.errors import InputError

_ROWS_PER_PART = 1 << 18  # a few million bytes
_TOO_LARGE = re.compile(r"overflowed binary array|array too large|cannot contain more than")  # in Arrow's messages
_START = b"PAR1\x15"
_WITH_TEXT = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_timestamp, pa.types.is_date,
)  # fmt: skip


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet, by its name or its first bytes."""
    if path.suffix == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:  # which the reader of text files explains
        return False


def read_columns(path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return the columns that the config names, by their roles.

    Raises:
        InputError: the file is broken, has no rows, or lacks a column, or a column has a type that is not read.
    """
    with _opened(path, dataset) as (file, wanted):
        table = file.read(columns=sorted(set(wanted.values())))
        return _to_columns(table, wanted, path)


def read_parts(path: Path, dataset: DatasetConfig) -> Iterator[Callable[[], dict[str, Column]]]:
    """Yield functions that return the columns of the next rows, so that memory holds a part of the file only.

    Raises:
        InputError: as `read_columns`.
    """
    with _opened(path, dataset) as (file, wanted):
        for batch in file.iter_batches(_ROWS_PER_PART, columns=sorted(set(wanted.values()))):
            yield partial(_to_columns, pa.table(batch), wanted, path)


@contextmanager
def _opened(path: Path, dataset: DatasetConfig) -> Iterator[tuple[parquet.ParquetFile, dict[str, str]]]:
    """Yield the open file, and the names of the columns to read by role."""
    if dataset.format is not Format.table:
        raise InputError(f"dataset.format={dataset.format.name} is for text, but {path} is Parquet; use table")
    try:
        with parquet.ParquetFile(path) as file:
            wanted = find_columns(file.schema_arrow.names, path, dataset)
            if not file.metadata.num_rows:
                raise InputError(f"{path} has no rows; dataset.path must name a file with interactions")
            yield file, wanted
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # Arrow's own errors are mostly ValueErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is a broken Parquet file ({reason}); replace it with a complete one") from error


def _to_columns(table: pa.Table, wanted: dict[str, str], path: Path) -> dict[str, Column]:
    return {role: _to_column(table.column(name), role, name, path) for role, name in wanted.items()}


def _to_column(chunks: pa.ChunkedArray, role: str, name: str, path: Path) -> Column:
    """Return a column in one of the types that `Column` may have; missing values become empty text."""

    def place(row: int) -> str:
        return f"{path}, row {row + 1:,}"

    values = in_one(chunks, name, path)
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name} is broken ({error}); write the file again, text as UTF-8") from error
    try:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        native = _native_values(values, role)
        return Column(name.strip(), _as_text(values) if native is None else native, place)
    except pa.ArrowException as error:
        if _TOO_LARGE.search(str(error)):
            raise InputError(f"{path}: column {name} {TOO_LONG}") from error
        kinds = "integers, text" + (", numbers or timestamps" if role == "time" else " or numbers")
        raise InputError(f"{path}: column {name} has type {values.type}; it must have {kinds}; convert it") from error


def _native_values(values: pa.Array, role: str) -> pa.Array | None:
    """Return numbers and times as int64, float64 or timestamps; None if they must be taken as text.

    Raises:
        pa.ArrowException: the type cannot be converted.
    """
    kind = values.type
    if values.null_count:
        return None
    if pa.types.is_integer(kind) and not (pa.types.is_uint64(kind) and pc.max(values).as_py() >= 2**63):
        return values.cast(pa.int64())
    if pa.types.is_floating(kind):
        numbers = values.cast(pa.float64())
        if role not in ("user", "item"):
            return numbers
        is_exact = np.abs(numbers.to_numpy()) < 2**53
        return numbers.cast(pa.int64()) if is_exact.all() and _is_whole(numbers) else None
    if role == "time" and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return _microseconds(values)
    return None


def _is_whole(numbers: pa.DoubleArray) -> bool:
    return bool((numbers.to_numpy() % 1 == 0).all())


def _microseconds(values: pa.Array) -> pa.TimestampArray:
    """Return timestamps in microseconds; a finer part is cut."""
    if not pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("us"))
    return values.cast(pa.timestamp("us", values.type.tz), safe=values.type.unit != "ns")


def _as_text(values: pa.Array) -> pa.StringArray:
    """Return values as text, missing ones as empty text.

    Raises:
        pa.ArrowException: the type has no text.
    """
    if not any(is_kind(values.type) for is_kind in _WITH_TEXT):
        raise pa.ArrowNotImplementedError(f"no text for {values.type}")
    if pa.types.is_timestamp(values.type):
        values = _microseconds(values)
    return pc.fill_null(values.cast(pa.string()), "")
