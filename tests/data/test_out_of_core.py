"""Arrays built by DuckDB in little memory: the same as those built in memory, and the same lines for mistakes."""

import builtins
import csv
import gzip
import importlib.util
import io
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, Repeats, WeightConfig
from sasrec_lab.data import ids, out_of_core, parquet, parts, sequences, source
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.out_of_core import build_arrays
from sasrec_lab.data.sequences import load_sequences, to_arrays
from sasrec_lab.errors import InputError

needs_duckdb = pytest.mark.skipif(
    importlib.util.find_spec("duckdb") is None, reason="DuckDB (pip install 'sasrec-lab[big]') is not installed"
)
LIMIT = 50 * 10**6
TIMED = load(["dataset=csv", "dataset.path=x.csv"]).dataset  # user_id, item_id, timestamp
PLAIN = replace(TIMED, time=None)
Outcome = dict[str, tuple[str, list]] | str


def outcome(build: Callable[[], dict[str, np.ndarray] | None]) -> Outcome | None:
    """Return the type and the values of each array, or the message of an InputError."""
    try:
        arrays = build()
    except InputError as error:
        return str(error)
    return None if arrays is None else {name: (str(x.dtype), x.tolist()) for name, x in sorted(arrays.items())}


def in_memory(path: Path, dataset: DatasetConfig) -> Outcome | None:
    return outcome(lambda: to_arrays(clean(read_file(path, dataset), dataset)))


def out_of_memory(path: Path, dataset: DatasetConfig, scratch: Path) -> Outcome | None:
    scratch.mkdir(parents=True, exist_ok=True)
    for file in scratch.iterdir():
        file.unlink()
    return outcome(lambda: build_arrays(path, dataset, LIMIT, scratch))


def both(folder: Path, text: str | bytes, dataset: DatasetConfig = TIMED, **changes: Any) -> Outcome:
    """Return what both ways make of a file, which must be the same."""
    path, dataset = folder / "x.csv", replace(dataset, **changes)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    expected = in_memory(path, dataset)
    assert out_of_memory(path, dataset, folder / "scratch") == expected
    assert expected is not None
    return expected.replace(f"{folder}/", "") if isinstance(expected, str) else expected


# Properties

small = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ID_KINDS = [
    st.integers(0, 6),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.sampled_from(["a", "b", "é", "日本", "😀", "Z", "zz"]),
    st.sampled_from(["7", "007", "-1", "0", "70"]),
]
TIME_KINDS = [
    st.integers(0, 3),
    st.integers(1_600_000_000, 1_600_000_003),
    st.integers(-(2**40), 2**40),
    st.sampled_from(["0.5", "1.0", "2", "-0.0", "0"]),
    st.sampled_from(["2021-05-11", "2021-05-12", "2021-05-11 10:00:00"]),
    st.sampled_from(["2021-05-11T10:00:00.25Z", "2021-05-11T10:00:00Z"]),
]
VALUES = st.sampled_from(["1", "2", "3", "2.5", "4e0"])
FILTERS = [
    {},
    {"min_rating": 2.5},
    {"since": "1"},
    {"since": "2021-05-12"},
    {"until": "2020-09-13"},
    {"min_rating": 2, "since": "2020-01-01", "until": "2021-05-11"},
    {"repeats": Repeats.drop},
    {"min_item": 2},
    {"min_user": 2, "min_item": 2},
    {"min_user": 2, "min_item": 3, "until_stable": True, "repeats": Repeats.drop},
]
WEIGHTS = [None, WeightConfig("rating"), WeightConfig("pct", above=2, then=3, otherwise=0.5)]


def drawn_table(data: st.DataObject) -> list[list[str]]:
    """Return the columns user_id, item_id, timestamp, rating and pct, which has missing values, as text."""
    rows = data.draw(st.integers(1, 40), "rows")
    kinds = [data.draw(st.sampled_from(ID_KINDS)), data.draw(st.sampled_from(ID_KINDS))]
    kinds += [data.draw(st.sampled_from(TIME_KINDS)), VALUES, VALUES | st.just("")]
    return [[str(value) for value in data.draw(st.lists(kind, min_size=rows, max_size=rows))] for kind in kinds]


NAMES = ["user_id", "item_id", "timestamp", "rating", "pct"]


