"""A finished run as an object: records, ranks, vectors whose products are the scores, and lists."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import in_this_process

from sasrec_lab import InputError, Run, load_run
from sasrec_lab.recommend.recommender import Recommender

WORDS = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=40", "trainer=fast"]
MODELS = {
    "sasrec": ["model=tiny"],
    "bias": ["model=tiny", "model.output_bias=true"],
    "ease": ["model=ease"],
    "all": ["model=tiny", "dataset.holdout=none"],
    "untested": ["model=tiny", "evaluation.test=false"],
}

pytestmark = pytest.mark.usefixtures("one_thread")


def train_models(folder: Path) -> None:
    command = in_this_process("sasrec_lab.train", folder)
    for name, words in MODELS.items():
        done = command(*WORDS, *words, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def runs(made_once) -> Path:
    return made_once("finished-runs", train_models)


def test_records_are_those_of_the_files(runs):
    run = load_run(runs / "sasrec")
    assert isinstance(run, Run)
    results, info = (json.loads((runs / f"sasrec/{name}.json").read_text()) for name in ("metrics", "run"))
    assert run.results == results
    assert (run.metrics, run.baselines, run.protocol) == tuple(
        results[key] for key in ("metrics", "baselines", "protocol")
    )
    assert run.config["model"] == info["config"]["model"]
    assert run.info == {key: value for key, value in info.items() if key != "config"}
    ndcg = run.metrics["test/ndcg@10"]
    assert repr(run) == f"Run({str(runs / 'sasrec')!r}: SASRec, synthetic, test/ndcg@10 {ndcg:.4f})"


def test_a_run_that_saw_no_test_has_ranks_of_validation(runs):
    run = load_run(runs / "untested")
    ranks = run.ranks["rank"].to_numpy()
    hits = (ranks > 0) & (ranks <= 10)
    value = run.metrics["val/ndcg@10"]
    assert (1 / np.log2(1 + ranks[hits])).sum() / len(ranks) == pytest.approx(value, abs=1e-6)
    assert repr(run).endswith(f"val/ndcg@10 {value:.4f})")


def test_ranks_give_the_metric(runs):
    run = load_run(runs / "sasrec")
    assert {"user", "target", "rank"} <= set(run.ranks)
    ranks = run.ranks["rank"].to_numpy()
    hits = (ranks > 0) & (ranks <= 10)
    assert (1 / np.log2(1 + ranks[hits])).sum() / len(ranks) == pytest.approx(run.metrics["test/ndcg@10"], abs=1e-6)


@pytest.mark.parametrize("name", ["sasrec", "bias"])
def test_products_of_vectors_are_the_scores(runs, name):
    run = load_run(str(runs / name))
    users = run.ranks["user"].tolist()[:5]
    vectors, items = run.user_vectors(users), run.item_vectors
    assert (vectors.index.name, items.index.name) == ("user_id", "item_id")
    assert vectors.index.tolist() == users
    assert vectors.shape[1] == items.shape[1] == run.config["model"]["dim"] + (name == "bias")
    scores = vectors.to_numpy() @ items.to_numpy().T
    lists = run.recommend(users, 3)
    for user, row in zip(users, scores, strict=True):
        for _, line in lists[lists["user_id"] == user].iterrows():
            assert row[items.index.get_loc(line["item_id"])] == pytest.approx(line["score"], abs=1e-5)


def test_the_encoder_has_the_tested_weights(runs):
    run = load_run(runs / "sasrec")
    saved = torch.load(runs / "sasrec/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert not run.encoder.training
    assert all((x == saved[f"encoder.{name}"]).all() for name, x in run.encoder.state_dict().items())


def test_methods_take_what_the_recommender_takes():
    for name in ("recommend", "recommend_to_items", "user_vectors"):
        own, other = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Run, Recommender))
        assert sorted(own) == sorted(other), name


def test_a_model_without_epochs_has_lists_but_no_vectors(runs):
    run = load_run(runs / "ease")
    assert len(run.recommend([1], k=4)) == 4
    assert len(run.recommend_to_items([1], k=4)) == 4
    for ask in (lambda: run.encoder, lambda: run.item_vectors, lambda: run.user_vectors([1])):
        with pytest.raises(InputError, match="ease has no encoder and no vectors, but weights between items"):
            ask()


def test_what_a_run_lacks_is_one_line(runs, tmp_path):
    with pytest.raises(InputError, match=r"all has no ranks\.npz, because it held nothing out"):
        _ = load_run(runs / "all").ranks
    with pytest.raises(InputError, match=r"^folder=.*sasrecc: there is no such folder; did you mean"):
        load_run(runs / "sasrecc")
    with pytest.raises(InputError, match=r"is not a run folder: it contains 5 runs"):
        load_run(runs)
    with pytest.raises(InputError, match="folder is empty"):
        load_run("")
    with pytest.raises(InputError, match=r"users: no list for 1 of 1 \(unknown: 1000\)"):
        load_run(runs / "sasrec").user_vectors([1000])
