"""Parse a file into text columns that know the line of each value, for error messages."""

import io
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.errors import InputError, nearest


@dataclass
class Column:
    """A column as text, so that an error message can show a value unchanged, with its line."""

    name: str
    values: pa.StringArray  # (rows,), empty text for a missing value
    place: Callable[[int], str]  # row -> "file, line n"

    def error(self, row: int, rule: str, fix: str) -> InputError:
        """Return the error for an invalid value; `rule` says what it is not, `fix` what to do."""
        value = self.values[row].as_py()
        found = f"is {value!r}, {rule}" if value else "is missing"
        return InputError(f"{self.place(row)}: column {self.name} {found}; {fix}")


def check_not_blank(data: bytes, path: Path) -> None:
    """Raise InputError if all lines are empty."""
    if re.search(rb"\S", data) is None:
        raise InputError(f"{path} has only empty lines; dataset.path must name a file with interactions")


def _check_line_ends(data: bytes, path: Path) -> None:
    """Raise InputError if lines end in a carriage return without a line feed."""
    if b"\n" not in data and b"\r" in data.strip():
        raise InputError(f"{path}: lines end in a carriage return only, as on old Macs; end them with a line feed")


def cut_header(block: bytes, path: Path, dataset: DatasetConfig) -> tuple[list[str], bytes] | None:
    """Return a file's column names and the rows of its first block; None if the first line is not a plain header."""
    if dataset.names:
        return list(dataset.names), block
    line = re.match(rb"[\r\n]*([^\r\n]+\r?\n)", block)
    if line is None or line[1].count(b'"') % 2:  # the header continues on the next line
        return None
    return _names(*_one_character_separator(line[1], dataset.separator), path), block[line.end() :]


