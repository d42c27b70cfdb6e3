"""Fast dropout: the compiled kernel stores no mask; the torch path draws one random byte per element."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops import library
from sasrec_lab.ops.library import Floats, kernel


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero elements with probability `rate` and scale the others so that the mean stays; rate 0 returns x itself."""
    if not rate:
        return x
    return _CompiledDropout.apply(x, rate) if library.supports(x) else _dropout_torch(x, rate)


def _dropout_torch(x: Tensor, rate: float) -> Tensor:
    if x.is_cuda:
        return F.dropout(x, rate)
    # the mask stays 0 or 1: in bfloat16 its product with the factor would be another factor
    return (x * keep_mask(x, rate)).mul_(1 / keep_probability(rate))


class _CompiledDropout(torch.autograd.Function):
    """Dropout by the kernel; the seed is all that the backward pass needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        ctx.rate, ctx.seed = float(rate), int(torch.randint(2**62, ()))  # follows torch's own seed
        return _dropout_compiled(x, ctx.rate, ctx.seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropout_compiled(grad.contiguous(), ctx.rate, ctx.seed), None


def _dropout_compiled(x: Tensor, rate: float, seed: int) -> Tensor:
    out = torch.empty_like(x)
    _dropout_kernel(x, x.numel(), rate, seed, out)
    return out


@kernel
def _dropout_kernel(x: Floats, count: int, rate: float, seed: int, out: Floats) -> None:
    """Write x, with elements dropped that follow from the seed and their index only, to `out`."""


def keep_mask(x: Tensor, rate: float) -> Tensor:
    """Return 1 with probability `keep_probability(rate)`, else 0, for each element of x.

    On the CPU torch draws Bernoulli numbers one by one, which is much slower than the bytes of 64-bit integers.
    """
    if not _fits_byte(rate):
        return torch.empty_like(x).bernoulli_(1 - rate)
    # without bounds random_() keeps bit 63 clear, which biases every eighth byte
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.ge(bits.view(torch.uint8)[: x.numel()].view(x.shape), round(rate * 256), out=mask)


def keep_probability(rate: float) -> float:
    """Return 1 - rate, with the rate rounded to k / 256 as the mask is, so that scaling by it is unbiased."""
    return 1 - round(rate * 256) / 256 if _fits_byte(rate) else 1 - rate


def _fits_byte(rate: float) -> bool:
    return 0 < round(rate * 256) < 256
