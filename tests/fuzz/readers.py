"""Feed every reader of files with mutated inputs and print each exception that is not an InputError.

python tests/fuzz/readers.py 10000            10,000 inputs for each reader
python tests/fuzz/readers.py 10000 7 csv      with another seed, for the readers named
"""

import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyarrow import parquet

from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import section_of, to_plain
from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, Repeats, TitlesConfig, WeightConfig
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.items import read_titles
from sasrec_lab.data.sequences import to_arrays
from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.inputs import find_candidates, find_targets, read_ids, read_table
from sasrec_lab.report.runs import find_runs
from sasrec_lab.run import folder as run_folder
from sasrec_lab.training.saved_encoder import load_encoder

SECONDS_PER_INPUT = 20
Files = dict[str, bytes]  # content by name; a reader's input
Reader = Callable[[Path, random.Random], object]

# Mutations

VALUES = [
    "", " ", "0", "-0", "+7", "007", "1", "2", "-12", " 7", "7 ", "0x1F", "1e3", "1e400", "-1e400", "1.5", ".5",
    "1_000",
    "9223372036854775807", "-9223372036854775808", "9223372036854775808", "18446744073709551616", "9" * 5000,
    "-" + "9" * 5000, "0." + "1" * 5000, "1e" + "9" * 5000, "nan", "NaN", "inf", "-inf", "null", "None", "NA", "N/A",
    "true", "x", "é", "日本", "\ufeff", "\u2028", "\u0085", "\x00", "a\x00", "\x1f", "\x7f", "a" * 3000,
    "2021-05-11", "2021-13-01", "2021-05-11 10:00:00.25", "2021-05-11T10:00:00+02:00", "0000-00-00", "9999-12-31",
    "-0001-01-01", "292278-01-01", "1620000000", "1620000000000", "1620000000000000", "1620000000000000000",
    '"', '""', '"7"', '"a, b"', '"3', "5\" pipe", "'", "\\", ",", ",,", "\t", "::", ";", "|",
]  # fmt: skip
BYTES = [b"\n", b"\r", b"\r\n", b"\r\r\n", b"\x00", b"\xff", b"\xfe\xff", b"\xe9", b"\xc3", b"\xef\xbb\xbf", b'"', b","]
BYTES += [b"\xed\xa0\x80", b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"\x80", b" ", b"\t", b"::", b"\n\n", b"{", b"["]


def mutate_bytes(data: bytes, choose: random.Random, changes: int) -> bytes:
    """Return the data after some insertions, deletions, copies, flips and cuts."""
    for _ in range(changes):
        start = choose.randint(0, len(data))
        end = min(len(data), start + choose.choice([1, 1, 2, 8, 40]))
        kind = choose.randrange(7)
        if kind == 0:
            data = data[:start] + choose.choice(BYTES) + data[start:]
        elif kind == 1:
            data = data[:start] + choose.choice(VALUES).encode() + data[end:]
        elif kind == 2:
            data = data[:start] + data[end:]
        elif kind == 3:
            data = data[:end] + data[start:end] + data[end:]
        elif kind == 4 and data:
            place = start % len(data)
            data = data[:place] + bytes([data[place] ^ 1 << choose.randrange(8)]) + data[place + 1 :]
        elif kind == 5 and choose.random() < 0.3:
            data = data[:start]
        elif data:
            place = start % len(data)
            data = data[:place] + bytes([choose.randrange(256)]) + data[place + 1 :]
    return data


def maybe_gzipped(name: str, data: bytes, choose: random.Random) -> Files:
    """Return the file, sometimes as .gz, which is sometimes broken."""
    if choose.random() < 0.8:
        return {name: data}
    packed = gzip.compress(data, 1, mtime=0)
    return {f"{name}.gz": mutate_bytes(packed, choose, choose.choice([0, 0, 1]))}


def random_rows(choose: random.Random, columns: int) -> list[list[str]]:
    """Return rows of integers, of which a few values are odd and a few rows ragged."""
    rows = [[str(choose.randint(1, 9)) for _ in range(columns)] for _ in range(choose.choice([0, 2, 5, 20, 20]))]
    odd = choose.choice([0, 0, 0.02, 0.1])
    for row in rows:
        for place in range(columns):
            if choose.random() < odd:
                row[place] = choose.choice(VALUES)
        if choose.random() < odd / 10:
            row.pop()
        elif choose.random() < odd / 10:
            row.append(choose.choice(VALUES))
    if rows and choose.random() < 0.2:  # a whole column of one kind
        place, kind = choose.randrange(columns), choose.choice(VALUES)
        for row in rows:
            if place < len(row):
                row[place] = kind
    return rows


