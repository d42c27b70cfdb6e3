"""Every loss and its gradients against a plain reference, with and without compiled kernels."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import Similarity
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import Exclude, LossConfig, LossName, SamplerName
from sasrec_lab.data.batches import Labels, Negatives, TrainingBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.negatives import UserItems, draw_distinct, draw_shared
from sasrec_lab.errors import InputError
from sasrec_lab.ops import library as kernels
from sasrec_lab.ops import lookup_loss, softmax_products
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.losses import LOSSES, ItemTable

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
pytestmark = pytest.mark.usefixtures("one_thread", "both_forms")

TOKENS, DIM, ITEMS = 50, 8, 23


@pytest.fixture
def _three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def set_chunk_rows(monkeypatch, rows: int) -> None:
    for form in ("cpu", "compiled", "compiled bfloat16"):
        monkeypatch.setitem(softmax_products.MAX_CHUNK_TOKENS, form, rows)


def batch_of(
    targets: Tensor,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> tuple[Labels, Negatives | None]:
    labels = Labels(targets, counts=np.array([len(targets)]), weights=weights)
    return labels, None if negatives is None else Negatives(negatives, log_weights)


def loss_of(
    name: LossName,
    states: Tensor,
    table: Tensor,
    batch: tuple[Labels, Negatives | None],
    calibration: float = 0.0,
    sparse: bool = False,
) -> Tensor:
    count = 0 if batch[1] is None or name is LossName.softmax else batch[1].items.shape[-1]
    return LOSSES[name].compute(states, ItemTable(table, sparse), *batch, LossConfig(name, count, calibration))


def softmax(states: Tensor, table: Tensor, batch: tuple[Labels, Negatives | None]) -> Tensor:
    return loss_of(LossName.softmax, states, table, batch)


def bce(states: Tensor, table: Tensor, batch: tuple[Labels, Negatives | None]) -> Tensor:
    return loss_of(LossName.bce, states, table, batch)


def draws_for(name: LossName, tokens: int) -> list[Tensor]:
    """Return the negatives that the loss needs, and log weights if they are shared."""
    if name is LossName.sampled_softmax:
        return shared_draws(range(2, ITEMS), count=12)
    return [torch.randint(1, ITEMS + 1, (tokens, 2))]


def shared_draws(counts: Sequence[int], count: int, seed: int = 0) -> list[Tensor]:
    """Return negatives drawn in proportion to the items' counts, and their log weights."""
    negatives, log_weights = draw_shared(np.cumsum(counts), count, np.random.default_rng(seed))
    return [torch.from_numpy(negatives), torch.from_numpy(log_weights).float()]


def example(seed: int, *, tokens: int = TOKENS, items: int = ITEMS, scale: float = 1.0, dummies: int = 3):
    """Return states, item table and targets; the last targets (of dummies) and one more are 0."""
    torch.manual_seed(seed)
    states = (scale * torch.randn(tokens, DIM)).requires_grad_()
    table = torch.randn(items, DIM).requires_grad_()
    targets = torch.randint(1, items + 1, (tokens,))
    targets[tokens - dummies :] = 0
    targets[1] = 0
    return states, table, targets


