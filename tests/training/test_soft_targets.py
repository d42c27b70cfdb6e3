"""Targets that share their probability with later items, or with all items, against a loop over distributions."""

import numpy as np
import pytest
import torch
from small_data import holdout_of, random_users
from torch import Tensor

from sasrec_lab.config.composition import load
from sasrec_lab.config.training import LossConfig, LossName
from sasrec_lab.data.batches import Labels
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.losses import LOSSES, ItemTable

pytestmark = pytest.mark.usefixtures("one_thread", "both_forms")

DIM, ITEMS, COUNTS = 8, 23, [1, 7, 12, 4]
SETTINGS = [(0.1, 0, 0.5), (0.0, 1, 0.5), (0.0, 3, 0.7), (0.2, 2, 1.0), (0.3, 30, 0.9)]  # smoothing, horizon, decay


def example(seed: int) -> tuple[Tensor, Tensor, Labels]:
    """Return states, table and labels of four windows; the third one begins with labels without a target."""
    torch.manual_seed(seed)
    targets = torch.randint(1, ITEMS + 1, (sum(COUNTS) + 3,))
    targets[-3:] = 0  # dummies
    targets[8:11] = 0
    targets[12] = targets[11]
    states = torch.randn(len(targets), DIM, requires_grad=True)
    weights = 2 * torch.rand(len(targets)) if seed % 2 else None
    return states, torch.randn(ITEMS, DIM, requires_grad=True), Labels(targets, np.array(COUNTS), weights=weights)


def loss_of(states: Tensor, table: Tensor, labels: Labels, smoothing: float, horizon: int, decay: float) -> Tensor:
    cfg = LossConfig(LossName.softmax, 0, 0.0, smoothing=smoothing, horizon=horizon, decay=decay)
    return LOSSES[LossName.softmax].compute(states, ItemTable(table), labels, None, cfg)


def by_loop(states: Tensor, table: Tensor, labels: Labels, smoothing: float, horizon: int, decay: float) -> Tensor:
    """Return the mean over targets of the cross-entropy between the full distribution and the softmax."""
    targets, total, number, start = labels.targets.tolist(), torch.zeros(()), 0, 0
    for count in COUNTS:
        for place in range(start, start + count):
            if not targets[place]:
                continue
            wanted = torch.zeros(ITEMS)
            for step in range(horizon + 1):
                if place + step < start + count and targets[place + step]:
                    wanted[targets[place + step] - 1] += decay**step
            wanted = (1 - smoothing) * wanted / wanted.sum() + smoothing / ITEMS
            weight = 1.0 if labels.weights is None else labels.weights[place]
            total = total - weight * (wanted * (table @ states[place]).log_softmax(0)).sum()
            number += 1
        start += count
    return total / number


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradients_equal_a_loop_over_distributions(seed, setting):
    states, table, labels = example(seed)
    found, expected = loss_of(states, table, labels, *setting), by_loop(states, table, labels, *setting)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    mine, theirs = (torch.autograd.grad(loss, (states, table)) for loss in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_by_hand():
    """Two items, scores 0 and log 3, so p is 1/4 and 3/4; the target is the first, the next one the second."""
    states, table = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]).log()
    labels = Labels(torch.tensor([1, 2]), np.array([2]))
    quarter, rest = -torch.tensor(0.25).log(), -torch.tensor(0.75).log()
    half = loss_of(states, table, labels, 0.0, 1, 0.5)  # 2/3 and 1/3, then only the second
    torch.testing.assert_close(half, (quarter * 2 / 3 + rest / 3 + rest) / 2)
    smooth = loss_of(states, table, labels, 0.2, 0, 0.5)
    torch.testing.assert_close(smooth, (0.9 * quarter + 0.1 * rest + 0.1 * quarter + 0.9 * rest) / 2)


def test_a_batch_without_targets_has_loss_0():
    states, table, labels = example(0)
    labels.targets.zero_()
    loss = loss_of(states, table, labels, 0.1, 2, 0.5)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (states, table)))


def test_off_means_the_same_bits():
    states, table, labels = example(1)
    plain = LOSSES[LossName.softmax].compute(
        states, ItemTable(table), labels, None, LossConfig(LossName.softmax, 0, 0.0)
    )
    off = loss_of(states, table, labels, 0.0, 0, 0.5)
    for one, other in zip(*(torch.autograd.grad(loss, (states, table)) for loss in (plain, off)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain, off)


def test_a_horizon_beyond_every_window_ends_there():
    states, table, labels = example(0)
    assert loss_of(states, table, labels, 0.0, 10**12, 0.5) == loss_of(states, table, labels, 0.0, max(COUNTS), 0.5)


def test_windows_of_a_batch_share_nothing():
    """The first labels of a window do not count for the last ones of the window before it."""
    users = random_users(0, users=9)
    cfg = load(["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=6", "loss.horizon=2"])
    holdout = holdout_of(users, maxlen=6)
    torch.manual_seed(0)
    model = SequentialRecommender(holdout.num_items, cfg).eval()
    data = SequenceData(holdout, cfg).train_dataloader().dataset
    windows = np.arange(len(holdout.window_users))
    batches = [data[windows[[window]], [0, 0, 0]] for window in windows]
    whole = data[windows, [0, 0, 0]]
    numbers = [int((batch.labels.targets > 0).sum()) for batch in batches]
    mean = sum(model.batch_loss(batch) * number for batch, number in zip(batches, numbers, strict=True)) / sum(numbers)
    torch.testing.assert_close(model.batch_loss(whole), mean)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.smoothing=1"], "loss.smoothing=1.0 must be at least 0 and below 1"),
        (["loss.horizon=-1"], "loss.horizon=-1 must be at least 0"),
        (["loss.horizon=1", "loss.decay=0"], "loss.decay=0.0 must be above 0 and at most 1"),
        (["loss.decay=0.7"], "loss.decay=0.7 only applies with loss.horizon; set loss.horizon=1, or remove it"),
        (
            ["loss=bce", "loss.smoothing=0.1"],
            "loss.smoothing=0.1 only applies to loss=softmax, which compares with every item; set it to 0 for loss=bce",
        ),
        (
            ["loss.horizon=2", "loss.exclude=history"],
            "loss.horizon=2 gives probability to items that loss.exclude=history excludes from the sum; set"
            " loss.exclude=none",
        ),
        (
            ["loss.horizon=2", "model=bert4rec"],
            "loss.horizon=2 is for items that follow each other, which the labels of objective=masked_items do not; set"
            " it to 0",
        ),
        (["loss.horizon=2", "capture=true"], "capture=true repeats a step for other batches of the same size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(InputError) as caught:
        load(words)
    assert str(caught.value).startswith(message)


def test_the_opening_line_names_what_shares_the_probability():
    cfg = load(["loss.horizon=2", "loss.smoothing=0.1"]).loss
    assert LOSSES[cfg.name].describe(cfg) == "softmax (horizon 2, smoothing 0.1)"