def drawn_config(data: st.DataObject) -> DatasetConfig:
    kind = st.sampled_from([IdType.auto, IdType.auto, IdType.str, IdType.int])
    changes = {
        "user_type": data.draw(kind),
        "item_type": data.draw(kind),
        "weight": data.draw(st.sampled_from(WEIGHTS)),
    }
    filters = data.draw(st.sampled_from(FILTERS))
    has_time = data.draw(st.booleans()) or "since" in filters or "until" in filters
    return replace(TIMED, rating="rating", time="timestamp" if has_time else None, **changes, **filters)


def written(columns: list[list[str]], separator: str, has_names: bool, quoting: int) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\x1f", quoting=quoting, lineterminator="\n")
    if has_names:
        writer.writerow(NAMES)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue().replace("\x1f", separator).encode()


@needs_duckdb
@small
@given(data=st.data())
def test_text_gives_the_same_arrays(tmp_path, monkeypatch, data):
    columns, dataset = drawn_table(data), drawn_config(data)
    separator, has_names = data.draw(st.sampled_from([",", "::", "\t"])), data.draw(st.booleans())
    text = written(columns, separator, has_names, data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
    dataset = replace(dataset, separator=separator, names=None if has_names else NAMES)
    monkeypatch.setattr(source, "_BLOCK_BYTES", data.draw(st.sampled_from([20, 100, 10_000])))
    name = data.draw(st.sampled_from(["x.csv", "x.csv.gz"]))
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    expected = in_memory(tmp_path / name, dataset)
    assert out_of_memory(tmp_path / name, dataset, tmp_path / "scratch") == expected


def typed(values: list[str]) -> pa.Array:
    """Return text as numbers if all of it are some."""
    for kind in (int, float):
        try:
            return pa.array([None if value == "" else kind(value) for value in values])
        except ValueError:
            continue
    return pa.array(values)


@needs_duckdb
@small
@given(data=st.data())
def test_a_folder_of_parquet_gives_the_same_arrays(tmp_path, monkeypatch, data):
    columns, dataset = drawn_table(data), drawn_config(data)
    rows = len(columns[0])
    table = pa.table(dict(zip(NAMES, map(typed, columns), strict=True)))
    group = data.draw(st.integers(1, 20))
    monkeypatch.setattr(parts, "_ROWS", data.draw(st.sampled_from([1, 7, 1000])))
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=group)
    folder = tmp_path / "x"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    cuts = sorted([0, *data.draw(st.lists(st.integers(0, rows), max_size=3)), rows])
    for number, (start, end) in enumerate(pairwise(cuts)):
        pq.write_table(table.slice(start, end - start), folder / f"part-{number}.parquet", row_group_size=group)
    (folder / "_SUCCESS").touch()
    expected = in_memory(tmp_path / "x.parquet", dataset)
    assert out_of_memory(tmp_path / "x.parquet", dataset, tmp_path / "scratch") == expected
    from_folder = in_memory(folder, dataset)
    assert out_of_memory(folder, dataset, tmp_path / "scratch") == from_folder
    if not isinstance(expected, str):
        assert from_folder == expected


@needs_duckdb
def test_lists_give_the_same_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 20)
    lists = replace(PLAIN, format=Format.lists)
    for word in ("9", "x"):
        text = "".join(f"{user} {user + 3} 4 {word} 4\n\n" for user in range(30, 0, -1))
        assert isinstance(both(tmp_path, text, lists), dict)
    assert both(tmp_path, text + "31\n", lists) == "x.csv, line 61: a user without an item; remove the line"
    assert isinstance(both(tmp_path, b"\xef\xbb\xbf" + text.encode(), lists), dict)


# Layouts that the properties do not reach


