"""Sequences, the holdout, training windows, and the cache of the arrays."""

import multiprocessing
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cache_race import build_at_once, cached
from small_data import holdout_of, next_item, random_users, sequences_of

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Repeats, WeightConfig, Windows
from sasrec_lab.data import cache, sequences, source
from sasrec_lab.data.holdout import Holdout, cut_windows, hold_out
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.sequences import Sequences, concatenate_ranges, load_sequences, to_arrays
from sasrec_lab.errors import InputError

CSV = load(["dataset=csv", "dataset.path=x.csv"]).dataset  # user_id, item_id, timestamp


def sessions(holdout: Holdout) -> list[list]:
    """Return the raw item ids of each training window."""
    spans = zip(holdout.window_starts, holdout.window_ends, strict=True)
    return [holdout.item_ids[holdout.items[start:end] - 1].tolist() for start, end in spans]


def batch_of(holdout: Holdout):
    """Return all training windows, packed."""
    from small_data import training_batch

    return training_batch(holdout, np.arange(len(holdout.window_users)))


def inputs_and_targets(holdout: Holdout) -> list[tuple[list, list]]:
    """Return inputs and targets of each window in raw ids, from the packed batch of all windows."""
    batch = batch_of(holdout)
    items, targets = (holdout.item_ids[x.numpy() - 1] for x in (batch.inputs.items, batch.labels.targets))
    ends = batch.inputs.last.numpy() + 1
    return [
        (items[start:end].tolist(), targets[start:end].tolist())
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def split(holdout: Holdout, user: int) -> tuple[list[int], list[int], list[int]]:
    """Return a user's training items, the items that the test reads, and the validation and test targets if any."""
    start = holdout.starts[user]
    training = holdout.items[start : holdout.train_ends[user]].tolist()
    row = np.flatnonzero(holdout.test.users == user)
    if not len(row):
        return training, training, []
    end = holdout.test.ends[row[0]]
    targets = [int(rows.targets[row[0]]) for rows in (holdout.val, holdout.test)]
    return training, holdout.items[start:end].tolist(), targets


# The tutorial's example

TUTORIAL = """user_id,item_id,weight,datetime
u1,i1,0.1,2021-09-09
u2,i1,0.3,2021-09-09
u2,i3,0.2,2021-09-05
u1,i2,0.3,2021-09-07
u3,i2,0.4,2021-09-05
u1,i3,0.5,2021-09-08
"""


def read(tmp_path: Path, text: str, **changes) -> Sequences:
    (tmp_path / "x.csv").write_text(text)
    return load_sequences(replace(CSV, path=str(tmp_path / "x.csv"), **changes), str(tmp_path / "data"))


def read_tutorial(tmp_path: Path, more: str = "") -> Sequences:
    return read(tmp_path, TUTORIAL + more, time="datetime", weight=WeightConfig("weight"))


def test_the_tutorial_trains_on_whole_sequences(tmp_path):
    table = read_tutorial(tmp_path)
    starts, ends = table.offsets[:-1], table.offsets[1:]
    window_starts, window_ends, users = cut_windows(starts, ends, Windows.last, maxlen=5)
    assert table.user_ids[users].tolist() == ["u1", "u2"]
    whole = replace(
        hold_out(table, Windows.last, Catalogue.all, maxlen=5),
        train_ends=ends,
        window_starts=window_starts,
        window_ends=window_ends,
        window_users=users,
    )
    assert sessions(whole) == [["i2", "i3", "i1"], ["i3", "i1"]]
    assert inputs_and_targets(whole) == [(["i2", "i3"], ["i3", "i1"]), (["i3"], ["i1"])]
    np.testing.assert_array_equal(batch_of(whole).labels.weights, np.float32([0.5, 0.1, 0.3]))  # each is its target's


# two more interactions of u1 and of u2, which are held out
HELD_OUT = "u1,i3,1,2021-09-10\nu2,i4,1,2021-09-11\nu2,i2,1,2021-09-10\nu1,i5,1,2021-09-11\n"


@pytest.mark.parametrize("ranges", [[], [(3, 3)], [(2, 5), (7, 7), (0, 3), (9, 10)]])
def test_ranges_are_concatenated(ranges):
    starts, ends = (np.array([each[side] for each in ranges], dtype=np.int64) for side in (0, 1))
    assert concatenate_ranges(starts, ends).tolist() == [i for start, end in ranges for i in range(start, end)]


@pytest.mark.parametrize(
    ("more", "third"),
    [("", []), ("u3,i4,1,2021-09-06\n", [(["i2"], ["i4"])])],
    ids=["u3 serves nothing", "u3 serves training only"],
)
def test_the_tutorial_from_a_file_behind_a_holdout(tmp_path, more, third):
    table = read_tutorial(tmp_path, HELD_OUT + more)
    holdout = hold_out(table, Windows.last, Catalogue.all, maxlen=5)
    assert inputs_and_targets(holdout) == [(["i2", "i3"], ["i3", "i1"]), (["i3"], ["i1"]), *third]
    assert table.user_ids[holdout.test.users].tolist() == ["u1", "u2"]
    assert holdout.item_ids[holdout.val.targets - 1].tolist() == ["i3", "i2"]
    assert holdout.item_ids[holdout.test.targets - 1].tolist() == ["i5", "i4"]


def test_tutorial_sessions_keep_the_newest_maxlen_items(tmp_path):
    holdout = hold_out(read_tutorial(tmp_path, HELD_OUT), Windows.last, Catalogue.all, maxlen=1)
    assert inputs_and_targets(holdout) == [(["i3"], ["i1"]), (["i3"], ["i1"])]


# The holdout


@pytest.mark.parametrize("seed", range(5))
def test_training_validation_and_test_are_everything_in_order(seed):
    users = random_users(seed)
    holdout = holdout_of(users, maxlen=4)
    assert holdout.test.users.tolist() == [user for user, items in enumerate(users) if len(items) >= 3]
    for user, items in enumerate(users):
        training, known_to_test, targets = split(holdout, user)
        assert training + targets == (items if len(items) >= 2 else [])
        assert known_to_test == training + targets[:1]


def test_users_with_few_interactions():
    holdout = holdout_of([[1], [2, 3], [4, 5, 6], [7, 8, 9, 10]])
    assert sessions(holdout) == [[20, 30], [70, 80]]
    assert holdout.window_users.tolist() == [1, 3]
    assert [split(holdout, user) for user in range(4)] == [
        ([], [], []),
        ([2, 3], [2, 3], []),
        ([4], [4, 5], [5, 6]),
        ([7, 8], [7, 8, 9], [9, 10]),
    ]


def test_only_the_newest_items_train():
    holdout = holdout_of([list(range(1, 11))], maxlen=3)  # item 9 is the validation's, 10 the test's
    assert sessions(holdout) == [[50, 60, 70, 80]]
    assert inputs_and_targets(holdout) == [([50, 60, 70], [60, 70, 80])]


USERS = [
    [1, 2, 3, 4, 5],  # 1 is outside the window (2, 3)
    [2, 6, 4, 1],
    [3, 7],
    [8],
    [9, 2, 6],  # one training item makes no window
    [8, 1, 3, 2, 7],
]


def test_catalogue_train_knows_the_windows_items_only():
    holdout = holdout_of(USERS, maxlen=1, catalogue=Catalogue.train, weights=[[float(i) for i in u] for u in USERS])
    assert holdout.item_ids.tolist() == [10, 20, 30, 60, 70]  # now items 1 to 5
    assert sessions(holdout) == [[20, 30], [20, 60], [30, 70], [10, 30]]
    assert holdout.test.users.tolist() == [0, 1, 4, 5]
    assert [split(holdout, user) for user in range(6)] == [
        ([1, 2, 3], [1, 2, 3], [0, 0]),  # its validation item 4 is not read by the test either
        ([2, 4], [2, 4], [0, 1]),
        ([3, 5], [3, 5], []),
        ([], [], []),
        ([], [2], [2, 4]),
        ([1, 3], [1, 3, 2], [2, 5]),
    ]
    np.testing.assert_array_equal(holdout.weights, holdout.item_ids[holdout.items - 1] / 10)


def test_catalogue_all_knows_every_item():
    holdout = holdout_of(USERS, maxlen=1)
    assert holdout.item_ids.tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [split(holdout, user)[0] for user in range(6)] == [[1, 2, 3], [2, 6], [3, 7], [], [9], [8, 1, 3]]
    assert holdout.val.targets.tolist() == [4, 4, 2, 2]
    assert holdout.test.targets.tolist() == [5, 1, 6, 7]


@pytest.mark.parametrize("windows", list(Windows))
@pytest.mark.parametrize("seed", range(4))
def test_catalogue_train_drops_only_items_of_no_window(seed, windows):
    users = random_users(seed, users=8, items=60)
    whole = holdout_of(users, maxlen=2, windows=windows)
    known = holdout_of(users, maxlen=2, windows=windows, catalogue=Catalogue.train)
    trained = {item for session in sessions(whole) for item in session}
    assert known.item_ids.tolist() == sorted(trained)
    assert sessions(known) == sessions(whole)

    def ids(holdout: Holdout, numbers) -> list[int]:
        return np.concatenate([[0], holdout.item_ids])[numbers].tolist()

    for user in range(len(users)):
        for mine, all_of_them in zip(split(known, user)[:2], split(whole, user)[:2], strict=True):
            assert ids(known, mine) == [item for item in ids(whole, all_of_them) if item in trained]
    for stage in ("val", "test"):
        assert ids(known, known.rows(stage).targets) == [
            item * (item in trained) for item in ids(whole, whole.rows(stage).targets)
        ]


# Windows


@pytest.mark.parametrize(
    ("windows", "maxlen", "expected"),
    [
        (Windows.last, 3, [(0, 6, 10), (2, 11, 13)]),
        (Windows.all, 3, [(0, 6, 10), (0, 3, 7), (0, 0, 4), (2, 11, 13)]),
        (Windows.all, 4, [(0, 5, 10), (0, 1, 6), (0, 0, 2), (2, 11, 13)]),
        (Windows.all, 9, [(0, 0, 10), (2, 11, 13)]),
        (Windows.last, 50, [(0, 0, 10), (2, 11, 13)]),
    ],
)
def test_windows_of_users_with_ten_one_two_and_no_items(windows, maxlen, expected):
    starts, ends, users = cut_windows(np.array([0, 10, 11, 13]), np.array([10, 11, 13, 13]), windows, maxlen)
    assert list(zip(users, starts, ends, strict=True)) == expected


@pytest.mark.parametrize("maxlen", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("seed", range(4))
def test_windows_all_have_every_training_label_once(seed, maxlen):
    lengths = np.random.default_rng(seed).integers(0, 25, 40)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    window_starts, window_ends, users = cut_windows(starts, ends, Windows.all, maxlen)
    sizes = window_ends - window_starts
    assert ((sizes >= 2) & (sizes <= maxlen + 1)).all()
    assert ((starts[users] <= window_starts) & (window_ends <= ends[users])).all()
    labels = np.concatenate([np.arange(a + 1, b) for a, b in zip(window_starts, window_ends, strict=True)])
    expected = np.concatenate([np.arange(a + 1, max(a + 1, b)) for a, b in zip(starts, ends, strict=True)])
    assert sorted(labels) == expected.tolist()
    assert ((sizes == maxlen + 1) | (window_starts == starts[users])).all()  # only a user's oldest may be short

    newest = window_ends == ends[users]
    last = cut_windows(starts, ends, Windows.last, maxlen)
    for every, newest_alone in zip((window_starts, window_ends, users), last, strict=True):
        np.testing.assert_array_equal(every[newest], newest_alone)


@pytest.mark.parametrize(("maxlen", "overlap"), [(2, 1), (7, 3), (7, 6), (50, 10)])
@pytest.mark.parametrize("catalogue", Catalogue)
@pytest.mark.parametrize("seed", range(2))
def test_overlapping_windows_have_every_label_once(seed, catalogue, maxlen, overlap):
    """Every label but those of a user's oldest window sees at least `overlap` items, and no window exceeds maxlen."""
    users = random_users(seed, users=25, items=60, longest=40)
    sequences = sequences_of(users)
    holdout = hold_out(sequences, Windows.all, catalogue, maxlen, overlap=overlap)
    plain = hold_out(sequences, Windows.all, catalogue, maxlen)
    counted = {name: [] for name in ("overlapping", "plain")}
    for name, held in (("overlapping", holdout), ("plain", plain)):
        windows = np.arange(len(held.window_users))
        inputs, labels = next_item(maxlen).training(held, windows, np.random.default_rng(0))
        tokens = inputs.offsets[-1]
        assert np.diff(inputs.offsets).max() <= maxlen
        targets = labels.targets[:tokens].numpy()
        counted[name] = sorted(targets[targets > 0].tolist())
        assert (labels.targets[tokens:] == 0).all()
        if name == "plain" or catalogue is Catalogue.train:
            continue
        for window, begin in enumerate(inputs.offsets[:-1]):
            mine = targets[begin : inputs.offsets[window + 1]]
            first = int(np.flatnonzero(mine)[0])
            is_oldest = held.window_starts[window] == held.starts[held.window_users[window]]
            assert first == (0 if is_oldest else overlap)
            assert (mine[first:] > 0).all()
    assert counted["overlapping"] == counted["plain"]


# Reading, and the cache


ROWS = "user_id,item_id,timestamp\n7,007,3\n7,x,1\n-5,007,2\n7,9,2\n-5,9,2\n7,x,4\n"


def test_ids_are_kept_as_they_came(tmp_path):
    loaded = read(tmp_path, ROWS)
    assert loaded.user_ids.tolist() == [-5, 7]
    assert loaded.user_ids.dtype == np.int64
    assert loaded.item_ids.tolist() == ["007", "9", "x"]
    assert loaded.items.tolist() == [1, 2, 3, 2, 1, 3]  # the two of user -5 have the same time and stay in file order
    assert loaded.offsets.tolist() == [0, 2, 6]
    assert loaded.lengths.tolist() == [2, 4]
    assert loaded.times.tolist() == [2, 2, 1, 2, 3, 4]
    assert loaded.weights is None
    assert (loaded.file, len(loaded.sha256)) == ("x.csv", 64)


def test_arrays_of_an_unsorted_table_are_refused():
    with pytest.raises(AssertionError):
        to_arrays(pd.DataFrame({"user": [2, 1, 2], "item": [1, 2, 3]}))


def test_a_second_load_maps_the_cache_and_reads_no_row(tmp_path, monkeypatch):
    first = read(tmp_path, ROWS)
    monkeypatch.setattr(sequences, "read_file", lambda *_: pytest.fail("read again"))
    second = read(tmp_path, ROWS)
    assert cached(second) == cached(first)
    assert cached(first).parent == tmp_path / "data" / "cache"
    for name in ("items", "offsets", "user_ids", "item_ids", "times"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))
    assert second.sha256 == first.sha256


@pytest.fixture
def settled(tmp_path: Path, monkeypatch) -> Path:
    """A file that was last changed an hour ago; its arrays are built."""
    monkeypatch.setattr(cache.time, "time_ns", lambda now=time.time_ns: now() + 3_600 * 10**9)
    read(tmp_path, ROWS)
    return tmp_path / "x.csv"


def load_again(settled: Path, **changes) -> Sequences:
    return load_sequences(replace(CSV, path=str(settled), **changes), str(settled.parent / "data"))


def test_an_unchanged_file_is_not_opened(settled, monkeypatch):
    first = load_again(settled)
    with monkeypatch.context() as patch:
        patch.setattr(source, "_opened", lambda *_: pytest.fail("opened"))
        assert load_again(settled).sha256 == first.sha256
        with pytest.raises(InputError, match=f"has sha256 {first.sha256}, expected {'0' * 64};"):
            load_again(settled, sha256="0" * 64)
    assert load_again(settled, min_user=3).sha256 == first.sha256  # another folder, from the same file
    assert sorted(path.name for path in cached(first).glob("*.json*")) == ["checksums.json", "stamp.json"]


@pytest.mark.parametrize("change", ["size", "time", "content behind its time", "inode"])
def test_a_changed_file_is_read_again(settled, change):
    first = load_again(settled)
    was = settled.stat()
    if change == "size":
        settled.write_text(ROWS + "8,9,2\n")
    elif change == "time":
        os.utime(settled, ns=(was.st_atime_ns, was.st_mtime_ns - 1))
    elif change == "content behind its time":
        settled.write_text(ROWS.replace("9", "8"))
        os.utime(settled, ns=(was.st_atime_ns, was.st_mtime_ns))
    else:
        copy = settled.with_name("copy")
        copy.write_text(ROWS)
        os.utime(copy, ns=(was.st_atime_ns, was.st_mtime_ns))
        copy.replace(settled)
    assert cache.find_sha256(cache.file_stamp(settled), settled.parent / "data") is None
    again = load_again(settled)
    assert (again.sha256 == first.sha256) == (change in ("time", "inode"))
    assert (cached(again) == cached(first)) == (change in ("time", "inode"))
    assert cache.find_sha256(cache.file_stamp(settled), settled.parent / "data") == again.sha256


def test_a_file_changed_just_now_gets_no_stamp(tmp_path):
    loaded = read(tmp_path, ROWS)
    assert not list(cached(loaded).glob("stamp*"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"file": 1}'])
def test_a_malformed_stamp_is_ignored(settled, content):
    folder = cached(load_again(settled))
    (folder / "stamp.json").write_text(content)
    load_again(settled)
    assert cache.find_sha256(cache.file_stamp(settled), settled.parent / "data") == load_again(settled).sha256


def test_a_damaged_checksum_in_a_stamp_is_not_believed(settled):
    first = load_again(settled)
    stamp = cached(first) / "stamp.json"
    stamp.write_text(stamp.read_text().replace(first.sha256, "0" * 64))
    assert load_again(settled).sha256 == first.sha256
    assert first.sha256 in stamp.read_text()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    def read_while_it_grows(path, dataset):
        with path.open("a") as file:
            file.write("8,9,2\n")
        return read_file(path, dataset)

    monkeypatch.setattr(sequences, "read_file", read_while_it_grows)
    with pytest.raises(InputError, match=r"x\.csv changed while it was read; run this again when it is complete"):
        read(tmp_path, ROWS)
    assert not list((tmp_path / "data" / "cache").iterdir())


@pytest.mark.parametrize("ids", ["close", "far apart", "text"])
def test_indices_of_item_ids(ids):
    random = np.random.default_rng(0)
    there = random.choice({"close": 60, "far apart": 2**62, "text": 60}[ids], 40) - 10
    values = pd.Series(random.choice(there, 200))
    values = values.astype(str) if ids == "text" else values
    numbers, different = sequences._index_items(values)
    codes, plain = pd.factorize(values, sort=True)
    np.testing.assert_array_equal(numbers, codes + 1)
    assert list(different) == list(plain)


def test_a_holdout_of_known_items_shares_the_cached_arrays(tmp_path):
    loaded = read(tmp_path, ROWS)
    held = hold_out(loaded, Windows.last, Catalogue.all, maxlen=5)
    assert np.shares_memory(held.items, loaded.items)
    assert not np.shares_memory(hold_out(loaded, Windows.last, Catalogue.train, maxlen=5).items, loaded.items)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_repeats_are_found_in_chunks_of_users(monkeypatch, at_once):
    monkeypatch.setattr("sasrec_lab.data.holdout.PAIRS_PER_CHUNK", at_once)
    assert not holdout_of([[1, 2, 3], [1, 2, 3, 4], [5], [3, 2, 1]]).has_repeats
    assert not holdout_of([[1, 2, 3], [1, 2, 3, 1]]).has_repeats  # only the test target is a repeat
    for users in ([[1, 2, 1, 3], [1, 2, 3]], [[1, 2, 3], [4], [1, 5, 2, 5, 3]], [[1, 2, 3], [2, 2]]):
        assert holdout_of(users).has_repeats


def test_keys_that_decide_the_arrays_decide_the_cache_folder(tmp_path):
    plain = read(tmp_path, ROWS)
    folders = {
        cached(plain),
        cached(read(tmp_path, ROWS, repeats=Repeats.drop)),
        cached(read(tmp_path, ROWS, min_user=3)),
        cached(read(tmp_path, ROWS, time=None)),
        cached(read(tmp_path, ROWS.replace("9", "8"))),
    }
    assert len(folders) == 5
    assert read(tmp_path, ROWS, repeats=Repeats.drop).items.tolist() == [1, 2, 3, 2, 1]
    # these are applied to the arrays later
    assert cached(read(tmp_path, ROWS, windows=Windows.all, catalogue=Catalogue.train)) == cached(plain)


def test_checking_ids_keeps_the_names_of_caches(tmp_path):
    # as before the key existed
    names = {"ml_100k": "ml_100k-34061fa9bd770cae", "kion": "kion-f9567fdd9a5fa3dd"}
    for name, folder in names.items():
        assert sequences._folder_name(load([f"dataset={name}"]).dataset, "abc") == folder
    kept = replace(load(["dataset=kion"]).dataset, check_ids=False)
    assert sequences._folder_name(kept, "abc") != names["kion"]


def test_generated_interactions_need_no_file(tmp_path):
    dataset = load(["dataset=synthetic", "dataset.synthetic.users=20"]).dataset
    loaded = load_sequences(dataset, str(tmp_path))
    assert len(loaded.lengths) == 20
    assert (loaded.file, loaded.sha256) == ("(generated)", None)
    other = load_sequences(replace(dataset, synthetic=replace(dataset.synthetic, seed=1)), str(tmp_path))
    assert cached(other) != cached(loaded)


@pytest.mark.parametrize("is_damaged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_build_the_cache_at_once(tmp_path, is_damaged):
    (tmp_path / "x.csv").write_text(ROWS)
    dataset = replace(CSV, path=str(tmp_path / "x.csv"))
    if is_damaged:
        (cached(load_sequences(dataset, str(tmp_path / "data"))) / "items.npy").write_bytes(b"")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (dataset, str(tmp_path / "data"), barrier, results)
    processes = [context.Process(target=build_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        one, other = results.get(timeout=300), results.get(timeout=300)
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert one == other
    assert one[:2] == ([1, 2, 3, 2, 1, 3], [0, 2, 6])
    assert list((tmp_path / "data" / "cache").iterdir()) == [Path(one[2])]  # no draft is left behind


@pytest.fixture
def read_only(tmp_path: Path):
    """Make folders read-only until the test is over."""
    folders: list[Path] = []

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        folder.chmod(0o555)
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        folder.chmod(0o755)


def test_the_cache_of_a_read_only_root_is_in_the_user_cache(tmp_path, monkeypatch, read_only):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "x.csv").write_text(ROWS)
    root = read_only(tmp_path / "root")
    loaded = load_sequences(replace(CSV, path=str(tmp_path / "x.csv")), str(root))
    assert cached(loaded).parent == tmp_path / "home" / "sasrec_lab" / "cache"
    assert not list(root.iterdir())
    assert stat.S_IMODE(cached(loaded).stat().st_mode) == 0o755


def test_an_unwritable_cache_is_an_error(tmp_path, monkeypatch, read_only):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "x.csv").write_text(ROWS)
    root = read_only(tmp_path / "root")
    read_only(tmp_path / "home" / "sasrec_lab")
    with pytest.raises(InputError) as caught:
        load_sequences(replace(CSV, path=str(tmp_path / "x.csv")), str(root))
    assert str(caught.value) == (
        f"data_dir={root}: neither {root}/cache nor the user's cache folder is writable; set data_dir to another"
    )


def test_a_full_disk_leaves_no_partial_cache(tmp_path, monkeypatch):
    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", no_space)
        with pytest.raises(InputError) as caught:
            read(tmp_path, ROWS)
    cache = tmp_path / "data" / "cache"
    assert not list(cache.iterdir())
    message = str(caught.value)
    assert message.startswith(f"{cache}/csv-")
    assert message.endswith(": the cache cannot be written (No space left on device); set data_dir to another folder")
    assert read(tmp_path, ROWS).items.tolist() == [1, 2, 3, 2, 1, 3]


# Too little data


def test_no_user_is_long_enough_for_a_holdout():
    with pytest.raises(InputError) as caught:
        hold_out(sequences_of([[1, 2], [2]]), Windows.last, Catalogue.all, maxlen=5)
    assert str(caught.value) == (
        "x.csv: no user has 3 interactions, which a holdout needs (training, validation, test);"
        " the longest of 2 users has 2; check that dataset.user is the column of the users, or train only:"
        " dataset.holdout=none"
    )


@pytest.mark.parametrize("catalogue", list(Catalogue))
@pytest.mark.parametrize("windows", list(Windows))
def test_a_holdout_without_training_windows_is_an_error(windows, catalogue):
    with pytest.raises(InputError) as caught:
        hold_out(sequences_of([[1, 2, 3], [2]]), windows, catalogue, maxlen=5)
    assert str(caught.value) == (
        "x.csv: no user has 2 training interactions; with the last two of each held out, the longest of 2 users has 3;"
        " check that dataset.user is the column of the users, or use more data"
    )


def test_without_a_holdout_all_is_trained_on():
    users = sequences_of([[1, 2, 3, 4], [5], [6, 1], [2, 7, 8]])
    held = hold_out(users, Windows.last, Catalogue.train, 2, HoldoutMode.none)
    assert len(held.val) == len(held.test) == len(held.test.targets) == 0
    assert held.item_ids.tolist() == [10, 20, 30, 40, 60, 70, 80]  # 50 is of a user with one interaction
    windows = zip(held.window_starts, held.window_ends, held.window_users, strict=True)
    cut = {user: held.item_ids[held.items[start:end] - 1].tolist() for start, end, user in windows}
    assert cut == {0: [20, 30, 40], 2: [60, 10], 3: [20, 70, 80]}
    with pytest.raises(InputError, match="no user has 2 training interactions; the longest of 2 users has 1"):
        hold_out(sequences_of([[1], [2]]), Windows.last, Catalogue.all, 2, HoldoutMode.none)