# Data sets


@cache
def own_dataset() -> DatasetConfig:
    """Return the config of a user's own file."""
    return load(["dataset=csv", "dataset.path=x.csv"]).dataset


NAMES = ["user_id", "item_id", "timestamp", "rating", "watched"]


def random_dataset(choose: random.Random) -> DatasetConfig:
    """Return a config with any format, separator, type and filter."""
    names = NAMES[: choose.randint(2, 5)]
    above = choose.choice([None, 2.0])
    weight = WeightConfig("watched", above=above, then=3 if above else 1) if "watched" in names else None
    has_time = "timestamp" in names and choose.random() < 0.8
    bounds = [None] * 30 + ["3", "2021-05-11", "1620000000", "0001-01-01T00:00:00+14:00", "nan", "9" * 5000, "x"]
    return replace(
        own_dataset(),
        separator=choose.choice([",", ",", ",", "\t", "::", " ", ";", "|", ", ", "é"]),
        names=choose.choice([None, names]),
        time="timestamp" if has_time else None,
        rating="rating" if "rating" in names else None,
        weight=weight,
        user_type=choose.choice(list(IdType)),
        item_type=choose.choice(list(IdType)),
        check_ids=choose.random() < 0.5,
        min_rating=choose.choice([None, None, None, 3.0, 3.0, float("nan")]) if "rating" in names else None,
        since=choose.choice(bounds) if has_time else None,
        until=choose.choice(bounds) if has_time else None,
        repeats=choose.choice(list(Repeats)),
        min_user=choose.choice([0, 0, 0, 2]),
        min_item=choose.choice([0, 0, 0, 2]),
        until_stable=choose.random() < 0.5,
    )


def check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raise AssertionError if the arrays of a data set contradict each other."""
    items, offsets = arrays["items"], arrays["offsets"]
    assert offsets[0] == 0, "first offset"
    assert offsets[-1] == len(items), "last offset"
    assert (np.diff(offsets) > 0).all(), "users without items"
    assert set(np.unique(items)) == set(range(1, len(arrays["item_ids"]) + 1)), "items are not 1..num_items"
    for name in ("user_ids", "item_ids"):
        assert len(np.unique(arrays[name])) == len(arrays[name]), f"{name} are not distinct"


def read_dataset(files: Files, folder: Path, dataset: DatasetConfig) -> None:
    """Read a data set's file as training does, up to the arrays."""
    path = folder / next(iter(files))
    check_arrays(to_arrays(clean(read_file(path, dataset), dataset)))


def csv_input(choose: random.Random) -> tuple[Files, object]:
    """Return a table in text."""
    dataset = random_dataset(choose)
    columns = len(dataset.names or NAMES)
    header = [] if dataset.names else [[choose.choice([name, name, f" {name} "]) for name in NAMES]]
    if choose.random() < 0.8:
        header = header and [NAMES]
    end = choose.choice(["\n", "\n", "\r\n", "\r"])
    data = end.join(dataset.separator.join(row) for row in header + random_rows(choose, columns)).encode()
    data = mutate_bytes(data, choose, choose.choice([0, 0, 1, 1, 2, 5]))
    return maybe_gzipped("x.csv", data, choose), dataset


def lists_input(choose: random.Random) -> tuple[Files, object]:
    """Return lines of a user and the user's items."""
    rows = random_rows(choose, choose.randint(2, 6))
    data = choose.choice(["\n", "\r\n", "\r"]).join(" ".join(row) for row in rows).encode()
    data = mutate_bytes(data, choose, choose.choice([0, 1, 1, 2, 5]))
    plain = {"time": None, "rating": None, "weight": None, "min_rating": None, "since": None, "until": None}
    return maybe_gzipped("x.txt", data, choose), replace(random_dataset(choose), format=Format.lists, **plain)


INTEGERS = [pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.decimal128(20, 2)]
TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
MOMENTS = [pa.timestamp("s"), pa.timestamp("ms", "UTC"), pa.timestamp("us"), pa.timestamp("ns", "Europe/Berlin")]
MOMENTS += [pa.date32(), pa.date64(), pa.time64("us"), pa.duration("s"), pa.bool_(), pa.null(), pa.list_(pa.int64())]


