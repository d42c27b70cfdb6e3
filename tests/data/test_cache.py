"""The cache of arrays: damage of any kind is found and mended, and what is checked once is not checked again."""

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.data import cache

ARRAYS = {
    "items": np.array([1, 2, 3, 2, 1, 3], np.int32),
    "offsets": np.array([0, 2, 6]),
    "user_ids": np.array([-5, 7]),
    "item_ids": np.array(["007", "9", "x"]),
    "times": np.array([2, 2, 1, 2, 3, 4], np.int32),
}
FILES = [*(f"{name}.npy" for name in ARRAYS), "checksums.json"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sasrec_lab"


@pytest.fixture
def root(tmp_path) -> Path:
    """A data root with the arrays `x-1` and `other-2`."""
    for name in ("x-1", "other-2"):
        assert load(tmp_path / "root", name)[1] == 1
    return tmp_path / "root"


@pytest.fixture
def settled(monkeypatch) -> None:
    """Let every file be an hour old."""
    monkeypatch.setattr(cache.time, "time_ns", lambda now=time.time_ns: now() + 3_600 * 10**9)


def load(root: Path, name: str = "x-1") -> tuple[dict[str, np.ndarray], int]:
    """Return the arrays of this name, which must be right, and how often they were built."""
    built = []

    def build(scratch: Path) -> dict[str, np.ndarray]:
        built.append(name)
        return ARRAYS if name == "x-1" else {**ARRAYS, "items": ARRAYS["items"][::-1], "offsets": np.array([0, 3, 6])}

    arrays, folder = cache.load_or_build(root, name, build)
    assert folder.name == name
    if name == "x-1":
        assert set(arrays) == set(ARRAYS)
        for array_name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[array_name], array)
    return arrays, len(built)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.usefixtures("settled")
def test_no_flipped_bit_reaches_an_array(root, file):
    path = root / "cache" / "x-1" / file
    random = np.random.default_rng(0)
    for bit in random.integers(0, 8 * path.stat().st_size, 5):
        flip(path, int(bit))
        load(root)


def make_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_foreign(path: Path) -> None:
    shutil.copy(path.parent.parent / "other-2" / path.name, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, 8 * path.stat().st_size - 9),
    "short": make_short,
    "empty": make_empty,
    "missing": Path.unlink,
    "foreign": make_foreign,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", ["items.npy", "offsets.npy", "checksums.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.usefixtures("settled")
def test_a_damaged_folder_is_rebuilt_with_one_log_line(root, damage, file, caplog):
    assert load(root)[1] == 0
    damage(root / "cache" / "x-1" / file)
    assert load(root)[1] == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"cache {root}/cache/x-1 ")
    assert caplog.messages[0].endswith("; not using it")
    assert load(root)[1] == 0
    assert sorted(path.name for path in (root / "cache").iterdir()) == ["other-2", "x-1"]


def test_an_extra_array_leads_to_a_rebuild(root):
    np.save(root / "cache" / "x-1" / "weights.npy", np.ones(6, np.float32))
    assert load(root)[1] == 1


def test_a_folder_under_anothers_name_is_rebuilt(root):
    shutil.rmtree(root / "cache" / "x-1")
    shutil.copytree(root / "cache" / "other-2", root / "cache" / "x-1")
    assert load(root)[1] == 1


def test_a_cache_of_an_older_version_is_rebuilt_in_place(root, caplog):
    (root / "cache" / "x-1" / "checksums.json").unlink()
    assert load(root)[1] == 1
    assert caplog.messages == [f"cache {root}/cache/x-1 has no checksums.json; not using it"]


