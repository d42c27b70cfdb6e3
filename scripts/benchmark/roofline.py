"""The roofline: the arithmetic that the model needs at least, at the rate at which this machine multiplies matrices.

It counts the matrix products on existing positions, a multiplication and an addition each: no padding, attention to
the past only if it is causal, items for the labels only, and nothing for norms, dropout or softmax.
"""

import time

import numpy as np
import torch

from sasrec_lab.config.model import Activation, BlockName, ModelConfig

SQUARES = {"cuda": 8192, "cpu": 2048}  # rows of the large square matrices by device


def flops_per_position(
    model: ModelConfig, compared: int, lengths: np.ndarray, labels_per_position: float = 1.0
) -> float:
    """Return the FLOPs of a training step per useful position of sequences with these lengths.

    The backward pass takes twice the forward pass. `compared` is the number of items that the state of a label is
    compared with. The last block is needed for the labels only, but its keys and values for all positions.
    """
    attended = np.sum(pairs(model, lengths)) / np.sum(lengths)  # positions that each one attends to, on average
    block = token_flops(model) + pair_flops(model) * attended
    keys_and_values = 2 * 2 * model.dim**2
    last = keys_and_values + labels_per_position * (block - keys_and_values) if model.blocks else 0
    labels = labels_per_position * (head_flops(model) + 2 * model.dim * compared)
    return 3 * (max(model.blocks - 1, 0) * block + last + labels)


def flops_per_user(model: ModelConfig, items: int, lengths: np.ndarray) -> float:
    """Return the FLOPs of ranking all items per user, for users with inputs of these numbers of positions.

    The last block is needed for the newest position only; there, the matrices of keys and values are applied to the
    query and the result. Adjacent matrices count as one: with one head those of query and key, and of value and output.
    """
    one = (1 + model.output_projection) * 2 * model.dim**2 if model.heads == 1 else 0
    token = token_flops(model) - one
    last, all_but_last = min(model.blocks, 1), max(model.blocks - 1, 0)
    newest = token + 4 * model.dim * model.heads * lengths.mean()
    block = token * lengths.mean() + pair_flops(model) * np.mean(pairs(model, lengths))
    return all_but_last * block + last * newest + head_flops(model) + 2 * model.dim * items


def pairs(model: ModelConfig, lengths: np.ndarray) -> np.ndarray:
    """Return the pairs of positions of which one attends to the other, in sequences of these lengths."""
    return lengths * (lengths + 1) / 2 if model.causal else lengths * lengths


def pair_flops(model: ModelConfig) -> int:
    """Return the FLOPs per pair of positions: its score, and the value weighted by it, in FuXi by three weights."""
    return 2 * model.dim * (1 + model.num_maps)


def head_flops(model: ModelConfig) -> int:
    """Return the FLOPs of the layer between a state and its comparison with items."""
    return 2 * model.dim**2 if model.head_transform else 0


def token_flops(model: ModelConfig) -> int:
    """Return the FLOPs per token of one block's layers: query, key, value (and output), gates, feed-forward."""
    if model.block in (BlockName.hstu, BlockName.fuxi):
        qk_dim, v_dim = model.head_widths
        width = model.heads * (2 * qk_dim + (2 * model.num_maps + 1) * v_dim)
        return 2 * model.dim * (width + (3 * model.feed_forward_width if model.block is BlockName.fuxi else 0))
    squares = (4 if model.output_projection else 3) + (2 if model.block is BlockName.ligr else 0)
    feed_forward = 3 if model.activation is Activation.swiglu else 2
    return 2 * model.dim * (squares * model.dim + feed_forward * model.feed_forward_width)


def matrix_rate(device: torch.device, dtype: torch.dtype, dim: int, items: int) -> float:
    """Return the FLOP/s of the fastest among a large square product and the three of the output layer.

    float32 runs on the backend that ops/backend.py has chosen, the fastest exact one.
    """
    size = SQUARES[device.type]
    rows, columns = (8192, min(items, 16384)) if device.type == "cuda" else (512, min(items, 8192))
    square = torch.randn(size, size, device=device, dtype=dtype)
    states = torch.randn(rows, dim, device=device, dtype=dtype)
    table = torch.randn(columns, dim, device=device, dtype=dtype)
    logits = states @ table.T
    pairs = [(square, square), (states, table.T), (logits, table), (logits.T, states)]
    return max(2 * a.shape[0] * a.shape[1] * b.shape[1] / best_seconds(a, b) for a, b in pairs)


def best_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the shortest of ten times of a matrix product."""
    out = a @ b
    times = []
    for _ in range(10):
        synchronize(a.device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(a.device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, which works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