def plain_softmax(states: Tensor, table: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the reference: all logits, cross_entropy, and autograd."""
    each = F.cross_entropy(states @ table.T, targets - 1, reduction="none", ignore_index=-1)  # (T,) 0 where ignored
    return (each if weights is None else each * weights).sum() / (targets > 0).sum()


def plain_bce(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, weights: Tensor | None = None
) -> float:
    """-log s(positive) - sum of log s(-negative), divided by the number of targets, in numbers."""
    states, table = states.tolist(), table.tolist()
    total, count = 0.0, 0
    for t, target in enumerate(targets.tolist()):
        if target == 0:
            continue
        scores = {
            item: sum(x * y for x, y in zip(states[t], table[item - 1], strict=True)) for item in range(1, ITEMS + 1)
        }
        loss = -log(1 / (1 + exp(-scores[target])))
        for negative in negatives[t].tolist():
            loss -= log(1 - 1 / (1 + exp(-scores[negative])))
        total += loss * (1 if weights is None else float(weights[t]))
        count += 1
    return total / count


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_close_gradients(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], within: float = 1e-4) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= within * theirs.norm()


# Softmax


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 25, 49, 50, 1000])  # per chunk; some last ones are partial, some have one row
@pytest.mark.parametrize("seed", range(3))
def test_softmax_is_cross_entropy_over_all_items(monkeypatch, seed, rows, weighted):
    set_chunk_rows(monkeypatch, rows)
    states, table, targets = example(seed)
    weights = 3 * torch.rand(TOKENS) if weighted else None
    loss = softmax(states, table, batch_of(targets, weights))
    expected = plain_softmax(states, table, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dim", [1, 16, 50, 64, 130])
@pytest.mark.parametrize(("tokens", "items"), [(1, 1), (3, 500), (130, 7), (333, 1201)])
def test_softmax_on_three_threads(tokens, items, dim):
    """Sizes that fill registers, tiles, panels and chunks, and sizes that do not."""
    states = torch.randn(tokens, dim).requires_grad_()
    table = torch.randn(items, dim).requires_grad_()
    targets = torch.randint(0, items + 1, (tokens,))
    targets[0] = 1
    loss, expected = softmax(states, table, batch_of(targets)), plain_softmax(states, table, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_a_chunk_has_at_least_sixteen_rows(monkeypatch):
    for form in ("cpu", "compiled", "compiled bfloat16"):
        monkeypatch.setitem(softmax_products.MAX_CHUNK_LOGITS, form, 1)
    states, table, targets = example(0)
    loss, expected = softmax(states, table, batch_of(targets)), plain_softmax(states, table, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_softmax_by_hand():
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    targets = torch.tensor([1, 3, 0])
    first = -log(exp(1) / (exp(1) + 1 + exp(-1)))
    second = -log(exp(2) / (1 + 2 * exp(2)))
    assert softmax(states, table, batch_of(targets)).item() == pytest.approx((first + second) / 2, rel=1e-6)
    # weights multiply the losses but do not change the divisor
    weights = torch.tensor([3.0, 0.5, 7.0])
    weighted = softmax(states, table, batch_of(targets, weights)).item()
    assert weighted == pytest.approx((3 * first + 0.5 * second) / 2, rel=1e-6)


@pytest.mark.parametrize("size", [50, 200])
def test_large_logits_stay_finite_and_right(size):
    states, table, targets = example(0)
    with torch.no_grad():
        logits = states @ table.T
        states *= size / logits.abs().max()
        assert (states @ table.T).abs().max() == pytest.approx(size)
    loss, expected = softmax(states, table, batch_of(targets)), plain_softmax(states, table, targets)
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_logits_so_large_that_one_item_has_probability_1():
    states = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    table = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    assert softmax(states, table, batch_of(torch.tensor([1, 2]))).item() == 0
    loss = softmax(states, table, batch_of(torch.tensor([2, 1])))
    assert loss.item() == 400
    assert [g.tolist() for g in gradients(loss, states, table)] == [[[1.0], [-1.0]], [[200.0], [-200.0], [0.0]]]


@pytest.mark.parametrize("gap", [60.0, 70.0, 90.0, 110.0])
def test_a_target_of_vanishing_probability(gap):
    """Its probability is between 1e-26 and 1e-48, below the smallest number of single precision."""
    states, table, targets = example(0)
    with torch.no_grad():
        logits = states[0] @ table.T
        states[0] *= gap / (logits.max() - logits.min())
    targets[0] = logits.argmin() + 1
    loss, expected = softmax(states, table, batch_of(targets)), plain_softmax(states, table, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_gradients_of_scaled_losses_scale_and_add_up():
    states, table, targets = example(0)
    other = example(1)[0]
    with_weights = batch_of(targets, torch.rand(TOKENS))
    (3 * softmax(states, table, batch_of(targets))).backward()
    (-0.25 * softmax(other, table, with_weights)).backward()
    first = states.grad, table.grad
    states.grad = table.grad = None
    (
        3 * plain_softmax(states, table, targets) - 0.25 * plain_softmax(other, table, targets, with_weights[0].weights)
    ).backward()
    assert_close_gradients(first, (states.grad, table.grad))


@pytest.mark.parametrize("name", [LossName.softmax, LossName.sampled_softmax])
def test_two_backward_passes_double_the_gradients(name):
    states, table, targets = example(0)
    loss = loss_of(name, states, table, batch_of(targets, None, *draws_for(name, TOKENS)))
    once = torch.autograd.grad(loss, (states, table), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close_gradients((states.grad, table.grad), tuple(2 * gradient for gradient in once), 1e-6)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_states_and_table_of_other_dtypes(dtype, within):
    states, table, targets = example(0)
    expected = plain_softmax(states.double(), table.double(), targets)
    states, table = (x.detach().to(dtype).requires_grad_() for x in (states, table))
    loss = softmax(states, table, batch_of(targets))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=within, atol=within)
    assert [x.dtype for x in gradients(loss, states, table)] == [dtype, dtype]


def test_states_made_from_the_table_get_both_gradients():
    """The shared item table is input and output at once."""
    _, table, targets = example(0)
    items = torch.randint(0, ITEMS, (TOKENS,))
    found = gradients(softmax(table[items].sin(), table, batch_of(targets)), table)
    assert_close_gradients(found, gradients(plain_softmax(table[items].sin(), table, targets), table))


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("name", list(LossName))
def test_one_thread_count_gives_the_same_bits_each_time(name):
    states, table, targets = example(0, tokens=300)
    batch = batch_of(targets, None, *draws_for(name, 300))
    first, second = (gradients(loss_of(name, states, table, batch), states, table) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", list(LossName))
def test_a_batch_without_targets_has_loss_0(name):
    states, table, targets = example(0)
    loss = loss_of(name, states, table, batch_of(0 * targets, None, *draws_for(name, TOKENS)))
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, states, table))


@pytest.mark.parametrize("name", list(LossName))
def test_tokens_without_a_target_do_not_count(name):
    states, table, targets = example(0, dummies=20)
    weights = torch.rand(TOKENS)
    real = targets > 0
    draws = draws_for(name, TOKENS)
    of_real = draws if name is LossName.sampled_softmax else [draws[0][real]]
    loss = loss_of(name, states, table, batch_of(targets, weights, *draws))
    without_dummies = loss_of(name, states[real], table, batch_of(targets[real], weights[real], *of_real))
    torch.testing.assert_close(loss, without_dummies, rtol=1e-6, atol=0)
    states_gradient, table_gradient = gradients(loss, states, table)
    assert not states_gradient[~real].any()
    assert_close_gradients((table_gradient,), gradients(without_dummies, table), 1e-6)


@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("low_precision_states", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close(monkeypatch, dtype, rows, low_precision_states):
    set_chunk_rows(monkeypatch, rows)
    states, table, targets = example(0)
    if low_precision_states:  # as without a final norm
        states = states.detach().to(dtype).requires_grad_()
    weights = torch.rand(TOKENS)
    with torch.autocast("cpu", dtype=dtype):
        loss = softmax(states, table, batch_of(targets, weights))
    exact_states = states.detach().float().requires_grad_()
    expected = plain_softmax(exact_states, table, targets, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    found = gradients(loss, states, table)
    assert [gradient.dtype for gradient in found] == [states.dtype, torch.float32]
    assert_close_gradients((found[0].float(), found[1]), gradients(expected, exact_states, table), 1e-2)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))]
        )
        return out


def test_all_logits_never_exist(monkeypatch):
    tokens, items = 400, 300
    set_chunk_rows(monkeypatch, 20)
    states, table, targets = example(0, tokens=tokens, items=items)
    with Largest() as plain:
        plain_softmax(states, table, targets).backward()
    assert plain.elements == tokens * items
    with Largest() as fast:
        softmax(states, table, batch_of(targets)).backward()
    assert fast.elements <= max(20 * items, tokens * DIM, items * DIM)


@needs_compiler
@pytest.mark.parametrize("items", [5, 16, 37])
@pytest.mark.parametrize("at", ["first", "middle", "last", "target"])
def test_the_compiled_softmax_keeps_nan(monkeypatch, at, items):
    logits, targets = torch.randn(3, items), torch.tensor([[1], [2], [0]])
    logits[1, {"first": 0, "middle": items // 2, "last": items - 1, "target": 2}[at]] = float("nan")
    compiled, plain = logits.clone(), logits.clone()
    log_p = softmax_products.softmax_and_log_p(compiled, targets)
    monkeypatch.setattr(kernels, "supports", lambda *tensors: False)
    torch.testing.assert_close(log_p, softmax_products.softmax_and_log_p(plain, targets), equal_nan=True)
    torch.testing.assert_close(compiled, plain, equal_nan=True)
    assert log_p.isnan().flatten().tolist() == [False, True, False]
    assert compiled[1].isnan().all()


# Sampled softmax


def plain_sampled_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_weights: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the reference: per token, cross_entropy of its target among itself and the negatives other than it."""
    total, count = states.sum() * 0, 0
    for t, target in enumerate(targets.tolist()):
        if target == 0:
            continue
        others = negatives != target
        logits = table[negatives[others] - 1] @ states[t] + log_weights[others]
        loss = torch.cat([(table[target - 1] @ states[t])[None], logits]).logsumexp(0) - table[target - 1] @ states[t]
        total = total + loss * (1 if weights is None else weights[t])
        count += 1
    return total / count


def sampled_softmax(states: Tensor, table: Tensor, batch: tuple[Labels, Negatives | None]) -> Tensor:
    return loss_of(LossName.sampled_softmax, states, table, batch)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 1000])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_softmax_against_a_loop(monkeypatch, seed, count, rows, weighted):
    set_chunk_rows(monkeypatch, rows)
    states, table, targets = example(seed)
    weights = 3 * torch.rand(TOKENS) if weighted else None
    draws = shared_draws(range(1, ITEMS + 1), count, seed)
    assert count < 40 or draws[1].isinf().any()  # surplus entries are among them
    loss = sampled_softmax(states, table, batch_of(targets, weights, *draws))
    expected = plain_sampled_softmax(states, table, targets, *draws, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


@pytest.mark.parametrize("surplus", [0, 3])
def test_with_every_item_drawn_once_it_is_the_full_softmax(surplus):
    states, table, targets = example(0)
    negatives = torch.arange(1, ITEMS + 1 + surplus).clamp(max=ITEMS)
    log_weights = torch.zeros(ITEMS + surplus)
    log_weights[ITEMS:] = float("-inf")
    loss = sampled_softmax(states, table, batch_of(targets, None, negatives, log_weights))
    expected = softmax(states, table, batch_of(targets))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table), 1e-5)


