"""Read a file or folder of interactions part by part, for data larger than memory."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from sasrec_lab.config.dataset import DatasetConfig, Format, IdType
from sasrec_lab.data import parquet, source
from sasrec_lab.data.columns import Column, check_is_text, count_lines, read_lists, read_table, without_marks
from sasrec_lab.data.interactions import blocks_of_rows

_BOM = b"\xef\xbb\xbf"
_HEADER = re.compile(rb"[\r\n]*[^\r\n]+(?:\r\n?|\n)")  # the first line that is not empty
_ROWS = 1 << 17  # of Parquet


@dataclass(frozen=True)
class Part:
    """The next rows of a file. `explain` reads them again, slowly, so that an error names the place in the file."""

    read: Callable[[], dict[str, Column]]
    explain: Callable[[], dict[str, Column]]


@dataclass(frozen=True)
class Parts:
    """All parts of a file with at least one line, in order, which give columns by role."""

    parts: Iterator[Part]
    dataset: DatasetConfig  # with the names of the columns
    rows: int | None  # None if they are not counted yet
    as_text: frozenset[str]  # roles of ids that are text from the beginning


def open_parts(path: Path, dataset: DatasetConfig) -> Parts | None:
    """Return the parts of a file or folder; None if the header is such that the file must be read as a whole.

    Raises:
        InputError: it cannot be read, is not text, or lacks a column.
    """
    if parquet.is_parquet(path):
        layout = parquet.find_layout(path, dataset)
        as_text = _text_roles(dataset) | parquet.fractional_ids(layout)
        readers = parquet.read_parts(layout, _ROWS, as_text)
        return Parts((Part(read, read) for read in readers), dataset, layout.rows, as_text)
    if dataset.format is Format.lists:
        found = _blocks_of_lists(path), dataset
    else:
        found = blocks_of_rows(path, dataset)  # type: ignore[assignment]
    if found is None:
        return None
    blocks, named = found
    return Parts(_text_parts(blocks, path, named, dataset), named, None, _text_roles(dataset))


def _text_roles(dataset: DatasetConfig) -> frozenset[str]:
    types = {"user": dataset.user_type, "item": dataset.item_type}
    return frozenset(role for role, kind in types.items() if kind is IdType.str)


def _blocks_of_lists(path: Path) -> Iterator[bytes]:
    blocks = source.blocks(path)
    first = next(blocks, b"")
    check_is_text(first, path)
    return chain([first.removeprefix(_BOM)], without_marks(blocks))


def _text_parts(blocks: Iterator[bytes], path: Path, named: DatasetConfig, given: DatasetConfig) -> Iterator[Part]:
    """Yield the blocks that are not blank; `named` has the names of the header, which they lack."""
    read = read_lists if named.format is Format.lists else read_table
    filled = re.compile(rb"\S" if named.format is Format.lists else rb"[^\r\n]")
    for number, block in enumerate(blocks):
        if filled.search(block):
            yield Part(partial(read, block, path, named), partial(_read_in_place, read, path, given, number))


def _read_in_place(
    read: Callable[[bytes, Path, DatasetConfig], dict[str, Column]], path: Path, dataset: DatasetConfig, number: int
) -> dict[str, Column]:
    """Read a block of a text file again, below the header and as many empty lines as the file has lines above it."""
    above, lines = b"", 0
    for place, block in enumerate(source.blocks(path)):
        if place == 0 and dataset.format is Format.table and not dataset.names:
            above = _HEADER.match(block)[0]  # type: ignore[index]
            lines, block = -count_lines(above), block if number else block[len(above) :]
        if place == number:
            return read(above + b"\n" * max(lines, 0) + block, path, dataset)
        lines += count_lines(block)
    raise AssertionError(f"{path} has become shorter")


def part_of_row(path: Path, dataset: DatasetConfig, row: int) -> tuple[Part, int]:
    """Return the part that has this row of the file, and the row in it, both from 0."""
    found = open_parts(path, dataset)
    assert found is not None
    for part in found.parts:
        rows = len(part.read()["user"].values)
        if row < rows:
            return part, row
        row -= rows
    raise AssertionError(f"{path} has become shorter")
