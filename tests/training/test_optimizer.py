"""Row-wise Adam compared with Adam and with a loop, first on a toy model, then with the model and Lightning."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from small_data import holdout_of, random_users
from small_trainer import small_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.optimizer import RowwiseAdam, learning_rate_factor

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS, DIM, STEPS = 12, 4, 6
HYPER = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-8}


class Toy(nn.Module):
    """A table and a matrix."""

    def __init__(self, sparse: bool):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(ITEMS, DIM, sparse=sparse)
        self.matrix = nn.Linear(DIM, 3)

    def forward(self, items: Tensor) -> Tensor:
        return self.matrix(self.items(items)).sin().sum()


def batches(steps: int = STEPS) -> list[Tensor]:
    """Return a few items per step, some of them twice, and never the last item."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, ITEMS - 1, (5,), generator=random) for _ in range(steps)]


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: list[Tensor]) -> None:
    for items in steps:
        optimizer.zero_grad()
        model(items).backward()
        optimizer.step()


def rowwise(model: nn.Module) -> RowwiseAdam:
    return RowwiseAdam(model.parameters(), **HYPER, fused=True)


def assert_same(found: nn.Module, expected: nn.Module, exact: bool = False) -> None:
    for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name, **({"rtol": 0, "atol": 0} if exact else {}))


def test_first_step_equals_adam():
    found, expected = Toy(sparse=True), Toy(sparse=False)
    train(found, rowwise(found), batches(1))
    train(expected, torch.optim.Adam(expected.parameters(), **HYPER), batches(1))
    assert_same(found, expected)


def test_it_equals_adam_if_every_step_touches_every_row():
    found, expected = Toy(sparse=True), Toy(sparse=False)
    steps = [torch.arange(ITEMS).repeat(times) for times in (1, 2, 1, 3)]
    train(found, rowwise(found), steps)
    train(expected, torch.optim.Adam(expected.parameters(), **HYPER), steps)
    assert_same(found, expected)


def test_it_equals_adam_without_sparse_gradients():
    found, expected = Toy(sparse=False), Toy(sparse=False)
    train(found, rowwise(found), batches())
    train(expected, torch.optim.Adam(expected.parameters(), **HYPER, fused=True), batches())
    assert_same(found, expected, exact=True)


def test_it_equals_a_loop_over_the_touched_rows():
    found, reference = Toy(sparse=True), Toy(sparse=False)
    optimizer = rowwise(found)
    others = torch.optim.Adam(reference.matrix.parameters(), **HYPER)
    moments = {row: (torch.zeros(DIM), torch.zeros(DIM)) for row in range(ITEMS)}
    for step, items in enumerate(batches(), start=1):
        train(found, optimizer, [items])
        reference.zero_grad()
        reference(items).backward()
        others.step()
        with torch.no_grad():
            for row in set(items.tolist()):
                gradient, (mean, square) = reference.items.weight.grad[row], moments[row]
                mean = 0.9 * mean + (1 - 0.9) * gradient
                square = 0.98 * square + (1 - 0.98) * gradient**2
                moments[row] = mean, square
                size = (square / (1 - 0.98**step)).sqrt() + 1e-8
                reference.items.weight[row] -= 0.05 * (mean / (1 - 0.9**step)) / size
        assert_same(found, reference)


def test_untouched_rows_keep_values_and_moments():
    model = Toy(sparse=True)
    optimizer = rowwise(model)
    train(model, optimizer, [torch.arange(ITEMS)])
    state = optimizer.state[model.items.weight]
    before = [tensor.detach().clone() for tensor in (model.items.weight, state["exp_avg"], state["exp_avg_sq"])]
    train(model, optimizer, [torch.tensor([3, 3, 5])])
    for old, new in zip(before, (model.items.weight, state["exp_avg"], state["exp_avg_sq"]), strict=True):
        assert (old != new).any(1).nonzero().flatten().tolist() == [3, 5]


def test_gradients_of_two_backward_passes_add_up():
    found, expected = Toy(sparse=True), Toy(sparse=False)
    for model, optimizer in ((found, rowwise(found)), (expected, torch.optim.Adam(expected.parameters(), **HYPER))):
        for items in batches(2):
            model(items).backward()
        optimizer.step()
    assert_same(found, expected)