@needs_duckdb
@pytest.mark.parametrize(
    "text",
    [
        "user_id,item_id,timestamp\n1,2,3\n4,5,6",  # no line end
        "\n\nuser_id,item_id,timestamp\r\n1,2,3\r\n\r\n4,5,6\r\n",
        b"\xef\xbb\xbfuser_id,item_id,timestamp\n1,2,3\n4,5,6\n",
        '"user_id","item_id","timestamp"\n1,2,3\n4,5,6\n',
        '"user_id","item_id","timestamp","a\nb"\n1,2,3,\n4,5,6,\n',  # read as a whole
        "user_id,item_id,timestamp\n" + "\n" * 100 + "1,2,3\n" + "\n" * 100 + "4,5,6\n",
    ],
)
def test_unusual_layouts(tmp_path, monkeypatch, text):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 24)
    (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    expected = in_memory(tmp_path / "x.csv", TIMED)
    found = out_of_memory(tmp_path / "x.csv", TIMED, tmp_path / "scratch")
    assert found == (None if b"\nb" in (tmp_path / "x.csv").read_bytes() else expected)


@needs_duckdb
def test_types_that_change_between_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 30)
    many = "".join(f"{row % 7},{row % 5},{row}\n" for row in range(100))
    for last in ("7,8,9.5\n", "7,x,9\n", "x,7,9\n", "x,y,9.5\n", "007,7,9\n", "7,9223372036854775808,9\n"):
        assert isinstance(both(tmp_path, f"user_id,item_id,timestamp\n{many}{last}{many}"), dict)
    zeros = f"user_id,item_id,timestamp\n{many}007,8,9\n"
    found = both(tmp_path, zeros, user_type=IdType.int)
    assert isinstance(found, dict)
    assert found["user_ids"] == ("int64", [*range(7), 7])


@needs_duckdb
def test_a_unit_that_the_same_sample_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 2000)
    random = np.random.default_rng(0)
    for share in (0.48, 0.5, 0.52):  # of milliseconds among seconds, so that the sample's median is near the border
        times = np.where(random.random(3000) < share, 1_620_691_200_000, 1_620_691_200) + random.integers(0, 9, 3000)
        text = "".join(f"{row % 9},{row % 8},{time},{row % 2}\n" for row, time in enumerate(times))
        text = f"user_id,item_id,timestamp,rating\n{text}"
        for changes in ({"since": "2021-01-01"}, {"since": "2021-01-01", "min_rating": 1, "rating": "rating"}):
            both(tmp_path, text, **changes)


@needs_duckdb
def test_parquet_numbers_as_text_ids(tmp_path):
    for values in ([1.0, 2.0, 3.0], [1.0, 2.5, 3.0]):
        pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": values}), tmp_path / "x.parquet", row_group_size=1)
        for kind in IdType:
            dataset = replace(PLAIN, item_type=kind)
            expected = in_memory(tmp_path / "x.parquet", dataset)
            assert out_of_memory(tmp_path / "x.parquet", dataset, tmp_path / "scratch") == expected


# Mistakes

GOOD = "".join(f"{row},{row % 5},{row}\n" for row in range(30))


@needs_duckdb
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2", "line 32: 2 columns, not 3 as in the header; correct or remove the line"),
        (",2,3", "line 32: column user_id is missing; every interaction needs one; correct or remove the line"),
        ("1,2,", "line 32: column timestamp is missing; correct or remove the line"),
        ("1,2,soon", "line 32: column timestamp is 'soon', not a number; correct or remove the line"),
        ('1,"2,3', "line 32: 2 columns, not 3 as in the header; correct or remove the line"),
        (
            "1,2.5,3",
            "line 32: column item_id is '2.5', a decimal number; use dataset.item_type=str to take it as text",
        ),
        (
            "1,NA,3\n1,NA,4",
            "line 32: column item_id is 'NA', which means a missing value, the first of 2; remove these lines, or keep"
            " them as ids: dataset.check_ids=false",
        ),
        (
            "1, a,3",
            "line 32: column item_id is ' a', with blanks around it; remove the blanks (dataset.separator=', ' if each"
            " comma has one), or keep them as ids: dataset.check_ids=false",
        ),
        (
            "1,a\0b,3",
            "line 32: column item_id is 'a\\x00b', with a NUL character; ids are shorter text; correct or remove the"
            " line",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 40)
    found = both(tmp_path, f"user_id,item_id,timestamp\n{GOOD}{line}\n{GOOD}")
    assert found == f"x.csv, {message}"


