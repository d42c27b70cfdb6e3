"""The evaluate command, on lists of another system: what counts, what is reported, and what is refused."""

import json
from collections.abc import Callable
from math import log2
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Done, in_a_fresh_process, in_this_process

from sasrec_lab.config.composition import load
from sasrec_lab.train import train

# by last item: u1 has the test target a, u2 b, u3 c; training: u1 has b and d, u2 d, u3 d twice, u4 is too short
MY = """user_id,item_id,ts
u1,b,1
u1,d,2
u1,e,3
u1,a,4
u2,d,1
u2,a,2
u2,b,3
u3,d,1
u3,d,2
u3,a,3
u3,c,4
u4,d,1
"""
DATA = ["dataset=csv", "dataset.path=my.csv", "dataset.time=ts"]
BY_TIME = ["dataset.holdout=time", "dataset.time_split.val=1.5", "dataset.time_split.test=2.5"]


@pytest.fixture
def evaluate(tmp_path) -> Callable[..., Done]:
    """Run the command in a folder with the data set and lists, given as lines of lists.csv."""
    (tmp_path / "my.csv").write_text(MY)
    run = in_this_process("sasrec_lab.evaluate.__main__", tmp_path)

    def command(lines: str, *words: str) -> Done:
        (tmp_path / "lists.csv").write_text(lines)
        return run("lists=lists.csv", *words)

    return command


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "out.json").read_text())["metrics"]


def test_a_rank_may_be_any_number(evaluate, tmp_path):
    done = evaluate("user_id,item_id,rank\nu1,a,1\nu2,b,9000000000000000\n", *DATA, "k=3", "output=out.json")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path)["test/hit_rate@3"] == pytest.approx(1 / 3)


