"""Recommendation lists, some thousand targets at a time, and where they go: the terminal, CSV or Parquet."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv, parquet
from tqdm import tqdm

from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import InputError
from sasrec_lab.files import atomic_write

AT_ONCE, ROWS = 8192, 2**20  # targets and rows of a table at most: some 100 MB, however many and long the lists are


@dataclass(frozen=True)
class Lists:
    """Tables of target, item_id, score and rank, in the order of the targets; at least one, which may be empty."""

    targets: np.ndarray  # (n,) numbers of the users or items that get a list
    k: int  # items of a list at most
    make: Callable[[np.ndarray], pd.DataFrame]  # the table of some of them

    @property
    def at_once(self) -> int:
        return max(min(AT_ONCE, ROWS // self.k), 1)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        for begin in range(0, max(len(self.targets), 1), self.at_once):
            yield self.make(self.targets[begin : begin + self.at_once])

    def table(self) -> pd.DataFrame:
        return pd.concat(self, ignore_index=True)


def check_output(path: Path) -> None:
    """Raises InputError where the file cannot be written, before anything is computed for it."""
    if path.is_dir():
        raise InputError(f"output={path} is a folder; name a file in it")
    with _explained(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def write(path: Path, lists: Lists) -> None:
    """All lists or no file; a progress bar where the error stream is a terminal.

    Raises:
        InputError: the file cannot be written.
    """
    bar = tqdm(total=len(lists.targets), unit=" lists", unit_scale=True, disable=not sys.stderr.isatty())
    with bar, _explained(path), atomic_write(path) as draft, draft.open("wb") as file:
        writer = None
        for table in lists:
            block = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or _writer(path, file, block.schema)
            writer.write(block)
            bar.update(min(lists.at_once, bar.total - bar.n))
        writer.close()


def _writer(path: Path, file: BinaryIO, schema: pa.Schema) -> csv.CSVWriter | parquet.ParquetWriter:
    if path.suffix == ".parquet":
        return parquet.ParquetWriter(file, schema)
    file.write(",".join(schema.names).encode() + b"\n")  # Arrow would put quotes around the names
    return csv.CSVWriter(file, schema, write_options=csv.WriteOptions(include_header=False))


def show(lists: Lists, items: Ids, titles: np.ndarray | None) -> None:
    """A line an item, below a line that names the target; with titles where there are any."""
    for table in lists:
        target = table.columns[0]
        title = titles[items.numbers(table["item_id"], "item_id")] if titles is not None else [""] * len(table)
        rows = zip(table[target], table["rank"], table["item_id"], table["score"], title, strict=True)
        for name, own in groupby(rows, key=lambda row: row[0]):
            print(f"{target} {name}")
            for _, rank, item, score, text in own:
                print(f"{rank:6}  {item:<12}{score:10.4f}  {text}".rstrip())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output={path} cannot be written: {error.strerror or str(error).splitlines()[0]}; choose another place"
        ) from error
