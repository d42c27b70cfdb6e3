"""Parse a file into columns that know the place of each value, for error messages."""

import csv as python_csv
import io
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.errors import InputError, nearest, shown

_BOM = b"\xef\xbb\xbf"
_RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")  # in Arrow's message; rows count from 1
_MAX_TEXT = 2**31 - 2  # bytes of an array of text
TOO_LONG = "has over 2 GiB of text; set dataset.memory_limit=4GB, which sorts it on disk, or use a part of the file"
FIX = "correct or remove the line"
_FORMATS = "a CSV or other text file, plain or .gz, or a Parquet file"
_MAGIC = {  # first bytes of files that are not text
    b"PAR1\x15": "a Parquet file packed by gzip; unpack it",
    b"PK\x03\x04": "a zip archive or an Excel file; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file; save the sheet as CSV",
    b"\x1f\x8b": "packed by gzip; end its name in .gz",
    b"BZh91AY": "packed by bzip2; unpack it",
    b"\xfd7zXZ": "packed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"ARROW1\0": "an Arrow (Feather) file; convert it",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"\x93NUMPY": "a NumPy array; convert it",
    b"<!doctype html": "an HTML page, not data; download the file itself",
    b"<html": "an HTML page, not data; download the file itself",
}


@dataclass
class Column:
    """A column of a file: text as written, so that an error message can show a value unchanged with its place.

    A Parquet file's numbers and timestamps stay what they are, because they need no parsing.
    """

    name: str
    # (rows,) text, empty for a missing value; or int64, float64 or timestamps in microseconds, without nulls
    values: pa.Array
    place: Callable[[int], str]  # row -> "file, line n"

    def error(self, row: int, rule: str, fix: str) -> InputError:
        """Return the error for an invalid value; `rule` says what it is not, `fix` what to do."""
        value = str(self.values[row].as_py())
        found = f"is {shown(value)}, {rule}" if value else "is missing"
        return InputError(f"{self.place(row)}: column {self.name} {found}; {fix}")


