"""Recommendation lists, made table by table, and their output: terminal, CSV or Parquet."""

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
from sasrec_lab.errors import InputError, printable
from sasrec_lab.files import atomic_write

# a table takes about 100 MB at most, whatever the number and length of the lists
MAX_TARGETS_PER_TABLE, MAX_ROWS_PER_TABLE = 8192, 2**20


@dataclass(frozen=True)
class Lists:
    """Lists made on iteration: tables of target, item_id, score and rank, in the order of the targets.

    Without targets there is one table without rows.
    """

    targets: np.ndarray  # (n,) indices of the users or items that get a list
    k: int  # maximum length of a list
    make_table: Callable[[np.ndarray], pd.DataFrame]  # of some targets
    asked: str = ""  # when users ask, in words, if the model reads times

    @property
    def targets_per_table(self) -> int:
        """Return how many targets share a table, so that it fits in memory."""
        return max(min(MAX_TARGETS_PER_TABLE, MAX_ROWS_PER_TABLE // self.k), 1)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        for begin in range(0, max(len(self.targets), 1), self.targets_per_table):
            yield self.make_table(self.targets[begin : begin + self.targets_per_table])

    def table(self) -> pd.DataFrame:
        """Return all lists as one table."""
        return pd.concat(self, ignore_index=True)


def check_output(path: Path) -> None:
    """Raise InputError if the file cannot be written, before anything is computed."""
    if path.is_dir():
        raise InputError(f"output={path} is a folder; give a file in it")
    if not path.parent.is_dir():
        raise InputError(f"output={path}: there is no folder {path.parent}; create it, or choose another place")
    with _explain_write_errors(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def write(path: Path, lists: Lists) -> None:
    """Write all lists, or no file if that fails; show a progress bar if stderr is a terminal.

    Raises:
        InputError: the file cannot be written.
    """
    bar = tqdm(total=len(lists.targets), unit=" lists", unit_scale=True, disable=not sys.stderr.isatty())
    with bar, _explain_write_errors(path), atomic_write(path) as draft, draft.open("wb") as file:
        writer = None
        for table in lists:
            block = pa.Table.from_pandas(table, preserve_index=False)
            writer = writer or _open_writer(path, file, block.schema)
            writer.write(block)
            bar.update(min(lists.targets_per_table, len(lists.targets) - bar.n))
        assert writer is not None
        writer.close()


def _open_writer(path: Path, file: BinaryIO, schema: pa.Schema) -> csv.CSVWriter | parquet.ParquetWriter:
    """Return a writer of Parquet or CSV, by the ending of the path."""
    if path.suffix == ".parquet":
        return parquet.ParquetWriter(file, schema)
    file.write(",".join(schema.names).encode() + b"\n")  # Arrow would quote the names
    return csv.CSVWriter(file, schema, write_options=csv.WriteOptions(include_header=False))


def show(lists: Lists, items: Ids, titles: np.ndarray | None) -> None:
    """Print each list: a line with the target, then one line per item, with its title if the run has titles.

    Control characters in ids and titles are shown, not sent to the terminal; files have them as they are.
    """
    for table in lists:
        target = table.columns[0]
        title = titles[items.indices(table["item_id"], "item_id")] if titles is not None else [""] * len(table)
        rows = zip(table[target], table["rank"], table["item_id"], table["score"], title, strict=True)
        for name, best in groupby(rows, key=lambda row: row[0]):
            print(printable(f"{target} {name}"))
            for _, rank, item, score, text in best:
                print(printable(f"{rank:6}  {item:<12}{score:10.4f}  {text}".rstrip()))


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing the output file into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output={path} cannot be written: {error.strerror or str(error).splitlines()[0]}; choose another path"
        ) from error