def test_sampled_softmax_approaches_softmax_with_more_draws():
    states, table, targets = example(0)
    expected = softmax(states, table, batch_of(targets))
    expected_gradients = gradients(expected, states, table)
    off = []
    for count in (20, 20_000):
        draws = shared_draws([1, 2, *range(1, ITEMS - 1)], count)
        loss = sampled_softmax(states, table, batch_of(targets, None, *draws))
        found = gradients(loss, states, table)
        off += [
            [
                abs(loss / expected - 1),
                *((x - y).norm() / y.norm() for x, y in zip(found, expected_gradients, strict=True)),
            ]
        ]
    assert all(x < 0.02 for x in off[1])
    assert all(x > 3 * y for x, y in zip(*off, strict=True))


def test_sampled_softmax_of_large_logits_stays_finite_and_right():
    states, table, targets = example(0, scale=40)
    draws = shared_draws(range(1, ITEMS + 1), 40)
    loss = sampled_softmax(states, table, batch_of(targets, None, *draws))
    expected = plain_sampled_softmax(states, table, targets, *draws)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampled_softmax_under_autocast_is_close(dtype):
    states, table, targets = example(0)
    draws = shared_draws(range(1, ITEMS + 1), 40)
    with torch.autocast("cpu", dtype=dtype):
        loss = sampled_softmax(states, table, batch_of(targets, None, *draws))
    expected = plain_sampled_softmax(states, table, targets, *draws)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table), 1e-2)


@pytest.mark.parametrize("name", [name for name in LossName if name is not LossName.softmax])
def test_a_sampled_loss_touches_only_rows_of_the_batch(name):
    states, table, targets = example(0)
    targets = targets.clamp(max=3)
    draws = [d.clamp(max=7) if d.dtype is torch.long else d for d in draws_for(name, TOKENS)]
    batch = batch_of(targets, None, *draws)
    (sparse,) = gradients(loss_of(name, states, table, batch, sparse=True), table)
    (dense,) = gradients(loss_of(name, states, table, batch), table)
    torch.testing.assert_close(sparse.to_dense(), dense)
    touched = {*targets.tolist(), *draws[0].flatten().tolist()} - {0}
    assert {row + 1 for row in sparse.coalesce().indices()[0].tolist()} == touched


# Softmax over the target and a list of negatives, of a sequence or of a position


COUNTS = [7, 0, 20, 1, 18]  # labels of each sequence; the other four of TOKENS are dummies


def plain_candidate_softmax(
    states: Tensor, table: Tensor, targets: Tensor, negatives: list[list[int]], weights: Tensor | None = None
) -> Tensor:
    """Return the reference: per token, cross-entropy of its target against its own list, in double precision."""
    states, table = states.double(), table.double()
    total, count = states.sum() * 0, 0
    for t, target in enumerate(targets.tolist()):
        if target == 0:
            continue
        logits = table[torch.tensor([target, *negatives[t]]) - 1] @ states[t]
        total = total + F.cross_entropy(logits[None], torch.tensor([0])) * (1 if weights is None else float(weights[t]))
        count += 1
    return total / count


