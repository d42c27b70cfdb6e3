"""Parquet files: they give what the equal CSV gives, whatever the types of their columns."""

import gzip
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import csv
from pyarrow import parquet as pq

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, WeightConfig
from sasrec_lab.data import parquet
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError

TIMED = load(["dataset=csv", "dataset.path=x.parquet"]).dataset  # user_id, item_id, timestamp
PLAIN = replace(TIMED, time=None)
KEEP = "or keep them as ids: dataset.check_ids=false"
TEXT = ["8", "7", "7"]


def write(folder: Path, columns: dict, rows_per_group: int | None = None, name: str = "x.parquet") -> Path:
    pq.write_table(pa.table(columns), folder / name, row_group_size=rows_per_group)
    return folder / name


def read(folder: Path, columns: dict, dataset: DatasetConfig = PLAIN, **changes) -> dict[str, list]:
    table = read_file(write(folder, columns), replace(dataset, **changes))
    return {name: column.tolist() for name, column in table.items()}


def refused(folder: Path, columns: dict, dataset: DatasetConfig = PLAIN, **changes) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, columns, dataset, **changes)
    return str(caught.value).replace(f"{folder}/", "")


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64(), pa.float32(), pa.float64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", INTEGERS + TEXTS, ids=str)
def test_integer_ids_of_any_type(tmp_path, kind):
    ids = pa.array(TEXT).cast(kind) if kind in TEXTS else pa.array([8, 7, 7], kind)
    columns = {"item_id": ids, "user_id": pa.array([1, 2, 3])}
    assert read(tmp_path, columns) == {"user": [1, 2, 3], "item": [8, 7, 7]}
    assert read(tmp_path, columns, item_type=IdType.int) == {"user": [1, 2, 3], "item": [8, 7, 7]}
    assert read(tmp_path, columns, item_type=IdType.str) == {"user": [1, 2, 3], "item": TEXT}


def test_text_ids(tmp_path):
    columns = {"user_id": [1, 2, 3], "item_id": pa.array(["007", "é", "x"]).dictionary_encode()}
    assert read(tmp_path, columns) == {"user": [1, 2, 3], "item": ["007", "é", "x"]}
    assert refused(tmp_path, columns, item_type=IdType.int) == (
        "x.parquet, row 2: column item_id is 'é', not an integer (of 64 bits); use dataset.item_type=str"
    )
    wide = pa.array([1, 2**63], pa.uint64())
    assert read(tmp_path, {"user_id": [1, 2], "item_id": wide})["item"] == ["1", "9223372036854775808"]


MAY_11 = 1620691200


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (pa.array([MAY_11, 5, -1], pa.int32()), [MAY_11, 5, -1]),
        (pa.array([MAY_11, 5, 6], pa.uint64()), [MAY_11, 5, 6]),
        (pa.array([1.5, 2, 3]), [1.5, 2, 3]),
        (pa.array([1.0, 2, 3]), [1, 2, 3]),
        (pa.array([Decimal("1.50"), Decimal("2"), Decimal("3")]), [1.5, 2, 3]),
        (pa.array(["2021-05-11", "1970-01-01 00:00:01", "1970-01-02"]), [MAY_11, 1, 86400]),
        (pa.array([date(2021, 5, 11), date(1970, 1, 1), date(1969, 12, 31)]), [MAY_11, 0, -86400]),
        (pa.array([MAY_11, 0, -1], pa.timestamp("s")), [MAY_11, 0, -1]),
        (pa.array([MAY_11 * 10**3, 1500, 0], pa.timestamp("ms")), [MAY_11, 1.5, 0]),
        (pa.array([MAY_11 * 10**9 + 1, 0, 0], pa.timestamp("ns", "Europe/Berlin")), [MAY_11, 0, 0]),
        (pa.array([datetime(2021, 5, 11, tzinfo=UTC)] * 3), [MAY_11] * 3),
    ],
    ids=lambda given: str(given.type) if isinstance(given, pa.Array) else "",
)
def test_times_of_any_type(tmp_path, times, seconds):
    columns = {"user_id": [1, 2, 3], "item_id": [4, 5, 6], "timestamp": times}
    assert read(tmp_path, columns, TIMED)["time"] == seconds


