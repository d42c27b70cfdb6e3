"""Buckets of time differences, each about 1.35 times as wide as the one before, for a learned bias."""

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.ops.library import Bytes, Integers, kernel

NUM_BUCKETS = 129
_LOG_OF_STEP = 0.301  # of the natural logarithm, as in HSTU's research code


def time_buckets(differences: Tensor) -> Tensor:
    """Return the bucket, int64 from 0 to 128, of differences in seconds, int64 and above -2**63, of any shape.

    The bucket of d is floor(ln(max(1, |d|)) / 0.301), at most 128, as HSTU's research code computes it in single
    precision. Logarithms of different machines differ in the last bit, so the buckets come from integer edges.
    """
    return torch.bucketize(differences.abs(), _EDGES.to(differences.device), right=True)


def _find_edges() -> Tensor:
    """Return the least difference (128,) that the formula puts into each bucket from 1 on, or behind it.

    By bisection, with logarithms that are rounded correctly.
    """
    buckets = np.arange(1, NUM_BUCKETS)
    low, high = np.ones_like(buckets), np.full_like(buckets, 2**62)
    while (low < high).any():
        middle = low + (high - low) // 2
        logarithms = np.log(middle.astype(np.float32).astype(np.float64)).astype(np.float32)
        is_reached = np.floor(logarithms / np.float32(_LOG_OF_STEP)) >= buckets
        low, high = np.where(is_reached, low, middle + 1), np.where(is_reached, middle, high)
    return torch.from_numpy(low)


_EDGES = _find_edges()


# For the kernel of pointwise attention


def pair_buckets(times: Tensor, query_times: Tensor, offsets: Tensor, num_pairs: int) -> Tensor:
    """Return the buckets (num_pairs,) uint8 of the times from keys to later queries, in the places of cpp/gaps.h."""
    buckets = torch.empty(num_pairs, dtype=torch.uint8)
    _gap_buckets_kernel(times, query_times, offsets, len(offsets) - 1, _EDGES, len(_EDGES), buckets)
    return buckets


@kernel
def _gap_buckets_kernel(
    times: Integers,
    query_times: Integers,
    offsets: Integers,
    sequences: int,
    edges: Integers,
    num_edges: int,
    buckets: Bytes,
) -> None:
    """Write the bucket of each pair."""
