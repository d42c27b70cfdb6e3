"""The kernel of the softmax's products in bfloat16, next to its plain form."""

import pytest
import torch
from torch import Tensor

from sasrec_lab.ops import softmax_products
from sasrec_lab.ops.softmax_products import Mask, sampled_softmax_products

is_compiled = softmax_products.has_bf16_products()
pytestmark = pytest.mark.skipif(not is_compiled, reason="needs a CPU that multiplies bfloat16, and a compiler")
BY_ROUNDING = 6e-3  # probabilities and scaled states are rounded once, by at most 2**-8


def plain(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    weights: Tensor,
    shared: tuple[Tensor, Tensor] | None = None,
    shown: Tensor | bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute in double precision what the kernel does, from states and table rounded to bfloat16."""
    h, rows, wanted = (x.bfloat16().double() for x in (states, table, targets))
    logits, own = (h @ rows.T).where(torch.as_tensor(shown), float("-inf")), (h * wanted).sum(1, keepdim=True)
    if shared:
        log_weights, excluded = shared
        logits = torch.cat([logits + log_weights, torch.empty(len(h), 1)], 1)
        logits = torch.cat([logits.scatter(1, excluded[:, None], float("-inf"))[:, :-1], own], 1)
    p = logits.softmax(1)[:, : len(table)]
    return own - logits.logsumexp(1, keepdim=True), p @ rows, p.T @ (states * weights).double()


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=atol)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < BY_ROUNDING * other.norm()


def products(states: Tensor, table: Tensor, targets: Tensor, weights: Tensor, mask: Mask | None = None):
    of_half = torch.bfloat16
    return softmax_products.softmax_products(states, table, targets, table[targets], weights, of_half, mask)


def example(tokens: int, dim: int, items: int, scale: float = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states, table = scale * torch.randn(tokens, dim), torch.randn(items, dim) / dim**0.5
    return states, table, torch.randint(0, items, (tokens,)), torch.rand(tokens, 1) + 0.1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize(
    ("tokens", "dim", "items"), [(1, 1, 1), (7, 17, 5), (33, 64, 256), (100, 50, 999), (513, 128, 3417)]
)
def test_products_are_those_of_rounded_numbers(monkeypatch, tokens, dim, items, rows, threads):
    monkeypatch.setitem(softmax_products.MAX_CHUNK_TOKENS, "compiled bfloat16", rows)
    torch.set_num_threads(threads)
    states, table, targets, weights = example(tokens, dim, items)
    assert_equal(products(states, table, targets, weights), plain(states, table, table[targets], weights))


def test_scores_far_above_that_of_the_target():
    states, table, targets, weights = example(60, 32, 300, scale=60)
    scores = states @ table.T
    assert scores.amax() - (states * table[targets]).sum(1).amin() > 150  # e^88 is the most in one pass
    of_rounding = 2 * torch.finfo(torch.float32).eps * scores.abs().amax().item()  # log p is a difference of two scores
    found, expected = products(states, table, targets, weights), plain(states, table, table[targets], weights)
    assert_equal(found, expected, atol=of_rounding)


@pytest.mark.parametrize("items", [1, 3])
def test_no_probability_is_above_one(items):
    states, table, targets, weights = example(500, 31, items, scale=20)
    log_p = products(states, table, targets, weights)[0]
    assert log_p.max() == 0


def test_every_nan_stays_nan():
    states, table, targets, weights = example(40, 16, 50)
    states[3, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    log_p, expected, _ = products(states, table, targets, weights)
    assert log_p.isnan().nonzero().tolist() == [[3, 0]]
    assert expected[3].isnan().all()


def test_negatives_with_weights_and_exclusions():
    states, table, targets, weights = example(70, 48, 200)
    negatives, log_weights = torch.randn(130, 48) / 7, torch.randn(130)
    shared = log_weights, torch.randint(0, 131, (70,))
    wanted = table[targets]
    found = sampled_softmax_products(states, negatives, wanted, weights, torch.bfloat16, shared)
    assert_equal(found, plain(states, negatives, wanted, weights, shared))
    found = sampled_softmax_products(states, negatives, wanted, weights, torch.bfloat16)
    none = torch.zeros(130), torch.full((70,), 130)
    assert_equal(found, plain(states, negatives, wanted, weights, none))


def test_tokens_of_weight_zero_are_skipped():
    states, table, targets, weights = example(40, 16, 90)
    weights[::3] = 0
    states[::3] = float("nan")
    log_p, expected, table_grad = products(states, table, targets, weights)
    real = weights[:, 0] > 0
    assert not log_p[~real].any()
    assert not expected[~real].any()
    of_real = plain(states[real], table, table[targets[real]], weights[real])
    assert_equal((log_p[real], expected[real], table_grad), of_real)


def test_one_thread_count_gives_the_same_bits_each_time():
    inputs = example(300, 64, 700)
    torch.set_num_threads(3)
    first, second = products(*inputs), products(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scale", [1, 60])
@pytest.mark.parametrize(
    ("tokens", "items", "groups", "width"), [(1, 1, 1, 1), (6, 9, 2, 0), (9, 40, 1, 2), (700, 301, 23, 90)]
)
def test_masked_items(tokens, items, groups, width, scale, threads):
    torch.set_num_threads(threads)
    states, table, targets, weights = example(tokens, 32, items, scale)
    rows, owners = torch.randint(-1, items, (groups, width)), torch.randint(0, groups, (tokens,)).sort().values
    found = products(states, table, targets, weights, Mask(rows, owners))
    shown = torch.ones(groups, items + 1, dtype=torch.bool).scatter(1, rows + 1, False)[owners, 1:]
    shown[torch.arange(tokens), targets] = True  # a token's own target counts
    rounding = 2 * torch.finfo(torch.float32).eps * (states @ table.T).abs().amax().item()
    assert_equal(found, plain(states, table, table[targets], weights, shown=shown), atol=max(rounding, 1e-5))
    real = torch.arange(tokens) % 3 < 2
    found = products(states, table, targets, weights * real[:, None], Mask(rows, owners))
    log_p, expected, grad = plain(states[real], table, table[targets[real]], weights[real], shown=shown[real])
    assert_equal((found[0][real], found[1][real], found[2]), (log_p, expected, grad), atol=max(rounding, 1e-5))
