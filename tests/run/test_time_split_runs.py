"""Runs with the split by time: what they print and write, and what a report makes of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

KEYS = [
    "dataset=csv",
    "dataset.path=my.csv",
    "dataset.holdout=time",
    "model=tiny",
    "trainer.max_epochs=1",
    "evaluation.filter_seen=false",
]


def write_data(folder: Path) -> None:
    """Write 40 users in 100 hours; those after the 30th begin late, and item 99 is only in the last hours."""
    random = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        first = 70 if user >= 30 else 0
        for hour in sorted(random.integers(first, 100, 12)):
            item = 99 if hour > 95 and user % 2 else random.integers(1, 20)
            lines.append(f"u{user},{item},{900_000_000 + 3600 * hour}")
    (folder / "my.csv").write_text("\n".join(lines) + "\n")


def ndcg_of_row(ranks: list[int], k: int) -> float:
    gain = sum(1 / math.log2(1 + rank) for rank in ranks if 1 <= rank <= k)
    return gain / sum(1 / math.log2(2 + place) for place in range(min(k, len(ranks))))


@pytest.mark.parametrize("target", ["first", "last", "all", "successive"])
def test_a_run_writes_and_prints_the_split(target, tmp_path, train_here, report_here):
    write_data(tmp_path)
    for seed in (0, 1):
        words = [*KEYS, f"dataset.time_split.target={target}", f"seed={seed}", f"hydra.run.dir=runs/{seed}"]
        done = train_here(*words, *(["loss=bce"] if seed else []))
        assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "runs/0/metrics.json").read_text())
    protocol, metrics = written["protocol"], written["metrics"]
    split = protocol["time_split"]
    assert protocol["held_out_users"] == split["test"]["users"]
    assert protocol["candidates"]["full"] == split["train"]["items"] == 19  # not the late item
    assert split["test"]["cold_interactions"] > 0
    tested = {"first": "first item", "last": "last item", "all": "all items", "successive": "each item"}[target]
    users = f"{tested} that training knows after {split['test']['date']} of {protocol['held_out_users']} users"
    assert f"Test: {users}, ranked among all 19 items\n" in done.stdout
    assert f"       training up to {split['val']['date']}: {split['train']['users']} users, 19 items" in done.stdout
    assert f"       test after {split['test']['date']}: {protocol['held_out_users']} users" in done.stdout

    with np.load(tmp_path / "runs/0/ranks.npz") as columns:
        ranks = dict(columns)
    assert len(ranks["user"]) == split["test"]["targets"]
    assert len(np.unique(ranks["user"])) == split["test"]["users"]
    assert (np.unique(ranks["rank"]) > 0).all()
    assert 99 not in ranks["target"]
    assert ("row" in ranks) == (target in ("all", "successive"))
    rows = ranks.get("row", np.arange(len(ranks["rank"])))
    of_rows = [ranks["rank"][rows == row].tolist() for row in np.unique(rows)]
    assert len(of_rows) == split["test"]["rows"]
    assert metrics["test/ndcg@10"] == pytest.approx(np.mean([ndcg_of_row(each, 10) for each in of_rows]))
    assert ("test/map@10" in metrics) == (target == "all")
    assert ("test/ndcg@10-by-user" in metrics) == (target == "successive")
    if target == "successive":
        each = np.array([ndcg_of_row(row, 10) for row in of_rows])
        by_user = [each[ranks["user"] == user].mean() for user in np.unique(ranks["user"])]
        assert metrics["test/ndcg@10-by-user"] == pytest.approx(np.mean(by_user))

    done = report_here("runs")
    assert done.returncode == 0, done.stderr
    assert users in done.stdout
    assert "is not tested" not in done.stdout
    assert "vs baseline" in done.stdout or "p (Holm)" in done.stdout


def test_models_without_training_take_the_split(tmp_path, train_here):
    pytest.importorskip("scipy")
    write_data(tmp_path)
    words = [word for word in KEYS if word != "model=tiny"]
    done = train_here(*words, "model=ease", "dataset.time_split.target=all", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["test/recall@10"] > 0


def test_a_finished_run_with_the_split_is_found_again(tmp_path, train_here, recommend_here):
    write_data(tmp_path)
    words = [*KEYS, "dataset.time_split.test=1998-07-12", "dataset.time_split.val=0.4", "hydra.run.dir=run"]
    assert train_here(*words).returncode == 0
    done = train_here(*words)
    assert done.returncode == 0
    assert "already finished" in done.stdout
    done = recommend_here("run=run", "users=[u35]", "k=3")
    assert done.returncode == 0, done.stderr
