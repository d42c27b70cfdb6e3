"""Causal attention with SiLU in place of the softmax, and biases by distance and time, over packed tokens.

The form of HSTU (Zhai et al. 2024, equation 3). B sequences, T tokens, H heads, E and V columns of a head's keys and
values.
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
from sasrec_lab.ops.time_buckets import NUM_BUCKETS, time_buckets


def attend_pointwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
) -> Tensor:
    """Return SiLU(q k' + biases) v / divisor (T, H V), over each token and the earlier ones of its sequence.

    The products of q (T, H E) and k (T, H E) are not divided by sqrt(E). All heads have the same biases: those of query
    i and key j are element i - j of `position_bias` (n,), and the element of `time_bias` (129,) for the time from key j
    to the query time of i, by `time_buckets`. No sequence may be longer than n. Dummy tokens after the last sequence
    get zeros. Computes in full precision under autocast.
    """
    q, k, v = (contiguous_floats(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return _attend_single_sequence(q, k, v, layout, heads, divisor, position_bias, time_bias)
        if library.supports(q, k, v):
            return compiled_pointwise(q, k, v, layout, heads, divisor, position_bias, time_bias)
        return bucketed_pointwise(q, k, v, layout.buckets, heads, divisor, position_bias, time_bias)


def attend_pointwise_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
) -> Tensor:
    """Return what `attend_pointwise` gives each sequence's newest token, for its query q (B, H E)."""  # (B, H V)
    q, k, v = (contiguous_floats(x) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return _attend_single_sequence(q, k, v, layout, heads, divisor, position_bias, time_bias)
        return _bucketed_newest(q, k, v, layout, heads, divisor, position_bias, time_bias)


def contiguous_floats(x: Tensor) -> Tensor:
    """Return x in single precision or better, copied if it is a part of a larger tensor's columns."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _attend_single_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    divisor: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """Return the output for the last tokens of a single sequence, of which q has the queries, in an export."""
    tokens = torch.arange(k.shape[0], device=q.device)
    distances = tokens[-q.shape[0] :, None] - tokens  # (queries, T)
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (H, queries or T, E or V)
    scores = q @ k.mT
    if position_bias is not None:
        scores = scores + position_bias[distances.clamp(min=0)]
    if time_bias is not None:
        scores = scores + time_bias[time_buckets(layout.gaps(slice(-q.shape[1], None), slice(None)))]
    weights = F.silu(scores).masked_fill(distances < 0, 0)
    return (weights @ v).transpose(0, 1).flatten(1) / divisor


# The form of torch


def bucketed_pointwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    heads: int,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
) -> Tensor:
    """Return `attend_pointwise` by matrix products: the form for GPUs, and for CPUs without a kernel.

    The backward pass computes the scores again, because kept they would fill a GPU of many layers.
    """
    queries, keys, values = (buckets.gather(x, heads) for x in (q, k, v))
    out: list[list[Tensor]] = [[] for _ in buckets.sizes]
    for i, (bucket, rows, seen) in enumerate(buckets.pieces(causal=True)):
        inputs = queries[bucket][:, :, rows], keys[bucket][:, :, seen], values[bucket][:, :, seen]
        times = None if time_bias is None else buckets.time_buckets[i]
        piece = _attend_piece, *inputs, rows, seen, position_bias, time_bias, times
        out[bucket].append(checkpoint(*piece, use_reentrant=False, preserve_rng_state=False))
    return buckets.scatter([torch.cat(pieces, 2) for pieces in out]) / divisor


def _attend_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice,
    seen: slice,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    times: Tensor | None,
) -> Tensor:
    """Return the output (n, H, rows, V) for queries (n, H, rows, E) of `rows`, and keys and values of `seen`.

    `times` are the time buckets (n, rows, seen).
    """
    scores = q @ k.mT
    if position_bias is not None:
        scores = scores + bias_scores(position_bias[None], True, rows, seen)
    if time_bias is not None and times is not None:
        scores = scores + look_up(time_bias, times)[:, None]
    return F.silu(scores).tril(rows.start) @ v


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """Return the elements of a table (n,) at these places, of any shape."""
    if places.is_cuda:  # the backward pass of index_select would add in any order there, and on a CPU is faster
        return F.embedding(places, table[:, None])[..., 0]
    return table.index_select(0, places.flatten()).view(places.shape)


def _bucketed_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    divisor: float,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
) -> Tensor:
    """Return `attend_pointwise_newest` by matrix products, one sequence's row for each query."""
    buckets = layout.buckets
    q = q.unflatten(1, (heads, 1, -1))  # (B, H, 1, E)
    keys, values = buckets.gather(k, heads), buckets.gather(v, heads)
    out = q.new_empty(len(q), v.shape[1])
    if time_bias is not None:
        times = buckets.gather(time_bias[time_buckets(layout.newest_gaps)][:, None], 1)
    for i, members in enumerate(buckets.members):
        rows, n = torch.from_numpy(members).to(q.device), len(members)
        scores = q[rows] @ keys[i][:n].mT  # (n, H, 1, L)
        if position_bias is not None:
            scores = scores + position_bias[buckets.ages(i)][:, None, None]
        if time_bias is not None:
            scores = scores + times[i][:n].mT
        weights = F.silu(scores) * buckets.key_masks[i][:n, None, None]
        out[rows] = (weights @ values[i][:n]).flatten(1) / divisor
    return out


# The kernel, for float32 on the CPU


def compiled_pointwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    divisor: float,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
) -> Tensor:
    """Return `attend_pointwise` by the kernel: one sequence and head at a time in a core's own cache.

    q, k and v are contiguous. No scores are stored, because the backward pass computes them again. Reference:
    `bucketed_pointwise`.
    """
    position_row = None
    if position_bias is not None:
        if layout.longest > len(position_bias):
            size = len(position_bias)
            raise ValueError(f"a position bias ({size},) does not fit sequences of {layout.longest} tokens")
        position_row = F.pad(position_bias.flip(0), (0, ROW_MULTIPLE))  # the kernel reads a register beyond the last
    return _CompiledPointwise.apply(q, k, v, layout, heads, float(divisor), position_row, time_bias)


class _CompiledPointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BatchLayout,
        heads: int,
        divisor: float,
        position_row: Tensor | None,
        time_bias: Tensor | None,
    ) -> Tensor:
        for name, x, dim in (("q", q, q.shape[1]), ("k", k, q.shape[1]), ("v", v, v.shape[1])):
            check_shape(name, x, layout.num_tokens, dim)
        if time_bias is not None:
            check_shape("time_bias", time_bias, NUM_BUCKETS)
        ctx.layout = layout
        ctx.sizes = layout.num_sequences, heads, q.shape[1] // heads, v.shape[1] // heads, divisor
        ctx.reach = 0 if position_row is None else len(position_row) - ROW_MULTIPLE - 1
        ctx.buckets = None if time_bias is None else layout.pair_buckets
        out = torch.empty_like(v)
        out[layout.num_real_tokens :] = 0
        biases = position_row, ctx.reach, time_bias, ctx.buckets
        _pointwise_kernel(q, k, v, layout.offsets_tensor, *ctx.sizes, *biases, out)
        ctx.save_for_backward(q, k, v, position_row, time_bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position_row, time_bias = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for x in grads:
            x[ctx.layout.num_real_tokens :] = 0
        tables = [None if x is None else torch.zeros_like(x) for x in (position_row, time_bias)]
        biases = position_row, ctx.reach, time_bias, ctx.buckets, NUM_BUCKETS
        offsets, grad = ctx.layout.offsets_tensor, grad.contiguous()
        _pointwise_backward_kernel(q, k, v, grad, offsets, *ctx.sizes, *biases, *grads, *tables)
        return *grads, None, None, None, *tables


@kernel
def _pointwise_kernel(
    q: Floats,
    k: Floats,
    v: Floats,
    offsets: Integers,
    sequences: int,
    heads: int,
    key_width: int,
    value_width: int,
    divisor: float,
    position_bias: Floats | None,
    reach: int,
    time_bias: Floats | None,
    buckets: Bytes | None,
    out: Floats,
) -> None:
    """Write attention's output to `out`."""


@kernel
def _pointwise_backward_kernel(
    q: Floats,
    k: Floats,
    v: Floats,
    grad: Floats,
    offsets: Integers,
    sequences: int,
    heads: int,
    key_width: int,
    value_width: int,
    divisor: float,
    position_bias: Floats | None,
    reach: int,
    time_bias: Floats | None,
    buckets: Bytes | None,
    num_buckets: int,
    q_grad: Floats,
    k_grad: Floats,
    v_grad: Floats,
    position_grad: Floats | None,
    time_grad: Floats | None,
) -> None:
    """Write the gradients of q, k and v, and add those of the biases."""
