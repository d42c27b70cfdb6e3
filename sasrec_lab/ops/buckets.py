"""Attention by torch's matrix products: sequences of similar length share a bucket, an (n, L) table of cells.

Hardly anything is computed for positions that do not exist. Causal attention needs no other mask, because no real token
sees the cells after a sequence's newest item. B sequences, T tokens, D dim, H heads, C cells of all buckets.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.backend import round_up_size
from sasrec_lab.ops.dropout import keep_mask, keep_probability
from sasrec_lab.ops.time_buckets import time_buckets
from sasrec_lab.ops.time_decay import decay_scores

QUERIES_PER_PRODUCT = 128  # with the keys up to them; fewer compute less in vain, in more calls


@dataclass(frozen=True)
class Buckets:
    """Sequences sorted into buckets, whose sizes are rounded up to few; cells left over hold token 0."""

    sizes: list[tuple[int, int]]  # (n, L) of each bucket: n sequences of up to L tokens
    members: list[np.ndarray]  # of each bucket: the sequence in each row, fewer than n if rows are left over
    lengths: list[np.ndarray]  # of each bucket: the number of tokens of its members
    cells: Tensor  # (C,) the token in each cell, one bucket after the other
    places: Tensor  # (tokens in sequences,) the cell of each token
    num_tokens: int  # T, including those of no sequence
    times: Tensor | None = None  # (C,) of the token in each cell, in seconds
    query_times: Tensor | None = None  # (C,) at which its prediction is asked for

    @staticmethod
    def from_offsets(offsets: np.ndarray, num_tokens: int, device: torch.device) -> "Buckets":
        """Sort sequences with these offsets (B + 1,) into buckets."""
        lengths = np.diff(offsets)  # (B,)
        width_of = np.array([round_up_size(-(-length // 16) * 16) for length in range(lengths.max() + 1)])
        widths = width_of[lengths]  # (B,)
        places = np.empty(offsets[-1], dtype=np.int64)
        sizes, members, cells = [], [], []
        end = 0
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            n, steps = round_up_size(len(rows), steps_per_octave=2), np.arange(width)
            is_real = steps < lengths[rows][:, None]  # (sequences, L)
            table = np.zeros((n, width), dtype=np.int64)
            table[: len(rows)][is_real] = (offsets[rows][:, None] + steps)[is_real]
            places[table[: len(rows)][is_real]] = end + np.flatnonzero(is_real)
            sizes.append((n, int(width)))
            members.append(rows)
            cells.append(table.ravel())
            end += table.size
        return Buckets(
            sizes,
            members,
            [lengths[rows] for rows in members],
            torch.from_numpy(np.concatenate(cells)).to(device),
            torch.from_numpy(places).to(device),
            num_tokens,
        )

    def with_times(self, times: Tensor, query_times: Tensor) -> "Buckets":
        """Return these buckets with the tokens' times (T,) and query times (T,)."""
        return replace(self, times=times[self.cells], query_times=query_times[self.cells])

    def gaps(self, bucket: int, queries: slice, keys: slice) -> Tensor:
        """Return the seconds (n, queries, keys) from the keys' times to the query times, of these cells in each row."""
        assert self.times is not None, "the layout has no times"
        assert self.query_times is not None
        times, query_times = (self.split(x, 1)[bucket][:, 0, :, 0] for x in (self.times, self.query_times))
        return query_times[:, queries, None] - times[:, None, keys]

    @cached_property
    def time_buckets(self) -> list[Tensor]:
        """Return the time buckets (n, queries, keys) int32 of the gaps of each causal piece; all layers share them."""
        return [time_buckets(self.gaps(*piece)).int() for piece in self.pieces(causal=True)]

    def pieces(self, causal: bool) -> list[tuple[int, slice, slice]]:
        """Return (bucket, queries, the keys that they meet) of each product."""
        pieces = []
        for i, (_, length) in enumerate(self.sizes):
            for begin in range(0, length, QUERIES_PER_PRODUCT):
                end = min(begin + QUERIES_PER_PRODUCT, length)
                pieces.append((i, slice(begin, end), slice(end if causal else length)))
        return pieces

    def ages(self, bucket: int) -> Tensor:
        """Return the distance of each cell from its sequence's newest token (members, L), zero after it."""
        steps = np.arange(self.sizes[bucket][1])
        ages = np.maximum(self.lengths[bucket][:, None] - 1 - steps, 0)
        return torch.from_numpy(ages).to(self.cells.device)

    @cached_property
    def key_masks(self) -> list[Tensor]:
        """Return each bucket's mask (n, L): False after a sequence, but True in rows left over, against NaN."""
        masks = []
        for (n, width), lengths in zip(self.sizes, self.lengths, strict=True):
            ends = np.append(lengths, np.full(n - len(lengths), width))[:, None]
            masks.append(torch.from_numpy(np.arange(width) < ends).to(self.cells.device))
        return masks

    def split(self, cells: Tensor, heads: int) -> list[Tensor]:
        """Return each bucket's part (n, H, L, D / H) of the cells (C, D)."""
        parts = cells.split([n * length for n, length in self.sizes])
        return [x.view(n, length, heads, -1).transpose(1, 2) for x, (n, length) in zip(parts, self.sizes, strict=True)]

    def gather(self, x: Tensor, heads: int) -> list[Tensor]:
        """Return each bucket's part (n, H, L, D / H) of the tokens' rows (T, D)."""
        return self.split(x.index_select(0, self.cells), heads)

    def scatter(self, buckets: list[Tensor]) -> Tensor:
        """Return the tokens' rows (T, D) of buckets (n, H, L, D / H), zeros after the last sequence."""
        cells = torch.cat([x.transpose(1, 2).flatten(2).flatten(0, 1) for x in buckets])  # (C, D)
        return F.pad(cells.index_select(0, self.places), (0, 0, 0, self.num_tokens - len(self.places)))


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    heads: int,
    rate: float,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return attention's output (T, D) by torch's fused kernels, one call per bucket.

    The form for GPUs with a bias or decay, or if no operator of ops/packed_attention.py suits.
    """
    out = []
    inputs = zip(*(buckets.gather(x, heads) for x in (q, k, v)), strict=True)
    for i, (queries, keys, values) in enumerate(inputs):
        mask = None if causal else buckets.key_masks[i][:, None, None]  # (n, 1, 1, L)
        biases = _added_scores(buckets, (i, slice(queries.shape[2]), slice(queries.shape[2])), causal, bias, decay)
        if biases is not None:
            future = torch.ones(queries.shape[2], queries.shape[2], dtype=torch.bool, device=q.device).triu(1)
            mask = biases.to(queries.dtype).masked_fill(future if mask is None else ~mask, float("-inf"))
        is_causal = mask is None
        out.append(F.scaled_dot_product_attention(queries, keys, values, mask, dropout_p=rate, is_causal=is_causal))
    return buckets.scatter(out)


def _added_scores(
    buckets: Buckets, piece: tuple[int, slice, slice], causal: bool, bias: Tensor | None, decay: Tensor | None
) -> Tensor | None:
    """Return what is added to the scores of a piece (n or 1, H or 1, queries, keys), if anything."""
    added = None if bias is None else bias_scores(bias, causal, *piece[1:])[None]
    if decay is None:
        return added
    decays = decay_scores(buckets.gaps(*piece), decay)[:, None]
    return decays if added is None else added + decays


def bias_scores(bias: Tensor, causal: bool, queries: slice, keys: slice) -> Tensor:
    """Return the biases (H or 1, queries, keys) of these positions in a sequence, the later ones of zero if `causal`.

    `bias` is as in `attend`. Positions further apart than it reaches get zeros too.
    """
    begin, end, count = queries.start or 0, queries.stop, keys.stop
    table = by_offset(bias, causal, max(end, count))
    width = table.shape[1] // 2 + 1
    # a row for each offset of key 0, and the last query has the lowest
    return table.unfold(1, count, 1)[:, width - end : width - begin].flip(1)


def by_offset(bias: Tensor, causal: bool, width: int) -> Tensor:
    """Return the biases (H or 1, 2 width - 1) by j - i + width - 1, for a query i and a key j below `width`."""
    if causal:
        bias = F.pad(bias, (bias.shape[1] - 1, 0))
    surplus = width - (bias.shape[1] + 1) // 2
    return F.pad(bias, (surplus, surplus)).flip(1)


def past_of(bias: Tensor, causal: bool) -> Tensor:
    """Return the biases (H or 1, n) of keys at the distances 0 .. n - 1 before a query."""
    return bias if causal else bias[:, bias.shape[1] // 2 :]


def newest_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    scale: float,
    past: Tensor | None = None,
    decays: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale q k' + bias) v (B, G, Q, E) within each sequence, for Q queries in each of G groups.

    Keys and values (T, G E) may be the same tensor. The bias is the sum of `past` (G Q or 1, n) by distance from the
    newest token, and `decays` (T,) by key.
    """
    out, groups = torch.empty_like(q), q.shape[1]
    keys = buckets.gather(k, groups)
    values = keys if v is k else buckets.gather(v, groups)
    added = None if decays is None else buckets.gather(decays[:, None].to(q.dtype), 1)  # (n, 1, L, 1) of each bucket
    for i, (key, value, members, mask) in enumerate(zip(keys, values, buckets.members, buckets.key_masks, strict=True)):
        rows, n = torch.from_numpy(members).to(q.device), len(members)
        k, v = key[:n].flatten(0, 1), value[:n].flatten(0, 1)  # (n G, L, E)
        visible = mask[:n, None].repeat_interleave(groups, 0)  # (n G, 1, L)
        if past is not None:
            biases = past[:, buckets.ages(i)].expand(groups * q.shape[2], -1, -1)  # (G Q, n, L)
            biases = biases.transpose(0, 1).reshape(n * groups, -1, k.shape[1]).to(q.dtype)
        if added is not None:
            own = added[i][:n, 0].mT.repeat_interleave(groups, 0)  # (n G, 1, L)
            biases = own if past is None else biases + own
        if past is not None or added is not None:
            visible = biases.masked_fill(~visible, float("-inf"))
        mean = F.scaled_dot_product_attention(q[rows].flatten(0, 1), k, v, attn_mask=visible, scale=scale)
        out[rows] = mean.unflatten(0, (n, groups))
    return out


