"""Estimates of a run's memory: exact for parameters, never above what a step of training needs."""

import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_data import holdout_of, hourly, random_users
from torch.autograd.graph import saved_tensors_hooks

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import QueryTime
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.negatives import SharedSampler, draw_candidates
from sasrec_lab.data.synthetic import _needs, make_interactions
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.memory_needs import batch_needs, model_needs, sampling_needs
from sasrec_lab.training.optimizer import build_optimizer

USERS = random_users(0)
HOLDOUT = holdout_of(USERS, maxlen=8, times=hourly(USERS), query_time=QueryTime.target)
TINY = ["dataset=synthetic", "dataset.synthetic.users=30", "dataset.synthetic.items=20", "trainer=fast"]


def config(*overrides: str):
    return load(["dataset=synthetic", *overrides, "model.dim=16", "model.maxlen=8"])


def sizes(needs) -> list[int]:
    return [need.size for need in needs]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.blocks=0"],
        ["model.ff_dim=24", "model.output_projection=true"],
        ["model.share_items=false", "model.pos_emb=none"],
        ["model.pos_emb=sinusoidal", "model.blocks=3"],
        ["model=gru4rec", "model.blocks=2", "model.pos_emb=learned"],
        ["model=hstu", "model.heads=2"],
        ["model=hstu_meta", "model.qk_dim=3", "model.v_dim=5", "model.time_bias=none"],
        ["model=fuxi", "model.heads=2", "model.ff_dim=24"],
        ["model=fuxi", "model.qk_dim=3", "model.v_dim=5", "model.time_bias=none"],
        ["model=ligr", "model.time_bias=decay"],
        ["model=ligr"],
        ["model=ligr", "model.ff_dim=24", "model.activation=relu", "model.output_projection=false"],
        ["model=ligr", "model.pos_emb=relative", "model.heads=2"],
        ["model.activation=swiglu", "model.pos_emb=rope", "model.heads=2"],
        ["optimizer.name=rowwise_adam", "loss=bce"],
    ],
)
def test_parameters_and_moments_are_counted(overrides):
    cfg = config(*overrides)
    assert sum(sizes(model_needs(cfg, HOLDOUT.num_items))) == held_after_a_step(cfg)


def test_muon_has_one_moment_of_each_matrix():
    cfg = config("optimizer.name=muon", "model.blocks=3")
    vectors = 3 * (4 + 3 + 2) * 16 * 4  # bytes of the blocks' norms and biases, which have two
    assert sum(sizes(model_needs(cfg, HOLDOUT.num_items))) == held_after_a_step(cfg) - vectors


def held_after_a_step(cfg) -> int:
    """Return the bytes of parameters, gradients and moments, except those of the last norm, which are not counted."""
    model = SequentialRecommender(HOLDOUT.num_items, cfg)
    batch = batch_of(cfg)
    optimizer = build_optimizer(model.encoder, cfg.optimizer, cfg.trainer)
    model.batch_loss(batch).backward()
    dense = [p.grad for p in model.encoder.parameters() if p.grad is not None and not p.grad.is_sparse]
    optimizer.step()
    held = [*model.encoder.parameters(), *model.encoder.buffers(), *dense]
    held += [moment for state in optimizer.state.values() for name, moment in state.items() if name != "step"]
    final_norm = 4 * 2 * cfg.model.dim * 4 * cfg.model.final_norm
    return sum(tensor.numel() * tensor.element_size() for tensor in held) - final_norm


