"""Dropout whose mask costs a byte of randomness an element."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero elements with probability `rate` and scale the others so that the mean stays; 0 switches it off.

    On the CPU torch draws one Bernoulli after the other, 6.5 ns each, which is a fifth of a training step. Bytes of
    64-bit random integers cost a tenth; `rate` is rounded to k / 256, and the scale follows, so it stays unbiased.
    """
    if rate == 0:
        return x
    dropped = round(rate * 256)
    if x.device.type != "cpu" or not 0 < dropped < 256:
        return F.dropout(x, rate)
    # random_() alone leaves bit 63 clear, and with it every eighth byte biased
    bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))