def read_table(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return the columns that the config names, by their roles: user, item, time, rating, weight."""
    data, separator = _one_character_separator(data, dataset.separator)
    wanted = _wanted(dataset)
    _check_header(_header(data, path, dataset, separator), wanted, path, dataset)
    table = _parse(data, path, dataset, separator, sorted(set(wanted.values())))
    above = 0 if dataset.names else 1  # lines above the first row
    _check_quotes(data, path, len(table) + above)

    def place(row: int) -> str:
        return f"{path}, line {_line_number(data, row + above)}"

    return {role: Column(name, table.column(name).combine_chunks(), place) for role, name in wanted.items()}


def _wanted(dataset: DatasetConfig) -> dict[str, str]:
    columns = {"user": dataset.user, "item": dataset.item, "time": dataset.time, "rating": dataset.rating}
    columns["weight"] = dataset.weight.column if dataset.weight else None
    return {role: name for role, name in columns.items() if name is not None}


def _one_character_separator(data: bytes, separator: str) -> tuple[bytes, str]:
    """Replace a longer separator by a character that the data does not contain: the CSV reader takes only one."""
    if separator == " ":  # spaces at the end of a line separate nothing
        while b" \n" in data or b" \r\n" in data:
            data = data.replace(b" \n", b"\n").replace(b" \r\n", b"\r\n")
        return data.rstrip(b" "), separator
    if len(separator) == 1:
        return data, separator
    free = next(chr(code) for code in (31, 30, 29, 28, *range(1, 9), 127) if bytes([code]) not in data)
    return data.replace(separator.encode(), free.encode()), free


def _header(data: bytes, path: Path, dataset: DatasetConfig, separator: str) -> list[str]:
    if dataset.names:
        return list(dataset.names)
    _check_line_ends(data, path)
    filled = (line for line in io.BytesIO(data) if line.strip(b"\r\n"))
    line = next(filled)
    if next(filled, None) is None:
        raise InputError(f"{path} has a header line and no interactions; dataset.path must name a file with some")
    return _names(line, separator, path)


def _names(line: bytes, separator: str, path: Path) -> list[str]:
    try:
        return csv.read_csv(io.BytesIO(line), parse_options=csv.ParseOptions(delimiter=separator)).column_names
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the header line cannot be read ({error}); it must be UTF-8 text") from error


def _check_header(header: list[str], wanted: dict[str, str], path: Path, dataset: DatasetConfig) -> None:
    for role, name in wanted.items():
        if header.count(name) == 1:
            continue
        if name in header:
            raise InputError(f"{path}: column {name!r} is twice in the header; rename one of the two")
        has = "dataset.names has" if dataset.names else "the file has"
        raise InputError(f"{path}: no column {name!r}; {has} {', '.join(header)}; {_column_fix(header, role, name)}")


def _column_fix(header: list[str], role: str, name: str) -> str:
    key = "dataset.weight.column" if role == "weight" else f"dataset.{role}"
    if len(header) == 1:
        return "check that dataset.separator is the file's"
    if all(re.fullmatch(r"[\d.]+", column) for column in header):
        return "if the file has only data, name its columns: dataset.names=[...]"
    simple = {re.sub(r"\W|_", "", column).lower(): column for column in header}
    suggestion = nearest(re.sub(r"\W|_", "", name).lower(), simple)
    return f"did you mean {key}={simple[suggestion]}?" if suggestion else f"name the column: {key}=..."


def _parse(data: bytes, path: Path, dataset: DatasetConfig, separator: str, wanted: list[str]) -> pa.Table:
    invalid: list[csv.InvalidRow] = []

    def keep_invalid(row: csv.InvalidRow) -> str:
        invalid.append(row)
        return "error"

    def parse(threads: bool) -> pa.Table:
        return csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(use_threads=threads, column_names=dataset.names and list(dataset.names)),
            csv.ParseOptions(delimiter=separator, invalid_row_handler=keep_invalid),
            csv.ConvertOptions(include_columns=wanted, column_types={name: pa.string() for name in wanted}),
        )

    try:
        return parse(threads=True)
    except pa.ArrowInvalid as error:
        if not invalid:
            raise InputError(
                f"{path} cannot be read ({error}); it must be UTF-8 text, with every quote closed on its line"
            ) from error
    invalid.clear()
    with suppress(pa.ArrowInvalid):
        parse(threads=False)  # once more, because rows are numbered only without threads
    row = invalid[0]
    count = f"{row.actual_columns} column{'s' if row.actual_columns > 1 else ''}, not {row.expected_columns}"
    model = "dataset.names; correct dataset.names, or" if dataset.names else "the header;"
    line = _line_number(data, row.number - 1)
    raise InputError(f"{path}, line {line}: {count} as in {model} correct or remove the line")


def _check_quotes(data: bytes, path: Path, lines: int) -> None:
    """Raise InputError if a value has several lines: an open quote would silently swallow the rows below it."""
    if b'"' not in data or lines >= _filled_lines(data):
        return
    number = next(number for number, line in enumerate(io.BytesIO(data), 1) if line.count(b'"') % 2)
    raise InputError(f"{path}, line {number}: a quote is not closed on its line; close it or remove the line")


def _filled_lines(data: bytes) -> int:
    """Count the lines that are not empty, a megabyte at a time: those start after a line end or at the beginning."""
    count, ended = 0, True
    for start in range(0, len(data), 2**20):
        part = np.frombuffer(data, np.uint8, min(2**20, len(data) - start), start)
        end = (part == ord("\n")) | (part == ord("\r"))
        count += int(ended and not end[0]) + np.count_nonzero(end[:-1] & ~end[1:])
        ended = bool(end[-1])
    return count


def _line_number(data: bytes, index: int) -> int:
    """Return the line number (from 1) of the `index`-th line (from 0) that is not empty."""
    filled = (number for number, line in enumerate(io.BytesIO(data), 1) if line.strip(b"\r\n"))
    return next(islice(filled, index, None))


def read_lists(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Return user and item columns from lines of the form `user item item ...`."""
    for key, value in {"time": dataset.time, "rating": dataset.rating, "weight": dataset.weight}.items():
        if value is not None:
            raise InputError(f"dataset.{key} is set, but dataset.format=lists has users and items only; set it to null")
    _check_line_ends(data, path)
    try:
        lines = pc.utf8_trim_whitespace(pa.array(data.decode().split("\n"), pa.string()))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error}); it must be UTF-8 text") from error
    filled = pc.not_equal(lines, "")
    numbers = np.flatnonzero(filled.to_numpy(zero_copy_only=False)) + 1
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
