"""Softmax products on a GPU by Triton kernels, which keep the scores of tokens and items in registers.

Each program holds one block of tokens and reads the table block by block, with a running maximum and sum, as in Dao et
al. 2022, arXiv 2205.14135; for the table's gradient it holds items and reads the states. If there are too few blocks to
fill a GPU, each of S splits of the rows has its own programs, and their results are added in order, so that no number
depends on the timing of threads. T tokens, D dim, V items, S splits.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)
MAX_DIM = 256
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.03}  # of results, by the dtype of the products
PROGRAMS = 4 * 132  # enough to fill a GPU: an H100 has 132 multiprocessors
BLOCKS_PER_SPLIT = 8  # at least, because a program also has to read what it holds


class Inputs(NamedTuple):
    """Operands of the products, and which of them count."""

    states: Tensor  # (T, D)
    table: Tensor  # (V, D)
    biases: Tensor | None  # (V,) added to the items' scores
    excluded: Tensor | None  # (T,) int64, the row of the table that does not count for a token


class Blocks(NamedTuple):
    """Rows that a program holds, rows that it reads at a time, its warps, and the buffers for what it reads."""

    held: int
    streamed: int
    warps: int
    stages: int


def supports(states: Tensor, table: Tensor, dtype: torch.dtype, is_sampled: bool) -> bool:
    """Return whether the kernels can multiply these tensors in `dtype`, and were correct when tried on their GPU."""
    tensors = states, table
    # exact types, because a subclass such as torch's fake tensors may have no memory
    fit = all(x.is_cuda and type(x) in (Tensor, torch.nn.Parameter) and x.numel() for x in tensors)
    fit = fit and {dtype, states.dtype, table.dtype} <= MAX_ERROR.keys() and states.shape[1] <= MAX_DIM
    return fit and _is_correct(states.device, dtype, states.shape[1], is_sampled)


def softmax_products(
    states: Tensor,
    table: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    sampled: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(target) (T, 1), p @ table (T, D) and p' @ (states * weights) (V, D), p the softmax over the table.

    Products of float32 are exact, others are those of numbers rounded to `dtype`; all sums are in float32. `sampled`
    says that the table holds negatives: it is (log weights (V,) added to their scores or None, the row (T,) that does
    not count for each token or None), and the target is one more column. Memory grows with T and V, not with T * V.
    """
    dim, (biases, excluded) = states.shape[1], (x if x is None else x.contiguous() for x in sampled or (None, None))
    inputs = Inputs(_operand(states, dtype), _operand(table, dtype), biases, excluded)
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


