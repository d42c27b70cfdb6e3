"""The lists compared with a slow reference: one user at a time through the whole encoder, and a sort."""

import json
import pickle
import re
import shutil
import socket
import subprocess
import warnings
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import random_users, sequences_of

from sasrec_lab.config.composition import load
from sasrec_lab.data.batches import pack
from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import InputError, InputWarning
from sasrec_lab.files import display_path
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend import histories, lists
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.rankers import EncoderRanker, _find_device
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run.folder import RETRAIN_HINT
from sasrec_lab.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
MAXLEN, ITEMS = 5, 20


def recommender_of(users: list[list[int]], items: int = ITEMS, text: bool = False) -> Recommender:
    """Return an untrained encoder that knows the items 1 to `items`; item i has the id 10 i, user u the id 100 + u."""
    cfg = load(["dataset=csv", "dataset.path=x.csv", "model.dim=8", f"model.maxlen={MAXLEN}"])
    torch.manual_seed(0)
    sequences = sequences_of(users)
    if text:
        sequences = replace(
            sequences, user_ids=np.array([f"u{u}" for u in range(len(users))]), item_ids=sequences.item_ids.astype(str)
        )
    known = Ids(sequences.item_ids[:items])
    recommender = Recommender(
        Path("run"), EncoderRanker(Encoder(items, cfg.model), cfg.objective, cfg.model), known, cfg.dataset
    )
    recommender.histories = Histories.from_sequences(sequences, known)
    return recommender


@torch.no_grad()
def expected(recommender: Recommender, history: list[int], k: int, allowed=None, filter_viewed=True) -> list[list]:
    """Return the [item id, score] pairs of one user from the indices of the items that the user has seen."""
    known = np.array([item for item in history if item <= len(recommender.items)])
    newest = known[-MAXLEN:]
    batch, _ = pack(np.array([0]), np.array([len(newest)]), newest)
    scores = recommender.ranker.encoder(batch)[len(newest) - 1] @ recommender.ranker.encoder.item_table.T
    best = sorted(range(1, len(scores) + 1), key=lambda item: (-scores[item - 1].item(), item))
    kept = [x for x in best if not (filter_viewed and x in known) and (allowed is None or x in allowed)]
    return [[recommender.items.ids[x - 1], scores[x - 1].item()] for x in kept[:k]]


def assert_lists(table: pd.DataFrame, wanted: dict) -> None:
    """Check the table against each target's [item id, score] pairs, in order."""
    assert list(table.columns[1:]) == ["item_id", "score", "rank"]
    assert list(dict.fromkeys(table.iloc[:, 0])) == [target for target, rows in wanted.items() if rows]
    for target, rows in wanted.items():
        own = table[table.iloc[:, 0] == target]
        assert own["item_id"].tolist() == [item for item, _ in rows]
        assert own["rank"].tolist() == list(range(1, len(rows) + 1))
        np.testing.assert_allclose(own["score"], [score for _, score in rows], atol=1e-5)


@pytest.mark.parametrize("filter_viewed", [True, False])
def test_lists_equal_those_of_one_user_at_a_time(filter_viewed):
    users = random_users(seed=1)
    recommender = recommender_of(users)
    order = np.random.default_rng(0).permutation(len(users))
    table = recommender.recommend(100 + order, k=4, filter_viewed=filter_viewed)
    wanted = {100 + u: expected(recommender, users[u], 4, filter_viewed=filter_viewed) for u in order}
    assert_lists(table, wanted)
    assert [str(kind) for kind in table.dtypes] == ["int64", "int64", "float32", "int64"]


def test_ids_may_be_text_and_integers_may_be_given_as_text():
    users = random_users(seed=2)
    recommender = recommender_of(users, text=True)
    wanted = {"u3": expected(recommender, users[3], 3), "u0": expected(recommender, users[0], 3)}
    assert_lists(recommender.recommend(pd.Series(["u3", "u0"]), k=3), wanted)
    allowed = recommender.recommend(["u3"], k=3, items_to_recommend=[10, 20, 30, 40])
    assert_lists(allowed, {"u3": expected(recommender, users[3], 3, allowed=[1, 2, 3, 4])})

    recommender = recommender_of(users)
    assert_lists(recommender.recommend(["103"], k=3), {103: expected(recommender, users[3], 3)})
    assert_lists(recommender.recommend(np.array([103.0]), k=3), {103: expected(recommender, users[3], 3)})
    with pytest.raises(InputError, match=r"no list for 1 of 1 \(unknown: 0103\)"):
        recommender.recommend(["0103"], k=3)


