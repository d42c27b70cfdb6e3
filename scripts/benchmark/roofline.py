"""The floor: the least arithmetic that the model needs, at the rate at which this machine multiplies matrices.

Counted are the matrix products on positions that are there, a multiplication and an addition each: no pad, attention
to the past only, and nothing for norms, dropout or softmax. D dim, F width of the feed-forward, V items.
"""

import time

import numpy as np
import torch

from sasrec_lab.config.schema import ModelConfig


def flops_per_position(model: ModelConfig, compared: int, lengths: np.ndarray) -> float:
    """Of a training step, a mean over the useful positions of sequences with so many; backward is twice forward.

    `compared` is how many items a state is compared with.
    """
    attended = np.sum(lengths * (lengths + 1) / 2) / np.sum(lengths)  # mean over positions of those up to each
    block = token_flops(model) + 4 * model.dim * attended  # scores, and the values weighted by them
    return 3 * (model.blocks * block + 2 * model.dim * compared)


def flops_per_user(model: ModelConfig, items: int, lengths: np.ndarray) -> float:
    """Of ranking all items for a user, a mean over users with so many known items.

    Of the last block only the newest position is needed, its keys' and values' matrices applied to query and result.
    Matrices that follow each other without anything between are one: with one head the query's and the key's, and the
    value's and the output's.
    """
    one = (1 + model.output_projection) * 2 * model.dim**2 if model.heads == 1 else 0
    token = token_flops(model) - one
    last, all_but_last = min(model.blocks, 1), max(model.blocks - 1, 0)
    newest = token + 4 * model.dim * model.heads * lengths.mean()
    block = token * lengths.mean() + 4 * model.dim * np.mean(lengths * (lengths + 1) / 2)
    return all_but_last * block + last * newest + 2 * model.dim * items


def token_flops(model: ModelConfig) -> int:
    """Of one block's layers: query, key, value (and output), and the two of the feed-forward."""
    return 2 * model.dim**2 * (4 if model.output_projection else 3) + 4 * model.dim * (model.ff_dim or model.dim)


def matrix_rate(device: torch.device, dtype: torch.dtype, dim: int, items: int) -> float:
    """FLOP/s of the fastest of a large square product and the output layer's three.

    float32 runs on the backend that machine.py has chosen, the fastest one that is exact.
    """
    size, rows, columns = (8192, 8192, min(items, 16384)) if device.type == "cuda" else (2048, 512, min(items, 8192))
    square = torch.randn(size, size, device=device, dtype=dtype)
    states = torch.randn(rows, dim, device=device, dtype=dtype)
    table = torch.randn(columns, dim, device=device, dtype=dtype)
    logits = states @ table.T
    pairs = [(square, square), (states, table.T), (logits, table), (logits.T, states)]
    return max(2 * a.shape[0] * a.shape[1] * b.shape[1] / best_seconds(a, b) for a, b in pairs)


def best_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    out = a @ b
    times = []
    for _ in range(10):
        synchronise(a.device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(a.device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, which works behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
