"""Sums over each token and the earlier ones of its sequence, with learned weights by distance and by time.

The maps of FuXi (Ye et al. 2025, arXiv 2502.03036) that do not depend on the tokens' vectors. B sequences, T tokens, D
columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sasrec_lab.ops import library
from sasrec_lab.ops.buckets import Buckets, bias_scores
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.library import ROW_MULTIPLE, Bytes, Floats, Integers, check_shape, kernel
from sasrec_lab.ops.pointwise import contiguous_floats, look_up
from sasrec_lab.ops.time_buckets import NUM_BUCKETS, time_buckets


def relative_sums(
    v: Tensor, layout: BatchLayout, by_distance: Tensor | None = None, by_time: Tensor | None = None
) -> list[Tensor]:
    """Return for each kind of weights that is given, first by distance, the weighted sums (T, D) of the rows of v.

    The weight of token j in the sum of a token i of its sequence, j <= i, is element i - j of `by_distance` (n,), or
    that of `by_time` (129,) for the time from j to the query time of i, by `time_buckets`. No sequence may be longer
    than n. Dummy tokens after the last sequence get zeros. Computes in full precision under autocast.
    """
    v = contiguous_floats(v)
    with torch.autocast(v.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return _sums_of_single_sequence(v, v.shape[0], layout, by_distance, by_time)
        if library.supports(v):
            return compiled_sums(v, layout, by_distance, by_time)
        return bucketed_sums(v, layout.buckets, by_distance, by_time)


def relative_sums_newest(
    v: Tensor, layout: BatchLayout, by_distance: Tensor | None = None, by_time: Tensor | None = None
) -> list[Tensor]:
    """Return what `relative_sums` gives each sequence's newest token."""  # (B, D) each
    v = contiguous_floats(v)
    with torch.autocast(v.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return _sums_of_single_sequence(v, 1, layout, by_distance, by_time)
        return _bucketed_newest(v, layout, by_distance, by_time)


def _sums_of_single_sequence(
    v: Tensor, queries: int, layout: BatchLayout, by_distance: Tensor | None, by_time: Tensor | None
) -> list[Tensor]:
    """Return the sums of the last tokens, `queries` of them, of a single sequence, in an export."""
    tokens = torch.arange(v.shape[0], device=v.device)
    distances = tokens[-queries:, None] - tokens  # (queries, T)
    weights = []
    if by_distance is not None:
        weights.append(by_distance[distances.clamp(min=0)])
    if by_time is not None:
        weights.append(by_time[time_buckets(layout.gaps(slice(-queries, None), slice(None)))])
    return [own.masked_fill(distances < 0, 0) @ v for own in weights]


# The form of torch


def bucketed_sums(
    v: Tensor, buckets: Buckets, by_distance: Tensor | None = None, by_time: Tensor | None = None
) -> list[Tensor]:
    """Return `relative_sums` by matrix products: the form for GPUs, and for CPUs without a kernel.

    The backward pass looks the weights up again, because kept they would fill a GPU of many layers.
    """
    values, sums = buckets.gather(v, 1), []
    for table, sum_piece in ((by_distance, _sum_by_distance), (by_time, _sum_by_time)):
        if table is None:
            continue
        out: list[list[Tensor]] = [[] for _ in buckets.sizes]
        for i, (bucket, rows, seen) in enumerate(buckets.pieces(causal=True)):
            times = buckets.time_buckets[i] if table is by_time else None
            piece = sum_piece, values[bucket][:, :, seen], table, rows, seen, times
            out[bucket].append(checkpoint(*piece, use_reentrant=False, preserve_rng_state=False))
        sums.append(buckets.scatter([torch.cat(pieces, 2) for pieces in out]))
    return sums


def _sum_by_distance(v: Tensor, table: Tensor, rows: slice, seen: slice, _: None) -> Tensor:
    """Return the sums (n, 1, rows, D) of values (n, 1, seen, D), as one product for all sequences."""
    return torch.einsum("ij,nhjd->nhid", bias_scores(table[None], True, rows, seen)[0], v)


def _sum_by_time(v: Tensor, table: Tensor, rows: slice, _: slice, times: Tensor) -> Tensor:
    """Return the sums (n, 1, rows, D) of values (n, 1, seen, D); `times` are the time buckets (n, rows, seen)."""
    return look_up(table, times).tril(rows.start)[:, None] @ v


def _bucketed_newest(
    v: Tensor, layout: BatchLayout, by_distance: Tensor | None, by_time: Tensor | None
) -> list[Tensor]:
    """Return `relative_sums_newest` by matrix products, with one row of weights for each sequence."""
    buckets = layout.buckets
    values = buckets.gather(v, 1)
    if by_time is not None:
        looked_up = buckets.gather(by_time[time_buckets(layout.newest_gaps)][:, None], 1)
    sums = [v.new_empty(layout.num_sequences, v.shape[1]) for table in (by_distance, by_time) if table is not None]
    for i, members in enumerate(buckets.members):
        rows, n = torch.from_numpy(members).to(v.device), len(members)
        weights = []  # (n, L)
        if by_distance is not None:
            weights.append(by_distance[buckets.ages(i)])
        if by_time is not None:
            weights.append(looked_up[i][:n, 0, :, 0])
        for out, own in zip(sums, weights, strict=True):
            out[rows] = ((own * buckets.key_masks[i][:n])[:, None] @ values[i][:n, 0])[:, 0]
    return sums


# The kernel, for float32 on the CPU


def compiled_sums(
    v: Tensor, layout: BatchLayout, by_distance: Tensor | None = None, by_time: Tensor | None = None
) -> list[Tensor]:
    """Return `relative_sums` by the kernel, which takes one sequence at a time in a core's own cache.

    Weights by distance are read where they are; those by time are looked up again in the backward pass. Reference:
    `bucketed_sums`.
    """
    distance_row = None
    if by_distance is not None:
        if layout.longest > len(by_distance):
            raise ValueError(
                f"weights ({len(by_distance)},) by distance do not fit sequences of {layout.longest} tokens"
            )
        distance_row = F.pad(by_distance.flip(0), (0, ROW_MULTIPLE))  # a query's later tokens have the weights behind
    return [sums for sums in _CompiledSums.apply(v, layout, distance_row, by_time) if sums is not None]


class _CompiledSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, layout: BatchLayout, distance_row: Tensor | None, by_time: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        check_shape("v", v, layout.num_tokens, v.shape[1])
        if by_time is not None:
            check_shape("by_time", by_time, NUM_BUCKETS)
        ctx.layout = layout
        ctx.reach = 0 if distance_row is None else len(distance_row) - ROW_MULTIPLE - 1
        ctx.buckets = None if by_time is None else layout.pair_buckets
        out = [None if table is None else torch.empty_like(v) for table in (distance_row, by_time)]
        for sums in out:
            if sums is not None:
                sums[layout.num_real_tokens :] = 0
        tables = distance_row, ctx.reach, by_time, ctx.buckets
        _relative_sums_kernel(v, layout.offsets_tensor, layout.num_sequences, v.shape[1], *tables, *out)
        ctx.save_for_backward(v, distance_row, by_time)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, distance_row, by_time = ctx.saved_tensors
        v_grad = torch.empty_like(v)
        v_grad[ctx.layout.num_real_tokens :] = 0
        table_grads = [None if table is None else torch.zeros_like(table) for table in (distance_row, by_time)]
        grads = tuple(None if grad is None else grad.contiguous() for grad in grads)
        sizes = ctx.layout.offsets_tensor, ctx.layout.num_sequences, v.shape[1]
        tables = distance_row, ctx.reach, by_time, ctx.buckets, NUM_BUCKETS
        _relative_sums_backward_kernel(v, *grads, *sizes, *tables, v_grad, *table_grads)
        return v_grad, None, *table_grads


@kernel
def _relative_sums_kernel(
    v: Floats,
    offsets: Integers,
    sequences: int,
    width: int,
    by_distance: Floats | None,
    reach: int,
    by_time: Floats | None,
    buckets: Bytes | None,
    out_by_distance: Floats | None,
    out_by_time: Floats | None,
) -> None:
    """Write the sums of each kind of weights."""


@kernel
def _relative_sums_backward_kernel(
    v: Floats,
    grad_by_distance: Floats | None,
    grad_by_time: Floats | None,
    offsets: Integers,
    sequences: int,
    width: int,
    by_distance: Floats | None,
    reach: int,
    by_time: Floats | None,
    buckets: Bytes | None,
    num_buckets: int,
    v_grad: Floats,
    distance_grad: Floats | None,
    time_grad: Floats | None,
) -> None:
    """Write the gradient of v, and add those of the weights."""
