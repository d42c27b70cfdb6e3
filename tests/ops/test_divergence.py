"""The cross-entropy of two passes and their divergence, against all logits and autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sasrec_lab.ops import divergence, library, softmax_products
from sasrec_lab.ops.cross_entropy import SoftTargets, linear_cross_entropy
from sasrec_lab.ops.divergence import two_pass_cross_entropy
from sasrec_lab.ops.softmax_products import Mask

pytestmark = pytest.mark.usefixtures("one_thread")

needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
TOKENS, DIM, ITEMS, COUNTS = 50, 6, 31, [20, 1, 29]


def example(dtype: torch.dtype = torch.double, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, table, targets and weights; the last tokens, and one more, have the weight 0."""
    torch.manual_seed(0)
    states = (scale * torch.randn(2, TOKENS, DIM, dtype=dtype)).requires_grad_()
    table = torch.randn(ITEMS, DIM, dtype=dtype).requires_grad_()
    weights = torch.rand(TOKENS, dtype=dtype)
    weights[[3, -2, -1]] = 0
    return states, table, torch.randint(0, ITEMS, (TOKENS,)), weights


def window_mask() -> Mask:
    """Return a mask of 5, 0 and 30 rows for groups of tokens."""
    rows = torch.full((len(COUNTS), ITEMS), -1)
    rows[0, :5], rows[2, :30] = torch.arange(3, 8), torch.arange(30)
    return Mask(rows, torch.from_numpy(np.repeat(np.arange(len(COUNTS)), COUNTS)))


def soft_targets(targets: Tensor) -> SoftTargets:
    """Return distributions with half of the probability at the target, and a tenth shared by all items."""
    rows = torch.stack([targets, targets.roll(-1)], 1)
    return SoftTargets(rows, torch.tensor([0.5, 0.4], dtype=torch.double).expand(TOKENS, 2), 0.1)


def plain(states: Tensor, table: Tensor, targets: Tensor, weights: Tensor, factor: float, **forms) -> Tensor:
    """Return the reference from all (2, T, V) logits."""
    logits = states @ table.T
    if mask := forms.get("mask"):
        is_masked = F.one_hot(mask.rows + 1, ITEMS + 1).any(1)[mask.owners, 1:]
        logits = logits.masked_fill(is_masked & (F.one_hot(targets, ITEMS) == 0), float("-inf"))
    log_p = logits.log_softmax(2)
    wanted = F.one_hot(targets, ITEMS).to(states.dtype)
    if soft := forms.get("soft"):
        wanted = torch.full_like(wanted, soft.smoothing / ITEMS).scatter_add(1, soft.rows, soft.masses)
    log_p = log_p.masked_fill(log_p == float("-inf"), 0.0)
    is_counted = logits > float("-inf")
    cross_entropy = -(wanted * log_p).sum(2).mean(0)
    p, q = log_p.exp() * is_counted
    divergence = ((p * (log_p[0] - log_p[1])).sum(1) + (q * (log_p[1] - log_p[0])).sum(1)) / 2
    return (weights * (cross_entropy + factor * divergence)).sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(0.7 * loss, inputs)


