"""Read the columns of Parquet files, as a whole or in parts, so that they become what the equal CSV becomes.

A folder of files is read as one table: its rows are those of the files in the order of their paths.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from sasrec_lab.config.dataset import DatasetConfig, Format
from sasrec_lab.data import source
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
    """Return whether a file is Parquet, by its name or its first bytes; a folder of files is."""
    if path.suffix == ".parquet" or path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:  # which the reader of text files explains
        return False


@dataclass(frozen=True)
class Layout:
    """The files of a table that have rows, and where its columns are."""

    path: Path  # the file, or the folder
    files: list[Path]
    names: list[dict[str, str]]  # of the columns in each file, by role
    starts: list[int]  # first row of each file
    rows: int
    types: dict[str, pa.DataType]  # of the columns, by role, the same for all files

    def place(self, row: int) -> str:
        """Return the file and the row in it, from 1."""
        number = bisect_right(self.starts, row) - 1
        return f"{self.files[number]}, row {row - self.starts[number] + 1:,}"


def find_layout(path: Path, dataset: DatasetConfig) -> Layout:
    """Read where the columns are that the config names.

    Raises:
        InputError: a file is broken or lacks a column, no file has a row, or a column has types that differ.
    """
    if dataset.format is not Format.table:
        raise InputError(f"dataset.format={dataset.format.name} is for text, but {path} is Parquet; use table")
    files, names, starts, schemas, rows = [], [], [], [], 0
    for each in source.files_of(path):
        with _opened(each) as file:
            wanted = find_columns(file.schema_arrow.names, each, dataset)
            if not file.metadata.num_rows:  # as Spark writes for an empty partition
                continue
            schemas.append({role: _plain_type(file.schema_arrow.field(name).type) for role, name in wanted.items()})
            files.append(each)
            names.append(wanted)
            starts.append(rows)
            rows += file.metadata.num_rows
    if not rows:
        has = "has files without rows" if path.is_dir() else "has no rows"
        raise InputError(f"{path} {has}; dataset.path must name a file with interactions")
    types = {role: _common_type(role, [schema[role] for schema in schemas], files, names) for role in schemas[0]}
    return Layout(path, files, names, starts, rows, types)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _common_type(role: str, types: list[pa.DataType], files: list[Path], names: list[dict[str, str]]) -> pa.DataType:
    """Return a type for all values of a column."""
    common = types[0]
    for kind, file, name in zip(types, files, names, strict=True):
        if kind != common:
            try:
                fields = [pa.schema([(role, each)]) for each in (common, kind)]
                common = pa.unify_schemas(fields, promote_options="permissive").field(role).type
            except pa.ArrowException as error:
                raise InputError(
                    f"{file}: column {name[role]} has type {kind}, but {common} in {files[0]}; write the files with one"
                    " type"
                ) from error
    return common


def read_columns(path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return the columns that the config names, by their roles.

    Raises:
        InputError: as `find_layout`, or a file is broken, or a column has a type that is not read.
    """
    layout = find_layout(path, dataset)
    tables = []
    for each, names in zip(layout.files, layout.names, strict=True):
        with _opened(each) as file:
            tables.append(file.read(columns=sorted(set(names.values()))))
    if len(tables) == 1:
        chunks = {role: tables[0].column(name) for role, name in layout.names[0].items()}
    else:
        chunks = {
            role: pa.chunked_array(
                [
                    _cast_chunk(chunk, kind)
                    for table, names in zip(tables, layout.names, strict=True)
                    for chunk in table.column(names[role]).chunks
                ],
                kind,
            )
            for role, kind in layout.types.items()
        }
    return {role: _to_column(chunks[role], role, layout.names[0][role], layout.place, path) for role in chunks}


def _cast_chunk(chunk: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return values in a wider type."""
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    return chunk.cast(kind, safe=False)


def read_parts(
    layout: Layout, rows: int = _ROWS_PER_PART, as_text: frozenset[str] = frozenset()
) -> Iterator[Callable[[], dict[str, Column]]]:
    """Yield functions that return the columns of the next rows, so that memory holds a part of the file only.

    Columns of `as_text` are read as text even if they are numbers. `rows` are the most in a part.

    Raises:
        InputError: as `read_columns`.
    """
    for each, names, first in zip(layout.files, layout.names, layout.starts, strict=True):
        with _opened(each) as file:
            for batch in file.iter_batches(rows, columns=sorted(set(names.values()))):
                yield partial(_to_columns, batch, layout, names, first, as_text)
                first += len(batch)


def _to_columns(
    batch: pa.RecordBatch, layout: Layout, names: dict[str, str], first: int, as_text: frozenset[str]
) -> dict[str, Column]:
    def place(row: int) -> str:
        return layout.place(first + row)

    columns = {}
    for role, name in names.items():
        chunks = pa.chunked_array([batch.column(name)])
        if len(layout.files) > 1:
            chunks = pa.chunked_array([_cast_chunk(chunks.chunk(0), layout.types[role])])
        columns[role] = _to_column(chunks, role, name, place, layout.path, role in as_text)
    return columns


@contextmanager
def _opened(path: Path) -> Iterator[parquet.ParquetFile]:
    """Yield the open file."""
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # Arrow's own errors are mostly ValueErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is a broken Parquet file ({reason}); replace it with a complete one") from error


def _to_column(
    chunks: pa.ChunkedArray, role: str, name: str, place: Callable[[int], str], path: Path, as_text: bool = False
) -> Column:
    """Return a column in one of the types that `Column` may have; missing values become empty text."""
    values = in_one(chunks, name, path)
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name} is broken ({error}); write the file again, text as UTF-8") from error
    try:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        native = None if as_text else _native_values(values, role)
        return Column(name.strip(), _as_text(values) if native is None else native, place)
    except pa.ArrowException as error:
        if _TOO_LARGE.search(str(error)):
            raise InputError(f"{path}: column {name} {TOO_LONG}") from error
        kinds = "integers, text" + (", numbers or timestamps" if role == "time" else " or numbers")
        raise InputError(f"{path}: column {name} has type {values.type}; it must have {kinds}; convert it") from error


def fractional_ids(layout: Layout) -> frozenset[str]:
    """Return the roles of ids whose numbers are floating-point and not all of them integers, so that they are text."""
    found = set()
    for role in ("user", "item"):
        if pa.types.is_floating(layout.types[role]):
            parts = (part()[role].values for part in read_parts(layout))
            if not all(pa.types.is_int64(values.type) for values in parts):
                found.add(role)
    return frozenset(found)


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
