"""Run queries in a temporary DuckDB database, within a limit of memory, with the rest on disk."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

_ROWS = 1 << 17  # fetched at a time
_DUCKDB_SHARE = 0.8  # of the limit; parsing takes the rest
_BYTES_PER_THREAD = 100 * 10**6  # with less DuckDB fails to sort
_MOST_BYTES = 10**18  # DuckDB refuses a limit of more than 64 bits


@contextmanager
def connected(limit: int, scratch: Path) -> "Iterator[Connection]":
    """Yield a connection to a new database in `scratch`, which reads no other file and nothing from a network."""
    import duckdb

    share = int(_DUCKDB_SHARE * min(limit, _MOST_BYTES))
    threads = max(1, min(pa.cpu_count(), share // _BYTES_PER_THREAD))
    settings: dict[str, Any] = {
        "memory_limit": f"{share // 10**6}MB",
        "temp_directory": str(scratch / "spilled"),
        "threads": threads,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with duckdb.connect(str(scratch / "interactions.duckdb"), config=settings) as connection:
        connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
        yield connection


def one_row(connection: "Connection", query: str, values: list[float] | None = None) -> tuple[Any, ...]:
    """Return the only row of a query."""
    found = connection.execute(query, values or []).fetchall()
    assert len(found) == 1
    return found[0]


def fetched(connection: "Connection", query: str, values: list[float] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a query in batches, which are not held in memory."""
    with connection.sql(query, params=values or []).to_arrow_reader(_ROWS) as reader:
        yield from reader


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator["tqdm[Any]"]:
    """Yield a progress bar, shown on a terminal only."""
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar


def type_of(connection: "Connection", table: str, column: str) -> str:
    """Return a column's type; an empty text if the table lacks it."""
    query = "SELECT data_type FROM information_schema.columns WHERE table_name = ? AND column_name = ?"
    found = connection.execute(query, [table, column]).fetchall()
    return found[0][0] if found else ""
