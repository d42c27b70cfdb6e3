"""Read a file of any size into tables of a DuckDB database, with every value checked.

Tables have the columns place (row of the file, from 0), user_id, item_id, and time, rating and weight if the data set
has them. A new table begins where a column needs a wider type than in the rows above it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.data.columns import Column
from sasrec_lab.data.database import fetched, progress, type_of
from sasrec_lab.data.id_checks import IdTest, are_integers
from sasrec_lab.data.interactions import plain_integers, value_columns
from sasrec_lab.data.parts import Part, Parts, part_of_row
from sasrec_lab.errors import InputError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

_Converted = TypeVar("_Converted")
_WIDER = {(pa.int64(), pa.string()): pa.string(), (pa.int64(), pa.float64()): pa.float64()}


def stage(connection: "Connection", parts: Parts) -> list[str]:
    """Fill tables with all rows of the file; return their names."""
    failures: list[BaseException] = []
    batches = _batches(parts, failures)
    batch = next(batches, None)

    def same_types(schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        nonlocal batch
        while batch is not None and batch.schema == schema:
            yield batch
            batch = next(batches, None)

    tables: list[str] = []
    while batch is not None:
        tables.append(f"staged_{len(tables)}")
        connection.register("batches", pa.RecordBatchReader.from_batches(batch.schema, same_types(batch.schema)))
        connection.execute(f"CREATE TABLE {tables[-1]} AS SELECT * FROM batches")
        connection.unregister("batches")
    if failures:  # kept, because DuckDB would raise an error of its own in place of it
        raise failures[0]
    return tables


def _batches(parts: Parts, failures: list[BaseException]) -> Iterator[pa.RecordBatch]:
    """Yield the rows in order, parsed in parallel; after an error, which is put into `failures`, no more."""
    types: dict[str, pa.DataType] = {}
    rows = 0
    try:
        with progress("reading", parts.rows, " rows") as bar:
            for columns in _parsed(parts):
                for name, values in columns.items():
                    types[name] = _WIDER.get((types.get(name, values.type), values.type), types.get(name, values.type))
                    types[name] = _WIDER.get((values.type, types[name]), types[name])
                size = len(columns["user_id"])
                place = pa.array(np.arange(rows, rows + size))
                arrays = [values.cast(types[name], safe=False) for name, values in columns.items()]
                yield pa.record_batch([place, *arrays], names=["place", *columns])
                rows += size
                bar.update(size)
    except BaseException as error:
        failures.append(error)


def _parsed(parts: Parts) -> Iterator[dict[str, pa.Array]]:
    """Yield the columns of each part, while the next ones are parsed."""
    first_part = next(parts.parts, None)
    if first_part is None:
        return
    times = _explained(first_part, lambda columns: columns.get("time"))
    first = None if times is None else Column(times.name, times.values[:1], times.place)
    threads = min(pa.cpu_count(), 4)  # more would only wait for DuckDB
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[dict[str, pa.Array]]] = deque()
        for part in chain([first_part], parts.parts):
            pending.append(pool.submit(_columns_of, part, parts, first))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _columns_of(part: Part, parts: Parts, first: Column | None) -> dict[str, pa.Array]:
    """Return the columns of a part; ids are int64 if all in the part are written as plain integers, or else text."""

    def convert(columns: dict[str, Column]) -> dict[str, pa.Array]:
        converted = {}
        for role in ("user", "item"):
            values = columns[role].values
            integers = None if role in parts.as_text else plain_integers(values)
            converted[f"{role}_id"] = values.cast(pa.string()) if integers is None else pa.array(integers)
        return converted | {name: pa.array(x) for name, x in value_columns(columns, parts.dataset, first).items()}

    return _explained(part, convert)


def _explained(part: Part, convert: Callable[[dict[str, Column]], _Converted]) -> _Converted:
    """Return what `convert` makes of a part's columns; its errors name the place in the file."""
    try:
        return convert(part.read())
    except InputError:
        convert(part.explain())
        raise


# Check: text that is an id is checked as in memory, by distinct ids


def check_ids(connection: "Connection", tables: list[str], path: Path, dataset: DatasetConfig) -> set[str]:
    """Return the columns of ids that are integers.

    Raises:
        InputError: a text is not an id, as `are_integers` says.
    """
    integers = set()
    kinds = {"user": (dataset.user_type, "dataset.user_type"), "item": (dataset.item_type, "dataset.item_type")}
    for role, (kind, key) in kinds.items():
        column = f"{role}_id"
        if "VARCHAR" not in {type_of(connection, table, column) for table in tables}:
            integers.add(column)
            continue
        rows = union(tables, [column], {column: "VARCHAR"})
        connection.execute(
            f"CREATE TABLE ids AS SELECT {column} AS id, min(place) AS first, count(*) AS n FROM ({rows}) GROUP BY id"
        )
        if are_integers(partial(_find_id, connection, path, dataset, role), kind, key, dataset.check_ids):
            integers.add(column)
        connection.execute("DROP TABLE ids")
    return integers


def _find_id(
    connection: "Connection", path: Path, dataset: DatasetConfig, role: str, is_wrong: IdTest
) -> "tuple[partial[InputError], int] | None":
    """Return how to raise the error of the first row whose id passes the test, and how many rows do."""
    first, rows = None, 0
    for batch in fetched(connection, "SELECT id, first, n FROM ids"):
        wrong = is_wrong(batch.column("id")).to_numpy(zero_copy_only=False)
        if wrong.any():
            lowest = int(batch.column("first").to_numpy()[wrong].min())
            first = lowest if first is None else min(first, lowest)
            rows += int(batch.column("n").to_numpy()[wrong].sum())
    return None if first is None else (partial(_id_error, path, dataset, role, first), rows)


def _id_error(path: Path, dataset: DatasetConfig, role: str, row: int, rule: str, fix: str) -> InputError:
    part, place = part_of_row(path, dataset, row)
    return part.explain()[role].error(place, rule, fix)


def union(tables: list[str], columns: list[str], types: dict[str, str]) -> str:
    """Return a query for the columns of all tables, in the order of their rows."""
    casts = [f"CAST({name} AS {types[name]}) AS {name}" if name in types else name for name in columns]
    return " UNION ALL ".join(f"SELECT place, {', '.join(casts)} FROM {table}" for table in tables)
