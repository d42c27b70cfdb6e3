"""Properties of reading: what is written, in any layout, is read back equal, and broken input is one line."""

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, Format, IdType
from sasrec_lab.data import source
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.ids import Ids, as_id_array
from sasrec_lab.data.interactions import read_file, read_interactions
from sasrec_lab.data.sequences import to_arrays
from sasrec_lab.errors import InputError
from sasrec_lab.recommend.inputs import read_ids, read_table

TIMED = load(["dataset=csv", "dataset.path=x.csv"]).dataset
NAMES = ["user_id", "item_id", "timestamp"]
SEPARATORS = [",", "\t", "::", "|", ";", ", ", "é"]

few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
integers = st.integers(-(2**63) + 1, 2**63 - 1)
# text that is neither a number, nor refused as an id, nor divided by a separator of several characters
words = st.from_regex(r"[a-z\"'é日_][a-z0-9\"',;|é日 _]{0,6}[a-z_]", fullmatch=True).filter(
    lambda word: ", " not in word
)
rows_of_integers = st.lists(st.tuples(integers, integers, st.integers(-(2**40), 2**40)), min_size=1, max_size=30)
rows_of_text = st.lists(st.tuples(words, words, st.floats(-1e12, 1e12)), min_size=1, max_size=30)


def rows_of(table: pd.DataFrame) -> list[tuple]:
    return list(table[["user", "item", "time"]].itertuples(index=False, name=None))


def written(rows: list[tuple], order: list[int], separator: str, end: str, quoting: int) -> bytes:
    """Return the rows as a CSV file with the columns in this order."""
    text = io.StringIO()
    one = separator if len(separator) == 1 else "\x1f"
    writer = csv.writer(text, delimiter=one, lineterminator=end, quoting=quoting)
    writer.writerow([NAMES[place] for place in order])
    writer.writerows([[row[place] for place in order] for row in rows])
    return text.getvalue().replace(one, separator).encode()


@few
@given(
    rows=rows_of_integers | rows_of_text,
    order=st.permutations(range(3)),
    separator=st.sampled_from(SEPARATORS),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    block=st.integers(10, 400),
)
def test_written_rows_are_read_back(tmp_path, monkeypatch, rows, order, separator, end, quoting, block):
    monkeypatch.setattr(source, "_BLOCK_BYTES", block)
    data = written(rows, order, separator, end, quoting)
    dataset = replace(TIMED, separator=separator)
    assert rows_of(read_interactions(data, Path("x.csv"), dataset)) == rows
    (tmp_path / "x.csv").write_bytes(data)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(data))
    assert rows_of(read_file(tmp_path / "x.csv", dataset)) == rows
    assert rows_of(read_file(tmp_path / "x.csv.gz", dataset)) == rows


@few
@given(rows=rows_of_integers | rows_of_text, group=st.integers(1, 40), dictionary=st.booleans())
def test_arrow_writes_what_is_read_back(tmp_path, rows, group, dictionary):
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    table = pa.table(dict(zip(NAMES, columns, strict=True)))
    arrow_csv.write_csv(table, tmp_path / "x.csv")
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=group, use_dictionary=dictionary)
    read = [read_file(tmp_path / name, TIMED) for name in ("x.csv", "x.parquet")]
    assert rows_of(read[0]) == rows
    pd.testing.assert_frame_equal(*read)


@few
@given(users=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=2, max_size=8), data=st.data())
def test_the_order_of_rows_does_not_matter_if_times_differ(users, data):
    rows = [(user, item, time) for user, items in enumerate(users) for time, item in enumerate(items)] + [(99, 10, 0)]
    shuffled = data.draw(st.permutations(rows))
    expected, found = (
        to_arrays(clean(pd.DataFrame(each, columns=["user", "item", "time"]), TIMED)) for each in (rows, shuffled)
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@few
@given(users=st.permutations(range(5)), rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=3))
def test_users_may_be_interleaved_if_their_rows_keep_their_order(users, rows):
    rows = [*rows, (0, 10), (1, 11)]
    grouped = [row for user in users for row in rows if row[0] == user]
    plain = replace(TIMED, time=None)
    expected, found = (
        to_arrays(clean(pd.DataFrame(each, columns=["user", "item"]), plain)) for each in (rows, grouped)
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@few
@given(rows=rows_of_integers | rows_of_text)
def test_recommend_reads_tables_back(tmp_path, rows):
    table = pd.DataFrame(rows, columns=NAMES)
    table.to_csv(tmp_path / "h.csv", index=False)
    table.to_csv(tmp_path / "h.csv.gz", index=False)
    table.to_parquet(tmp_path / "h.parquet")
    for name in ("h.csv", "h.csv.gz", "h.parquet"):
        read = read_table(tmp_path / name, "interactions", ("user_id", "item_id"))
        assert list(read.itertuples(index=False, name=None)) == rows
    (tmp_path / "ids.txt").write_text("\n".join(str(row[0]) for row in rows))
    for name in ("ids.txt", "h.csv", "h.parquet"):
        given_ids = read_ids(str(tmp_path / name), "users", ("user_id", "user_id"))
        users = Ids(np.array(sorted({row[0] for row in rows})))
        assert users.ids[users.indices(given_ids, "users")].tolist() == [row[0] for row in rows]


@few
@given(ids=st.lists(integers, min_size=1) | st.lists(words, min_size=1))
def test_ids_are_the_same_in_any_container(ids):
    given_ids = [ids, tuple(ids), np.array(ids), np.array(ids, object), pd.Series(ids), pd.Index(ids)]
    given_ids += [pd.Series(ids, dtype="category"), pd.Series(ids, index=["a"] * len(ids)), pa.array(ids)]
    for each in given_ids:
        assert as_id_array(each, "users").tolist() == ids


pieces = st.sampled_from([
    b"1", b"2", b",", b"\n", b"\r", b"\r\n", b'"', b" ", b"\t", b"\0", b"\xe9", b"\xef\xbb\xbf", b"nan", b"9" * 5000,
    b"2021-05-11", b"user_id", b"item_id", b"user_id,item_id,timestamp\n", b"1,2,3\n", b"\x1f", b"-", b".",
])  # fmt: skip


def outcome(read: Callable[[], pd.DataFrame]) -> dict[str, list] | None:
    """Return the columns that are read, or None for an InputError, after a check of its message."""
    try:
        return {name: column.tolist() for name, column in read().items()}
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1600
    return None


@settings(few, max_examples=150)
@given(
    data=st.lists(pieces, max_size=25).map(b"".join),
    separator=st.sampled_from(SEPARATORS),
    kind=st.sampled_from(list(IdType)),
    names=st.sampled_from([None, NAMES]),
    layout=st.sampled_from([Format.table, Format.lists]),
)
def test_any_bytes_are_a_table_or_one_line(tmp_path, data, separator, kind, names, layout):
    (tmp_path / "x.csv").write_bytes(data)
    changes = {"format": layout, "time": None if layout is Format.lists else "timestamp"}
    dataset: DatasetConfig = replace(TIMED, separator=separator, user_type=kind, names=names, **changes)
    whole = outcome(lambda: read_interactions(data, tmp_path / "x.csv", dataset))
    assert outcome(lambda: read_file(tmp_path / "x.csv", dataset)) == whole