def test_ids_may_have_64_bits_and_not_more():
    ids = Ids(np.array([7, 1234567890123456003, -(2**63), 2**63 - 1]))
    given = ["1234567890123456003", str(2**63 - 1), str(-(2**63)), str(2**63), "9" * 25, "7", "007"]
    assert ids.indices(given, "users").tolist() == [1, 3, 2, -1, -1, 0, -1]
    for wide in (np.array([2**64 - 1], np.uint64), np.array([1e30]), np.array([np.inf])):
        with pytest.raises(InputError, match=r"must fit in 64 bits|contains inf; ids are"):
            ids.indices(wide, "users")


@pytest.mark.parametrize(
    "kind", ["int64[pyarrow]", "uint8[pyarrow]", "double[pyarrow]", "Int64", "uint16", "category", object]
)
def test_ids_may_be_of_any_integer_type(kind):
    recommender = recommender_of(random_users(seed=2))
    users = pd.Series([103, 100], dtype=kind)
    pd.testing.assert_frame_equal(recommender.recommend(users, k=3), recommender.recommend([103, 100], k=3))
    table = pd.DataFrame({"user_id": [7, 8, 7], "item_id": [10, 20, 30], "timestamp": [2, 1, 1]})
    wanted = recommender.recommend([7, 8], k=3, interactions=table)
    for column in table:
        given = table.assign(**{column: table[column].astype(kind)})
        pd.testing.assert_frame_equal(recommender.recommend([7, 8], k=3, interactions=given), wanted)


@pytest.mark.parametrize(
    "times",
    [
        [Decimal(2), Decimal(1), Decimal("1.5")],
        pd.Categorical(["2021-05-13", "2021-05-11", "2021-05-12"]),
        pd.Series(["2021-05-13", "2021-05-11", "2021-05-12"]).astype("date32[pyarrow]"),
        pd.Series(pd.to_datetime(["2021-05-13", "2021-05-11", "2021-05-12"])).astype("timestamp[us][pyarrow]"),
    ],
    ids=["decimal", "category", "date", "timestamp"],
)
def test_items_are_ordered_by_times_of_any_type(times):
    table = pd.DataFrame({"user_id": 7, "item_id": [10, 20, 30], "timestamp": times})
    with warnings.catch_warnings(action="error"):
        own = recommender_of(random_users(seed=2)).recommend([7], 3, interactions=table)
    assert_lists(own, {7: expected(recommender_of(random_users(seed=2)), [2, 3, 1], 3)})


@pytest.mark.parametrize("kind", ["int64", "uint64", "Int64", "int64[pyarrow]", "category", object])
def test_times_of_many_digits_stay_distinct(kind):
    nanoseconds = 1_700_000_000_000_000_000
    times = pd.Series([nanoseconds + 2, nanoseconds, nanoseconds + 1], dtype=kind)
    table = pd.DataFrame({"user_id": 7, "item_id": [10, 20, 30], "timestamp": times})
    own = recommender_of(random_users(seed=2)).recommend([7], 3, interactions=table)
    assert_lists(own, {7: expected(recommender_of(random_users(seed=2)), [2, 3, 1], 3)})


def test_unknown_items_and_users_are_skipped_with_a_warning():
    users = [[1, 5, 20], [20], [2], [7, 19, 18, 3, 17, 2, 6, 20]]
    recommender = recommender_of(users, items=16)
    with pytest.warns(InputWarning) as warned:
        table = recommender.recommend([103, 101, 7, 100, 102], k=6, on_unsupported_targets="warn")
    assert_lists(table, {100 + u: expected(recommender, users[u], 6) for u in (3, 0, 2)})
    assert len(warned) == 1
    line = "users: no list for 2 of 5 (unknown: 7; no item known to the model: 101)"
    assert str(warned[0].message) == line
    assert warned[0].filename == __file__
    with pytest.raises(InputError) as error:
        recommender.recommend([103, 101, 7], k=6)
    assert str(error.value).startswith("users: no list for 2 of 3 (unknown: 7; no item known to the model")
    with pytest.raises(InputError, match=r"no list for 1 of 4 \(no item known to the model: 101\)"):
        recommender.recommend("all", k=6)
    with warnings.catch_warnings(action="error"):
        assert recommender.recommend([101], k=6, on_unsupported_targets="ignore").empty