def check_is_text(data: bytes, path: Path) -> None:
    """Raise InputError if the data, or the first block of it, is evidently not text."""
    head = data[:20].removeprefix(_BOM)
    for magic, what in _MAGIC.items():
        if head.startswith(magic) or head.lower().startswith(magic):
            raise InputError(f"{path} is {what}; dataset.path must name {_FORMATS}")
    if path.name.removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson")):
        raise InputError(f"{path} is a JSON file; convert it: dataset.path must name {_FORMATS}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        check_utf8(data, path)


def check_not_blank(data: bytes, path: Path) -> None:
    """Raise InputError if all lines are empty."""
    if re.search(rb"\S", data.removeprefix(_BOM)) is None:
        raise _empty_error(path)


def _empty_error(path: Path) -> InputError:
    return InputError(f"{path} has only empty lines; dataset.path must name a file with interactions")


def check_utf8(data: bytes, path: Path) -> None:
    """Raise InputError with the first line that is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        convert, file = f"iconv -f {encoding} -t utf-8", shlex.quote(str(path))
        command = f"zcat {file} | {convert}" if path.suffix == ".gz" else f"{convert} {file}"
        raise InputError(
            f"{path}, line {_line_at(data, error.start)} is not UTF-8 text (byte 0x{data[error.start]:02x});"
            f" convert the file from its encoding, such as: {command} > converted.csv"
        ) from error


def cut_header(block: bytes, path: Path, dataset: DatasetConfig) -> tuple[list[str], bytes] | None:
    """Return a file's column names and the rows of its first block; None if the first line is not a plain header."""
    if dataset.names:
        return list(dataset.names), block
    line = re.match(rb"[\r\n]*([^\r\n]+(?:\r\n?|\n))", block)
    if line is None or line[1].count(b'"') % 2:  # the header continues on the next line
        return None
    return _names(*_one_character_separator(line[1], dataset.separator, path), path), block[line.end() :]


def without_marks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield blocks of rows; an empty line precedes one that begins like a byte order mark, which would be dropped."""
    for block in blocks:
        yield b"\n" + block if block.startswith(_BOM) else block


def read_table(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return the columns that the config names, by their roles: user, item, time, rating, weight."""
    data, separator = _one_character_separator(data, dataset.separator, path)
    wanted = find_columns(_header(data, path, dataset, separator), path, dataset)
    table = _parse(data, path, dataset, separator, sorted(set(wanted.values())))
    if not len(table):
        raise _empty_error(path)
    above = 0 if dataset.names else 1  # lines above the first row
    _check_quotes(data, path, separator, len(table) + above)

    def place(row: int) -> str:
        return f"{path}, line {_line_number(data, row + above)}"

    may_contain_separators = separator != dataset.separator and b'"' in data

    def values_of(name: str) -> pa.Array:
        values = in_one(table.column(name), name, path)
        return _with_separators(values, separator, dataset.separator) if may_contain_separators else values

    return {role: Column(name.strip(), values_of(name), place) for role, name in wanted.items()}


def _with_separators(values: pa.Array, replacement: str, separator: str) -> pa.Array:
    """Return a column with the separators that were replaced inside quotes, where they are text."""
    if not pa.types.is_string(values.type) or not pc.any(pc.match_substring(values, replacement)).as_py():
        return values
    return pc.replace_substring(values, replacement, separator)


def in_one(chunks: pa.ChunkedArray, name: str, path: Path) -> pa.Array:
    """Return a column as one array.

    Raises:
        InputError: it is text of over 2 GiB, which no array of Arrow's plain text type can have.
    """
    try:
        return chunks.combine_chunks()
    except pa.ArrowException as error:
        raise InputError(f"{path}: column {name} {TOO_LONG}") from error


def _wanted(dataset: DatasetConfig) -> dict[str, str]:
    columns = {"user": dataset.user, "item": dataset.item, "time": dataset.time, "rating": dataset.rating}
    columns["weight"] = dataset.weight.column if dataset.weight else None
    return {role: name for role, name in columns.items() if name is not None}


def _one_character_separator(data: bytes, separator: str, path: Path) -> tuple[bytes, str]:
    """Replace a longer separator by a character that the data does not contain: the CSV reader takes only one byte."""
    if separator == " " and (b" \n" in data or b" \r" in data or data.endswith(b" ")):  # they separate nothing there
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return b"\n".join(line.rstrip(b" ") for line in lines), separator
    if separator.isascii() and len(separator) == 1:
        return data, separator
    free = next((chr(code) for code in (31, 30, 29, 28, *range(1, 9), 127) if bytes([code]) not in data), None)
    if free is None:
        raise InputError(f"{path} has bytes of all values, so it is not text; dataset.path must name {_FORMATS}")
    return data.replace(separator.encode(errors="surrogateescape"), free.encode()), free


def _header(data: bytes, path: Path, dataset: DatasetConfig, separator: str) -> list[str]:
    if dataset.names:
        return list(dataset.names)
    filled = re.finditer(rb"[^\r\n]+", data)
    line = next(filled)[0]
    if next(filled, None) is None:
        raise InputError(f"{path} has a header line and no interactions; dataset.path must name a file with some")
    return _names(line, separator, path)


def _names(line: bytes, separator: str, path: Path) -> list[str]:
    try:
        return csv.read_csv(io.BytesIO(line + b"\n"), parse_options=csv.ParseOptions(delimiter=separator)).column_names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        check_utf8(line, path)
        raise InputError(
            f"{path}: the header line cannot be read ({error}); it must be UTF-8 text, with every quote closed"
        ) from error


def find_columns(header: list[str], path: Path, dataset: DatasetConfig) -> dict[str, str]:
    """Return the name in the file of each column that the config names, by role; blanks around it do not matter.

    Raises:
        InputError: a column is missing, or is there twice.
    """
    found = {}
    for role, name in _wanted(dataset).items():
        same = [column for column in header if column == name] or [c for c in header if c.strip() == name.strip()]
        if len(same) > 1:
            raise InputError(f"{path}: column {name!r} is twice in the header; rename one of the two")
        if not same:
            has = "dataset.names has" if dataset.names else "the file has"
            fix = _column_fix(header, role, name)
            raise InputError(f"{path}: no column {name!r}; {has} {', '.join(header)}; {fix}")
        found[role] = same[0]
    return found


def _column_fix(header: list[str], role: str, name: str) -> str:
    key = "dataset.weight.column" if role == "weight" else f"dataset.{role}"
    if len(header) == 1:
        for separator, typed in {";": """'dataset.separator=";"'""", "\t": r"dataset.separator='\t'"}.items():
            if separator in header[0]:
                return f"set {typed}"
        return "check that dataset.separator is the file's"
    if all(re.fullmatch(r"[\d.]+", column) for column in header):
        return "if the file has only data, name its columns: dataset.names=[...]"
    simple = {re.sub(r"\W|_", "", column).lower(): column for column in header}
    suggestion = nearest(re.sub(r"\W|_", "", name).lower(), simple)
    return f"did you mean {key}={simple[suggestion]}?" if suggestion else f"name the column: {key}=..."


def _parse(data: bytes, path: Path, dataset: DatasetConfig, separator: str, wanted: list[str]) -> pa.Table:
    def parse(threads: bool) -> pa.Table:
        return csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(use_threads=threads, column_names=dataset.names and list(dataset.names)),
            csv.ParseOptions(delimiter=separator),
            csv.ConvertOptions(include_columns=wanted, column_types={name: pa.string() for name in wanted}),
        )

    try:
        return parse(threads=True)
    except pa.ArrowInvalid:
        pass
    try:
        return parse(threads=False)  # once more, because rows are numbered only without threads
    except pa.ArrowInvalid as error:
        if ragged := _RAGGED.search(str(error)):
            raise _ragged_error(data, path, dataset, *map(int, ragged.groups())) from error
        check_utf8(data, path)
        raise InputError(
            f"{path} cannot be read ({error}); it must be text, with every quote closed on its line"
        ) from error


