"""The decay of attention scores with time, by which recent tokens get more weight."""

import torch
from torch import Tensor

from sasrec_lab.ops.library import Floats, Integers, kernel

SECONDS_PER_DAY = 86400


def decay_scores(gaps: Tensor, decay: Tensor) -> Tensor:
    """Return - c days**beta for gaps in seconds, int64, and `decay` (c, beta), both above 0; 0 for gaps below 0."""
    days = gaps.clamp(min=0).to(decay.dtype) / SECONDS_PER_DAY
    return -decay[0] * days ** decay[1]


# For the kernel of attention


def pair_logarithms(times: Tensor, query_times: Tensor, offsets: Tensor, num_pairs: int) -> Tensor:
    """Return the logarithms (num_pairs,) of the days from keys to queries, in the places of cpp/gaps.h."""
    logarithms = torch.empty(num_pairs)
    _gap_logarithms_kernel(times, query_times, offsets, len(offsets) - 1, logarithms)
    return logarithms


@kernel
def _gap_logarithms_kernel(
    times: Integers, query_times: Integers, offsets: Integers, sequences: int, logarithms: Floats
) -> None:
    """Write the logarithm of each pair's days."""
