"""Buckets of time differences against the formula in single precision."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec_lab.ops.time_buckets import NUM_BUCKETS, time_buckets

LARGEST = 2**63 - 1
DAY = 86400


def by_formula(differences: Tensor) -> Tensor:
    logarithms = np.log(differences.abs().clamp(min=1).numpy().astype(np.float32).astype(np.float64))
    shares = logarithms.astype(np.float32) / np.float32(0.301)
    return torch.from_numpy(shares.astype(np.int64)).clamp(max=NUM_BUCKETS - 1)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0, 0),
        (1, 0),
        (2, 2),
        (60, 13),
        (3600, 27),
        (DAY, 37),
        (7 * DAY, 44),
        (30 * DAY, 49),
        (365 * DAY, 57),
        (2**31 - 1, 71),
        (LARGEST, 128),
    ],
)
def test_the_buckets_of_usual_differences(seconds, bucket):
    assert time_buckets(torch.tensor([[seconds, -seconds]])).tolist() == [[bucket, bucket]]


def edges() -> list[int]:
    """Return the least difference of each bucket, by bisection."""
    found = []
    for bucket in range(NUM_BUCKETS):
        low, high = 0, LARGEST
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if by_formula(torch.tensor([middle])) >= bucket else (middle + 1, high)
        found.append(low)
    return found


def test_buckets_equal_the_formula_around_each_edge():
    differences = torch.tensor(edges())[:, None] + torch.arange(-3, 4)
    assert torch.equal(time_buckets(differences), by_formula(differences))
    reached = time_buckets(torch.tensor(edges())).tolist()
    assert reached == [0, 2, *range(2, NUM_BUCKETS)]  # bucket 1 is empty


def test_buckets_of_random_differences_equal_the_formula():
    random = torch.Generator().manual_seed(0)
    sizes = torch.rand(100_000, generator=random, dtype=torch.float64) * 43.6
    differences = sizes.exp().long() * torch.where(torch.rand(100_000, generator=random) < 0.5, -1, 1)
    assert torch.equal(time_buckets(differences), by_formula(differences))


def test_torchs_own_logarithm_gives_the_same_buckets():
    """HSTU's code in torch; from about 2**20 seconds on, the last bit of a machine's logarithm may move an edge."""
    differences = torch.arange(2**20)
    expected = (torch.log(differences.clamp(min=1)) / 0.301).long()
    assert torch.equal(time_buckets(differences), expected)