@needs_duckdb
def test_mistakes_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 40)
    head = "user_id,item_id,timestamp,rating\n"
    rated = "".join(f"{row},{row % 5},{1_600_000_000 + row},{row % 3}\n" for row in range(30))
    for text, changes in (
        ("", {}),
        ("\n\n\n", {}),
        ("user_id,item_id,timestamp\n", {}),
        ("user_id,item,timestamp\n1,2,3\n", {}),
        (f"{head}{rated}", {"rating": "rating", "min_rating": 5}),
        (f"{head}{rated}", {"since": "2021-05-11"}),
        (f"{head}{rated}", {"until": "2020-01-01"}),
        (f"{head}{rated}", {"since": "1600000000000"}),
        (f"{head}{rated}", {"min_user": 2}),
        (f"{head}1,2,3,1\n3,2,3,1\n", {}),
        (f"{head}1,two,3,1\n3,two,3,1\n", {}),
        (f"{head}1,two,3,1\n3,2,3,1\n", {"item_type": IdType.int}),
        (f"{head}1,{'x' * 1001},3,1\n3,2,3,1\n", {}),
        (f"{head}{rated}1,2,2021-05-11,1\n", {}),
        (f"{head}1,2,2021-05-11,1\n{rated}", {}),
        (f"{head}1,2,2021-05-11T10:00Z,1\n{rated}", {}),
        (f"{head}{rated}1,2,3,-1\n", {"weight": WeightConfig("rating")}),
        (f"{head}{rated}1,2,3,x\n", {"weight": WeightConfig("rating", above=2)}),
        (f"{head}{rated}1,2,3,inf\n", {"rating": "rating", "min_rating": 1}),
        (f"{head}{rated}1,\xe9,3,1\n".encode("latin-1"), {}),
    ):
        path, dataset = tmp_path / "x.csv", replace(TIMED, **changes)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        expected = in_memory(path, dataset)
        assert isinstance(expected, str)
        assert out_of_memory(path, dataset, tmp_path / "scratch") in (
            expected,
            None,
        )  # None: read in memory, to explain