def random_column(choose: random.Random, rows: int) -> pa.Array:
    """Return a column of any type, with nulls."""
    kind = choose.choice(INTEGERS if choose.random() < 0.8 else TEXTS * 2 + MOMENTS)
    values: list = [choose.randint(1, 9) for _ in range(rows)]
    if kind in TEXTS:
        values = [choose.choice(VALUES) if choose.random() < 0.1 else str(value) for value in values]
    if pa.types.is_list(kind):
        values = [[value] for value in values]
    if choose.random() < 0.1:
        values = [None if choose.random() < 0.2 else value for value in values]
    if kind in (pa.float32(), pa.float64()) and choose.random() < 0.3:
        values = [choose.choice([0.5, float("nan"), float("inf"), 1e300, value]) for value in values]
    if pa.types.is_null(kind):
        values = [None] * rows
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError):
        return pa.array(values)


def parquet_bytes(choose: random.Random, names: list[str]) -> bytes:
    """Return a table of any types as Parquet, sometimes broken."""
    rows = choose.choice([0, 2, 5, 20, 20])
    columns = {choose.choice([*[name] * 20, f" {name}", "user_id"]): random_column(choose, rows) for name in names}
    file = io.BytesIO()
    compression = choose.choice(["none", "snappy", "zstd"])
    parquet.write_table(pa.table(columns), file, row_group_size=choose.choice([1, 3, 100]), compression=compression)
    return mutate_bytes(file.getvalue(), choose, choose.choice([0] * 8 + [1, 3]))


def parquet_input(choose: random.Random) -> tuple[Files, object]:
    """Return a data set in Parquet."""
    dataset = random_dataset(choose)
    return maybe_gzipped("x.parquet", parquet_bytes(choose, NAMES), choose), dataset


# Titles, and what `recommend` reads


def titles_input(choose: random.Random) -> tuple[Files, object]:
    """Return a file of titles."""
    columns = choose.choice([["item_id", "title"], ["title", "item_id", "year"]])
    separator = choose.choice([",", "|", "\t", "::"])
    rows = ([] if choose.random() < 0.3 else [columns]) + random_rows(choose, len(columns))
    data = mutate_bytes("\n".join(separator.join(row) for row in rows).encode(), choose, choose.choice([0, 1, 2, 5]))
    titles = TitlesConfig(
        path="t.csv",
        separator=choose.choice([*[separator] * 20, "", "ab", "é", '"', "\n", " "]),
        names=None if rows and rows[0] == columns else columns,
        encoding=choose.choice([*["utf-8"] * 20, "latin-1", "utf-16", "no-such", "idna", "zlib", "hex"]),
    )
    return maybe_gzipped("t.csv", data, choose), replace(own_dataset(), titles=titles)


def read_titles_file(files: Files, folder: Path, dataset: DatasetConfig) -> None:
    """Read item titles for integer and for text ids."""
    for ids in (np.arange(1, 10), np.array(["1", "x", "é"])):
        read_titles(replace(dataset, titles=replace(dataset.titles, path=str(folder / "t.csv"))), None, ids)


def ids_input(choose: random.Random) -> tuple[Files, object]:
    """Return a file of ids."""
    ending = choose.choice(["txt", "csv", "parquet"])
    if ending == "parquet":
        return {"ids.parquet": parquet_bytes(choose, ["user_id"])}, None
    columns = [] if ending == "txt" else [["user_id", "item_id"]]
    rows = columns + random_rows(choose, 1 if ending == "txt" else 2)
    data = choose.choice(["\n", "\r\n", "\r"]).join(",".join(row) for row in rows).encode()
    return {f"ids.{ending}": mutate_bytes(data, choose, choose.choice([0, 1, 1, 2, 5]))}, None


def read_ids_file(files: Files, folder: Path, _: object) -> None:
    """Read ids and look them up among integers and among texts."""
    given = read_ids(str(folder / next(iter(files))), "users", ("user_id", "user_id"))
    for ids in (Ids(np.arange(1, 10)), Ids(np.array(["1", "x", "é"]))):
        find_targets(ids, given, "users")
        find_candidates(ids, given)


def interactions_input(choose: random.Random) -> tuple[Files, object]:
    """Return a table of histories."""
    names = ["user_id", "item_id", choose.choice(["datetime", "timestamp", "other"])]
    if choose.random() < 0.3:
        return {"h.parquet": parquet_bytes(choose, names)}, None
    rows = [names, *random_rows(choose, 3)]
    data = choose.choice(["\n", "\r\n", "\r"]).join(",".join(row) for row in rows).encode()
    return maybe_gzipped("h.csv", mutate_bytes(data, choose, choose.choice([0, 1, 1, 2, 5])), choose), None


