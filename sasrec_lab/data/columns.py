"""Read a file's bytes into columns of text, each of which can say where in the file a value stands."""

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
    """A column as text, so that a value that is refused can be shown as it stands, with its line."""

    name: str
    values: pa.StringArray  # (rows,), an empty text where the value is missing
    place: Callable[[int], str]  # row -> "file, line n"

    def refuse(self, row: int, rule: str, fix: str) -> InputError:
        value = self.values[row].as_py()
        said = f"is {value!r}, {rule}" if value else "is missing"
        return InputError(f"{self.place(row)}: column {self.name} {said}; {fix}")


def refuse_blank(data: bytes, path: Path) -> None:
    if re.search(rb"\S", data) is None:
        raise InputError(f"{path} has only empty lines; dataset.path must name a file with interactions")


def refuse_lone_returns(data: bytes, path: Path) -> None:
    if b"\n" not in data and b"\r" in data.strip():
        raise InputError(f"{path}: lines end in a carriage return alone, as on old Macs; end them in a line feed")


def cut_header(block: bytes, path: Path, dataset: DatasetConfig) -> tuple[list[str], bytes] | None:
    """The names of the columns and the rows of a file's first block; None where the first line is none of the plain."""
    if dataset.names:
        return list(dataset.names), block
    line = re.match(rb"[\r\n]*([^\r\n]+\r?\n)", block)
    if line is None or line[1].count(b'"') % 2:  # a name over several lines
        return None
    return _names(*_one_character_separator(line[1], dataset.separator), path), block[line.end() :]


def read_table(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
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
    """The CSV reader takes one character, so a longer separator becomes one that the data does not have."""
    if separator == " ":  # a blank at the end of a line separates nothing
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
    refuse_lone_returns(data, path)
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
            raise InputError(f"{path}: column {name!r} stands twice in the header; rename one of the two")
        has = "dataset.names has" if dataset.names else "the file has"
        raise InputError(f"{path}: no column {name!r}; {has} {', '.join(header)}; {_column_fix(header, role, name)}")


def _column_fix(header: list[str], role: str, name: str) -> str:
    key = "dataset.weight.column" if role == "weight" else f"dataset.{role}"
    if len(header) == 1:
        return "dataset.separator may be another than the file's"
    if all(re.fullmatch(r"[\d.]+", column) for column in header):
        return "if that is no header line, name the columns: dataset.names=[...]"
    simple = {re.sub(r"\W|_", "", column).lower(): column for column in header}
    suggestion = nearest(re.sub(r"\W|_", "", name).lower(), simple)
    return f"did you mean {key}={simple[suggestion]}?" if suggestion else f"say which one it is: {key}=..."


def _parse(data: bytes, path: Path, dataset: DatasetConfig, separator: str, wanted: list[str]) -> pa.Table:
    refused: list[csv.InvalidRow] = []

    def refuse(row: csv.InvalidRow) -> str:
        refused.append(row)
        return "error"

    def parse(threads: bool) -> pa.Table:
        return csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(use_threads=threads, column_names=dataset.names and list(dataset.names)),
            csv.ParseOptions(delimiter=separator, invalid_row_handler=refuse),
            csv.ConvertOptions(include_columns=wanted, column_types={name: pa.string() for name in wanted}),
        )

    try:
        return parse(threads=True)
    except pa.ArrowInvalid as error:
        if not refused:
            raise InputError(
                f"{path} cannot be read ({error}); it must be UTF-8 text, with a quote closed on its line"
            ) from error
    refused.clear()
    with suppress(pa.ArrowInvalid):
        parse(threads=False)  # once more, because rows are numbered only without threads
    row = refused[0]
    count = f"{row.actual_columns} column{'s' if row.actual_columns > 1 else ''}, not {row.expected_columns}"
    model = "dataset.names; correct dataset.names, or" if dataset.names else "the header;"
    line = _line_number(data, row.number - 1)
    raise InputError(f"{path}, line {line}: {count} as in {model} correct the line or leave it out")


def _check_quotes(data: bytes, path: Path, lines: int) -> None:
    """An open quote would swallow the rows below it without a word; so no value may go over several lines."""
    if b'"' not in data or lines >= _filled_lines(data):
        return
    number = next(number for number, line in enumerate(io.BytesIO(data), 1) if line.count(b'"') % 2)
    raise InputError(f"{path}, line {number}: a quote is not closed on its line; close it or leave the line out")


def _filled_lines(data: bytes) -> int:
    """A line begins where a line end, or nothing, is followed by something else. In parts of a megabyte or so."""
    count, ended = 0, True
    for start in range(0, len(data), 2**20):
        part = np.frombuffer(data, np.uint8, min(2**20, len(data) - start), start)
        end = (part == ord("\n")) | (part == ord("\r"))
        count += int(ended and not end[0]) + np.count_nonzero(end[:-1] & ~end[1:])
        ended = bool(end[-1])
    return count


def _line_number(data: bytes, index: int) -> int:
    """The number, from 1, of the line that is number `index`, from 0, among those that are not empty."""
    filled = (number for number, line in enumerate(io.BytesIO(data), 1) if line.strip(b"\r\n"))
    return next(islice(filled, index, None))


def read_lists(data: bytes, path: Path, dataset: DatasetConfig) -> dict[str, Column]:
    """Lines of `user item item ...`."""
    for key, value in {"time": dataset.time, "rating": dataset.rating, "weight": dataset.weight}.items():
        if value is not None:
            raise InputError(f"dataset.{key} is set, but dataset.format=lists has users and items only; set it to null")
    refuse_lone_returns(data, path)
    try:
        lines = pc.utf8_trim_whitespace(pa.array(data.decode().split("\n"), pa.string()))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error}); it must be UTF-8 text") from error
    filled = pc.not_equal(lines, "")
    numbers = np.flatnonzero(filled.to_numpy(zero_copy_only=False)) + 1
    words = pc.utf8_split_whitespace(lines.filter(filled))
    counts = pc.list_value_length(words).to_numpy() - 1  # items of each line
    if not counts.all():
        raise InputError(f"{path}, line {numbers[counts.argmin()]}: a user without an item; leave the line out")
    numbers = np.repeat(numbers, counts)

    def place(row: int) -> str:
        return f"{path}, line {numbers[row]}"

    words = words.flatten()
    users = np.cumsum(counts + 1) - counts - 1  # where in `words` the user of each line stands
    items = np.ones(len(words), dtype=bool)
    items[users] = False
    return {
        "user": Column(dataset.user, words.take(pa.array(np.repeat(users, counts))), place),
        "item": Column(dataset.item, words.filter(pa.array(items)), place),
    }