def test_saved_state_resumes(tmp_path):
    whole = Toy(sparse=True)
    train(whole, rowwise(whole), batches())
    model = Toy(sparse=True)
    optimizer = rowwise(model)
    train(model, optimizer, batches()[:3])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    saved, states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Toy(sparse=True)
    resumed.load_state_dict(saved)
    optimizer = rowwise(resumed)
    optimizer.load_state_dict(states)
    train(resumed, optimizer, batches()[3:])
    assert_same(resumed, whole, exact=True)


def test_warm_up_and_cosine_are_the_literal_ones():
    factors = [learning_rate_factor(step, 2, 6) for step in (0, 1, 2, 4, 6, 9)]
    assert factors == pytest.approx([0.5, 1, 1, 0.5, 0, 0])
    assert [learning_rate_factor(step, 2, None) for step in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    assert learning_rate_factor(0, 0, 4) == 1
    assert learning_rate_factor(3, 5, 4) == 0.8  # a warm-up that never ends


# With the model and Lightning

HOLDOUT = holdout_of(random_users(0, users=60), maxlen=6)
SETTINGS = [
    "dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=6", "batch_size=9", "optimizer.lr=.01",
    "optimizer.name=rowwise_adam",
]  # fmt: skip
LOSSES = [
    ["loss=sampled_softmax", "loss.negatives=7"],
    ["loss=gbce", "loss.negatives=4"],
    ["loss=bce", "loss.negatives=2"],
]


def config(*settings: str) -> TrainConfig:
    return load([*SETTINGS, *settings])


def fit(cfg: TrainConfig, folder: Path, epochs: int, ckpt: Path | None = None, **flags) -> SequentialRecommender:
    pl.seed_everything(0, verbose=False)
    model = SequentialRecommender(HOLDOUT.num_items, cfg)
    trainer = small_trainer(folder, epochs, limit_val_batches=0, **flags)
    trainer.fit(model, SequenceData(HOLDOUT, cfg), ckpt_path=ckpt, weights_only=True)
    return model


@pytest.mark.parametrize("share_items", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=[loss[0] for loss in LOSSES])
def test_gradients_have_only_the_rows_of_the_batch(loss, share_items):
    cfg = config(*loss, f"model.share_items={share_items}")
    model = SequentialRecommender(HOLDOUT.num_items, cfg)
    batch = SequenceData(HOLDOUT, cfg).train_dataloader().dataset[np.array([3, 1]), [0, 0, 0, 0]]
    model.batch_loss(batch).backward()
    drawn = batch.negatives.items.flatten().tolist()
    inputs, compared = set(batch.inputs.items.tolist()), {*batch.labels.targets.tolist(), *drawn} - {0}
    tables = {
        "encoder.input_items.weight": inputs | compared if share_items else inputs,
        "encoder.output_items.weight": compared,
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad.is_sparse == (name in tables)
        if name in tables:
            assert {row + 1 for row in parameter.grad.coalesce().indices()[0].tolist()} == tables[name]


@pytest.mark.parametrize("share_items", [True, False])
def test_resumed_training_equals_uninterrupted_training(share_items, tmp_path):
    cfg = config(*LOSSES[0], f"model.share_items={share_items}", "optimizer.warmup_steps=9")
    whole = fit(cfg, tmp_path / "whole", 4)
    fit(cfg, tmp_path / "half", 2)
    resumed = fit(cfg, tmp_path / "half", 4, tmp_path / "half" / "last.ckpt")
    assert_same(resumed, whole, exact=True)


def test_it_trains_with_accumulation_and_averaging(tmp_path):
    cfg = config(*LOSSES[0])
    model = fit(cfg, tmp_path, 8, accumulate_grad_batches=2, callbacks=[EMAWeightAveraging(decay=0.9)])
    start = SequentialRecommender(HOLDOUT.num_items, cfg)
    batch = SequenceData(HOLDOUT, cfg).train_dataloader().dataset[np.arange(40), [0, 0, 0, 0]]
    losses = []
    for each in (start, model):
        each.encoder.eval()
        table = each.encoder.item_table.detach()
        logits = each.encoder(batch.inputs).detach() @ table.T
        losses.append(F.cross_entropy(logits, batch.labels.targets - 1, ignore_index=-1).item())
    assert losses[1] < losses[0] - 0.05