def windows_example(seed: int, weighted: bool) -> tuple[Tensor, Tensor, Labels, UserItems]:
    """Return states, table, labels of five windows, and the windows' items: the targets and one item more."""
    states, table, targets = example(seed, dummies=TOKENS - sum(COUNTS))
    targets[27] = 0  # the only label of a sequence
    owners, rng = np.repeat(np.arange(5), COUNTS), np.random.default_rng(seed)
    items = targets[: sum(COUNTS)].clamp(max=9).numpy()  # at least 13 items are outside each window
    targets[: sum(COUNTS)] = torch.from_numpy(items)
    inside = UserItems(
        np.append(owners[items > 0], range(5)), np.append(items[items > 0], rng.integers(1, 11, 5)), ITEMS
    )
    weights = 3 * torch.rand(TOKENS) if weighted else None
    return states, table, Labels(targets, np.array(COUNTS), weights=weights), inside


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [16, 1000])
@pytest.mark.parametrize("count", [1, 5, 15, 40])  # the last two are more than some or all windows have outside them
@pytest.mark.parametrize("seed", range(2))
def test_softmax_over_negatives_of_a_sequence_against_a_loop(monkeypatch, seed, count, rows, weighted, sparse):
    set_chunk_rows(monkeypatch, rows)
    states, table, labels, inside = windows_example(seed, weighted)
    drawn = draw_distinct(inside, 5, count, np.random.default_rng(seed))
    cfg = LossConfig(LossName.sampled_softmax, count, 0.0, SamplerName.sequence)
    loss = sampled_loss(states, table, labels, drawn, cfg, sparse)
    lists = [[item for item in drawn[owner].tolist() if item] for owner in np.repeat(np.arange(5), COUNTS)]
    expected = plain_candidate_softmax(states, table, labels.targets, lists, labels.weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    of_states, of_table = gradients(loss, states, table)
    assert of_table.is_sparse == sparse
    assert_close_gradients((of_states, of_table.to_dense()), gradients(expected, states, table))
    if sparse:
        touched = set(drawn.flatten().tolist()) | set(labels.targets.tolist())
        assert {row + 1 for row in of_table.coalesce().indices()[0].tolist()} == touched - {0}


def sampled_loss(
    states: Tensor, table: Tensor, labels: Labels, drawn: np.ndarray, cfg: LossConfig, sparse: bool = False
) -> Tensor:
    negatives = Negatives(torch.from_numpy(drawn))
    return LOSSES[cfg.name].compute(states, ItemTable(table, sparse), labels, negatives, cfg)


def set_lookup_elements(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    for form in ("cpu", "compiled", "compiled bfloat16"):
        monkeypatch.setitem(lookup_loss.MAX_LOOKUP_ELEMENTS, form, elements)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens_a_chunk", [0.5, 7, 1000])
@pytest.mark.parametrize("sampler", [SamplerName.uniform, SamplerName.unseen])
def test_softmax_over_negatives_of_a_position_against_a_loop(monkeypatch, sampler, tokens_a_chunk, weighted, sparse):
    """A draw that equals the target, or another draw, counts as any other."""
    set_lookup_elements(monkeypatch, int(tokens_a_chunk * 31 * DIM))
    states, table, labels, _ = windows_example(0, weighted)
    drawn = np.random.default_rng(0).integers(1, ITEMS + 1, (TOKENS, 30))
    assert (drawn == labels.targets.numpy()[:, None]).any()
    cfg = LossConfig(LossName.sampled_softmax, 30, 0.0, sampler)
    loss = sampled_loss(states, table, labels, drawn, cfg, sparse)
    expected = plain_candidate_softmax(states, table, labels.targets, drawn.tolist(), labels.weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    of_states, of_table = gradients(loss, states, table)
    assert of_table.is_sparse == sparse
    assert_close_gradients((of_states, of_table.to_dense()), gradients(expected, states, table))


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dim", [1, 16, 50, 64, 130])
@pytest.mark.parametrize(("tokens", "width", "items"), [(1, 1, 1), (3, 2, 500), (61, 9, 7), (130, 40, 1201)])
def test_lookups_on_three_threads(tokens, width, items, dim):
    torch.manual_seed(0)
    states, table = (torch.randn(count, dim).requires_grad_() for count in (tokens, items))
    rows, weights = torch.randint(items, (tokens, width)), torch.rand(tokens)
    loss = lookup_loss.lookup_cross_entropy(states, table, rows, weights)
    logits = (table.double()[rows] * states.double()[:, None]).sum(2)
    expected = (weights * F.cross_entropy(logits, torch.zeros(tokens, dtype=torch.long), reduction="none")).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert_close_gradients(gradients(2 * loss, states, table), gradients(2 * expected, states, table))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", [SamplerName.sequence, SamplerName.uniform])
def test_softmax_over_lists_under_autocast_is_close(sampler, dtype):
    states, table, labels, inside = windows_example(0, True)
    drawn = draw_distinct(inside, 5, 12, np.random.default_rng(0))
    lists = drawn[np.repeat(np.arange(5), COUNTS)]
    if sampler is SamplerName.uniform:
        drawn = np.pad(lists, ((0, TOKENS - len(lists)), (0, 0)), mode="edge")
    with torch.autocast("cpu", dtype=dtype):
        loss = sampled_loss(states, table, labels, drawn, LossConfig(LossName.sampled_softmax, 12, 0.0, sampler))
    expected = plain_candidate_softmax(states, table, labels.targets, lists.tolist(), labels.weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    found = gradients(loss, states, table)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    assert_close_gradients(found, gradients(expected, states, table), 1e-2)


def test_a_window_with_nothing_outside_it_has_loss_0():
    states, table, targets = example(0)
    cfg = LossConfig(LossName.sampled_softmax, 4, 0.0, SamplerName.sequence)
    labels = Labels(targets, np.array([TOKENS - 3]))
    loss = sampled_loss(states, table, labels, np.zeros((1, 0), dtype=np.int64), cfg)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, states, table))


@pytest.mark.parametrize("sampler", [SamplerName.sequence, SamplerName.uniform])
def test_large_logits_over_lists_stay_finite_and_right(sampler):
    states, table, labels, inside = windows_example(0, False)
    states = (40 * states.detach()).requires_grad_()
    drawn = draw_distinct(inside, 5, 12, np.random.default_rng(0))
    lists = drawn[np.repeat(np.arange(5), COUNTS)]
    if sampler is SamplerName.uniform:
        drawn = np.pad(lists, ((0, TOKENS - len(lists)), (0, 0)), mode="edge")
    loss = sampled_loss(states, table, labels, drawn, LossConfig(LossName.sampled_softmax, 12, 0.0, sampler))
    expected = plain_candidate_softmax(states, table, labels.targets, lists.tolist())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_vectors_of_lists_are_never_looked_up_at_once(monkeypatch):
    sequences, each, count = 20, 10, 100
    set_lookup_elements(monkeypatch, 10 * (1 + count) * DIM)
    states, table, targets = example(0, tokens=sequences * each, items=300)
    drawn = np.sort(np.random.default_rng(0).integers(1, 301, (sequences, count)))
    labels = Labels(targets, np.full(sequences, each))
    with Largest() as of_sequences:
        cfg = LossConfig(LossName.sampled_softmax, count, 0.0, SamplerName.sequence)
        sampled_loss(states, table, labels, drawn, cfg).backward()
    with Largest() as of_positions:
        cfg = LossConfig(LossName.sampled_softmax, count, 0.0, SamplerName.uniform)
        sampled_loss(states, table, labels, drawn.repeat(each, 0), cfg).backward()
    assert of_sequences.elements <= max(sequences * (each + count), len(table) * DIM)
    assert of_positions.elements == sequences * each * (1 + count)  # what the draws themselves have


# Softmax without the other items of the window


def excluding_loss(states: Tensor, table: Tensor, labels: Labels, inside: UserItems) -> Tensor:
    excluded = torch.from_numpy(inside.as_rows(len(COUNTS)))
    cfg = LossConfig(LossName.softmax, 0, 0.0, exclude=Exclude.history)
    return LOSSES[cfg.name].compute(states, ItemTable(table), replace(labels, excluded=excluded), None, cfg)


def items_outside(inside: UserItems) -> list[list[int]]:
    """Return the items of each label that are not in its window."""
    own = [set(row) for row in inside.as_rows(len(COUNTS)).tolist()]
    return [sorted(set(range(1, ITEMS + 1)) - own[owner]) for owner in np.repeat(np.arange(5), COUNTS)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_softmax_without_history_against_a_loop(monkeypatch, seed, rows, weighted):
    set_chunk_rows(monkeypatch, rows)
    states, table, labels, inside = windows_example(seed, weighted)
    loss = excluding_loss(states, table, labels, inside)
    expected = plain_candidate_softmax(states, table, labels.targets, items_outside(inside), labels.weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.parametrize("dim", [1, 50, 64])
@pytest.mark.parametrize("items", [30, 500, 1201])
def test_softmax_without_history_on_three_threads(items, dim):
    """Sizes that fill registers, tiles, panels and chunks, and sizes that do not."""
    counts, rng = [3, 70, 1, 200, 59], np.random.default_rng(0)
    states, table = (torch.randn(n, dim).requires_grad_() for n in (340, items))
    owners = np.repeat(np.arange(5), counts)
    targets = rng.integers(1, items + 1, 340)
    targets[333:] = 0
    excluded = UserItems(owners, targets[:333], items).as_rows(5)
    cfg = LossConfig(LossName.softmax, 0, 0.0, exclude=Exclude.history)
    labels = Labels(torch.from_numpy(targets), np.array(counts), excluded=torch.from_numpy(excluded))
    loss = LOSSES[cfg.name].compute(states, ItemTable(table), labels, None, cfg)
    is_excluded = torch.zeros(340, items + 1, dtype=torch.bool)
    is_excluded[:333].scatter_(1, labels.excluded[owners], True)
    is_excluded.scatter_(1, labels.targets[:, None], False)
    logits = (states.double() @ table.double().T).masked_fill(is_excluded[:, 1:], float("-inf"))
    expected = F.cross_entropy(logits, labels.targets - 1, ignore_index=-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


@pytest.mark.parametrize(("of_excluded", "of_other"), [(50, 0), (200, 0), (300, 150)])
def test_excluded_items_may_outweigh_all_others_by_far(of_excluded, of_other):
    """Subtracting their exponentials from the sum would leave nothing of the others."""
    states, table, labels, inside = windows_example(0, False)
    inside = UserItems(
        np.append(inside.keys // inside.base, range(5)), np.append(inside.keys % inside.base, [10] * 5), ITEMS
    )
    with torch.no_grad():
        states[:, 0] = 1
        table[9, 0] = of_excluded  # item 10, in every window and never a target
        table[20, 0] = of_other  # item 21, in no window
    loss = excluding_loss(states, table, labels, inside)
    expected = plain_candidate_softmax(states, table, labels.targets, items_outside(inside))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_softmax_without_history_is_that_over_all_items_outside():
    states, table, labels, inside = windows_example(0, True)
    loss = excluding_loss(states, table, labels, inside)
    everything = draw_distinct(inside, 5, ITEMS, np.random.default_rng(0))
    sampled = sampled_loss(
        states, table, labels, everything, LossConfig(LossName.sampled_softmax, ITEMS, 0.0, SamplerName.sequence)
    )
    torch.testing.assert_close(loss, sampled, rtol=1e-6, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(sampled, states, table), 1e-5)


def test_softmax_without_history_by_hand():
    """The window is 1, 2, 1: the target of a label counts, the other item of the window does not."""
    states, table = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    labels = Labels(torch.tensor([2, 1]), np.array([2]), excluded=torch.tensor([[1, 2]]))
    cfg = LossConfig(LossName.softmax, 0, 0.0, exclude=Exclude.history)
    loss = LOSSES[cfg.name].compute(states, ItemTable(table), labels, None, cfg)
    expected = (log(exp(-1) + exp(0.5)) + 1 + log(exp(2) + exp(1)) - 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_without_history_under_autocast_is_close(dtype):
    states, table, labels, inside = windows_example(0, True)
    with torch.autocast("cpu", dtype=dtype):
        loss = excluding_loss(states, table, labels, inside)
    expected = plain_candidate_softmax(states, table, labels.targets, items_outside(inside), labels.weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table), 1e-2)


# Binary cross-entropies: what both share


def plain_binary(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    beta: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the reference: every vector looked up at once, and autograd."""
    positive = (states * table[targets - 1]).sum(1)  # (T,) of any item if there is no target
    negative = torch.einsum("td,tnd->tn", states, table[negatives - 1])
    each = beta * F.softplus(-positive) + F.softplus(negative).sum(1)
    real = (targets > 0).float() * (1 if weights is None else weights)
    return (each * real).sum() / (targets > 0).sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens_a_chunk", [0.5, 1, 7, 49, 50, 1000])
@pytest.mark.parametrize("name", [LossName.bce, LossName.gbce])
def test_binary_losses_in_chunks_equal_those_at_once(monkeypatch, name, tokens_a_chunk, weighted, sparse):
    set_lookup_elements(monkeypatch, int(tokens_a_chunk * 4 * DIM))
    states, table, targets = example(0)
    drawn = torch.randint(1, ITEMS + 1, (TOKENS, 3))
    weights = 3 * torch.rand(TOKENS) if weighted else None
    calibration = 0.75 if name is LossName.gbce else 0.0
    loss = loss_of(name, states, table, batch_of(targets, weights, drawn), calibration, sparse)
    beta, divisor = (1 - 0.75 * (1 - 3 / (ITEMS - 1)), 4) if name is LossName.gbce else (1.0, 1)
    expected = plain_binary(states, table, targets, drawn, beta, weights) / divisor
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    of_states, of_table = gradients(loss, states, table)
    assert of_table.is_sparse == sparse
    found = (of_states, of_table.to_dense())
    assert_close_gradients(found, gradients(expected, states, table), 1e-5)


def test_gradients_of_scaled_binary_losses_scale_and_add_up():
    states, table, targets = example(0)
    drawn = torch.randint(1, ITEMS + 1, (TOKENS, 2))
    batch = batch_of(targets, None, drawn)
    items = torch.randint(0, ITEMS, (TOKENS,))  # the shared table is input and output at once
    found = gradients(3 * bce(table[items].sin(), table, batch) - bce(states, table, batch), states, table)
    plain = 3 * plain_binary(table[items].sin(), table, targets, drawn) - plain_binary(states, table, targets, drawn)
    assert_close_gradients(found, gradients(plain, states, table))


@pytest.mark.parametrize("low_precision_states", [False, True])
@pytest.mark.parametrize("name", [LossName.bce, LossName.gbce])
def test_binary_losses_under_autocast_are_exact_for_their_states(name, low_precision_states):
    states, table, targets = example(0)
    if low_precision_states:
        states = states.detach().bfloat16().requires_grad_()
    batch = batch_of(targets, None, torch.randint(1, ITEMS + 1, (TOKENS, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(name, states, table, batch)
    exact_states = states.detach().float().requires_grad_()
    expected = loss_of(name, exact_states, table, batch)
    torch.testing.assert_close(loss, expected)
    of_states, of_table = gradients(loss, states, table)
    assert (of_states.dtype, of_table.dtype) == (states.dtype, torch.float32)
    assert_close_gradients((of_states.float(), of_table), gradients(expected, exact_states, table), 1e-2)


def test_many_negatives_are_never_looked_up_at_once(monkeypatch):
    tokens, negatives = 200, 40
    set_lookup_elements(monkeypatch, 10 * 41 * DIM)
    states, table, targets = example(0, tokens=tokens)
    drawn = torch.randint(1, ITEMS + 1, (tokens, negatives))
    with Largest() as plain:
        plain_binary(states, table, targets, drawn).backward()
    assert plain.elements == tokens * negatives * DIM
    with Largest() as fast:
        loss_of(LossName.gbce, states, table, batch_of(targets, None, drawn), 0.5).backward()
    assert fast.elements == tokens * (1 + negatives)  # what the draws themselves have


# Binary cross-entropy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("negatives", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_bce_against_a_loop(seed, negatives, weighted):
    states, table, targets = example(seed)
    drawn = torch.randint(1, ITEMS + 1, (TOKENS, negatives))
    weights = 3 * torch.rand(TOKENS) if weighted else None
    loss = bce(states, table, batch_of(targets, weights, drawn))
    assert loss.item() == pytest.approx(plain_bce(states, table, targets, drawn, weights), rel=1e-5)


def test_bce_gradients_are_those_of_the_formula():
    states, table, targets = example(0)
    drawn = torch.randint(1, ITEMS + 1, (TOKENS, 3))
    loss = bce(states, table, batch_of(targets, None, drawn))
    real = targets > 0
    logits = states[real] @ table.T
    positive = logits.gather(1, targets[real, None] - 1)
    negative = logits.gather(1, drawn[real] - 1)
    expected = -(positive.sigmoid().log().sum() + (1 - negative.sigmoid()).log().sum()) / real.sum()
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_bce_by_hand():
    states, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    loss = bce(states, table, batch_of(torch.tensor([2]), None, torch.tensor([[1, 3, 3]])))
    assert loss.item() == pytest.approx(log(1 + exp(-2)) + log(1 + exp(1)) + 2 * log(1 + exp(-1)), rel=1e-6)


def test_bce_of_large_logits_stays_finite():
    states, table = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = bce(states, table, batch_of(torch.tensor([2]), None, torch.tensor([[1]])))
    assert loss.item() == 400
    assert gradients(loss, states)[0].tolist() == [[2.0]]


# gBCE


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.3, 0.75, 1.0])
def test_gbce_against_the_papers_formula(calibration, weighted):
    states, table, targets = example(0)
    drawn = torch.randint(1, ITEMS + 1, (TOKENS, 4))
    weights = 3 * torch.rand(TOKENS) if weighted else torch.ones(TOKENS)
    loss = loss_of(LossName.gbce, states, table, batch_of(targets, weights, drawn), calibration)
    share = 4 / (ITEMS - 1)
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    real = targets > 0
    probabilities = (states[real] @ table.T).sigmoid()
    positive = probabilities.gather(1, targets[real, None] - 1) ** beta
    negative = 1 - probabilities.gather(1, drawn[real] - 1)
    each = -(positive.log().sum(1) + negative.log().sum(1)) / (4 + 1)
    expected = (each * weights[real]).sum() / real.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(loss, states, table), gradients(expected, states, table))


def test_gbce_refuses_more_negatives_than_other_items():
    cfg = LossConfig(LossName.gbce, 4, 0.75)
    LOSSES[cfg.name].check(cfg, 5)
    with pytest.raises(InputError) as refused:
        LOSSES[cfg.name].check(cfg, 4)
    assert str(refused.value) == (
        "loss.negatives=4 must be at most 3 with loss=gbce, the number of items other than the target; lower it"
    )
    assert LOSSES[LossName.bce].check is None


def test_gbce_without_calibration_is_bce():
    states, table, targets = example(0)
    batch = batch_of(targets, None, torch.randint(1, ITEMS + 1, (TOKENS, 3)))
    torch.testing.assert_close(loss_of(LossName.gbce, states, table, batch) * 4, bce(states, table, batch))


# Bayesian personalized ranking


def plain_bpr(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the reference: a loop over tokens and negatives."""
    total, count = states.sum() * 0, 0
    for t, target in enumerate(targets.tolist()):
        if target == 0:
            continue
        gaps = torch.stack([states[t] @ (table[target - 1] - table[n - 1]) for n in negatives[t].tolist()])
        total = total - gaps.sigmoid().log().mean() * (1 if weights is None else weights[t])
        count += 1
    return total / count


def bpr_example(negatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *example(0), torch.randint(1, ITEMS + 1, (TOKENS, negatives))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("negatives", [1, 4])
def test_bpr_against_a_loop(negatives, weighted, sparse):
    states, table, targets, drawn = bpr_example(negatives)
    weights = 3 * torch.rand(TOKENS) if weighted else None
    loss = loss_of(LossName.bpr, states, table, batch_of(targets, weights, drawn), sparse=sparse)
    expected = plain_bpr(states, table, targets, drawn, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    of_states, of_table = gradients(loss, states, table)
    assert of_table.is_sparse == sparse
    assert_close_gradients((of_states, of_table.to_dense()), gradients(expected, states, table), 1e-5)


@pytest.mark.parametrize("low_precision_states", [False, True])
def test_bpr_under_autocast_is_exact_for_its_states(low_precision_states):
    states, table, targets, drawn = bpr_example(3)
    if low_precision_states:
        states = states.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(LossName.bpr, states, table, batch_of(targets, None, drawn))
    exact_states = states.detach().float().requires_grad_()
    expected = plain_bpr(exact_states, table, targets, drawn)
    torch.testing.assert_close(loss, expected)
    of_states, of_table = gradients(loss, states, table)
    assert (of_states.dtype, of_table.dtype) == (states.dtype, torch.float32)
    assert_close_gradients((of_states.float(), of_table), gradients(expected, exact_states, table), 1e-2)


def test_bpr_of_large_scores_stays_finite():
    states, table = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = loss_of(LossName.bpr, states, table, batch_of(torch.tensor([2]), None, torch.tensor([[1]])))
    assert loss.item() == 400
    assert gradients(loss, states)[0].tolist() == [[2.0]]


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adam"])
def test_bpr_training_learns_a_cycle(optimizer, tmp_path):
    """Users walk through the items in a circle, so the next item follows from the last one."""
    walks = [[(start + step) % 12 + 1 for step in range(7)] for start in range(12) for _ in range(4)]
    settings = ["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=6", "batch_size=8", "loss=bpr"]
    cfg = load([*settings, "loss.negatives=3", f"optimizer.name={optimizer}", "optimizer.lr=.02"])
    pl.seed_everything(0, verbose=False)
    model = SequentialRecommender(12, cfg)
    data = SequenceData(holdout_of(walks, maxlen=6), cfg)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=15,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.tested["test/mrr"] > 0.8


# Every loss


@pytest.mark.parametrize(
    ("cfg", "described", "compared"),
    [
        (LossConfig(LossName.softmax, 0, 0.0), "softmax", 5000),
        (LossConfig(LossName.softmax, 0, 0.0, exclude=Exclude.history), "softmax (history excluded)", 5000),
        (LossConfig(LossName.bce, 1, 0.0), "bce (1 negative per position)", 2),
        (LossConfig(LossName.sampled_softmax, 7, 0.0), "sampled_softmax (7 negatives per batch)", 8),
        (
            LossConfig(LossName.sampled_softmax, 3000, 0.0, SamplerName.sequence),
            "sampled_softmax (3,000 negatives per sequence)",
            3001,
        ),
        (
            LossConfig(LossName.sampled_softmax, 256, 0.0, SamplerName.uniform),
            "sampled_softmax (256 negatives per position)",
            257,
        ),
    ],
)
def test_a_loss_describes_what_it_compares(cfg, described, compared):
    assert LOSSES[cfg.name].describe(cfg) == described
    assert LOSSES[cfg.name].compared_items(cfg, 5000) == compared


def test_every_name_has_a_loss():
    assert set(LOSSES) == set(LossName)
    states, table, targets = example(0)
    for name in LossName:
        assert loss_of(name, states, table, batch_of(targets, None, *draws_for(name, TOKENS))).shape == ()


CONFIG = load(["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=6"])
SAMPLERS_OF = {
    LossName.softmax: [SamplerName.none],
    LossName.sampled_softmax: [
        SamplerName.shared,
        SamplerName.sequence,
        SamplerName.uniform,
        SamplerName.others,
        SamplerName.unseen,
    ],
    LossName.bce: [SamplerName.unseen, SamplerName.uniform],
    LossName.gbce: [SamplerName.uniform, SamplerName.unseen],
    LossName.bpr: [SamplerName.unseen, SamplerName.uniform],
}
LOSS_CONFIGS = [
    LossConfig(LossName.softmax, 0, 0.0, exclude=Exclude.history),
    *(
        LossConfig(name, 0 if name is LossName.softmax else 4, 0.0, sampler)
        for name, samplers in SAMPLERS_OF.items()
        for sampler in samplers
    ),
]
HEADS = {
    "dot": {},
    "cosine": {"similarity": Similarity.cosine, "temperature": 0.2},
    "bias": {"output_bias": True, "temperature": 2.0},
    "transform": {"head_transform": True, "output_bias": True, "similarity": Similarity.cosine},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSS_CONFIGS, ids=lambda cfg: f"{cfg.name.name}-{cfg.sampler.name}-{cfg.exclude.name}")
def test_every_loss_trains_through_every_head(loss, head):
    cfg = replace(CONFIG, loss=loss, model=replace(CONFIG.model, share_items=False, dropout=0.0, **HEADS[head]))
    holdout = holdout_of([[1, 2, 3, 4, 5, 6], [7, 2, 8, 9], [3, 9, 1, 10, 12]], maxlen=6)
    batch = SequenceData(holdout, cfg).train_dataloader().dataset[np.arange(3), [0, 0, 0, 0]]
    torch.manual_seed(0)
    model = SequentialRecommender(holdout.num_items, cfg)
    with torch.no_grad():
        if model.encoder.head.bias is not None:
            model.encoder.head.bias.uniform_(-1, 1)
    value = model.batch_loss(batch)
    value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel() > 1}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    compared = set(batch.labels.targets.tolist()) - {0}
    compared |= set() if batch.negatives is None else set(batch.negatives.items.flatten().tolist()) - {0}
    is_compared = torch.tensor([batch.negatives is None or item in compared for item in range(1, 13)])
    if model.encoder.head.bias is not None:
        assert torch.equal(model.encoder.head.bias.grad != 0, is_compared)
    # a small step against the gradient lowers the loss by what the gradient says
    step = 1e-3 / sum(float(gradient.norm() ** 2) for gradient in gradients.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= step * parameter.grad if parameter.grad is not None else 0
        assert float(value - model.batch_loss(batch)) == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("loss", LOSS_CONFIGS, ids=lambda cfg: f"{cfg.name.name}-{cfg.sampler.name}-{cfg.exclude.name}")
def test_every_loss_predicts_masked_items(loss):
    """The labels are fewer than the tokens, and each sequence has its own number of them."""
    objective = load(["dataset=csv", "dataset.path=x.csv", "model=bert4rec"]).objective
    cfg = replace(CONFIG, objective=objective, loss=loss, model=replace(CONFIG.model, causal=False, dropout=0.0))
    holdout = holdout_of([[1, 2, 3, 4, 5, 6], [7, 2, 8, 9], [3, 9, 1, 10, 12]], maxlen=6)
    batch = SequenceData(holdout, cfg).train_dataloader().dataset[np.arange(3), [0, 0, 0, 0]]
    model = SequentialRecommender(holdout.num_items, cfg)
    torch.testing.assert_close(model.batch_loss(batch), plain_loss(model, batch, cfg), rtol=1e-5, atol=0)


def plain_loss(model: SequentialRecommender, batch: TrainingBatch, cfg: TrainConfig) -> Tensor:
    """Return the loss of each label separately, by the same function."""
    labels, total = batch.labels, 0.0
    states = model.encoder.head(model.encoder(batch.inputs)[labels.rows])
    owners = np.repeat(np.arange(len(labels.counts)), labels.counts)
    for label, owner in enumerate(owners):
        negatives = batch.negatives
        if negatives is not None and negatives.items.ndim == 2:
            row = owner if cfg.loss.sampler is SamplerName.sequence else label
            negatives = replace(negatives, items=negatives.items[row : row + 1])
        excluded = None if labels.excluded is None else labels.excluded[owner : owner + 1]
        one = Labels(labels.targets[label : label + 1], np.array([1]), excluded=excluded)
        table = ItemTable(model.encoder.item_table)
        total += LOSSES[cfg.loss.name].compute(states[label : label + 1], table, one, negatives, cfg.loss)
    return total / len(owners)


@pytest.mark.parametrize("name", list(LossName))
def test_a_sampler_that_does_not_go_with_a_loss_is_refused(name):
    samplers = SAMPLERS_OF[name]
    for sampler in SamplerName:
        if sampler in samplers:
            continue
        with pytest.raises(InputError) as refused:
            LossConfig(name, 4, 0.0, sampler)
        names = " or ".join(each.name for each in samplers)
        assert str(refused.value) == f"loss.sampler={sampler.name} does not go with loss={name.name}; use {names}"
    assert LossConfig(name, 0 if name is LossName.softmax else 4, 0.0).sampler is samplers[0]


@pytest.mark.parametrize(
    ("name", "more"),
    [(LossName.bce, ""), (LossName.sampled_softmax, ", whose loss.sampler=sequence excludes the window")],
)
def test_only_softmax_excludes_history(name, more):
    with pytest.raises(InputError) as refused:
        LossConfig(name, 4, 0.0, exclude=Exclude.history)
    expected = f"loss.exclude=history only applies to loss=softmax; set it to none for loss={name.name}{more}"
    assert str(refused.value) == expected