def bucketed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Buckets,
    heads: int,
    rate: float,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return attention's output (T, D) by matrix products: the form for CPUs without a kernel.

    QUERIES_PER_PRODUCT queries of a bucket meet the keys up to them, or all keys if not `causal`. The backward pass is
    written by hand: autograd's would keep five (n, L, L) tensors instead of two, and would add up by index although
    cells and tokens match one to one. Reference: tests/reference_model.py.
    """
    biases = []  # of each piece, (n or 1, H or 1, rows, keys); autograd leads their gradients to the parameters
    if bias is not None or decay is not None:
        biases = [_added_scores(buckets, piece, causal, bias, decay) for piece in buckets.pieces(causal)]
    return _BucketedAttention.apply(q, k, v, buckets, heads, rate, causal, *biases)


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        buckets: Buckets,
        heads: int,
        rate: float,
        causal: bool,
        *biases: Tensor,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            # of the queries instead of the scores, and of the values instead of the weights
            ctx.scales = 1 / sqrt(q.shape[1] // heads), 1 / keep_probability(rate)
            queries = buckets.gather(q * ctx.scales[0], heads)
            keys = buckets.gather(k, heads)
            values = buckets.gather(v * ctx.scales[1] if rate else v, heads)
            out = [torch.empty_like(x) for x in queries]
            weights, kept = [], []  # per piece; kept: after dropout
            pieces = buckets.pieces(causal)
            for i, (bucket, rows, seen) in enumerate(pieces):
                scores = queries[bucket][:, :, rows] @ keys[bucket][:, :, seen].mT
                if biases:
                    scores = scores + biases[i]
                weights.append(
                    _softmax_of_past(scores, rows.start) if causal else _softmax(scores, buckets.key_masks[bucket])
                )
                kept.append(weights[-1] * keep_mask(weights[-1], rate) if rate else weights[-1])
                out[bucket][:, :, rows] = kept[-1].to(v.dtype) @ values[bucket][:, :, seen]
        ctx.save_for_backward(*queries, *keys, *values, *out, *weights, *kept)
        ctx.buckets, ctx.heads, ctx.pieces, ctx.bias_shapes = buckets, heads, pieces, [x.shape for x in biases]
        return buckets.scatter(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        buckets, n = ctx.buckets, len(ctx.buckets.sizes)
        q, k, v, out = (ctx.saved_tensors[i : i + n] for i in range(0, 4 * n, n))
        pieces = ctx.pieces
        biases_grads: list[Tensor] = []
        weights, kept = ctx.saved_tensors[4 * n :][: len(pieces)], ctx.saved_tensors[4 * n + len(pieces) :]
        cells = q[0].new_zeros(len(buckets.cells), grad.shape[1])
        cells.index_copy_(0, buckets.places, grad[: len(buckets.places)].to(cells.dtype))
        grads = buckets.split(cells, ctx.heads)  # cells without a token are zero, so they add nothing to others
        q_grads, k_grads, v_grads = ([torch.zeros_like(x) for x in bucket] for bucket in (q, k, v))
        for (i, rows, seen), weight, used in zip(pieces, weights, kept, strict=True):
            row_grads = grads[i][:, :, rows]
            v_grads[i][:, :, seen] += used.to(row_grads.dtype).mT @ row_grads
            # softmax's backward pass: weights * (their gradient - its weighted mean), which is the sum of grad * out
            scores_grad = (row_grads @ v[i][:, :, seen].mT).to(weight.dtype)
            if used is not weight:
                scores_grad = torch.ops.aten.threshold_backward(scores_grad, used, 0)  # 0 where the weight was dropped
            scores_grad.sub_((row_grads * out[i][:, :, rows]).sum(-1, keepdim=True)).mul_(weight)
            if ctx.bias_shapes:
                biases_grads.append(_sum_to(scores_grad, ctx.bias_shapes[len(biases_grads)]))
            scores_grad = scores_grad.to(row_grads.dtype)
            q_grads[i][:, :, rows] = scores_grad @ k[i][:, :, seen]
            k_grads[i][:, :, seen] += scores_grad.mT @ q[i][:, :, rows]
        q_grad, k_grad, v_grad = (buckets.scatter(x) for x in (q_grads, k_grads, v_grads))
        return q_grad.mul_(ctx.scales[0]), k_grad, v_grad.mul_(ctx.scales[1]), None, None, None, None, *biases_grads


def _sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient (n, H, rows, keys) summed over sequences, then over heads, if `shape` has one of them."""
    for dim in (0, 1):
        if shape[dim] < grad.shape[dim]:
            grad = grad.sum(dim, keepdim=True)
    return grad


def _softmax_of_past(scores: Tensor, begin: int) -> Tensor:
    """Return the softmax of scores (n, H, rows, past) over the tokens up to each query; the first query is `begin`.

    The scores are overwritten if they are in full precision.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    future = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device)
    scores += future.triu_(begin + 1)
    return torch.softmax(scores, -1, out=scores)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of scores (n, H, rows, L) over the cells that the mask (n, L) lets through."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores.masked_fill_(~mask[:, None, None], float("-inf"))
    return torch.softmax(scores, -1, out=scores)