@pytest.mark.parametrize("name", ["meta", "cuda:9", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError) as caught:
        _find_device(name)
    assert re.fullmatch(rf"device={name}: .+; use device=cpu", str(caught.value))


def test_many_unsupported_users_are_counted_and_five_named():
    with pytest.raises(InputError, match=r"users: no list for 20 of 20 \(unknown: 0, 1, 2, 3, 4, and 15 more\)"):
        recommender_of([[1, 2, 3]]).recommend(range(20), k=1)


def test_lists_are_shorter_if_fewer_candidates_are_left():
    users = [list(range(1, 19)), list(range(1, 21))]
    recommender = recommender_of(users)
    with pytest.warns(InputWarning, match=r"users: no list for 1 of 2: no candidate is left \(101\)") as warned:
        table = recommender.recommend([100, 101], k=5)
    assert (len(warned), warned[0].filename) == (1, __file__)
    assert_lists(table, {100: expected(recommender, users[0], 5), 101: []})
    assert sorted(table["item_id"]) == [190, 200]


def test_targets_without_candidates_are_named_not_counted(monkeypatch):
    monkeypatch.setattr(histories, "USERS_PER_CHUNK", 2)
    recommender = recommender_of([[1, 1], [1, 2], [3, 20], [2, 2, 1], [2]])
    with pytest.warns(InputWarning, match=r"users: no list for 2 of 5: .* \(101, 103\); filter_viewed=false keeps"):
        lists = recommender.lists_of_users("all", 2, items_to_recommend=[10, 20])
    assert len(lists.targets) == lists.table()["user_id"].nunique() == 3
    with warnings.catch_warnings(action="error"):
        assert recommender.recommend([101], 2, items_to_recommend=[10, 20], filter_viewed=False)["rank"].size == 2
    with pytest.warns(InputWarning, match=r"items: no list for 1 of 2: .* \(20\); filter_itself=false keeps"):
        table = recommender.recommend_to_items([10, 20], 2, items_to_recommend=[20])
    assert table["target_item_id"].tolist() == [10]


@pytest.mark.parametrize("text", [False, True])
def test_duplicate_targets_get_one_list(text):
    recommender = recommender_of(random_users(seed=9), text=text)
    users = recommender.histories.users.ids[[2, 0]].tolist()
    with pytest.warns(InputWarning, match="users: duplicates ignored: ") as warned:
        table = recommender.recommend([*users, users[0], users[0]], 3)
    assert (len(warned), warned[0].filename) == (1, __file__)
    pd.testing.assert_frame_equal(table, recommender.recommend(users, 3))
    with pytest.warns(InputWarning, match="items: duplicates ignored: 70"):
        assert len(recommender.recommend_to_items([70, 70], 3)) == 3


def test_only_items_to_recommend_are_recommended():
    users = random_users(seed=3)
    recommender = recommender_of(users)
    allowed = [40, 90, 20, 20, 130]
    table = recommender.recommend([105, 102], k=3, items_to_recommend=allowed)
    assert_lists(table, {100 + u: expected(recommender, users[u], 3, allowed=[2, 4, 9, 13]) for u in (5, 2)})
    with pytest.warns(InputWarning, match=r"items_to_recommend: 2 of 3 ignored \(unknown to the model: 5, 7\)"):
        table = recommender.recommend([105], k=3, items_to_recommend=[5, 40, 7], filter_viewed=False)
    assert table["item_id"].tolist() == [40]


def test_lists_are_made_from_given_interactions():
    users = random_users(seed=4)
    recommender = recommender_of(users)
    table = pd.DataFrame(
        {
            "user_id": [1, 100, 1, 2, 1, 2],
            "item_id": [30, 50, 10, 999, 20, 70],
            "timestamp": [3, 1, 1, 1, 2, 2],
            "price": 9.9,
        }
    )
    wanted = {
        1: expected(recommender, [1, 2, 3], 4),
        2: expected(recommender, [7], 4),
        100: expected(recommender, [5], 4),
    }
    assert_lists(recommender.recommend([1, 2, 100], 4, interactions=table), wanted)
    dated = table.assign(timestamp=pd.to_datetime("2021-05-11") + pd.to_timedelta(table["timestamp"], "D"))
    assert_lists(recommender.recommend([1, 2, 100], 4, interactions=dated), wanted)
    named = dated.rename(columns={"timestamp": "datetime"}).assign(datetime=dated["timestamp"].astype(str))
    assert_lists(recommender.recommend("all", 4, interactions=named), {u: wanted[u] for u in (1, 100, 2)})
    for times in ([3, 1, 1, 1, 2, 2], [3.5, 1, 1, 1, np.int64(2), 2]):
        objects = table.assign(timestamp=pd.Series(times, dtype=object))
        assert_lists(recommender.recommend([1, 2, 100], 4, interactions=objects), wanted)
    with pytest.raises(InputError, match="unknown: 101"):  # is in the run's histories only
        recommender.recommend([101], 4, interactions=table)

    with pytest.warns(InputWarning, match="no column timestamp, so each user's rows count as in time order"):
        table = recommender.recommend([1], 4, interactions=table.drop(columns="timestamp"))
    assert_lists(table, {1: expected(recommender, [3, 1, 2], 4)})


def test_lists_do_not_depend_on_the_size_of_tables(monkeypatch):
    recommender = recommender_of(random_users(seed=5))
    whole = recommender.recommend("all", 3), recommender.recommend_to_items("all", 3)
    monkeypatch.setattr(lists, "MAX_TARGETS_PER_TABLE", 7)
    parts = recommender.recommend("all", 3), recommender.recommend_to_items("all", 3)
    for one, other in zip(whole, parts, strict=True):
        pd.testing.assert_frame_equal(one, other, rtol=1e-5)
    assert len(list(recommender.lists_of_users("all", 3))) == 5


def test_tables_hold_fewer_lists_if_these_are_longer(monkeypatch):
    recommender = recommender_of(random_users(seed=5))
    whole = recommender.recommend("all", ITEMS, filter_viewed=False)
    monkeypatch.setattr(lists, "MAX_ROWS_PER_TABLE", 4 * ITEMS + 1)
    tables = list(recommender.lists_of_users("all", ITEMS, filter_viewed=False))
    assert [len(table) for table in tables] == [4 * ITEMS] * 7 + [2 * ITEMS]
    pd.testing.assert_frame_equal(whole, pd.concat(tables, ignore_index=True), atol=1e-5)
    monkeypatch.setattr(lists, "MAX_ROWS_PER_TABLE", 1)
    assert len(list(recommender.lists_of_items("all", ITEMS))) == ITEMS


def test_similar_items_are_ranked_by_cosine():
    recommender = recommender_of(random_users(seed=6))
    vectors = recommender.ranker.encoder.item_table.detach().double()
    wanted = {}
    for item in (7, 3):
        cosines = torch.nn.functional.cosine_similarity(vectors[item - 1 : item], vectors)
        order = sorted(range(1, ITEMS + 1), key=lambda other: (-cosines[other - 1].item(), other))
        wanted[10 * item] = [[10 * other, cosines[other - 1].item()] for other in order]
    without_itself = {item: rows[1:5] for item, rows in wanted.items()}
    assert_lists(recommender.recommend_to_items([70, 30], 4), without_itself)
    assert_lists(
        recommender.recommend_to_items([70, 30], 4, filter_itself=False),
        {item: rows[:4] for item, rows in wanted.items()},
    )
    table = recommender.recommend_to_items([70], 4, items_to_recommend=[10, 70, 200])
    assert_lists(table, {70: [row for row in wanted[70] if row[0] in (10, 200)]})
    assert table.columns[0] == "target_item_id"


def test_ties_go_to_the_lower_id():
    recommender = recommender_of(random_users(seed=7))
    with torch.no_grad():
        recommender.ranker.encoder.item_table[:] = recommender.ranker.encoder.item_table[0].clone()
    assert recommender.recommend([100], 4, filter_viewed=False)["item_id"].tolist() == [10, 20, 30, 40]
    assert recommender.recommend_to_items([30], 4)["item_id"].tolist() == [10, 20, 40, 50]


TABLE = pd.DataFrame({"user_id": [1, 1], "item_id": [10, 20], "timestamp": [1, 2]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k=0 must be from 1 to 20, the number of items that the model knows"),
        ({"k": -3}, "k=-3 must be from 1 to 20"),
        ({"k": 21}, "k=21 must be from 1 to 20"),
        ({"k": 2.5}, "k=2.5 must be an integer"),
        ({"users": []}, "users is empty; give at least one id"),
        ({"users": np.array([[100, 101]])}, "users is a ndarray of 2 dimensions, not a list of ids; give one column"),
        ({"users": pd.DataFrame({"user_id": [100]})}, "users is a DataFrame of 2 dimensions, not a list of ids; give"),
        ({"users": [100, None]}, "users: id 2 of 2 is missing; remove or fill it"),
        ({"users": [100.5]}, "users contains 100.5; ids are integers or text"),
        ({"users": [True]}, "users contains booleans; ids are integers or text"),
        ({"users": 100}, "users=100 is not a list of ids; write [100]"),
        ({"users": "100"}, "users='100' is not a list of ids; write [100]"),
        (
            {"items_to_recommend": [1, 2]},
            "items_to_recommend must contain an item known to the model, not only 1",
        ),
        ({"items_to_recommend": []}, "items_to_recommend is empty; give at least one item id, or omit it to allow all"),
        ({"users": [[1]]}, "users contains [1]; ids are integers or text"),
        ({"users": [100, True]}, "users contains True; ids are integers or text"),
        ({"users": {"a": 1}}, "users is a dict, not a list of ids; give a list"),
        ({"users": (user for user in [1])}, "users is a generator, not a list of ids; give a list"),
        ({"users": [float("inf")]}, "users contains inf; ids are integers or text"),
        ({"filter_viewed": "no"}, "filter_viewed='no' must be True or False"),
        (
            {"interactions": pd.concat([TABLE, TABLE[["timestamp"]]], axis=1)},
            "interactions: column 'timestamp' appears twice; remove one of the two",
        ),
        (
            {"interactions": pd.concat([TABLE, TABLE[["user_id"]]], axis=1)},
            "interactions: column 'user_id' appears twice; remove one of the two",
        ),
        (
            {"interactions": TABLE.assign(timestamp=pd.Series(["2021-05-11", 1], dtype=object))},
            "interactions, column timestamp: row 2 has 1, which is not an ISO date; give only numbers",
        ),
        (
            {"on_unsupported_targets": "warning"},
            "on_unsupported_targets='warning' must be one of raise, warn, ignore; did you mean warn?",
        ),
        ({"interactions": [1]}, "interactions must be a pandas DataFrame, not a list"),
        (
            {"interactions": TABLE.rename(columns={"user_id": "uid"})},
            "interactions must have a column 'user_id'; its columns are uid, item_id, timestamp",
        ),
        ({"interactions": TABLE[:0]}, "interactions has no rows; give at least one, or omit it"),
        (
            {"interactions": TABLE.assign(item_id=[10, None])},
            "interactions, column item_id: id 2 of 2 is missing; remove or fill it",
        ),
        (
            {"interactions": TABLE.assign(timestamp=[1, None])},
            "interactions, column timestamp: row 2 has no time; give only",
        ),
        (
            {"interactions": TABLE.assign(timestamp=pd.Series([10**5000, 1.5], dtype=object))},
            "interactions, column timestamp has an integer too large for a time; correct it",
        ),
        (
            {"interactions": TABLE.assign(timestamp=pd.Series([10**5000, "2021-05-11"], dtype=object))},
            "interactions, column timestamp: row 1 has a value of type int that is too long to print, which is not an",
        ),
        (
            {"interactions": TABLE.assign(timestamp=pd.Series([[1, 2], "2021-05-11"], dtype=object))},
            "interactions, column timestamp: row 1 has [1, 2], which is not an ISO date; give only numbers",
        ),
        (
            {"interactions": TABLE.assign(timestamp=pd.Series([1, None], dtype=pd.CategoricalDtype([1, 2])))},
            "interactions, column timestamp: row 2 has no time; give only",
        ),
        (
            {"interactions": TABLE.assign(timestamp=["2021-05-11", "soon"])},
            "interactions, column timestamp: row 2 has 'soon', which is not an ISO date",
        ),
    ],
)
def test_invalid_input_is_one_line(wrong, message):
    recommender = recommender_of(random_users(seed=8))
    with pytest.raises(InputError) as error:
        recommender.recommend(**{"users": [100], "k": 3} | wrong)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unknown_items_get_no_list():
    recommender = recommender_of(random_users(seed=8))
    with pytest.raises(InputError, match=r"items: no list for 2 of 3 \(unknown: 5, 7\); remove them, or set"):
        recommender.recommend_to_items([10, 5, 7], 3)
    with pytest.warns(InputWarning, match=r"items: no list for 2 of 3 \(unknown: 5, 7\)$") as warned:
        table = recommender.recommend_to_items([10, 5, 7], 3, on_unsupported_targets="warn")
    assert (len(warned), warned[0].filename) == (1, __file__)
    pd.testing.assert_frame_equal(table, recommender.recommend_to_items([10], 3))
    with warnings.catch_warnings(action="error"):
        assert recommender.recommend_to_items([5], 3, on_unsupported_targets="ignore").empty
    with pytest.raises(InputError, match="on_unsupported_targets='skip' must be one of raise, warn, ignore"):
        recommender.recommend_to_items([10], 3, on_unsupported_targets="skip")


# From a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a file of text ids and a finished run on it."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [f"u{user},i{(user * 7 + time * time) % 23},{time}" for user in range(30) for time in range(6)]
    (folder / "my.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows, "single,i3,1"]))
    (folder / "titles.csv").write_text('item_id,title\ni3,"Three, or so"\nother,Nothing\ni4,\n')
    files = [f"dataset.path={folder / 'my.csv'}", f"dataset.titles.path={folder / 'titles.csv'}"]
    settings = ["dataset=csv", *files, "model=tiny", "trainer=fast", f"data_dir={folder / 'data'}"]
    run = folder / "run"
    run.mkdir()
    train(load(settings), run)
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_recommender_has_the_runs_ids_histories_and_titles(trained):
    recommender = Recommender.from_run(trained / "run")
    table = recommender.recommend(["u3", "single"], k=4)
    assert table["user_id"].tolist() == ["u3"] * 4 + ["single"] * 4
    seen = {f"i{(21 + time * time) % 23}" for time in range(6)}  # the two that were held out too
    assert not seen & set(table["item_id"][:4])
    titles = dict(zip(recommender.items.ids.tolist(), recommender.titles.tolist(), strict=True))
    assert (titles["i3"], titles["i4"], titles["i5"]) == ("Three, or so", "", "")


def test_best_checkpoint_is_loaded(copied):
    before = Recommender.from_run(copied).recommend(["u3"], k=4)
    (copied / "checkpoints" / "last.ckpt").write_bytes(b"")
    pd.testing.assert_frame_equal(before, Recommender.from_run(copied).recommend(["u3"], k=4))


def refused(folder: Path) -> str:
    """Return the error of loading a run, which must be one line."""
    with pytest.raises(InputError) as error:
        Recommender.from_run(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_without_a_finished_run_are_rejected(copied, tmp_path):
    assert refused(tmp_path / "runs") == f"run={tmp_path / 'runs'}: there is no such folder; did you mean {copied}?"
    assert (
        refused(tmp_path)
        == f"run={tmp_path} is not a run folder: it contains 1 run; choose one, such as run={display_path(copied)}"
    )
    assert (
        refused(copied / "tb")
        == f"run={copied / 'tb'} is not a run folder: it has no run.json; choose the folder of a finished run"
    )
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "metrics.json").write_text('{"status": "failed", "error": "heads"}')
    message = "the run failed (heads); choose a finished one"
    assert refused(tmp_path / "job") == f"run={tmp_path / 'job'}: {message}"
    metrics = copied / "metrics.json"
    whole = json.loads(metrics.read_text())
    for status, error, message in [
        ("failed", "the loss is nan", "the run failed (the loss is nan)"),
        ("interrupted", None, "the run was interrupted"),
    ]:
        metrics.write_text(json.dumps(whole | {"status": status, "error": error}))
        assert refused(copied).startswith(f"run={copied}: {message}; resume it")
    metrics.unlink()
    assert refused(copied).startswith(f"run={copied}: the run has not finished; resume it, or choose a finished one")
    metrics.write_text(json.dumps(whole | {"protocol": {}}))
    assert "run.json or metrics.json is malformed ('sha256'); retrain the run" in refused(copied)
    metrics.write_text(json.dumps(whole))
    facts = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(facts | {"config": facts["config"] | {"dataset": "abc"}}))
    assert "config.dataset must be an object, not 'abc'" in refused(copied)
    for broken in ("{", "[]", "null"):
        (copied / "run.json").write_text(broken)
        assert "run.json is not a file that a run writes (" in refused(copied)
        assert refused(copied).endswith("); resume the run with ckpt=last, which tests it again, or choose another one")


class Code:
    """Creates a file when a loader that runs code unpickles it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_malformed_or_pickled_checkpoints_are_rejected(copied, tmp_path):
    best = copied / "checkpoints" / "best.ckpt"
    whole = best.read_bytes()
    content = torch.load(best, weights_only=True)
    mark = tmp_path / "mark"
    torch.save(content | {"state_dict": Code(mark)}, best)
    assert refused(copied).endswith(
        "best.ckpt is not a checkpoint of this project (it contains more than weights, such as"
        " code, which was not run); retrain the run, or choose another one"
    )
    best.write_bytes(pickle.dumps(Code(mark)))
    assert "best.ckpt is not a checkpoint of this project" in refused(copied)
    assert not mark.exists()
    for broken in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint"):
        best.write_bytes(broken)
        assert "best.ckpt is not a checkpoint of this project" in refused(copied)
    torch.save({"weights": torch.zeros(3)}, best)
    assert "best.ckpt is not a checkpoint of this project" in refused(copied)


def test_corrupted_or_missing_checkpoints_are_rejected(copied):
    path = copied / "checkpoints" / "best.ckpt"
    table = Recommender.from_run(copied).ranker.encoder.item_table.detach().numpy().tobytes()
    data = bytearray(path.read_bytes())
    place = data.index(table[:64])
    data[place] ^= 1
    path.write_bytes(data)
    assert "checksum mismatch in" in refused(copied)
    path.unlink()
    assert refused(copied).endswith("best.ckpt, which the run was tested with, is missing; " + RETRAIN_HINT)


def test_checkpoints_of_another_model_are_rejected(copied):
    best = copied / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    state, parameters = content["state_dict"], content["hyper_parameters"]
    torch.save(content | {"hyper_parameters": parameters | {"num_items": 9}}, best)
    assert "best.ckpt was trained on 9 items" in refused(copied)
    torch.save(content | {"state_dict": {name: x for name, x in state.items() if "query" not in name}}, best)
    assert "does not fit its own configuration: Missing key(s)" in refused(copied)
    for broken in ([1], None, {1: torch.zeros(1)}):
        torch.save(content | {"state_dict": broken}, best)
        assert "has no state_dict of named weights; retrain the run" in refused(copied)
    for broken in ({"num_items": None}, {"config": parameters["config"] | {"model": "abc"}}):
        torch.save(content | {"hyper_parameters": parameters | broken}, best)
        assert "its hyper_parameters are malformed); retrain the run" in refused(copied)
    torch.save(content | {"state_dict": {name: x * float("nan") for name, x in state.items()}}, best)
    assert "contains NaN or infinite weights" in refused(copied)


def test_missing_or_malformed_ids_are_rejected(copied):
    (copied / "items.npz").write_bytes(b"PK")
    assert "items.npz is broken" in refused(copied)
    ids = np.array(["a", "b"])
    for form in (
        {"foo": ids},
        {"ids": ids.astype(object)},
        {"ids": ids[None]},
        {"ids": ids[[0, 0]]},
        {"ids": ids, "titles": ids[:1]},
    ):
        np.savez(copied / "items.npz", **form)
        assert refused(copied).endswith("; retrain the run, or choose another one")
    with (copied / "items.npz").open("wb") as file:
        np.save(file, ids)
    assert "items.npz is broken (it does not end like an archive" in refused(copied)
    (copied / "items.npz").unlink()
    assert refused(copied).endswith("has no items.npz, because an older version wrote it; train the run again")


def reconfigure(folder: Path, data_dir: Path | None = None, **dataset: object) -> None:
    """Change the recorded config of a run."""
    info = json.loads((folder / "run.json").read_text())
    info["config"]["dataset"] |= dataset
    info["config"]["data_dir"] = data_dir and str(data_dir)
    (folder / "run.json").write_text(json.dumps(info))


def test_a_published_data_set_is_never_fetched(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it uses the network"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it starts a process"))
    root, before = tmp_path / "wrong", sorted(tmp_path.rglob("*"))
    sources = [{"url": "http://127.0.0.1:1/x"}, {"pip": "recbole==1.2.1"}]
    for name, fix in {
        "ml_100k": f"run python -m sasrec_lab.train dataset=ml_100k data_dir={root}",
        "theirs": f"put the file at {root}/ml-100k/u.data",
        "csv": f"put the file at {root}/ml-100k/u.data",
    }.items():
        reconfigure(copied, name=name, path="ml-100k/u.data", titles=None, sources=sources)
        recommender = Recommender.from_run(copied, data_dir=str(root))
        with pytest.raises(InputError) as caught:
            recommender.recommend(["u3"], k=4)
        assert str(caught.value) == (
            f"data_dir={root} has no ml-100k/u.data, and only training fetches it; set data_dir to the folder that has"
            f" it, pass the histories as interactions, or {fix}"
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_decides_no_place_that_is_written(trained, copied, tmp_path, monkeypatch):
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
    reconfigure(copied, theirs, name="renamed", path=str(trained / "my.csv"))
    assert len(Recommender.from_run(copied).recommend(["u3"], k=4)) == 4
    assert list(theirs.iterdir()) == []
    assert len(list((mine / "sasrec_lab" / "cache").glob("renamed-*"))) == 1
    assert len(Recommender.from_run(copied, data_dir=str(theirs)).recommend(["u3"], k=4)) == 4


def test_hostile_recorded_data_sets_are_one_line(copied):
    url = [{"url": "https://host/x"}]
    for changed in (
        {"path": "../x", "titles": None, "sources": url},
        {"path": "x", "titles": {"path": "../x"}, "sources": url},
        {"path": "x", "titles": None, "sources": [{"pip": "https://host/x.tar.gz"}]},
        {"name": "../../x"},
        {"path": "${oc.env:HOME}"},
    ):
        whole = (copied / "run.json").read_text()
        reconfigure(copied, **changed)
        assert "the run's dataset is not valid: " in refused(copied)
        (copied / "run.json").write_text(whole)


def test_a_recorded_path_that_cannot_exist_is_one_line(copied):
    reconfigure(copied, path="a" * 5000)
    assert "cannot be looked for (File name too long); check the path" in refused(copied)


def test_an_earlier_runs_own_file_among_sources_is_read(trained, copied):
    reconfigure(copied, path=str(trained / "my.csv"), sources=[{"pip": "recbole>=1"}])
    assert len(Recommender.from_run(copied).recommend(["u3"], k=4)) == 4


def test_missing_or_changed_data_set_is_rejected(trained, monkeypatch):
    file = trained / "my.csv"
    text = file.read_text()
    try:
        file.write_text(text + "\nu1,i1,9")
        with pytest.raises(InputError, match=r"was trained on .*; restore that file, or pass the histories as"):
            Recommender.from_run(trained / "run").recommend(["u3"], k=4)
        file.unlink()
        recommender = Recommender.from_run(trained / "run")
        with pytest.raises(InputError, match=r"my\.csv: no such file"):
            recommender.recommend(["u3"], k=4)
        histories = pd.DataFrame({"user_id": ["new"], "item_id": ["i3"], "timestamp": [1]})
        assert len(recommender.recommend(["new"], k=4, interactions=histories)) == 4  # needs no data set
    finally:
        file.write_text(text)
