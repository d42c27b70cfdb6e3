"""Dropout by the kernel and by torch: its rate, mean, seed and gradient."""

from math import sqrt

import pytest
import torch

from sasrec_lab.ops import library
from sasrec_lab.ops.dropout import dropout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    torch.manual_seed(0)
    n = 400_000
    rounded = rate if library.supports(torch.ones(1)) else round(rate * 256) / 256
    assert abs(rounded - rate) <= 1 / 512
    out = dropout(torch.ones(n), rate)
    kept = out != 0
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - rounded)))
    bound = 5 * sqrt(rounded * (1 - rounded) / n)
    assert abs(kept.double().mean() - (1 - rounded)) < bound
    assert abs(out.double().mean() - 1) < bound / (1 - rounded)
    # bytes of a random word, lanes of a register, and elements at small and at the block's distance are independent
    for places in (8, 16):
        assert (kept.view(-1, places).double().mean(0) - (1 - rounded)).abs().max() < sqrt(places) * bound
    both = torch.stack([(kept[i:] & kept[: n - i]).double().mean() for i in (*range(1, 18), 4096)])
    assert (both - (1 - rounded) ** 2).abs().max() < 2 * bound


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("rate", [0.001, 0.999])
def test_dropout_at_rates_that_a_byte_cannot_express(rate):
    torch.manual_seed(0)
    out = dropout(torch.ones(400_000), rate)
    assert abs((out == 0).double().mean() - rate) < 5 * sqrt(rate * (1 - rate) / 400_000)
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - rate)))


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 9), (0, 4)])
def test_dropout_of_any_shape_and_type(shape, dtype):
    torch.manual_seed(0)
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    out = torch.stack([dropout(x, 0.5) for _ in range(64)])
    assert (out.shape[1:], out.dtype) == (x.shape, dtype)
    assert ((out == 0) | (out == 2 * x)).all()
    assert (out == 0).any(0).all()
    assert (out != 0).any(0).all()
    out.sum().backward()
    assert torch.equal(x.grad, 2 * (out != 0).sum(0).to(dtype))  # dropped elements have no gradient


def test_half_precision_rounds_each_product_but_not_the_factor():
    torch.manual_seed(0)
    x = (torch.rand(400_000) + 1).bfloat16()
    out = dropout(x, 0.1)
    factors = (out / x.float())[out != 0]
    assert abs(factors.double().mean() * (1 - round(0.1 * 256) / 256) - 1) < 1e-4


@pytest.mark.usefixtures("both_forms")
def test_dropout_of_a_transposed_tensor():
    torch.manual_seed(0)
    x = torch.arange(1.0, 61).view(6, 10).T
    out = dropout(x, 0.25)
    assert torch.allclose(out[out != 0], x[out != 0] / 0.75)


def test_dropout_of_rate_zero_returns_its_input():
    x = torch.ones(3)
    assert dropout(x, 0) is x


@pytest.mark.usefixtures("both_forms")
def test_dropouts_gradient_has_its_mask_on_any_thread_count():
    torch.manual_seed(1)
    x, weights = torch.rand(10_001).add_(1).requires_grad_(), torch.randn(10_001)
    out = dropout(x, 0.3)
    torch.set_num_threads(3)
    (out * weights).sum().backward()
    torch.set_num_threads(1)
    torch.testing.assert_close(x.grad, weights * (out / x).detach())


@pytest.mark.usefixtures("both_forms")
def test_dropout_keeps_nan():
    assert dropout(torch.full((1000,), float("nan")), 0.5).isnan().all()


@pytest.mark.usefixtures("both_forms")
def test_dropout_differs_from_call_to_call_and_follows_the_seed():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.2), dropout(x, 0.2)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.2), first)
    assert not torch.equal(first, second)