def read_interactions_file(files: Files, folder: Path, _: object) -> None:
    """Read histories for integer and for text ids."""
    table = read_table(folder / next(iter(files)), "interactions", ("user_id", "item_id"))
    for ids in (Ids(np.arange(1, 10)), Ids(np.array(["1", "x", "é"]))):
        Histories.from_table(table, own_dataset(), ids)


# Values given in Python

SCALARS = [1, -1, 0, 2**63, -(2**70), 1.0, 1.5, float("nan"), float("inf"), None, True, "1", "x", "", " ", "\x00", b"1"]
SCALARS += ["\ud800", 10**5000, 1j, pd.NA, pd.NaT, pd.Timestamp("2021-05-11"), np.int8(3), np.float32(2), np.str_("7")]
SCALARS += [np.datetime64("2021-05-11"), [1], (1, 2), {1}, {"a": 1}, object(), ..., slice(3), pd.Interval(0, 1), len]


def values_input(choose: random.Random) -> tuple[Files, object]:
    """Return something that a program may pass as ids."""
    return {}, choose.getrandbits(60)


def made_value(choose: random.Random) -> object:
    """Return a list of ids, or something that is not one."""
    few = [
        choose.choice(SCALARS) if choose.random() < 0.3 else choose.randint(1, 9) for _ in range(choose.randrange(5))
    ]
    whole = [choose.choice(SCALARS)] * choose.randint(1, 3)
    values = choose.choice([few, whole])
    hashable = [value for value in values if isinstance(value, (int, float, str))]
    makers: list[Callable[[], object]] = [
        lambda: values, lambda: tuple(values), lambda: iter(values), lambda: (value for value in values),
        lambda: set(hashable), lambda: frozenset(hashable), lambda: dict.fromkeys(hashable), lambda: [values, values],
        lambda: dict.fromkeys(hashable).keys(), lambda: range(3), lambda: choose.choice(SCALARS),
        lambda: np.array(values, object), lambda: np.array(values), lambda: np.array([values, values]),
        lambda: np.array(5), lambda: np.zeros(2, [("a", int)]), lambda: np.array(values, "S5"),
        lambda: np.ma.masked_array([1, 2], [True, False]), lambda: np.array(["2021"], "M8[D]"),
        lambda: np.array([1 + 2j]), lambda: pd.Series(values), lambda: pd.Series(values, index=["a"] * len(values)),
        lambda: pd.Series(values, dtype="category"), lambda: pd.Series(hashable, dtype="string"),
        lambda: pd.Series([1, None], dtype="Int64"), lambda: pd.Index(values), lambda: pd.array(values),
        lambda: pd.MultiIndex.from_arrays([hashable, hashable]), lambda: pd.DataFrame({"a": values}),
        lambda: pd.date_range("2021", periods=2), lambda: pd.arrays.SparseArray([1, 2]), lambda: pa.array(values),
        lambda: pd.interval_range(0, 3), lambda: pd.period_range("2021", periods=2), lambda: memoryview(b"12"),
        lambda: pa.chunked_array([[1], [2]]), lambda: torch.tensor(values), lambda: bytearray(b"12"),
    ]  # fmt: skip
    try:
        return choose.choice(makers)()
    except Exception:  # the library refuses to make it
        return values


def read_values(files: Files, folder: Path, seed: int) -> None:
    """Look values up among integers and among texts."""
    for ids in (Ids(np.arange(1, 10)), Ids(np.array(["1", "x", "é"]))):
        with suppress(InputError):
            find_targets(ids, made_value(random.Random(seed)), "users")
        find_candidates(ids, made_value(random.Random(seed)))  # made again, because it may be an iterator


def frame_input(choose: random.Random) -> tuple[Files, object]:
    """Return the seed of a table of histories that a program may pass."""
    return {}, choose.getrandbits(60)


def read_frame(files: Files, folder: Path, seed: int) -> None:
    """Take a table of three columns, each of which is anything that pandas can hold."""
    choose = random.Random(seed)
    columns = {}
    for name in ("user_id", "item_id", choose.choice(["timestamp", "datetime", "other"])):
        values = made_value(choose) if choose.random() < 0.4 else [choose.randint(1, 9) for _ in range(3)]
        columns[choose.choice([*[name] * 9, 5, ("a", "b")])] = values
    try:
        table = pd.DataFrame(columns)
        if choose.random() < 0.1:
            table = pd.concat([table, table], axis=choose.choice([0, 1]))
    except Exception:  # pandas refuses to make it
        return
    for ids in (Ids(np.arange(1, 10)), Ids(np.array(["1", "x", "é"]))):
        Histories.from_table(table, own_dataset(), ids)