def test_ratings_and_weights(tmp_path):
    columns = {"user_id": [1, 1], "item_id": [2, 3], "stars": pa.array([4.5, 3], pa.float32()), "pct": [10, None]}
    weighted = replace(PLAIN, rating="stars", weight=WeightConfig("pct", above=5, then=3, otherwise=1))
    assert read(tmp_path, columns, weighted) == {"user": [1, 1], "item": [2, 3], "rating": [4.5, 3], "weight": [3, 1]}


@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_the_equal_csv_gives_the_same_arrays(tmp_path, monkeypatch, rows_per_group):
    monkeypatch.setattr(parquet, "_ROWS_PER_PART", 7)
    random = np.random.default_rng(rows_per_group)
    for round_ in range(30):
        rows = int(random.integers(1, 40))
        words = random.choice(["7", "007", "x", "é", 'a,"b"'] if round_ % 2 else ["7", "-12", "0"], rows)
        table = pa.table({
            "user_id": random.integers(-5, 5, rows) * int(random.choice([1, 10**12])),
            "other": random.random(rows),
            "item_id": pa.array(words.tolist()),
            "timestamp": random.integers(0, 9, rows) * [1, 0.5, 10**9][round_ % 3],
            "rating": pa.array(random.integers(1, 6, rows), pa.int8()),
        })  # fmt: skip
        csv.write_csv(table, tmp_path / "x.csv")
        path = write(tmp_path, dict(zip(table.column_names, table.columns, strict=True)), rows_per_group)
        dataset = replace(TIMED, rating="rating", weight=WeightConfig("rating", above=3, then=2, otherwise=1))
        expected = read_file(tmp_path / "x.csv", dataset)
        pd.testing.assert_frame_equal(read_file(path, dataset), expected, check_dtype=round_ % 2 == 0)


def test_integer_ids_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_ROWS_PER_PART", 2)
    monkeypatch.setattr(parquet, "read_columns", lambda *_: pytest.fail("read as a whole"))
    columns = {"user_id": range(9), "item_id": pa.array(map(str, range(9))).dictionary_encode(), "timestamp": range(9)}
    assert read(tmp_path, columns, TIMED) == {name: list(range(9)) for name in ("user", "item", "time")}


def test_a_file_that_is_parquet_without_the_name(tmp_path):
    path = write(tmp_path, {"user_id": [1], "item_id": [2]}, name="x.data")
    assert read_file(path, PLAIN).to_numpy().tolist() == [[1, 2]]


def test_a_parquet_file_trains_from_the_cache(tmp_path):
    columns = {" user_id": [1, 1, 2], "item_id ": ["a", "b", "a"], "timestamp": [2, 1, 3]}
    dataset = replace(TIMED, path=str(write(tmp_path, columns)))
    for _ in range(2):
        found = load_sequences(dataset, str(tmp_path / "data"))
        assert (found.items.tolist(), found.offsets.tolist()) == ([2, 1, 1], [0, 2, 3])
        assert (found.item_ids.tolist(), found.times.tolist(), found.file) == (["a", "b"], [1, 2, 3], "x.parquet")


# Mistakes


