"""Layouts of packed tokens with times."""

import numpy as np
import torch

from sasrec_lab.ops.layout import BatchLayout


def layout_of(lengths: list[int], dummies: int = 3) -> BatchLayout:
    """Return a layout with times: events of one second, long pauses, and small steps back."""
    random = torch.Generator().manual_seed(len(lengths))
    offsets = np.append(0, np.cumsum(lengths))
    tokens = int(offsets[-1]) + dummies
    steps = (torch.rand(2, tokens, generator=random) * 16).exp().long() - 100
    steps[torch.rand(2, tokens, generator=random) < 0.5] = 0
    times = 10**9 + steps[0].cumsum(0)
    return BatchLayout(offsets, tokens, torch.device("cpu"), times=times, query_times=times + steps[1])