def _ragged_error(data: bytes, path: Path, dataset: DatasetConfig, row: int, expected: int, found: int) -> InputError:
    count = f"{found} column{'s' if found > 1 else ''}, not {expected}"
    model = "dataset.names; correct dataset.names, or" if dataset.names else "the header;"
    return InputError(f"{path}, line {_line_number(data, row - 1)}: {count} as in {model} correct or remove the line")


def _check_quotes(data: bytes, path: Path, separator: str, lines: int) -> None:
    """Raise InputError if a value has several lines: an open quote would silently swallow the rows below it."""
    if b'"' not in data or lines >= _filled_lines(data):
        return
    rows = python_csv.reader(io.StringIO(data.decode(errors="replace"), newline=""), delimiter=separator)
    number = 1  # line of the row
    try:
        for _ in rows:
            if rows.line_num > number:
                break
            number += 1
    except python_csv.Error:  # it swallows more than the reader takes for a value
        pass
    raise InputError(f"{path}, line {number}: a quote is not closed on its line; close it or remove the line")


def _filled_lines(data: bytes) -> int:
    """Count the lines that are not empty, a megabyte at a time: those start after a line end or at the beginning."""
    count, ended = 0, True
    for start in range(0, len(data), 2**20):
        part = np.frombuffer(data, np.uint8, min(2**20, len(data) - start), start)
        end = (part == ord("\n")) | (part == ord("\r"))
        count += int(ended and not end[0]) + int(np.count_nonzero(end[:-1] & ~end[1:]))
        ended = bool(end[-1])
    return count


def _line_number(data: bytes, index: int) -> int:
    """Return the line number (from 1) of the `index`-th line (from 0) that is not empty."""
    return _line_at(data, next(islice(re.finditer(rb"[^\r\n]+", data), index, None)).start())


def _line_at(data: bytes, place: int) -> int:
    """Return the line number (from 1) of a byte; a line ends in a line feed, a carriage return, or both."""
    before = data[:place]
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")


def cast_values(values: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Return values in another type; None if one does not fit."""
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return None


def count_lines(block: bytes) -> int:
    """Return the number of lines that end in a block."""
    return _line_at(block, len(block)) - 1


def read_lists(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return user and item columns from lines of the form `user item item ...`."""
    for key, value in {"time": dataset.time, "rating": dataset.rating, "weight": dataset.weight}.items():
        if value is not None:
            raise InputError(f"dataset.{key} is set, but dataset.format=lists has users and items only; set it to null")
    if len(data) > _MAX_TEXT:
        raise InputError(f"{path} has over 2 GiB of lists; convert it to a table, or use a part of it")
    check_utf8(data, path)
    text = data.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode()
    lines = pc.utf8_trim_whitespace(pa.array(text.split("\n"), pa.string()))
    filled = pc.not_equal(lines, "")
    numbers = np.flatnonzero(filled.to_numpy(zero_copy_only=False)) + 1
    if not len(numbers):
        raise _empty_error(path)
    words = pc.utf8_split_whitespace(lines.filter(filled))
    counts = pc.list_value_length(words).to_numpy() - 1  # items of each line
    if not counts.all():
        raise InputError(f"{path}, line {numbers[counts.argmin()]}: a user without an item; remove the line")
    numbers = np.repeat(numbers, counts)

    def place(row: int) -> str:
        return f"{path}, line {numbers[row]}"

    words = words.flatten()
    users = np.cumsum(counts + 1) - counts - 1  # index in `words` of the user of each line
    items = np.ones(len(words), dtype=bool)
    items[users] = False
    return {
        "user": Column(dataset.user, words.take(pa.array(np.repeat(users, counts))), place),
        "item": Column(dataset.item, words.filter(pa.array(items)), place),
    }