@needs_duckdb
def test_a_row_of_parquet_is_named_with_its_file(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for number, items in enumerate((["a", "b"], [], ["c", "d", None])):
        table = pa.table({"user_id": list(range(len(items))), "item_id": pa.array(items, pa.string())})
        pq.write_table(table, folder / f"{number}.parquet")
    message = (
        f"{folder}/2.parquet, row 3: column item_id is missing; every interaction needs one; correct or remove the line"
    )
    assert in_memory(folder, PLAIN) == message
    assert out_of_memory(folder, PLAIN, tmp_path / "scratch") == message


def test_mistakes_in_a_folder(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), folder / "a.parquet")
    pq.write_table(pa.table({"user_id": [1], "item_id": ["x"]}), folder / "b.parquet")
    assert in_memory(folder, PLAIN) == (
        f"{folder}/b.parquet: column item_id has type string, but int64 in {folder}/a.parquet; write the files"
        " with one type"
    )
    pq.write_table(pa.table({"user_id": [1], "item": [2]}), folder / "b.parquet")
    assert in_memory(folder, PLAIN) == (
        f"{folder}/b.parquet: no column 'item_id'; the file has user_id, item; did you mean dataset.item=item?"
    )
    empty = pa.table({"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())})
    for name in ("a", "b"):
        pq.write_table(empty, folder / f"{name}.parquet")
    assert in_memory(folder, PLAIN) == (
        f"{folder} has files without rows; dataset.path must name a file with interactions"
    )


# The cache, limits and temporary files


def text_of(rows: int) -> str:
    random = np.random.default_rng(0)
    lines = (f"{user},{item},{time}\n" for user, item, time in random.integers(0, 50, (rows, 3)).tolist())
    return f"user_id,item_id,timestamp\n{''.join(lines)}"


@needs_duckdb
def test_a_limit_builds_the_same_cache(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text(text_of(3000))
    dataset = replace(TIMED, path=str(tmp_path / "x.csv"))
    expected = load_sequences(dataset, str(tmp_path / "one"))
    monkeypatch.setattr(sequences, "read_file", lambda *_: pytest.fail("read in memory"))
    found = load_sequences(replace(dataset, memory_limit="50MB"), str(tmp_path / "two"))
    for name in ("items", "offsets", "user_ids", "item_ids", "times"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    one, two = (list((tmp_path / name / "cache").iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]  # so a limit builds nothing again
    for name in ("items", "offsets", "user_ids", "item_ids", "times"):
        assert (one[0] / f"{name}.npy").read_bytes() == (two[0] / f"{name}.npy").read_bytes()


@needs_duckdb
def test_a_limit_beyond_64_bits(tmp_path):
    (tmp_path / "x.csv").write_text(text_of(100))
    dataset = replace(TIMED, path=str(tmp_path / "x.csv"), memory_limit="99999999999TB")
    assert len(load_sequences(dataset, str(tmp_path)).items) == 100


@needs_duckdb
def test_nothing_temporary_is_left_after_success_or_an_error(tmp_path):
    dataset = replace(TIMED, path=str(tmp_path / "x.csv"), memory_limit="50MB")
    for text, is_good in ((text_of(100), True), (f"{text_of(100)}1,2,soon\n", False)):
        (tmp_path / "x.csv").write_text(text)
        root = tmp_path / f"root-{is_good}"
        if is_good:
            load_sequences(dataset, str(root))
        else:
            with pytest.raises(InputError, match="line 102: column timestamp is 'soon', not a number"):
                load_sequences(dataset, str(root))
        left = [path.name for path in (root / "cache").iterdir()]
        assert len(left) == is_good
        assert not any(name.startswith(".draft") for name in left)


@needs_duckdb
def test_a_file_too_large_for_memory_is_built_out_of_core(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text(text_of(100))
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), tmp_path / "x.parquet")
    size = (tmp_path / "x.csv").stat().st_size
    for name, free, expected in (
        ("x.csv", 100 * size, None),
        ("x.csv", size, size // 2),
        ("x.csv", None, None),
        ("x.parquet", 10, 5),
    ):
        monkeypatch.setattr(source, "most_bytes", lambda free=free: free)
        assert out_of_core.memory_limit(tmp_path / name, PLAIN) == expected
    assert out_of_core.memory_limit(tmp_path / "x.csv", replace(PLAIN, memory_limit="2GB")) == 2 * 10**9


def test_a_limit_without_duckdb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(out_of_core, "find_spec", lambda _: None)
    (tmp_path / "x.csv").write_text(text_of(100))
    with pytest.raises(InputError) as caught:
        load_sequences(replace(TIMED, path=str(tmp_path / "x.csv"), memory_limit="2GB"), str(tmp_path))
    assert str(caught.value) == (
        "dataset.memory_limit=2GB needs DuckDB, which is not installed; pip install 'sasrec-lab[big]'"
    )
    monkeypatch.setattr(source, "most_bytes", lambda: 10**9)
    assert out_of_core.memory_limit(tmp_path / "x.csv", PLAIN) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2", "dataset.memory_limit=2 must be a size with its unit, such as 2GB or 500MB"),
        ("2 gigabytes", "dataset.memory_limit=2 gigabytes must be a size with its unit, such as 2GB or 500MB"),
        ("1MB", "dataset.memory_limit=1MB must be at least 50MB"),
    ],
)
def test_a_limit_that_is_no_size(given, message):
    with pytest.raises(InputError) as caught:
        load(["dataset=csv", "dataset.path=x.csv", f"dataset.memory_limit={given}"])
    assert str(caught.value) == message


def test_items_beyond_int32_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "MAX_ITEMS", 3)
    (tmp_path / "x.csv").write_text(text_of(100))
    items = len({line.split(",")[1] for line in text_of(100).splitlines()[1:]})
    expected = f"the data has {items} items, at most 3 are possible; raise dataset.min_item"
    assert in_memory(tmp_path / "x.csv", TIMED) == expected
    assert in_memory(tmp_path / "x.csv", replace(TIMED, item_type=IdType.str)) == expected
    if importlib.util.find_spec("duckdb"):
        assert out_of_memory(tmp_path / "x.csv", TIMED, tmp_path / "scratch") == expected


@needs_duckdb
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    import duckdb

    def full(*_: Any) -> None:
        raise duckdb.IOException("No space left on device\nmore")

    monkeypatch.setattr(out_of_core, "stage", full)
    (tmp_path / "x.csv").write_text(text_of(100))
    message = out_of_memory(tmp_path / "x.csv", TIMED, tmp_path / "scratch")
    assert message == (
        f"{tmp_path}: temporary files cannot be written (No space left on device); free space, or set data_dir to"
        " another folder"
    )


def test_duckdb_is_imported_only_if_it_is_used(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_duckdb(name: str, *rest: Any) -> Any:
        assert name != "duckdb"
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_duckdb)
    (tmp_path / "x.csv").write_text(text_of(100))
    load_sequences(replace(TIMED, path=str(tmp_path / "x.csv")), str(tmp_path))


def test_more_text_than_one_array_holds_names_the_limit(tmp_path):
    many = pa.chunked_array([pa.array(["x" * (1 << 24)])] * 200)
    with pytest.raises(InputError, match=r"has over 2 GiB of text; set dataset\.memory_limit=4GB"):
        parquet._to_column(many, "user", "user_id", str, Path("x.parquet"))