def write_unchecked(folder: Path, **changes: np.ndarray) -> None:
    """Write arrays with true checksums."""
    shutil.rmtree(folder)
    cache._save({**ARRAYS, **changes}, folder, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"items": np.array([1, 2, 3, 2, 1, 4])}, "items has an index outside the catalogue"),
        ({"items": np.array([1, 2, 3, 2, 1, 0])}, "items has an index outside the catalogue"),
        ({"offsets": np.array([0, 2, 7])}, "offsets do not divide the items among users"),
        ({"offsets": np.array([0, 7, 6])}, "offsets do not divide the items among users"),
        ({"offsets": np.array([], int)}, "index 0 is out of bounds"),
        ({"user_ids": np.array([1])}, "user_ids has 1 values instead of 2"),
        ({"times": np.array([1])}, "times has 1 values instead of 6"),
        ({"items": np.ones((6, 1), int)}, "items has type int64 and 2 dimensions"),
        ({"items": np.ones(6)}, "items has type float64 and 1 dimensions"),
        ({"other": np.ones(6)}, "'other'"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_rebuilt(root, changes, reason, caplog):
    write_unchecked(root / "cache" / "x-1", **changes)
    assert load(root)[1] == 1
    assert reason in caplog.messages[0]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (6,)}",
        "[" * 5000,
    ],
    ids=["too large", "overflow", "pickle", "nested"],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_hostile_header_is_rebuilt_and_allocates_nothing(root, header):
    folder = root / "cache" / "x-1"
    text = header.encode() + b"\n"
    (folder / "items.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    measured = {name: cache._measure(folder / name) for name in FILES[:-1]}
    (folder / "checksums.json").write_text(json.dumps({"folder": "x-1", "files": measured}))
    assert load(root)[1] == 1


# Checked once


def checked_files(monkeypatch) -> list[str]:
    """Return a list that grows by the name of each file whose checksum is computed."""
    names: list[str] = []
    measure = cache._measure
    monkeypatch.setattr(cache, "_measure", lambda path: names.append(path.name) or measure(path))
    return names


@pytest.mark.usefixtures("settled")
def test_unchanged_arrays_are_checked_once_per_boot(root, monkeypatch, tmp_path):
    load(root)
    checked = checked_files(monkeypatch)
    load(root)
    assert checked == []
    monkeypatch.setattr(cache, "_BOOT_ID", tmp_path / "boot_id")
    cache._BOOT_ID.write_text("another boot")
    load(root)
    assert sorted(checked) == sorted(FILES[:-1])
    checked.clear()
    load(root)
    assert checked == []


@pytest.mark.usefixtures("settled")
def test_machines_with_one_home_folder_check_once_each(root, monkeypatch, tmp_path):
    load(root)
    checked = checked_files(monkeypatch)
    for boot in ("one", "two", "one", "two"):
        monkeypatch.setattr(cache, "_BOOT_ID", tmp_path / boot)
        cache._BOOT_ID.write_text(boot)
        load(root)
    assert len(checked) == 2 * len(ARRAYS)


@pytest.mark.usefixtures("settled")
def test_a_changed_file_with_its_old_time_is_checked(root):
    load(root)
    path = root / "cache" / "x-1" / "items.npy"
    was = path.stat()
    flip(path, 8 * was.st_size - 8)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert load(root)[1] == 1


def test_arrays_written_just_now_are_checked_again(root, monkeypatch):
    load(root)
    checked = checked_files(monkeypatch)
    load(root)
    assert len(checked) == len(ARRAYS)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}, "boots": 1}'])
@pytest.mark.usefixtures("settled")
def test_a_malformed_record_of_a_check_is_replaced(root, home, content, monkeypatch):
    load(root)
    (record,) = (home / "checked").glob("x-1-*.json")
    record.write_text(content)
    checked = checked_files(monkeypatch)
    load(root)
    load(root)
    assert len(checked) == len(ARRAYS)


@pytest.mark.usefixtures("settled")
def test_without_boot_ids_each_run_checks(root, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_BOOT_ID", tmp_path / "missing")
    load(root)
    checked = checked_files(monkeypatch)
    load(root)
    assert len(checked) == len(ARRAYS)


# Other users and other processes


@pytest.fixture
def read_only_root(root):
    """The data root with a cache that cannot be written."""
    for path in (root / "cache", root / "cache" / "x-1"):
        path.chmod(0o555)
    yield root
    for path in (root / "cache", root / "cache" / "x-1"):
        path.chmod(0o755)


@pytest.mark.usefixtures("settled")
def test_a_read_only_cache_is_used_and_checked_once(read_only_root, home, monkeypatch):
    load(read_only_root)
    assert len(list((home / "checked").glob("x-1-*.json"))) == 1
    checked = checked_files(monkeypatch)
    assert load(read_only_root)[1] == 0
    assert checked == []


def test_a_damaged_read_only_cache_is_rebuilt_elsewhere(read_only_root, home):
    path = read_only_root / "cache" / "x-1" / "items.npy"
    flip(path, 8 * path.stat().st_size - 8)
    assert load(read_only_root)[1] == 1
    assert load(read_only_root)[1] == 0
    assert [path.name for path in (home / "cache").iterdir()] == ["x-1"]
    assert stat.S_IMODE((home / "cache" / "x-1").stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_replaced_is_built_elsewhere(root, home, monkeypatch):
    make_empty(root / "cache" / "x-1" / "items.npy")

    def refuse(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as in a folder with the sticky bit

    monkeypatch.setattr(cache, "_remove", refuse)
    assert load(root)[1] == 1
    assert load(root)[1] == 0
    assert (home / "cache" / "x-1").is_dir()


def test_mapped_arrays_outlive_a_rebuild(root):
    before, _ = load(root)
    make_empty(root / "cache" / "x-1" / "offsets.npy")
    assert load(root)[1] == 1
    assert isinstance(before["items"], np.memmap)
    np.testing.assert_array_equal(before["items"], ARRAYS["items"])


def test_arrays_that_vanish_once_written_are_still_returned(root, monkeypatch):
    save = cache._save

    def save_and_lose(arrays, folder, damaged) -> None:
        save(arrays, folder, damaged)
        shutil.rmtree(folder)

    monkeypatch.setattr(cache, "_save", save_and_lose)
    shutil.rmtree(root / "cache" / "x-1")
    assert load(root)[1] == 1


def test_a_hit_removes_what_a_killed_process_left(root):
    draft = root / "cache" / ".draft-0123456789ab-x-1"
    draft.mkdir()
    cache.load_or_build(root, "x-1", pytest.fail, may_write_root=False)
    assert draft.exists()
    assert load(root)[1] == 0
    assert not draft.exists()
