"""The commands with models that have no epochs: train, resume, sweep, recommend, report, export."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from commands import in_this_process

from sasrec_lab.recommend.recommender import Recommender

DATA = ("dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=50")


@pytest.mark.slow
def test_ease_runs_in_a_fresh_process_like_an_encoder(train_command, tmp_path):
    done = train_command(*DATA, "model=ease", "evaluation.sampled=10", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "model  EASE in closed form, regularization 500.0; 2,500 weights" in done.stdout
    assert "unused: objective, loss, optimizer, batch_size, trainer, dataset.weight, dataset.windows" in done.stdout
    assert re.search(r"  EASE +0\.\d{4} +0\.\d{4} +0\.\d{4}\n +popularity +0\.\d{4}", done.stdout)
    assert "\nweights      weights.npz\nrun folder   run\n" in done.stdout
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (written["status"], written["best_epoch"], written["epochs"]) == ("finished", None, 0)
    assert written["baselines"]["markov"].keys() == written["metrics"].keys()
    assert {"val/ndcg@10", "test/ndcg@10", "test/mrr-sampled10"} <= written["metrics"].keys()
    with np.load(tmp_path / "run" / "ranks.npz") as ranks:
        hits = (ranks["rank"] > 0) & (ranks["rank"] <= 10)
        assert hits.mean() == pytest.approx(written["metrics"]["test/recall@10"])
    again = train_command(*DATA, "model=ease", "evaluation.sampled=10", "hydra.run.dir=run", "ckpt=last")
    assert "already finished, nothing to run; its results:" in again.stdout


@pytest.mark.parametrize("model", ["ease", "itemknn"])
def test_lists_are_those_of_the_scores(model, train_here, tmp_path, monkeypatch):
    assert train_here(*DATA, f"model={model}", "hydra.run.dir=run").returncode == 0
    monkeypatch.setenv("SASREC_LAB_DATA", str(tmp_path / "cache"))
    recommender = Recommender.from_run(tmp_path / "run", data_dir=str(tmp_path / "cache"))
    matrix = recommender.ranker.weights.matrix
    dense = matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
    ids = recommender.items.ids
    histories = pd.DataFrame({"user_id": [1, 1, 1, 2], "item_id": ids[[3, 8, 3, 5]], "datetime": range(4)})
    lists = recommender.recommend([1, 2], 4, histories)
    for user, items in ((1, [3, 8]), (2, [5])):
        scores = dense[items].sum(0)
        scores[items] = -np.inf
        order = np.argsort(-scores, kind="stable")
        best = [item for item in order if model == "ease" or scores[item] > 0][:4]
        found = lists[lists["user_id"] == user]
        assert found["item_id"].tolist() == ids[best].tolist()
        assert found["score"].tolist() == pytest.approx(scores[best].tolist(), rel=1e-5)
    allowed = recommender.recommend([1], 50, histories, items_to_recommend=ids[[1, 3, 9]], filter_viewed=False)
    assert set(allowed["item_id"]) <= set(ids[[1, 3, 9]])
    similar = recommender.recommend_to_items(ids[[7]], 3)
    assert similar["item_id"].tolist() == ids[np.argsort(-dense[7], kind="stable")[:3]].tolist()
    assert similar["score"].tolist() == pytest.approx(np.sort(dense[7])[::-1][:3].tolist())


def test_a_sweep_compares_them_with_an_encoder(train_here, report_here, tmp_path):
    sweep = ("-m", "model=ease,itemknn,tiny", *DATA, "trainer=fast", "hydra.sweep.dir=sweep")
    done = train_here(*sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job 0-model=ease: test/ndcg@10 0." in done.stdout
    for model, name in (("ease", "EASE"), ("itemknn", "ItemKNN"), ("tiny", "SASRec")):
        assert re.search(rf"model={model} +{name} ", report_here("sweep").stdout)
    protocols = [json.loads(file.read_text())["protocol"] for file in (tmp_path / "sweep").glob("*/metrics.json")]
    assert len(protocols) == 3
    assert protocols[0] == protocols[1] == protocols[2]
    assert "job 1-model=itemknn already finished, skipped" in train_here(*sweep).stdout


def test_what_a_model_without_epochs_cannot_do_is_one_line(train_here, recommend_here, tmp_path):
    assert train_here(*DATA, "model=itemknn", "dataset.holdout=none", "hydra.run.dir=run").returncode == 0
    export = in_this_process("sasrec_lab.export.__main__", tmp_path)
    for done, message in (
        (
            export("run", "x.pt2"),
            "run=run has model=itemknn, which has no encoder and is not exported; use sasrec-recommend",
        ),
        (recommend_here("run=run", "items=[1]", "device=cuda"), "device=cuda: ItemKNN makes its lists on the CPU; use"),
        (
            train_here("model=ease", "ckpt=x.ckpt"),
            "ckpt=x.ckpt: model=ease has no epochs to continue from; remove ckpt",
        ),
    ):
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1
    (tmp_path / "run" / "weights.npz").write_bytes(b"")
    done = recommend_here("run=run", "items=[1]")
    assert done.stderr.startswith("error: run/weights.npz is not a file that a run writes (")