# Run folders


@cache
def run_files() -> Files:
    """Return the files of a small finished run."""
    cfg = to_plain(load(["model=tiny", "dataset=synthetic"]))
    dataset = own_dataset()
    torch.manual_seed(0)
    model = section_of(cfg, "model", ModelConfig)
    state = {f"encoder.{name}": value for name, value in Encoder(5, model).state_dict().items()}
    saved = {"hyper_parameters": {"config": cfg, "num_items": 5}, "state_dict": state, "epoch": 1, "validation": {}}
    checkpoint, items, ranks = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(saved, checkpoint)
    np.savez(items, ids=np.arange(5), titles=np.array(["a", "b", "c", "d", "é"]))
    np.savez(ranks, user=np.arange(3), target=np.arange(3), rank=np.arange(1, 4))
    info = {
        "config": cfg | {"dataset": to_plain(dataset)},
        "start": "2021-05-11T10:00:00",
        "end": "2021-05-11T10:01:00",
    }
    info |= {
        "seconds": {"fit": 1.5},
        "directory": "/tmp",
        "git": {"commit": None},
        "command": "a",
        "parameters": 5,
        "overrides": [],
    }
    protocol = {"sha256": "0", "dataset": "csv", "held_out_users": 3, "candidates": {"full": 5}, "filters": {}}
    protocol |= {"sampled_candidates": None, "seen_items": "ranked like the others", "selected_by": "val/ndcg@10"}
    results = {"status": "finished", "error": None, "protocol": protocol, "best_epoch": 1}
    results |= {"metrics": {"test/ndcg@10": 0.1}, "baselines": {}, "epochs": 2}
    return {
        "run.json": json.dumps(info, indent=1).encode(),
        "metrics.json": json.dumps(results, indent=1).encode(),
        "items.npz": items.getvalue(),
        "ranks.npz": ranks.getvalue(),
        "best.ckpt": checkpoint.getvalue(),
        "overrides.yaml": b"[seed=0]\n",
    }


JSON_VALUES = [
    None,
    True,
    0,
    -1,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "9" * 5000,
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
    "\x1b[2J",
]


def mutate_json(data: bytes, choose: random.Random) -> bytes:
    """Return the JSON after a value was replaced, a key was removed, or its text was mutated."""
    if choose.random() < 0.3:
        return mutate_bytes(data, choose, choose.choice([1, 2, 5]))
    tree = json.loads(data)
    for _ in range(choose.choice([1, 1, 2])):
        node = tree
        while True:
            if not node:
                break
            key = choose.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and choose.random() < 0.7:
                node = node[key]
                continue
            if choose.random() < 0.3:
                del node[key]
            else:
                node[key] = deepcopy(choose.choice(JSON_VALUES))
            break
    return json.dumps(tree).encode()


def mutate_yaml(data: bytes, choose: random.Random) -> bytes:
    """Return YAML after its bytes were mutated."""
    return mutate_bytes(data, choose, choose.choice([1, 2, 5]))


def mutate_zip(data: bytes, choose: random.Random) -> bytes:
    """Return the archive with members mutated, dropped or renamed, or its own bytes mutated."""
    if choose.random() < 0.5:
        return mutate_bytes(data, choose, choose.choice([1, 2, 5]))
    archive = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(archive, "w") as new,
    ):
        for member in old.infolist():
            content = old.read(member)
            if choose.random() < 0.3:
                content = mutate_bytes(content, choose, choose.choice([1, 2]))
            if choose.random() < 0.95:
                new.writestr(member.filename if choose.random() < 0.95 else "../x.npy", content)
    return archive.getvalue()


def run_input(choose: random.Random) -> tuple[Files, object]:
    """Return a run folder of which a record is mutated."""
    files = dict(run_files())
    name = choose.choice(["run.json", "metrics.json", "items.npz", "ranks.npz", "overrides.yaml"])
    mutate = mutate_json if name.endswith("json") else mutate_zip if name.endswith("npz") else mutate_yaml
    files[name] = mutate(files[name], choose)
    return files, None