def batch_of(cfg):
    """Return a batch of all windows, with negatives if the loss has any."""
    data = SequenceData(HOLDOUT, cfg).train_dataloader().dataset
    return data[np.arange(len(HOLDOUT.window_users)), [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "loss",
    [
        "softmax",
        "softmax loss.rdrop=1 model.dropout=0.2",
        "bce loss.negatives=50",
        "bpr loss.negatives=50",
        "sampled_softmax",
        "sampled_softmax loss.sampler=sequence",
        "sampled_softmax loss.sampler=uniform loss.negatives=50",
    ],
)
@pytest.mark.parametrize(
    "model",
    [
        *(f"model.norm={norm} model.ff_dim=1" for norm in ("sasrec", "pre", "post")),
        "model=ligr model.ff_dim=1",
        "model=gru4rec model.blocks=2",
        "model=hstu",
        "model=fuxi model.ff_dim=1",
        "model=bert4rec model.ff_dim=1",
    ],
)
@pytest.mark.usefixtures("both_forms")
def test_a_batch_needs_at_least_its_estimate(model, loss):
    cfg = config(*f"{model} loss={loss}".split(), "batch_size=1000")
    recommender = SequentialRecommender(HOLDOUT.num_items, cfg)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = batch_of(cfg)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = recommender.batch_loss(batch)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in recommender.parameters()}
    needed = sum(size for pointer, size in saved.items() if pointer not in parameters)
    needed += 0 if batch.negatives is None else batch.negatives.items.nbytes
    assert result.requires_grad
    assert 0 < sum(sizes(batch_needs(cfg, HOLDOUT, 1))) <= needed


def peak_bytes(make: Callable[[], object]) -> int:
    """Return the most memory that Python and NumPy had at once during the call."""
    tracemalloc.start()
    try:
        make()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_draws_need_at_least_their_estimate():
    cfg = config("loss=sampled_softmax", "loss.negatives=50000", "evaluation.sampled=2000")
    shared, candidates = sizes(sampling_needs(cfg, HOLDOUT))
    sampler = SharedSampler(HOLDOUT, cfg.loss.negatives)
    labels = batch_of(cfg).labels
    assert 0 < shared <= peak_bytes(lambda: sampler.draw(np.arange(1), labels, np.random.default_rng(0)))
    sets = []
    draw = cfg.evaluation.draw
    peak = peak_bytes(lambda: sets.extend(draw_candidates(HOLDOUT, draw, 2000, 0, stage) for stage in ("val", "test")))
    assert 0 < candidates <= peak


@pytest.mark.parametrize(("users", "items", "mean_length"), [(2000, 50, 5), (20, 20_000, 3), (10, 100, 1000)])
def test_generating_needs_at_least_its_estimate(users, items, mean_length):
    made = [f"dataset.synthetic.{name}" for name in (f"users={users}", f"items={items}", f"mean_length={mean_length}")]
    synthetic = config(*made).dataset.synthetic
    assert 0 < sum(sizes(_needs(synthetic))) <= peak_bytes(lambda: make_interactions(synthetic))


# A user's view


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["model.maxlen=1000000000000"], "model.maxlen=1000000000000, model.dim=64"),
        (["model.dim=10000000"], "model.dim=10000000, model.blocks=2"),
        (["loss=bce", "loss.negatives=100000000000"], "loss.negatives=100000000000, batch_size=128"),
        (["evaluation.sampled=100000000000"], "evaluation.sampled=100000000000"),
        (["dataset.synthetic.items=1000000000000"], "dataset.synthetic.items=1000000000000"),
    ],
)
def test_what_cannot_fit_ends_in_one_line_before_training(words, keys, train_here, tmp_path):
    done = train_here(*TINY, *words, "hydra.run.dir=run")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {keys}: the run needs at least ")
    assert done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "failed"


def test_sizes_that_are_not_used_refuse_nothing(train_here):
    done = train_here(*TINY, "batch_size=1000000000000", "evaluation.batch_size=1000000000000", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr


def test_running_out_of_memory_names_the_keys_to_lower(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(SequentialRecommender, "training_step", lambda *_: torch.empty(2**50))
    done = train_here(*TINY, "loss=bce", "hydra.run.dir=run")
    assert done.returncode == 1
    line = (
        "out of memory (4503599627370496 bytes more were needed); lower batch_size=128, loss.negatives=1, model.dim=64,"
        " model.maxlen=200 or evaluation.batch_size=1024"
    )
    assert done.stderr.splitlines()[-1] == f"error: {line}"
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (results["status"], results["error"]) == ("failed", line)
