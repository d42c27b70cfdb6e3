"""Lists of validation and test rows: they give the metrics of the run, and equal lists by definition."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Done, in_this_process

from sasrec_lab.config.composition import load
from sasrec_lab.errors import InputError, InputWarning
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.recommend.split_lists import lists_of_split
from sasrec_lab.train import train

DATA = ["dataset=synthetic", "dataset.synthetic.users=80", "dataset.synthetic.items=40"]
SMALL = ["model=tiny", "trainer.max_epochs=1", "evaluation.batch_size=16", "evaluation.k=[1,5,10,20]"]
BY_TIME = ["dataset.holdout=time", "dataset.time_split.val=0.6", "dataset.time_split.test=0.7"]
RUNS = {
    "last": SMALL,
    "averaged": [*SMALL, "optimizer.ema=0.9", "optimizer.lr=0.05", "batch_size=8"],
    "seen": [*SMALL, "evaluation.filter_seen=false", "trainer.precision=bf16-mixed"],
    "some": [*SMALL, "dataset.val_users=30"],
    "all": [*SMALL, *BY_TIME, "dataset.time_split.target=all", "dataset.time_split.cold_users=keep"],
    "successive": [*SMALL, *BY_TIME, "dataset.time_split.target=successive"],
    "times": ["model=hstu", "model.dim=8", "model.maxlen=10", *SMALL[1:]],
    "weights": ["model=itemknn", "model.neighbors=8", *BY_TIME, "dataset.time_split.target=all", *SMALL[2:]],
    "ease": ["model=ease", "dataset.catalogue=train", "dataset.holdout=time", *SMALL[2:]],
}


@pytest.fixture(params=RUNS, scope="module")
def run(request, made_once) -> Path:
    words = [*DATA, *RUNS[request.param], "trainer.accelerator=cpu"]
    return made_once(f"split-{request.param}", lambda folder: train(load(words), folder))


def evaluated(folder: Path, *words: str) -> Done:
    return in_this_process("sasrec_lab.evaluate.__main__", folder)(*words)


@pytest.mark.parametrize("split", ["val", "test"])
def test_lists_give_the_metrics_of_the_run(run, split, recommend_here, tmp_path):
    done = recommend_here(f"run={run}", f"split={split}", "k=20", "output=lists.parquet", "device=cpu")
    assert (done.returncode, done.stderr) == (0, "")
    words = ["lists=lists.parquet", f"run={run}", f"split={split}", "k=[1,5,10,20]", "output=metrics.json"]
    done = evaluated(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    expected = json.loads((run / "metrics.json").read_text())["metrics"]
    measured = {name: value for name, value in expected.items() if name.startswith(split) and "@" in name}
    assert len(measured) >= 12
    assert {name: found[name] for name in measured} == measured  # to the last digit


def test_a_list_has_the_best_items_in_order(run):
    recommender = Recommender.from_run(run, device="cpu")
    table = lists_of_split(recommender, "test", 12).table()
    keys = ["user_id", "row"] if "row" in table else ["user_id"]
    assert not table.duplicated([*keys, "item_id"]).any()
    falls = table.groupby(keys)["score"].diff().dropna()
    assert (falls <= 1e-5).all()
    with np.load(run / "ranks.npz") as columns:
        targets = pd.DataFrame({"user_id": columns["user"], "item_id": columns["target"], "true": columns["rank"]})
        if "row" in table:
            targets["row"] = columns["row"]
    both = targets.merge(table, on=[*keys, "item_id"], how="left")
    assert both["rank"].fillna(0).tolist() == both["true"].where(both["true"] <= 12, 0).tolist()


def test_a_row_column_is_there_for_several_rows_of_a_user(run):
    table = lists_of_split(Recommender.from_run(run, device="cpu"), "test", 3).table()
    assert ("row" in table) == ("successive" in run.name)
    assert list(table)[:4] == ["user_id", "item_id", "score", "rank"]


def test_lists_of_a_test_that_was_not_to_be_seen_warn(made_once):
    words = [*DATA, *SMALL, "evaluation.test=false", "trainer.accelerator=cpu"]
    recommender = Recommender.from_run(made_once("split-no-test", lambda folder: train(load(words), folder)))
    with pytest.warns(InputWarning, match=r"measured nothing on the test \(evaluation.test=false\)"):
        lists_of_split(recommender, "test", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split=test"], "split=test makes a list for each row; give the file to write: output=lists.parquet"),
        (["split=train", "output=x.csv"], "split=train is not one of val, test"),
        (["split=test", "users=all"], "give either users=... or items=...: ids in brackets such as [7,12], all, or a"),
        (["split=test", "output=x.csv", "filter_viewed=false"], "filter_viewed has no effect on split=test"),
        (["split=val", "output=x.csv", "query_time=last"], "query_time has no effect on split=val, whose lists are"),
        (["split=val", "output=x.csv", "items_to_recommend=[1]"], "items_to_recommend has no effect on split=val"),
        (["split=test", "output=x.csv", "k=41"], "k=41 must be from 1 to 40, the number of items that the model"),
    ],
)
def test_a_mistake_is_one_line(words, message, recommend_here, made_once):
    run = made_once("split-last", lambda folder: train(load([*DATA, *SMALL]), folder))
    done = recommend_here(f"run={run}", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_run_without_a_holdout_has_no_split(tmp_path):
    train(load([*DATA, "model=tiny", "trainer.max_epochs=1", "dataset.holdout=none"]), tmp_path)
    with pytest.raises(InputError, match=r"holds nothing out \(dataset.holdout=none\); choose a run with a holdout"):
        lists_of_split(Recommender.from_run(tmp_path), "test", 3)


def test_a_run_measures_its_own_lists(tmp_path, train_here, recommend_here, report_here):
    (tmp_path / "my.csv").write_text(
        "user_id,item_id,ts\n" + "".join(f"{u},{u * t % 11},{t}\n" for u in range(30) for t in range(6))
    )
    (tmp_path / "items.csv").write_text("item_id,genre\n" + "".join(f"{item},{item % 3}\n" for item in range(11)))
    words = ["dataset=csv", "dataset.path=my.csv", "dataset.time=ts", "dataset.features.path=items.csv"]
    words += [
        "dataset.features.categories=[genre]",
        "evaluation.k=4",
        "evaluation.lists=4",
        "evaluation.monitor=val/mrr",
    ]
    models = {"runs/0": ["model=itemknn"], "runs/1": ["model=tiny", "model.items=both", "trainer.max_epochs=1"]}
    for folder, model in models.items():
        done = train_here(*words, *model, f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
        assert recommend_here(f"run={folder}", "split=test", "k=4", "output=lists.csv").returncode == 0
        done = evaluated(tmp_path, "lists=lists.csv", f"run={folder}", "output=out.json")
        assert done.returncode == 0, done.stderr
        expected = json.loads((tmp_path / "out.json").read_text())["metrics"]
        found = json.loads((tmp_path / folder / "metrics.json").read_text())["metrics"]
        names = {name for name in found if name.startswith("test/") and name in expected}
        beyond = {f"test/{name}@4" for name in ("coverage", "gini", "novelty", "popularity")}
        assert beyond | {"test/ndcg@4", "test/recall@4"} <= names
        assert ("test/diversity@4" in names) == (folder == "runs/1")
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    done = report_here("runs", "--csv", "all.csv")
    assert done.returncode == 0, done.stderr
    assert "lists of the test beyond accuracy: mean ± std over seeds" in done.stdout
    assert "test/coverage@4" in (tmp_path / "all.csv").read_text()
