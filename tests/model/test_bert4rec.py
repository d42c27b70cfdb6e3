"""BERT4Rec: the mask's vector, states that depend on both sides, and what only they can learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import in_a_fresh_process, in_this_process
from small_data import holdout_of, masked_items
from small_models import SEQUENCES, packed, random_encoder, states_of
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.data.batches import MASK
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.training.lightning_module import SequentialRecommender

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = load(["dataset=csv", "dataset.path=x.csv", "model=bert4rec"])
SMALL = replace(CONFIG.model, dim=12, maxlen=9)
MASKED = [[3], [5, MASK, 5], [MASK, *range(2, 9), MASK], [7, MASK], [MASK], [4, 20, MASK, 2, 11, 3]]
HISTORIES = [[2, 7], [9, 1, 4, 4], [12], list(range(1, 13))]


def on_padded_rows(model: Encoder, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Return each sequence's states (n, D), computed again on left-padded rows with a key mask."""
    rows = torch.tensor([[-1] * (9 - len(items)) + items for items in sequences])  # (B, 9)
    table = torch.cat([torch.zeros(1, 12), model.mask, model.input_items.weight])  # padding, mask, items
    x = table[rows + 1] + model.positions.weight.flip(0)
    is_pad = (rows < 0)[:, None, None]  # (B, 1, 1, 9)
    for block in model.blocks:
        z = block.attention_norm(x)
        q, k, v = (f(z).view(len(rows), 9, 2, 6).transpose(1, 2) for f in (block.query, block.key, block.value))
        weights = (q @ k.mT / 6**0.5).masked_fill(is_pad, -torch.inf).softmax(-1)
        x = x + block.output((weights @ v).transpose(1, 2).flatten(2))
        z = block.feed_forward_norm(x)
        x = x + block.feed_forward.outer(F.gelu(block.feed_forward.inner(z)))
    return [row[9 - len(items) :] for row, items in zip(x, sequences, strict=True)]