def blocks_for(dtype: torch.dtype, width: int) -> Blocks:
    """Return sizes that ptxas nearly fits in registers, with buffers in the memory of a multiprocessor."""
    if dtype != torch.float32:
        return Blocks(held=128, streamed=64, warps=8, stages=3)
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
    blocks = blocks_for(inputs.states.dtype, padded_width(dim))
    programs = triton.cdiv(tokens, blocks.held)
    splits, length = _splits(items, blocks.streamed, programs)
    largest, totals = (_empty(inputs, splits, tokens) for _ in range(2))
    sums = _empty(inputs, splits, tokens, dim)
    log_p, target_scores, shifts, scales = (_empty(inputs, tokens) for _ in range(4))
    _expectation_kernel[programs, splits](
        *(inputs.states, inputs.table, inputs.biases, inputs.excluded, target_vectors),
        *(target_scores, largest, totals, sums, tokens, items, length),
        **sizes,
        HAS_TARGET_COLUMN=has_target_column,
        TOKENS=blocks.held,
        ITEMS=blocks.streamed,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    expected = _empty(inputs, tokens, dim)
    _combination_kernel[triton.cdiv(tokens, 16), 1](
        *(target_scores, weights, largest, totals, sums, log_p, expected, shifts, scales, tokens, splits),
        **sizes,
        TOKENS=16,
    )
    return log_p, expected, shifts, scales


def _table_grad(inputs: Inputs, shifts: Tensor, scales: Tensor) -> Tensor:
    """Return the sum (V, D) of the states, each times e^(score - shift) * scale of an item."""
    (tokens, dim), items = inputs.states.shape, len(inputs.table)
    blocks = blocks_for(inputs.states.dtype, padded_width(dim))
    programs = triton.cdiv(items, blocks.held)
    splits, length = _splits(tokens, blocks.streamed, programs)
    sums = _empty(inputs, splits, items, dim)
    _table_grad_kernel[programs, splits](
        *(inputs.states, inputs.table, inputs.biases, inputs.excluded, shifts, scales, sums, tokens, items, length),
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
def _is_correct(device: torch.device, dtype: torch.dtype, dim: int, is_sampled: bool) -> bool:
    """Return whether the kernels agree with float64 on this GPU; log the reason if they do not.

    This compiles them, in seconds, for the sizes that training needs.
    """
    random = torch.Generator().manual_seed(0)
    shapes = (150, dim), (600, dim), (150, dim), (150, 1), (600,)
    states, table, targets, weights, biases = (torch.randn(shape, generator=random).to(device) for shape in shapes)
    variants = ((biases, torch.arange(150, device=device)), (None, None)) if is_sampled else (None,)
    states, table = states / dim**0.5, table if is_sampled else torch.cat([targets, table])
    try:
        found = [softmax_products(states, table, targets, weights, dtype, sampled) for sampled in variants]
    except Exception as error:  # of a compiler or a driver; their types are not a part of Triton's interface
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        plain = (plain_products(states, table, targets, weights, sampled) for sampled in variants)
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
    columns = scores if sampled is None else torch.cat([scores, target_scores], 1)
    total = columns.logsumexp(1, keepdim=True)
    p = (scores - total).exp()
    return target_scores - total, p @ rows, p.T @ (h * weights)


@triton.jit(do_not_specialize=["tokens", "items", "length"])
def _expectation_kernel(
    states: tl.tensor,  # (T, D)
    table: tl.tensor,  # (V, D)
    biases: tl.tensor,  # (V,) or None
    excluded: tl.tensor,  # (T,) or None
    target_vectors: tl.tensor,  # (T, D)
    target_scores: tl.tensor,  # (T,)
    largest: tl.tensor,  # (S, T)
    totals: tl.tensor,  # (S, T)
    sums: tl.tensor,  # (S, T, D)
    tokens: int,
    items: int,
    length: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LIFT: tl.constexpr,
    HAS_TARGET_COLUMN: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Write each split's largest score, sum of e^(score - largest), and sum of the items' vectors times this."""
    split, d, column = tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, ITEMS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    at = token.to(tl.int64)[:, None] * DIM + d[None, :]
    is_there = is_token[:, None] & (d < DIM)[None, :]
    h = tl.load(states + at, mask=is_there, other=0.0)  # (TOKENS, WIDTH)
    target_score = tl.sum(h.to(tl.float32) * tl.load(target_vectors + at, mask=is_there, other=0.0).to(tl.float32), 1)
    is_first = HAS_TARGET_COLUMN & (split == 0)  # the target's own column is in the first split
    most = tl.where(is_first, target_score, float("-inf"))
    total = tl.where(is_first, tl.full((TOKENS,), 1.0, tl.float32), 0.0)
    vector_sum = tl.zeros((TOKENS, WIDTH), tl.float32)
    if excluded is not None:
        out = tl.load(excluded + token, mask=is_token, other=-1).to(tl.int32)
    begin = split * length
    rows = table + begin.to(tl.int64) * DIM + column[:, None] * DIM + d[None, :]
    for start in range(begin, tl.minimum(begin + length, items), ITEMS):
        item = start + column
        vectors = tl.load(rows, mask=(item < items)[:, None] & (d < DIM)[None, :], other=0.0)  # (ITEMS, WIDTH)
        if biases is None:
            bias = tl.where(item < items, 0.0, float("-inf"))
        else:
            bias = tl.load(biases + item, mask=item < items, other=float("-inf"))
        scores = tl.dot(h, tl.trans(vectors), input_precision="ieee") + bias[None, :]
        if excluded is not None:
            scores = tl.where(item[None, :] == out[:, None], float("-inf"), scores)
        larger = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp(scores - shift[:, None])
        rescale = tl.exp(most - shift)
        total = total * rescale + tl.sum(p, 1)
        vector_sum = tl.dot((p * LIFT).to(h.dtype), vectors, vector_sum * rescale[:, None], input_precision="ieee")
        most = larger
        rows += ITEMS * DIM
    part = split.to(tl.int64) * tokens
    tl.store(target_scores + token, target_score, mask=is_token)
    tl.store(largest + part + token, most, mask=is_token)
    tl.store(totals + part + token, total, mask=is_token)
    tl.store(sums + part * DIM + at, vector_sum, mask=is_there)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _combination_kernel(
    target_scores: tl.tensor,  # (T,)
    weights: tl.tensor,  # (T,)
    largest: tl.tensor,  # (S, T)
    totals: tl.tensor,  # (S, T)
    sums: tl.tensor,  # (S, T, D)
    log_p: tl.tensor,  # (T,)
    expected: tl.tensor,  # (T, D)
    shifts: tl.tensor,  # (T,)
    scales: tl.tensor,  # (T,)
    tokens: int,
    splits: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LIFT: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Combine the splits to log p(target), p @ table, the largest score, and weight / sum of e^(score - largest)."""
    token, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    is_token = token < tokens
    part = token.to(tl.int64)
    shift = tl.full((TOKENS,), float("-inf"), tl.float32)
    for _ in range(splits):
        shift = tl.maximum(shift, tl.load(largest + part, mask=is_token, other=0.0))
        part += tokens
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros((TOKENS,), tl.float32)
    vector_sum = tl.zeros((TOKENS, WIDTH), tl.float32)
    is_there = is_token[:, None] & (d < DIM)[None, :]
    part = token.to(tl.int64)
    for _ in range(splits):
        rescale = tl.exp(tl.load(largest + part, mask=is_token, other=0.0) - shift)
        total += rescale * tl.load(totals + part, mask=is_token, other=1.0)
        vector_sum += rescale[:, None] * tl.load(sums + part[:, None] * DIM + d[None, :], mask=is_there, other=0.0)
        part += tokens
    below = tl.load(target_scores + token, mask=is_token, other=0.0) - shift
    # the target is one of the columns; only because sums are in another order may its score exceed the largest
    tl.store(log_p + token, tl.where(below > 0.0, 0.0, below) - tl.log(total), mask=is_token)
    mean = vector_sum / (total * LIFT)[:, None]
    tl.store(expected + token.to(tl.int64)[:, None] * DIM + d[None, :], mean, mask=is_there)
    tl.store(shifts + token, shift, mask=is_token)
    tl.store(scales + token, tl.load(weights + token, mask=is_token, other=0.0) / total, mask=is_token)


@triton.jit(do_not_specialize=["tokens", "items", "length"])
def _table_grad_kernel(
    states: tl.tensor,  # (T, D)
    table: tl.tensor,  # (V, D)
    biases: tl.tensor,  # (V,) or None
    excluded: tl.tensor,  # (T,) or None
    shifts: tl.tensor,  # (T,)
    scales: tl.tensor,  # (T,)
    sums: tl.tensor,  # (S, V, D)
    tokens: int,
    items: int,
    length: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Write each split's sum of the states times e^(score - shift) * scale.

    In the last block, rows that are not items may overflow; they are not written.
    """
    split, d, row = tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_item = item < items
    at = item.to(tl.int64)[:, None] * DIM + d[None, :]
    is_there = is_item[:, None] & (d < DIM)[None, :]
    vectors = tl.load(table + at, mask=is_there, other=0.0)  # (ITEMS, WIDTH)
    if biases is not None:
        bias = tl.load(biases + item, mask=is_item, other=0.0)
    state_sum = tl.zeros((ITEMS, WIDTH), tl.float32)
    begin = split * length
    rows = states + begin.to(tl.int64) * DIM + row[:, None] * DIM + d[None, :]
    for start in range(begin, tl.minimum(begin + length, tokens), TOKENS):
        token = start + row
        is_token = token < tokens
        h = tl.load(rows, mask=is_token[:, None] & (d < DIM)[None, :], other=0.0)  # (TOKENS, WIDTH)
        shift = tl.load(shifts + token, mask=is_token, other=float("inf"))
        scale = tl.load(scales + token, mask=is_token, other=0.0)
        scores = tl.dot(vectors, tl.trans(h), input_precision="ieee")
        if biases is not None:
            scores += bias[:, None]
        if excluded is not None:
            out = tl.load(excluded + token, mask=is_token, other=-1).to(tl.int32)
            scores = tl.where(item[:, None] == out[None, :], float("-inf"), scores)
        p = tl.exp(scores - shift[None, :]) * scale[None, :]
        state_sum = tl.dot(p.to(h.dtype), h, state_sum, input_precision="ieee")
        rows += TOKENS * DIM
    tl.store(sums + split.to(tl.int64) * items * DIM + at, state_sum, mask=is_there)