@pytest.mark.parametrize("rows", [16, 17, 49, 50, 1000])  # per chunk; the last one has one token, or fewer than others
@pytest.mark.parametrize("factor", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("form", ["hard", "mask", "soft"])
def test_loss_and_gradients_equal_the_plain_form(form, factor, rows, monkeypatch):
    monkeypatch.setitem(softmax_products.MAX_CHUNK_LOGITS, "cpu", 4 * rows * ITEMS)
    states, table, targets, weights = example()
    forms = {"hard": {}, "mask": {"mask": window_mask()}, "soft": {"soft": soft_targets(targets)}}[form]
    found = two_pass_cross_entropy(states, table, targets, weights, factor, **forms)
    expected = plain(states, table, targets, weights, factor, **forms)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(found, states, table), gradients(expected, states, table), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    states = torch.randn(2, 3, 2, dtype=torch.double, requires_grad=True)
    table = torch.randn(4, 2, dtype=torch.double, requires_grad=True)
    targets, weights = torch.tensor([0, 3, 1]), torch.tensor([0.5, 0.0, 2.0], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda *x: two_pass_cross_entropy(*x, targets, weights, 1.5), (states, table))


def test_by_hand():
    """Two items: p is 1/4 and 3/4, q is 1/2 and 1/2, and the target is the first one."""
    states = torch.tensor([[[1.0]], [[0.0]]])
    table = torch.tensor([[1.0], [3.0]]).log()
    loss = two_pass_cross_entropy(states, table, torch.tensor([0]), torch.ones(1), 2.0)
    quarter, half, three = torch.tensor([0.25, 0.5, 0.75]).log()
    forward = 0.25 * (quarter - half) + 0.75 * (three - half)
    backward = 0.5 * (half - quarter) + 0.5 * (half - three)
    torch.testing.assert_close(loss, -(quarter + half) / 2 + 2 * (forward + backward) / 2)


def test_equal_passes_have_the_ordinary_loss_and_gradient():
    states, table, targets, weights = example()
    once = states[0].detach().requires_grad_()
    found = two_pass_cross_entropy(once.expand(2, -1, -1), table, targets, weights, 3.0)
    expected = linear_cross_entropy(once, table, targets, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(found, once, table), gradients(expected, once, table), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("form", ["hard", "mask", "soft"])
def test_single_precision_is_close_for_small_and_large_logits(form, scale, both_forms):
    states, table, targets, weights = example(torch.float, scale)
    forms = {"hard": {}, "mask": {"mask": window_mask()}, "soft": {"soft": soft_targets(targets)}}[form]
    precise = [x.detach().double().requires_grad_() for x in (states, table)]
    found = two_pass_cross_entropy(states, table, targets, weights, 1.0, **forms)
    expected = plain(*precise, targets, weights.double(), 1.0, **forms)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(gradients(found, states, table), gradients(expected, *precise), strict=True):
        assert mine.dtype == torch.float
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("form", ["hard", "mask"])
def test_autocast_is_close(form, both_forms):
    states, table, targets, weights = example(torch.float)
    forms = {"hard": {}, "mask": {"mask": window_mask()}}[form]
    precise = [x.detach().double().requires_grad_() for x in (states, table)]
    with torch.autocast("cpu", torch.bfloat16):
        found = two_pass_cross_entropy(states, table, targets, weights, 1.0, **forms)
    expected = plain(*precise, targets, weights.double(), 1.0, **forms)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)
    for mine, theirs in zip(gradients(found, states, table), gradients(expected, *precise), strict=True):
        assert mine.dtype == torch.float
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("items", [1, 15, 16, 31, 64, 100])  # whole registers, and parts of one
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_the_kernel_equals_torch_on_the_same_logits(dtype, items):
    """Some items are hidden from all tokens, and all but the target from one."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(2, 7, items)).to(dtype)
    targets = torch.randint(0, items // 2 + 1, (7, 1))
    is_hidden = torch.rand(7, items) < 0.3
    is_hidden[2] = True
    logits.masked_fill_(is_hidden.scatter(1, targets, False), float("-inf"))
    found, turned = divergence._losses_and_gradients_compiled(logits.clone(), targets, 0.7)
    expected, wanted = divergence._losses_and_gradients_torch(logits.double(), targets, 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.double(), wanted, rtol=5e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_a_score_that_is_no_number_stays_visible(dtype):
    logits = torch.zeros(2, 2, 20, dtype=dtype)
    logits[0, 1, 17] = float("nan")
    losses, turned = divergence._losses_and_gradients_compiled(logits, torch.zeros(2, 1).long(), 1.0)
    assert losses.isnan().flatten().tolist() == [False, True]
    assert not turned[:, 0].isnan().any()
    assert turned[:, 1].isnan().any()


class LargestTensor(TorchDispatchMode):
    """Remember the most elements that a result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_tensor_grows_with_tokens_times_items(monkeypatch):
    monkeypatch.setitem(softmax_products.MAX_CHUNK_LOGITS, "cpu", 2**14)
    states, table = torch.randn(2, 1000, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss = two_pass_cross_entropy(states, table, torch.zeros(1000).long(), torch.ones(1000), 1.0)
        loss.backward()
    assert 2 * 1000 * 4 < largest.elements <= 4 * 16 * 300  # sixteen tokens at least are a chunk
