"""Softmax products on a GPU by Triton kernels, which keep the scores of tokens and items in registers.

Each program holds one block of tokens and reads the table block by block, with a running maximum and sum, as in Dao et
al. 2022, arXiv 2205.14135; for the table's gradient it holds items and reads the states. If there are too few blocks to
fill a GPU, each of S splits of the rows has its own programs, and their results are added in order, so that no number
depends on the timing of threads. T tokens, D dim, V items, G groups of tokens, S splits.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.triton_kernels import combination_kernel, expectation_kernel, table_grad_kernel

log = logging.getLogger(__name__)
MAX_DIM = 256
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.03}  # of results, by the dtype of the products
PROGRAMS = 4 * 132  # enough to fill a GPU: an H100 has 132 multiprocessors
BLOCKS_PER_SPLIT = 8  # at least, because a program also has to read what it holds


class Inputs(NamedTuple):
    """Operands of the products, and which of them count; None where all do."""

    states: Tensor  # (T, D)
    table: Tensor  # (V, D)
    biases: Tensor | None  # (V,) added to the items' scores
    excluded: Tensor | None  # (T,) int64, the row of the table that does not count for a token
    is_masked: Tensor | None  # (G, V + 1) bool, rows that do not count for a group's tokens, except as a target
    owners: Tensor | None  # (T,) int64, the group of each token
    targets: Tensor | None  # (T,) int64, the row of its target


class Blocks(NamedTuple):
    """Rows that a program holds, rows that it reads at a time, its warps, and the buffers for what it reads."""

    held: int
    streamed: int
    warps: int
    stages: int


def supports(states: Tensor, table: Tensor, dtype: torch.dtype, is_sampled: bool, has_mask: bool) -> bool:
    """Return whether the kernels can multiply these tensors in `dtype`, and were correct when tried on their GPU."""
    tensors = states, table
    # exact types, because a subclass such as torch's fake tensors may have no memory
    fit = all(x.is_cuda and type(x) in (Tensor, torch.nn.Parameter) and x.numel() for x in tensors)
    fit = fit and {dtype, states.dtype, table.dtype} <= MAX_ERROR.keys() and states.shape[1] <= MAX_DIM
    return fit and _is_correct(states.device, dtype, states.shape[1], is_sampled, has_mask)


def softmax_products(
    states: Tensor,
    table: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    sampled: tuple[Tensor | None, Tensor | None] | None = None,
    masked: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(target) (T, 1), p @ table (T, D) and p' @ (states * weights) (V, D), p the softmax over the table.

    Products of float32 are exact, others are those of numbers rounded to `dtype`; all sums are in float32. `sampled`
    says that the table holds negatives: it is (log weights (V,) added to their scores or None, the row (T,) that does
    not count for each token or None), and the target is one more column. `masked` is the rows (G, M) that do not count
    for a group's tokens, -1 for none, the group (T,) of each token, on any device, and its target (T,), which counts.
    Memory grows with T and V, not with T * V, and with a byte for each group and item if rows are masked.
    """
    dim, (biases, excluded) = states.shape[1], (x if x is None else x.contiguous() for x in sampled or (None, None))
    mask = (None, None, None) if masked is None else _mask(*masked, len(table))
    inputs = Inputs(_operand(states, dtype), _operand(table, dtype), biases, excluded, *mask)
    # 16 bits of float16 have few exponents: probabilities and weights are multiplied by constants that keep them large
    lift = 2.0**15 if dtype == torch.float16 else 1.0
    unit = weights.abs().amax().clamp(min=1e-30) / lift if lift > 1 else None
    relative = weights.float() if unit is None else weights / unit
    with torch.cuda.device_of(states):
        found = _expectation(inputs, _operand(target_vectors, dtype), relative.contiguous(), lift, sampled is not None)
        log_p, expected, shifts, scales = found
        table_grad = _table_grad(inputs, shifts, scales)
    if unit is not None:
        table_grad *= unit
    return log_p[:, None], expected[:, :dim], table_grad[:, :dim].to(table.dtype).contiguous()


def blocks_for(dtype: torch.dtype, width: int, has_mask: bool) -> Blocks:
    """Return sizes that ptxas nearly fits in registers, with buffers in the memory of a multiprocessor."""
    if dtype != torch.float32:
        return Blocks(held=128, streamed=32 if has_mask else 64, warps=8, stages=3)
    if width <= 64:
        return Blocks(held=64, streamed=64, warps=8, stages=2)
    return Blocks(32, 64, 8, 2) if width <= 128 else Blocks(32, 32, 16, 2)


def padded_width(dim: int) -> int:
    """Return the power of two to which kernels pad vectors of this size."""
    return max(16, triton.next_power_of_2(dim))


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (R, D) in `dtype`, contiguous, with rows that begin at multiples of 16 bytes."""
    x = x.detach().to(dtype).contiguous()
    return F.pad(x, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else x


def _mask(rows: Tensor, owners: Tensor, targets: Tensor, items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows do not count for the tokens of a group, the group of each token, and its target.

    The first is (G, V + 1); its last column, of none, is not read.
    """
    is_masked = rows.new_zeros(len(rows), items + 1, dtype=torch.bool).scatter_(1, rows % (items + 1), True)
    return is_masked, owners.to(rows.device, non_blocking=True), targets.contiguous()


def _empty(inputs: Inputs, *shape: int) -> Tensor:
    return inputs.states.new_empty(shape, dtype=torch.float32)