NEEDED = "is missing; every interaction needs one; correct or remove the line"
NO_VALUE = "which means a missing value"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None, 3], f"row 2: column item_id {NEEDED}"),
        (["a", None, "b"], f"row 2: column item_id {NEEDED}"),
        ([1.0, 2.0, None], f"row 3: column item_id {NEEDED}"),
        (pa.nulls(3), f"row 1: column item_id {NEEDED}"),
        ([1.0, 2.0, float("nan")], f"row 3: column item_id is 'nan', {NO_VALUE}; remove these lines, {KEEP}"),
        (["a", "NA", "NA"], f"row 2: column item_id is 'NA', {NO_VALUE}, the first of 2; remove these lines, {KEEP}"),
        ([1.0, 2.5], "row 2: column item_id is '2.5', a decimal number; use dataset.item_type=str to take it as text"),
    ],
)
def test_a_missing_or_wrong_id(tmp_path, values, message):
    assert refused(tmp_path, {"user_id": range(len(values)), "item_id": values}) == f"x.parquet, {message}"


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.int64(), pa.float64(), pa.date32()])
def test_a_missing_time(tmp_path, kind):
    times = pa.array([1, None, 3], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    columns = {"user_id": [1, 2, 3], "item_id": [4, 5, 6], "timestamp": times}
    assert refused(tmp_path, columns, TIMED) == (
        "x.parquet, row 2: column timestamp is missing; correct or remove the line"
    )


@pytest.mark.parametrize(
    ("values", "kind", "takes"),
    [
        ([True, False], "bool", "integers, text or numbers"),
        ([[1], [2]], "list<element: int64>", "integers, text or numbers"),
        (pa.array([1, 2], pa.duration("s")), "duration[s]", "integers, text or numbers"),
    ],
)
def test_a_type_that_is_not_read(tmp_path, values, kind, takes):
    assert refused(tmp_path, {"user_id": [1, 2], "item_id": values}) == (
        f"x.parquet: column item_id has type {kind}; it must have {takes}; convert it"
    )


def test_a_missing_column(tmp_path):
    assert refused(tmp_path, {"user_id": [1], "itemid": [2]}) == (
        "x.parquet: no column 'item_id'; the file has user_id, itemid; did you mean dataset.item=itemid?"
    )


def test_a_file_without_rows_or_in_the_wrong_format(tmp_path):
    columns = {"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())}
    assert refused(tmp_path, columns) == "x.parquet has no rows; dataset.path must name a file with interactions"
    assert refused(tmp_path, columns, format=Format.lists) == (
        "dataset.format=lists is for text, but x.parquet is Parquet; use table"
    )


def test_a_broken_file(tmp_path):
    whole = write(tmp_path, {"user_id": [1], "item_id": [2]}).read_bytes()
    for data in (b"", b"user_id,item_id\n1,2\n", whole[:-1], whole[:40]):
        (tmp_path / "x.parquet").write_bytes(data)
        with pytest.raises(InputError, match=r"x\.parquet is a broken Parquet file \(.*\); replace it with a complete"):
            read_file(tmp_path / "x.parquet", PLAIN)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match=r"x\.csv\.gz is a Parquet file packed by gzip; unpack it; dataset\.path must"):
        read_file(tmp_path / "x.csv.gz", PLAIN)


def test_text_that_is_not_utf_8(tmp_path):
    latin = ["a".encode("latin-1"), "é".encode("latin-1")]
    message = refused(tmp_path, {"user_id": [1, 2], "item_id": pa.array(latin)})
    assert message.startswith("x.parquet: column item_id has type binary")
    text = pa.StringArray.from_buffers(2, *pa.array(latin).buffers()[1:])
    assert refused(tmp_path, {"user_id": [1, 2], "item_id": text}) == (
        "x.parquet: column item_id is broken (Invalid UTF8 sequence at string index 1); write the file again, text as"
        " UTF-8"
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_too_much_text_is_one_line(kind):
    long = pa.array(["x" * (1 << 24)])  # many times the same bytes, so that the test needs no memory
    many = pa.chunked_array([long] * 200)
    if pa.types.is_dictionary(kind):
        many = pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), long)])
    with pytest.raises(InputError) as caught:
        parquet._to_column(many, "user", "user_id", str, Path("x.parquet"))
    assert str(caught.value) == (
        "x.parquet: column user_id has over 2 GiB of text; set dataset.memory_limit=4GB, which sorts it on disk, or"
        " use a part of the file"
    )