def test_states_equal_those_of_padded_rows_with_a_key_mask():
    model = random_encoder(SMALL).eval()
    torch.set_default_dtype(torch.double)
    try:
        expected = torch.cat(on_padded_rows(model, MASKED))
    finally:
        torch.set_default_dtype(torch.float)
    batch = packed(MASKED)
    torch.testing.assert_close(torch.cat(states_of(model(batch), MASKED)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.newest(batch), expected[batch.last], rtol=0, atol=1e-12)
    assert model.blocks[0].feed_forward.inner.out_features == 4 * 12


@pytest.mark.parametrize(
    "changes", [{}, {"block": "ligr"}, {"pos_emb": "rope"}, {"head_transform": True, "output_bias": True}], ids=str
)
def test_newest_is_the_state_of_the_mask(changes):
    words = ["model=bert4rec", "model.maxlen=9", "model.dim=12", *(f"model.{key}={x}" for key, x in changes.items())]
    model = random_encoder(load(["dataset=csv", "dataset.path=x.csv", *words]).model).eval()
    flat = np.concatenate(HISTORIES)
    ends = np.cumsum([len(items) for items in HISTORIES])
    batch = masked_items(9).inference(flat, np.append(0, ends[:-1]), ends)
    with torch.no_grad():
        newest, states = model.newest(batch), model.head(model(batch))
    torch.testing.assert_close(newest, states[batch.last], rtol=0, atol=1e-12)
    alone = packed([[*HISTORIES[-1], MASK]])
    torch.testing.assert_close(newest[-1:], model.newest(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "words", [[], ["model.norm=sasrec"], ["model.norm=post"], ["model.block=ligr"], ["model=gru4rec"]]
)
def test_states_of_some_tokens_are_those_of_all(words):
    """As training needs of the last block only the states of masked items."""
    words = ["model=bert4rec", *words, "model.maxlen=9", "model.dim=12", "model.dropout=0"]
    model = random_encoder(load(["dataset=csv", "dataset.path=x.csv", *words]).model)
    batch, rows = packed(MASKED[2:] if model.mask is not None else SEQUENCES), torch.tensor([0, 2, 2, 9, 14, 17])
    (model(batch)[rows].square() * torch.arange(1, 7)[:, None]).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    states = model(batch, rows)
    torch.testing.assert_close(states, model(batch)[rows], rtol=0, atol=1e-12)
    (states.square() * torch.arange(1, 7)[:, None]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changed", [0, 4, 8])
def test_states_depend_on_both_sides_and_on_no_other_sequence(changed):
    model = random_encoder(SMALL).eval()
    with torch.no_grad():
        before = states_of(model(packed(SEQUENCES)), SEQUENCES)
        sequences = [list(items) for items in SEQUENCES]
        sequences[2][changed] = 17
        after = states_of(model(packed(sequences)), SEQUENCES)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        if number == 2:
            assert (one != other).any(1).all()
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_mask_starts_as_an_item_and_is_trained():
    torch.manual_seed(0)
    model = Encoder(1000, replace(CONFIG.model, dropout=0.0, dropout_output=None))
    assert model.mask.shape == (1, 64)
    assert 0.7 < model.mask.std() / model.input_items.weight.std() < 1.4
    states = model(packed([[5, MASK, 9], [8, 8]]))[:5]
    states.square().sum().backward()
    assert model.mask.grad.abs().min() > 0
    assert (model.input_items.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [4, 7, 8]


def test_sparse_gradients_have_the_rows_of_the_batch_only():
    words = ["optimizer.name=rowwise_adam", "loss=sampled_softmax", "loss.negatives=3", "model.dim=8", "model.maxlen=9"]
    cfg = load(["dataset=csv", "dataset.path=x.csv", "model=bert4rec", *words])
    model = SequentialRecommender(500, cfg)
    model.encoder(packed([[40, MASK, 90], [MASK, 70]])).sum().backward()
    grad = model.encoder.input_items.weight.grad
    assert grad.is_sparse
    assert grad.coalesce().indices()[0].tolist() == [39, 69, 89]
    optimizer = model.configure_optimizers()["optimizer"]
    before = model.encoder.input_items.weight.detach().clone()
    optimizer.step()
    changed = (model.encoder.input_items.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [39, 69, 89]


def test_masked_copy_needs_attention_to_later_items():
    """The first of two equal halves, masked, can only be read from the second half."""
    random, items = np.random.default_rng(0), 10
    halves = random.integers(1, items + 1, (600, 3))
    held_out = np.ones((600, 2), int)
    holdout = holdout_of([*np.concatenate([halves, halves, held_out], 1).tolist()], maxlen=6)
    objective = masked_items(6, share=0.3)

    def accuracy(causal: bool) -> float:
        torch.manual_seed(0)
        model = Encoder(items, replace(CONFIG.model, dim=32, maxlen=6, dropout=0.0, dropout_output=None, blocks=1))
        for block in model.blocks:
            block.causal = causal
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(250):
            windows = random.integers(0, 500, 64)
            inputs, labels = objective.training(holdout, windows, np.random.default_rng([1, step]))
            scores = model(inputs)[labels.rows] @ model.item_table.T
            loss = F.cross_entropy(scores, labels.targets - 1, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        unseen = np.concatenate([halves[500:], halves[500:]], 1)
        unseen[:, 0] = MASK
        with torch.no_grad():
            states = model.eval()(packed(unseen.tolist(), 6))[:600:6]
        best = (states @ model.item_table.T).argmax(1) + 1
        return float((best.numpy() == halves[500:, 0]).mean())

    assert accuracy(causal=False) > 0.95
    assert accuracy(causal=True) < 0.25


@pytest.mark.slow
def test_every_stage_works_in_a_fresh_process(tmp_path):
    words = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=40", "model=bert4rec"]
    words += ["model.dim=8", "model.maxlen=12", "objective.replace=mixed", "tensorboard.attention_users=1"]
    train, train_here = (run("sasrec_lab.train", tmp_path) for run in (in_a_fresh_process, in_this_process))
    for run, *more in (["whole", "trainer.max_epochs=4"], ["part", "trainer.max_epochs=2"]):
        done = train_here(*words, "trainer=cpu", f"hydra.run.dir={run}", *more)
        assert (done.returncode, done.stderr) == (0, "")
    done = train(*words, "trainer=cpu", "hydra.run.dir=part", "trainer.max_epochs=4", "ckpt=last")
    assert (done.returncode, done.stderr) == (0, "")
    whole, part = (torch.load(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("whole", "part"))
    assert "encoder.mask" in whole
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    ranks = [np.load(tmp_path / run / "ranks.npz") for run in ("whole", "part")]
    assert all((ranks[0][name] == ranks[1][name]).all() for name in ranks[0])
    lists = in_a_fresh_process("sasrec_lab.recommend", tmp_path)("run=whole", "users=all", "k=3", "output=lists.csv")
    assert (lists.returncode, lists.stderr) == (0, "")
    recommender = Recommender.from_run(tmp_path / "whole", device="cpu")
    assert len(np.unique(np.loadtxt(tmp_path / "lists.csv", delimiter=",", skiprows=1)[:, 0])) > 50
    done = in_a_fresh_process("sasrec_lab.export", tmp_path)("whole", "encoder.pt2")
    assert (done.returncode, done.stderr) == (0, "")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    history = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 7])  # as long as it may be
    batch = masked_items(12).inference(history.numpy(), np.array([0]), np.array([11]))
    with torch.no_grad():
        expected = recommender.ranker.encoder.newest(batch) @ recommender.ranker.encoder.item_table.T
        torch.testing.assert_close(program(history), expected[0])