def _splits(rows: int, block: int, held_blocks: int) -> tuple[int, int]:
    """Return into how many splits to divide the rows that each of the held blocks reads, and the rows of one."""
    splits = min(triton.cdiv(PROGRAMS, held_blocks), triton.cdiv(rows, block * BLOCKS_PER_SPLIT))
    length = triton.cdiv(triton.cdiv(rows, splits), block) * block
    return triton.cdiv(rows, length), length


def _expectation(
    inputs: Inputs, target_vectors: Tensor, weights: Tensor, lift: float, has_target_column: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p(target), p @ table (T, D), the largest scores, and weights / sums of e^(score - largest)."""
    (tokens, dim), items = inputs.states.shape, len(inputs.table)
    sizes = {"DIM": dim, "WIDTH": padded_width(dim), "LIFT": lift, "enable_fp_fusion": True}
    blocks = blocks_for(inputs.states.dtype, padded_width(dim), inputs.is_masked is not None)
    programs = triton.cdiv(tokens, blocks.held)
    splits, length = _splits(items, blocks.streamed, programs)
    largest, totals = (_empty(inputs, splits, tokens) for _ in range(2))
    sums = _empty(inputs, splits, tokens, dim)
    log_p, target_scores, shifts, scales = (_empty(inputs, tokens) for _ in range(4))
    expectation_kernel[programs, splits](
        *(*inputs, target_vectors),
        *(target_scores, largest, totals, sums, tokens, items, length),
        **sizes,
        HAS_TARGET_COLUMN=has_target_column,
        TOKENS=blocks.held,
        ITEMS=blocks.streamed,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    expected = _empty(inputs, tokens, dim)
    combination_kernel[triton.cdiv(tokens, 16), 1](
        *(target_scores, weights, largest, totals, sums, log_p, expected, shifts, scales, tokens, splits),
        **sizes,
        TOKENS=16,
    )
    return log_p, expected, shifts, scales


def _table_grad(inputs: Inputs, shifts: Tensor, scales: Tensor) -> Tensor:
    """Return the sum (V, D) of the states, each times e^(score - shift) * scale of an item."""
    (tokens, dim), items = inputs.states.shape, len(inputs.table)
    blocks = blocks_for(inputs.states.dtype, padded_width(dim), inputs.is_masked is not None)
    programs = triton.cdiv(items, blocks.held)
    splits, length = _splits(tokens, blocks.streamed, programs)
    sums = _empty(inputs, splits, items, dim)
    table_grad_kernel[programs, splits](
        *(*inputs, shifts, scales, sums, tokens, items, length),
        DIM=dim,
        WIDTH=padded_width(dim),
        TOKENS=blocks.streamed,
        ITEMS=blocks.held,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,
    )
    return sums[0] if splits == 1 else sums.sum(0)


@cache
def _is_correct(device: torch.device, dtype: torch.dtype, dim: int, is_sampled: bool, has_mask: bool) -> bool:
    """Return whether the kernels agree with float64 on this GPU; log the reason if they do not.

    This compiles them, in seconds, for the sizes that training needs.
    """
    random = torch.Generator().manual_seed(0)
    shapes = (150, dim), (600, dim), (150, dim), (150, 1), (600,)
    states, table, targets, weights, biases = (torch.randn(shape, generator=random).to(device) for shape in shapes)
    own = torch.arange(150, device=device)
    variants = ((biases, own), (None, None)) if is_sampled else (None,)
    masked = (torch.randint(-1, 750, (7, 90), generator=random).to(device), own // 25, own) if has_mask else None
    states, table = states / dim**0.5, table if is_sampled else torch.cat([targets, table])
    try:
        found = [softmax_products(states, table, targets, weights, dtype, sampled, masked) for sampled in variants]
    except Exception as error:  # of a compiler or a driver; their types are not a part of Triton's interface
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        plain = (plain_products(states, table, targets, weights, sampled, masked) for sampled in variants)
        pairs = ((x, expected) for both in zip(found, plain, strict=True) for x, expected in zip(*both, strict=True))
        errors = [float((x - expected).norm() / expected.norm()) for x, expected in pairs]
        if all(error <= MAX_ERROR[dtype] for error in errors):  # no NaN is
            return True
        reason = "relative errors of its results: " + ", ".join(f"{error:.1e}" for error in errors)
    log.warning(f"the loss runs in torch and not as a Triton kernel on {device} (dim {dim}, {dtype}): {reason}")
    return False


def plain_products(
    states: Tensor,
    table: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    sampled: tuple[Tensor | None, Tensor | None] | None = None,
    masked: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `softmax_products` does, from all scores (T, V) in float64."""
    h, rows, targets = states.double(), table.double(), target_vectors.double()
    scores, target_scores = h @ rows.T, (h * targets).sum(1, keepdim=True)
    biases, excluded = sampled or (None, None)
    if biases is not None:
        scores = scores + biases
    if excluded is not None:
        is_excluded = torch.arange(len(table), device=scores.device) == excluded[:, None]
        scores = scores.masked_fill(is_excluded, float("-inf"))
    if masked is not None:
        is_masked, owners, own = _mask(*masked, len(table))
        is_masked = is_masked[owners, :-1].scatter(1, own[:, None], False)
        scores = scores.masked_fill(is_masked, float("-inf"))
    columns = scores if sampled is None else torch.cat([scores, target_scores], 1)
    total = columns.logsumexp(1, keepdim=True)
    p = (scores - total).exp()
    return target_scores - total, p @ rows, p.T @ (h * weights)