def read_run(files: Files, folder: Path, _: object) -> None:
    """Read a run as `recommend`, `export`, `report` and a resumed training do."""
    failures = []
    for read in (
        lambda: run_folder.load_finished(folder),
        lambda: run_folder.read_items(folder),
        lambda: run_folder.read_metrics(folder),
        lambda: section_of(run_folder.load_finished(folder)[0], "dataset", DatasetConfig),
        lambda: find_runs([folder]),
        lambda: read_ranks(folder / "ranks.npz"),
    ):
        try:
            read()
        except InputError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def read_ranks(path: Path) -> None:
    """Read ranks as the report does, which explains the two errors that its reader may raise."""
    with suppress(OSError, ValueError):
        run_folder.read_arrays(path)


def checkpoint_input(choose: random.Random) -> tuple[Files, object]:
    """Return a mutated checkpoint."""
    return {"best.ckpt": mutate_zip(run_files()["best.ckpt"], choose)}, None


def read_checkpoint(files: Files, folder: Path, _: object) -> None:
    """Load the encoder in a checkpoint."""
    load_encoder(folder / "best.ckpt", 5)


READERS = {
    "csv": (csv_input, read_dataset),
    "lists": (lists_input, read_dataset),
    "parquet": (parquet_input, read_dataset),
    "titles": (titles_input, read_titles_file),
    "ids": (ids_input, read_ids_file),
    "interactions": (interactions_input, read_interactions_file),
    "values": (values_input, read_values),
    "frame": (frame_input, read_frame),
    "run": (run_input, read_run),
    "checkpoint": (checkpoint_input, read_checkpoint),
}


# The search


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError in the body if it takes long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS_PER_INPUT} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_INPUT)
    try:
        yield
    finally:
        signal.alarm(0)


def failure_of(read: Callable, files: Files, given: object, folder: Path) -> tuple[str, Exception | None]:
    """Return where and how reading fails and the error; `read` if it does not, `refused` for an InputError."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in files.items():
        place = folder / ".hydra" / name if name.endswith(".yaml") else folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    try:
        with time_limit(), warnings.catch_warnings(action="ignore"):
            read(files, folder, given)
    except InputError as error:
        return "refused" if len(str(error)) < 2000 else f"message of {len(str(error))} characters", error
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "sasrec_lab" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"
        return f"{type(error).__name__} at {place}", error
    return "read", None


def smallest(files: Files, fails: Callable[[Files], bool]) -> Files:
    """Return the files with as many bytes cut out of the mutated one as leave the failure."""
    for name in files:
        size = len(files[name]) // 2
        while size:
            start = 0
            while start < len(files[name]):
                cut = files | {name: files[name][:start] + files[name][start + size :]}
                if fails(cut):
                    files = cut
                else:
                    start += size
            size //= 2
    return files


def search(name: str, inputs: int, seed: int, folder: Path) -> int:
    """Try one reader, print each kind of failure once with a small input, and return how many kinds there are."""
    make, read = READERS[name]
    outcomes = Counter(read=0, refused=0)
    for number in range(inputs):
        files, given = make(random.Random(f"{name} {seed} {number}"))
        outcome, error = failure_of(read, files, given, folder)
        outcomes[outcome] += 1
        if outcome in ("read", "refused") or outcomes[outcome] > 1:
            continue
        if sum(map(len, files.values())) < 5000 and not isinstance(error, TimeoutError):
            files = smallest(files, lambda cut: failure_of(read, cut, given, folder)[0] == outcome)  # noqa: B023
        print(f"{name} {number}: {outcome}: {str(error)[:200]}")
        print(f"    {given if isinstance(given, int) else shown(given)} { ({key: files[key][:300] for key in files}) }")
    kinds = len(outcomes) - 2
    unexpected = inputs - outcomes["read"] - outcomes["refused"]
    print(
        f"{name}: {inputs:,} inputs, {outcomes['read']:,} read, {outcomes['refused']:,} refused,"
        f" {unexpected:,} unexpected exceptions of {kinds} kinds",
        flush=True,
    )
    return kinds


def shown(given: object) -> str:
    """Return the keys of a data set's config that differ from those of dataset=csv."""
    if not isinstance(given, DatasetConfig):
        return ""
    default = to_plain(own_dataset())
    return str({key: value for key, value in to_plain(given).items() if value != default[key]})


def main() -> None:
    """Search every reader, or those named."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    names = sys.argv[3:] or list(READERS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        folder = Path(place, "files")
        folder.mkdir()
        found = sum(search(name, inputs, seed, folder) for name in names)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