def test_lists_with_ranks_are_measured_by_hand(evaluate, tmp_path):
    lines = "user_id,item_id,rank\nu1,c,2\nu1,a,3\nu1,d,1\nu2,b,1\nu2,c,2\n"
    done = evaluate(lines, *DATA, "k=[1,3]", "output=out.json")
    assert done.returncode == 0, done.stderr
    found = metrics_of(tmp_path)
    assert found["test/ndcg@1"] == pytest.approx(1 / 3)
    assert found["test/ndcg@3"] == pytest.approx((1 / log2(4) + 1 + 0) / 3)
    assert found["test/recall@3"] == pytest.approx(2 / 3)
    assert found["test/map@3"] == found["test/mrr@3"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert found["test/precision@3"] == pytest.approx(2 / 9)
    assert found["test/hit_rate@1"] == pytest.approx(1 / 3)
    assert found["test/coverage@1"] == pytest.approx(2 / 5)
    assert found["test/novelty@1"] == pytest.approx((0 + log2(3)) / 2)
    assert found["test/popularity@1"] == pytest.approx((4 + 1) / 2)
    assert found["test/gini@1"] == pytest.approx((2 * 1 + 4 * 1) / (5 * 2))
    assert "test/diversity@1" not in found
    assert done.stderr.splitlines() == [
        "note: 1 of 3 rows have no list, and count as misses",
        "note: 1 of 2 lists have fewer than 3 items",
    ]
    assert done.stdout.splitlines()[0] == "Test: last item of 3 users, csv"
    assert done.stdout.splitlines()[1].split() == ["@1", "@3"]
    assert done.stdout.splitlines()[2].split() == ["ndcg", "0.3333", "0.5000"]


def test_validation_is_named_in_the_first_line(evaluate):
    done = evaluate("user_id,item_id,rank\nu1,a,1\n", *DATA, "split=val")
    assert done.stdout.splitlines()[0] == "Validation: the targets of 3 users, csv"


def test_scores_order_a_list_and_its_rows_break_ties(evaluate, tmp_path):
    by_score = "user_id,item_id,score\nu2,c,0.5\nu2,b,0.5\nu2,d,-1\nu2,a,2e3\n"
    assert evaluate(by_score, *DATA, "k=4", "output=out.json").returncode == 0
    expected = metrics_of(tmp_path)
    by_rank = "user_id,item_id,rank,score\nu2,c,2,0\nu2,b,3,9\nu2,d,4,0\nu2,a,1,0\n"  # ranks count, not scores
    assert evaluate(by_rank, *DATA, "k=4", "output=out.json").returncode == 0
    assert metrics_of(tmp_path) == expected
    assert expected["test/mrr@4"] == pytest.approx(1 / 3 / 3)


def test_ids_may_be_unknown_and_are_counted(evaluate, tmp_path):
    lines = "user_id,item_id,rank\nu1,x,1\nu1,a,2\nu9,a,1\nu4,a,1\nu8,a,1\n"
    done = evaluate(lines, *DATA, "output=out.json")
    assert done.stderr.splitlines() == [
        "note: ignored: the lists of 2 users unknown to the data set (u9, u8)",
        "note: ignored: the lists of 1 user without a target (u4)",
        "note: 2 of 3 rows have no list, and count as misses",
        "note: 1 of 2 entries are items outside the catalogue of 5 items",
    ]
    found = metrics_of(tmp_path)
    assert {name.partition("@")[2] for name in found} == {"2"}  # no list is longer
    assert found["test/mrr@2"] == pytest.approx(1 / 2 / 3)
    assert found["test/novelty@2"] == pytest.approx(log2(3))  # no training user has x or a
    assert found["test/coverage@2"] == pytest.approx(1 / 5)


def test_several_targets_and_names_of_the_data_set(evaluate, tmp_path):
    """After 2.5, of items of training (b and d): u2 has b; with cold items u1 has e and a, u2 b, u3 a and c."""
    (tmp_path / "my.csv").write_text(MY.replace("user_id,item_id", "uid,sku"))
    words = [*DATA, "dataset.user=uid", "dataset.item=sku", *BY_TIME, "dataset.time_split.target=all"]
    words += ["dataset.time_split.val=1", "dataset.time_split.cold_items=keep", "dataset.catalogue=all"]
    (tmp_path / "my.csv").write_text((tmp_path / "my.csv").read_text() + "u5,b,0\nu5,d,1\nu6,e,0\nu6,b,1\nu6,a,2\n")
    lines = "uid,sku,rank\nu1,a,2\nu1,b,1\nu1,e,3\n"
    done = evaluate(lines, *words, "k=3", "output=out.json")
    assert done.returncode == 0, done.stderr
    found = metrics_of(tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())["protocol"]["time_split"]["test"]["rows"]
    ideal = 1 + 1 / log2(3)
    assert found["test/ndcg@3"] == pytest.approx((1 / log2(3) + 1 / log2(4)) / ideal / rows)
    assert found["test/map@3"] == pytest.approx((1 / 2 + 2 / 3) / 2 / rows)
    assert found["test/recall@3"] == pytest.approx(1 / rows)


def test_successive_rows_need_their_column(evaluate, tmp_path):
    words = [*DATA, *BY_TIME, "dataset.time_split.target=successive", "dataset.time_split.cold_items=keep"]
    words += ["dataset.time_split.val=1", "dataset.time_split.cold_users=keep", "dataset.catalogue=all"]
    (tmp_path / "my.csv").write_text(MY + "u5,b,0\nu5,d,1\n")
    done = evaluate("user_id,item_id,rank\nu1,a,1\n", *words)
    assert done.stderr.startswith("error: lists must have a column 'row', the place of the list's row in the test from")
    done = evaluate("user_id,item_id,rank,row\nu1,e,1,0\nu1,e,1,1\nu1,a,2,1\n", *words, "k=2", "output=out.json")
    assert done.returncode == 0, done.stderr
    found = metrics_of(tmp_path)
    assert found["test/mrr@2"] == pytest.approx((1 + 1 / 2 + 0 + 0 + 0) / 5)
    assert found["test/mrr@2-by-user"] == pytest.approx(((1 + 1 / 2) / 2 + 0 + 0) / 3)
    done = evaluate("user_id,item_id,rank,row\nu1,a,1,2\n", *words)
    assert done.stderr == "error: lists, row 1: row=2 is one of user u2; correct the user or the row\n"


def test_diversity_takes_the_features_of_the_data_set(evaluate, tmp_path):
    (tmp_path / "items.csv").write_text("item_id,genre\na,x|y\nb,y\nc,\nd,z\n")
    features = ["dataset.features.path=items.csv", "dataset.features.categories=[genre]"]
    lines = "user_id,item_id,rank\nu1,a,1\nu1,b,2\nu1,d,3\nu2,e,1\n"
    done = evaluate(lines, *DATA, *features, "k=[2,3]", "output=out.json")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path)["test/diversity@2"] == pytest.approx((1 + 0) / 2)
    assert metrics_of(tmp_path)["test/diversity@3"] == pytest.approx((1 + 3 + 2) / 3 / 2)
    # with a run of the same data, whose model reads no features
    (tmp_path / "run").mkdir()
    train(load([*DATA, f"dataset.path={tmp_path}/my.csv", "model=tiny", "trainer.max_epochs=1"]), tmp_path / "run")
    expected = metrics_of(tmp_path)
    done = evaluate(lines, "run=run", *DATA, *features, "k=[2,3]", "output=out.json")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path) == expected
    assert evaluate(lines, "run=run", "k=[2,3]", "output=out.json").returncode == 0
    assert metrics_of(tmp_path) == {name: x for name, x in expected.items() if "diversity" not in name}
    for words, key in (
        ([*DATA, "dataset.holdout=time", *features], "dataset.holdout"),
        (["dataset=ml_100k"], "dataset"),
        ([*DATA, "dataset.path=other.csv", *features], "dataset.path"),
    ):
        done = evaluate(lines, "run=run", *words)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {key} is not as in the run, whose own data set is measured; with run=")
    done = evaluate(lines, *DATA, "dataset.features.path=no.csv", "dataset.features.categories=[genre]")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no.csv" in done.stderr


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ("a\n1\n", ["k=0"], "k=0 must be at least 1"),
        ("a\n1\n", [], "give the held-out items: run=<folder of a finished run>, or dataset=... as for sasrec-train"),
        ("a\n1\n", ["run=nowhere"], "run=nowhere: there is no such folder; check the path"),
        ("a\n1\n", ["runs=x"], "unknown key 'runs'; did you mean run?"),
        ("a\n1\n", [*DATA, "dataset.pat=x"], "unknown key 'dataset.pat'; did you mean dataset.path?"),
        ("a\n1\n", ["dataset=csv,ml_1m"], "dataset=csv,ml_1m has several values; run the command once for each"),
        ("a\n1\n", [*DATA, "+dataset.pat=x"], "unknown key 'dataset.pat'; did you mean dataset.path?"),
        ("a\n1\n", [*DATA, "dataset.holdout=none"], "dataset=csv holds nothing out (dataset.holdout=none), so lists"),
        ("a\n1\n", [*DATA, "output=x.csv"], "output=x.csv must end in .json; omit it to print the metrics only"),
        ("a\n1\n", [*DATA, "output=no/x.json"], "output=no/x.json: there is no folder no; create it"),
        (
            "user,item_id,rank\nu1,a,1\n",
            DATA,
            "lists must have a column 'user_id'; its columns are user, item_id, rank",
        ),
        ("user_id,rank\nu1,1\n", DATA, "lists must have a column 'item_id'; its columns are user_id, rank; rename one"),
        (
            "user_id,item_id\nu1,a\n",
            DATA,
            "lists must have a column 'rank' or 'score'; its columns are user_id, item_id",
        ),
        ("user_id,item_id,rank\n", DATA, "lists has no rows; give a row for each item of a list"),
        ("user_id,item_id,rank\nu1,a,0\n", DATA, "lists, row 1: rank=0 must be an integer; the first item has rank 1"),
        ("user_id,item_id,rank\nu1,a,1.5\n", DATA, "lists, row 1: rank=1.5 must be an integer"),
        ("user_id,item_id,rank\nu1,b,2\nu1,a,\n", DATA, "lists, row 2: rank is missing; give a number"),
        ("user_id,item_id,rank\nu1,b,first\n", DATA, "lists, row 1: rank is 'first'; give a number"),
        ("user_id,item_id,rank\nu1,b,1\n,a,2\n", DATA, "lists, column user_id: id 2 of 2 is missing"),
        (
            "user_id,item_id,rank\nu1,b,1\nu2,b,1\nu1,b,2\n",
            DATA,
            "lists, rows 1 and 3: a list of user u1 has item b twice; remove one",
        ),
        (
            "user_id,item_id,rank\nu1,b,1\nu1,c,1\n",
            DATA,
            "lists, row 2: rank=1 of user u1 is given to several items; number the items of a list, or give equal ones",
        ),
        (
            "user_id,item_id,rank\n1,b,1\n2,c,1\n",
            DATA,
            "lists has no list of a user with a target (users such as 1, 2, not u1, u2, u3); check the ids and",
        ),
    ],
)
def test_a_mistake_is_one_line(lines, words, message, evaluate):
    done = evaluate(lines, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_equal_items_may_share_the_worse_rank(evaluate, tmp_path):
    lines = "user_id,item_id,rank\nu1,b,2\nu1,a,2\nu1,c,3\n"
    assert evaluate(lines, *DATA, "k=[1,2]", "output=out.json").returncode == 0
    assert [metrics_of(tmp_path)[f"test/recall@{k}"] for k in (1, 2)] == pytest.approx([0, 1 / 3])


def test_a_fresh_process_reads_parquet_and_prints_help(tmp_path):
    (tmp_path / "my.csv").write_text(MY)
    table = pd.DataFrame({"user_id": ["u1", "u2"], "item_id": ["a", "a"], "score": np.float32([1, 2])})
    table.to_parquet(tmp_path / "lists.parquet")
    run = in_a_fresh_process("sasrec_lab.evaluate", tmp_path)
    done = run("lists=lists.parquet", *DATA, "k=1")
    assert done.returncode == 0, done.stderr
    assert "  recall                  0.3333\n" in done.stdout
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lists        .csv or .parquet file with columns user_id, item_id, and rank" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "lists.parquet", "my.csv"]
