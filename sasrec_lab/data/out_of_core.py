"""Build the arrays of a data set that is larger than memory: DuckDB filters and sorts it on disk (extra `big`).

The arrays are those that reading, `clean` and `to_arrays` make in memory, bit for bit. Parts of the file are parsed and
checked by the same code; what needs all rows is SQL, within the limit of memory that DuckDB is given.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as arrow_parquet

from sasrec_lab.config.checks import parse_size
from sasrec_lab.config.dataset import LEAST_MEMORY, DatasetConfig, Repeats
from sasrec_lab.data import source
from sasrec_lab.data.cleaning import (
    all_rare_error,
    describe_range,
    none_kept_error,
    one_item_error,
    sampled_rows,
    unit_of_sample,
    window_bound,
)
from sasrec_lab.data.database import connected, fetched, one_row, progress, type_of
from sasrec_lab.data.ids import check_item_count
from sasrec_lab.data.parquet import is_parquet
from sasrec_lab.data.parts import open_parts
from sasrec_lab.data.staging import check_ids, stage, union
from sasrec_lab.errors import InputError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

Arrays = dict[str, np.ndarray]

# Estimates of what reading in memory takes at its peak, by bytes of text, of zipped text, and by values of Parquet
_PER_BYTE, _PER_ZIPPED_BYTE, _PER_VALUE = 3, 15, 24


def memory_limit(path: Path, dataset: DatasetConfig) -> int | None:
    """Return the bytes of memory in which to build the arrays out of core; None to build them in memory.

    Without `dataset.memory_limit` a file that looks too large for the free memory is built out of core in half of it,
    if DuckDB is installed.

    Raises:
        InputError: `dataset.memory_limit` is set, and DuckDB is not installed.
    """
    has_duckdb = find_spec("duckdb") is not None
    if dataset.memory_limit is not None:
        if not has_duckdb:
            raise InputError(
                f"dataset.memory_limit={dataset.memory_limit} needs DuckDB, which is not installed;"
                " pip install 'sasrec-lab[big]'"
            )
        return parse_size("dataset.memory_limit", dataset.memory_limit, LEAST_MEMORY)
    free = source.most_bytes()
    return free // 2 if free is not None and has_duckdb and _estimate(path) > free else None


def _estimate(path: Path) -> int:
    """Return about how much memory reading and sorting takes without DuckDB."""
    if not is_parquet(path):
        return path.stat().st_size * (_PER_ZIPPED_BYTE if path.suffix == ".gz" else _PER_BYTE)
    values = 0
    with suppress(OSError, ValueError, pa.ArrowException):  # which reading explains
        for file in source.files_of(path):
            metadata = arrow_parquet.read_metadata(file)
            values += metadata.num_rows * min(metadata.num_columns, 4)
    return values * _PER_VALUE


def build_arrays(path: Path, dataset: DatasetConfig, limit: int, scratch: Path) -> Arrays | None:
    """Return the arrays of `Sequences`, mapped from files in `scratch`; DuckDB and parsing take about `limit` bytes.

    None if the file must be read as a whole, as one with an unusual header, or without a row.

    Raises:
        InputError: as reading and `clean`; of several mistakes it may name another one. Or the limit is too low, or the
            disk is full.
    """
    import duckdb

    parts = open_parts(path, dataset)
    if parts is None:
        return None
    with connected(limit, scratch) as connection:
        try:
            tables = stage(connection, parts)
            if not tables:
                return None
            integers = check_ids(connection, tables, path, dataset)
            _select(connection, tables, integers, dataset)
            _drop_repeats(connection, dataset)
            _drop_rare(connection, dataset)
            return _write(connection, dataset, scratch)
        except duckdb.OutOfMemoryException as error:
            raise InputError(
                f"{path} cannot be sorted in {limit / 10**9:.2g} GB of memory ({_first_line(error)}); raise"
                " dataset.memory_limit"
            ) from error
        except (duckdb.IOException, OSError) as error:
            raise InputError(
                f"{scratch.parent}: temporary files cannot be written ({_first_line(error)}); free space, or set"
                " data_dir to another folder"
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


# Filter: tables -> one table, kept, of the rows that the data set keeps


def _select(connection: "Connection", tables: list[str], integers: set[str], dataset: DatasetConfig) -> None:
    """Make the table `kept` of the rows with a rating and a time that the data set keeps."""
    names = ("user_id", "item_id", "time", "rating", "weight")
    columns = [name for name in names if type_of(connection, tables[0], name)]
    types = {name: "BIGINT" if name in integers else "VARCHAR" for name in ("user_id", "item_id")}
    for name in ("time", "rating"):
        if "DOUBLE" in {type_of(connection, table, name) for table in tables}:
            types[name] = "DOUBLE"
    connection.execute(f"CREATE VIEW rows AS {union(tables, columns, types)}")
    conditions: list[tuple[str, float]] = []
    if dataset.min_rating is not None:
        conditions.append(("rating >= ?", float(dataset.min_rating)))
        _check_some_kept(connection, conditions, f"dataset.min_rating={dataset.min_rating}", "rating")
    if dataset.since is not None or dataset.until is not None:
        _add_window(connection, conditions, dataset)
    kept = ", ".join(name for name in columns if name != "rating")
    where, values = _where(conditions)
    is_as_staged = all(type_of(connection, tables[0], name) == kind for name, kind in types.items())
    if len(tables) == 1 and is_as_staged and not where:
        connection.execute(f"DROP VIEW rows; ALTER TABLE {tables[0]} RENAME TO kept")
        return
    connection.execute(f"CREATE TABLE kept AS SELECT place, {kept} FROM rows{where}", values)
    connection.execute("DROP VIEW rows")
    for table in tables:
        connection.execute(f"DROP TABLE {table}")


def _where(conditions: list[tuple[str, float]]) -> tuple[str, list[float]]:
    text = " AND ".join(condition for condition, _ in conditions)
    return f" WHERE {text}" if text else "", [value for _, value in conditions]


def _add_window(connection: "Connection", conditions: list[tuple[str, float]], dataset: DatasetConfig) -> None:
    """Add the conditions of `since` and `until`."""
    where, values = _where(conditions)
    (newest,) = one_row(connection, f"SELECT max(time) FROM rows{where}", values)
    unit = unit_of_sample(_sampled_times(connection, where, values))
    for key, text, sign in (("dataset.since", dataset.since, ">="), ("dataset.until", dataset.until, "<=")):
        if text is not None:
            bound = window_bound(key, text, unit, newest)
            conditions.append((f"time {sign} ?", bound))
            _check_some_kept(connection, conditions, f"{key}={text}", "time", unit)


def _check_some_kept(
    connection: "Connection", conditions: list[tuple[str, float]], key: str, column: str, unit: str | None = None
) -> None:
    """Raise InputError if the last condition drops all rows that the others keep."""
    where, values = _where(conditions)
    if one_row(connection, f"SELECT count(*) FROM rows{where}", values) != (0,):
        return
    where, values = _where(conditions[:-1])
    rows, least, most = one_row(connection, f"SELECT count(*), min({column}), max({column}) FROM rows{where}", values)
    span = f"rating ranges from {least + 0} to {most + 0}" if unit is None else describe_range(least, most, unit)
    raise none_kept_error(key, rows, span)


def _sampled_times(connection: "Connection", where: str, values: list[float]) -> np.ndarray:
    """Return the times that decide the unit, those of the same rows as in memory."""
    (rows,) = one_row(connection, f"SELECT count(*) FROM rows{where}", values)
    places, seen, found = np.sort(sampled_rows(rows)), 0, []
    for batch in fetched(connection, f"SELECT time FROM rows{where}", values):  # in the order of the file
        first, last = np.searchsorted(places, [seen, seen + len(batch)])
        found.append(batch.column("time").to_numpy()[places[first:last] - seen])
        seen += len(batch)
    return np.concatenate(found)


def _drop_repeats(connection: "Connection", dataset: DatasetConfig) -> None:
    if dataset.repeats is Repeats.drop:
        order = "place" if dataset.time is None else "time, place"
        nth = f"row_number() OVER (PARTITION BY user_id, item_id ORDER BY {order}) AS nth"
        connection.execute(
            f"DELETE FROM kept WHERE place IN (SELECT place FROM (SELECT place, {nth} FROM kept) WHERE nth > 1)"
        )


def _drop_rare(connection: "Connection", dataset: DatasetConfig) -> None:
    if dataset.min_item <= 1 and dataset.min_user <= 1:
        return
    (rows,) = one_row(connection, "SELECT count(*) FROM kept")
    with progress("filtering", None, " rounds") as bar:
        while True:
            for column, least in (("item_id", dataset.min_item), ("user_id", dataset.min_user)):
                rare = f"SELECT {column} FROM kept GROUP BY {column} HAVING count(*) < {least}"
                connection.execute(f"DELETE FROM kept WHERE {column} IN ({rare})")
            (left,) = one_row(connection, "SELECT count(*) FROM kept")
            if not left:
                raise all_rare_error(rows, dataset)
            if left == rows or not dataset.until_stable:
                return
            rows = left
            bar.update()


# Sort and write: kept -> arrays


def _write(connection: "Connection", dataset: DatasetConfig, folder: Path) -> Arrays:
    """Write the arrays as files and return them, mapped."""
    (items,) = one_row(connection, "SELECT count(DISTINCT item_id) FROM kept")
    check_item_count(items)
    if items == 1:
        raise one_item_error(one_row(connection, "SELECT item_id FROM kept LIMIT 1")[0], dataset)
    code = "CAST(row_number() OVER (ORDER BY item_id) AS INTEGER) AS code"
    connection.execute(f"CREATE TABLE items AS SELECT item_id, {code} FROM (SELECT DISTINCT item_id FROM kept)")
    connection.execute("CREATE TABLE users AS SELECT user_id, count(*) AS n FROM kept GROUP BY user_id")
    _write_users(connection, folder)
    kind = _id_type(connection, "items", "item_id")
    ids = (batch.column(0) for batch in fetched(connection, "SELECT item_id FROM items ORDER BY code"))
    with _array_file(folder, "item_ids", kind, items) as file:
        for batch in ids:
            file.write(_id_values(batch, kind).tobytes())
    _write_interactions(connection, folder)
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}


def _write_users(connection: "Connection", folder: Path) -> None:
    """Write the ids of the users in their order, and the offsets of their interactions."""
    (users,) = one_row(connection, "SELECT count(*) FROM users")
    kind, end = _id_type(connection, "users", "user_id"), 0
    with (
        _array_file(folder, "user_ids", kind, users) as ids,
        _array_file(folder, "offsets", np.dtype(np.int64), users + 1) as offsets,
    ):
        offsets.write(np.zeros(1, np.int64).tobytes())
        for batch in fetched(connection, "SELECT user_id, n FROM users ORDER BY user_id"):
            ids.write(_id_values(batch.column("user_id"), kind).tobytes())
            ends = end + np.cumsum(batch.column("n").to_numpy())
            offsets.write(ends.tobytes())
            end = int(ends[-1])


def _write_interactions(connection: "Connection", folder: Path) -> None:
    """Write items, times and weights, sorted by user, time and row of the file."""
    (rows,) = one_row(connection, "SELECT count(*) FROM kept")
    kinds: dict[str, np.dtype[Any]] = {"items": np.dtype(np.int32)}
    columns, order = ["code AS items"], "user_id, place"
    if kind := type_of(connection, "kept", "time"):
        kinds["times"] = np.dtype(np.float64) if kind == "DOUBLE" else _integer_type(connection)
        columns.append("time AS times")
        order = "user_id, time, place"
    if type_of(connection, "kept", "weight"):
        kinds["weights"] = np.dtype(np.float32)
        columns.append("weight AS weights")
    query = f"SELECT {', '.join(columns)} FROM kept JOIN items USING (item_id) ORDER BY {order}"
    with ExitStack() as stack:
        files = {name: stack.enter_context(_array_file(folder, name, kind, rows)) for name, kind in kinds.items()}
        bar = stack.enter_context(progress("sorting", rows, " rows"))  # which counts them when they are sorted
        for batch in fetched(connection, query):
            for name, file in files.items():
                file.write(batch.column(name).to_numpy().astype(kinds[name], copy=False).tobytes())
            bar.update(len(batch))


def _integer_type(connection: "Connection") -> np.dtype[Any]:
    least, most = one_row(connection, "SELECT min(time), max(time) FROM kept")
    limits = np.iinfo(np.int32)
    is_narrow: bool = limits.min <= least and most <= limits.max
    return np.dtype(np.int32) if is_narrow else np.dtype(np.int64)


def _id_type(connection: "Connection", table: str, column: str) -> np.dtype[Any]:
    if type_of(connection, table, column) != "VARCHAR":
        return np.dtype(np.int64)
    return np.dtype(f"U{one_row(connection, f'SELECT max(length({column})) FROM {table}')[0]}")


def _id_values(ids: pa.Array, kind: np.dtype[Any]) -> np.ndarray:
    return np.array(ids.to_pylist(), kind) if kind.kind == "U" else ids.to_numpy()


@contextmanager
def _array_file(folder: Path, name: str, kind: np.dtype[Any], length: int) -> Iterator[Any]:
    """Yield a .npy file to which the bytes of its values are written in order."""
    with (folder / f"{name}.npy").open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        yield file
        if file.tell() - begin != length * kind.itemsize:
            raise AssertionError(f"{name} has {file.tell() - begin} bytes, not {length} values of {kind}")
