"""`loss.rdrop`: two passes over each batch, against what they are made of, and what training with them does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_data import holdout_of, random_users
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import TrainingBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.losses import LOSSES
from sasrec_lab.training.memory_needs import batch_needs

pytestmark = pytest.mark.usefixtures("one_thread", "both_forms")

HOLDOUT = holdout_of(random_users(3, users=40, items=25), maxlen=8)
SMALL = ["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=8", "model.dropout=0.3"]


def model_of(cfg: TrainConfig) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(HOLDOUT.num_items, cfg)


def batch_of(cfg: TrainConfig) -> TrainingBatch:
    return SequenceData(HOLDOUT, cfg).train_dataloader().dataset[np.arange(len(HOLDOUT.window_users)), [0, 0, 0]]


def log_probabilities(model: SequentialRecommender, batch: TrainingBatch) -> Tensor:
    """Return log p (R, V) of the labels that have a target, in one pass."""
    states, table = model.encoder.states_and_table(batch.inputs, batch.labels.rows)
    return (states @ table.T).log_softmax(1)[batch.labels.targets > 0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean over labels of both directions of the Kullback-Leibler divergence, given logarithms."""
    both = (F.kl_div(x, y, reduction="batchmean", log_target=True) for x, y in ((p, q), (q, p)))
    return sum(both) / 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.similarity=cosine", "model.temperature=0.1"],
        ["model.output_bias=true", "model.head_transform=true", "model.temperature=2"],
        ["model=bert4rec", "model.maxlen=8", "model.dim=16"],
        ["model=gru4rec", "model.maxlen=8", "model.dim=16"],
    ],
    ids=" ".join,
)
def test_the_loss_of_a_batch_is_that_of_two_passes(words):
    """The second pass draws its dropout from the same generator, after the first."""
    cfg = load([*SMALL, *words, "loss.rdrop=1.5"])
    model, batch = model_of(cfg), batch_of(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # initial probabilities hardly differ
    torch.manual_seed(7)
    found = model.batch_loss(batch)
    torch.manual_seed(7)
    passes = [log_probabilities(model, batch) for _ in range(2)]
    targets = batch.labels.targets[batch.labels.targets > 0] - 1
    expected = sum(F.nll_loss(log_p, targets) for log_p in passes) / 2 + 1.5 * divergence(*passes)
    assert divergence(*passes) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    parameters = list(model.encoder.parameters())
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    largest = max(gradient.norm() for gradient in expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6 * largest


def test_off_is_one_pass_and_the_same_bits(monkeypatch):
    cfg = load(SMALL)
    model, batch = model_of(cfg), batch_of(cfg)
    torch.manual_seed(7)
    states, vectors = model.encoder.states_and_table(batch.inputs)
    rest = torch.rand(1)  # what the generator draws next
    calls, forward = [], model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *given: (calls.append(1), forward(*given))[1])
    torch.manual_seed(7)
    found = model.batch_loss(batch)
    assert (len(calls), torch.equal(torch.rand(1), rest)) == (1, True)
    targets = (batch.labels.targets - 1).clamp(min=0)
    expected = (-(states @ vectors.T).log_softmax(1).gather(1, targets[:, None])[:, 0])[batch.labels.targets > 0].mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def trained_divergence(rdrop: float) -> float:
    """Return the divergence of two passes after thirty steps."""
    cfg = load([*SMALL, f"loss.rdrop={rdrop}", "model.dim=16"])
    model, batch = model_of(cfg), batch_of(cfg)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model.batch_loss(batch).backward()
        optimizer.step()
    with torch.no_grad():
        return float(divergence(*(log_probabilities(model, batch) for _ in range(2))))


def test_passes_come_closer_with_a_larger_factor():
    none, some, much = (trained_divergence(rdrop) for rdrop in (0, 1, 10))
    assert much < 0.7 * some
    assert some < 0.9 * none


def test_a_weight_of_an_interaction_is_that_of_its_divergence():
    cfg = load([*SMALL, "loss.rdrop=2"])
    model, batch = model_of(cfg), batch_of(cfg)

    def loss_with(weight: float) -> Tensor:
        torch.manual_seed(7)
        weights = torch.full_like(batch.labels.targets, weight, dtype=torch.float)
        return model.batch_loss(replace(batch, labels=replace(batch.labels, weights=weights)))

    torch.testing.assert_close(loss_with(3.0), 3 * loss_with(1.0))
    assert loss_with(0.0) == 0


def test_history_stays_excluded():
    cfg = load([*SMALL, "loss.rdrop=2", "loss.exclude=history"])
    model, batch = model_of(cfg), batch_of(cfg)
    torch.manual_seed(7)
    found = model.batch_loss(batch)
    torch.manual_seed(7)
    everything = model.batch_loss(replace(batch, labels=replace(batch.labels, excluded=None)))
    assert 0 < found < everything
    found.backward()
    assert all(x.grad.isfinite().all() for x in model.encoder.parameters())


def test_the_states_of_both_passes_are_counted_as_memory():
    (one,), (two,) = (batch_needs(load([*SMALL, f"loss.rdrop={rdrop}"]), HOLDOUT, 1) for rdrop in (0, 1))
    assert two.size == 2 * one.size
    assert two.keys == (*one.keys, "loss.rdrop=1.0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.rdrop=-1"], "loss.rdrop=-1.0 must be at least 0"),
        (["loss.rdrop=inf"], "loss.rdrop=inf must be a finite number"),
        (["loss.rdrop=null"], "loss.rdrop=null must have a value"),
        (
            ["loss=bce", "loss.rdrop=1"],
            "loss.rdrop=1.0 only applies to loss=softmax, which compares with every item; set it to 0 for loss=bce",
        ),
        (
            ["model.dropout=0", "loss.rdrop=1"],
            "loss.rdrop=1.0 compares two passes that differ by dropout, but the model's do not, so that their"
            " divergence is 0; set model.dropout=0.2, for example, or loss.rdrop=0",
        ),
        (
            ["model.blocks=0", "model.dropout_input=0", "loss.rdrop=1"],
            "loss.rdrop=1.0 compares two passes that differ by dropout, but the model's do not",
        ),
        (
            ["model.dropout=0", "model.dropout_items=0.5", "loss.rdrop=1"],
            "loss.rdrop=1.0 compares two passes that differ by dropout, but the model's do not",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(InputError) as caught:
        load(words)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "word", ["dropout_attention", "dropout_inner", "dropout_input", "dropout_output", "token_dropout"]
)
def test_any_dropout_makes_passes_differ(word):
    cfg = load([*SMALL, "model.dropout=0", f"model.{word}=0.5", "loss.rdrop=1"])
    model, batch = model_of(cfg), batch_of(cfg)
    with torch.no_grad():
        assert divergence(*(log_probabilities(model, batch) for _ in range(2))) > 1e-4


def test_the_opening_line_names_it():
    cfg = load(["loss.rdrop=0.5", "loss.horizon=2"]).loss
    assert LOSSES[cfg.name].describe(cfg) == "softmax (horizon 2, rdrop 0.5)"


def test_a_resumed_run_equals_an_uninterrupted_one(train_here, tmp_path):
    words = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=30", "model=tiny"]
    words += ["loss.rdrop=2", "optimizer.lr=0.01", "trainer=cpu", "batch_size=16"]
    for folder, parts in {"whole": ([4],), "parts": ([2], [4, "ckpt=last"])}.items():
        for epochs, *more in parts:
            done = train_here(*words, f"trainer.max_epochs={epochs}", f"hydra.run.dir={folder}", *more)
            assert (done.returncode, done.stderr) == (0, "")
    whole, parts = (
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in ("whole", "parts")
    )
    for name, expected in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], expected), name
    metrics = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "parts")]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["config"]["loss"]["rdrop"] == 2.0
