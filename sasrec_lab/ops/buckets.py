"""Attention by torch's matrix products: sequences of similar length share a bucket, an (n, L) table of cells.

Hardly anything is computed for positions that do not exist. No real token sees the cells after a sequence's newest
item, so the causal mask is the only one. B sequences, T tokens, D dim, H heads, C cells of all buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.backend import round_up_size
from sasrec_lab.ops.dropout import keep_mask, keep_probability

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


def fused_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
    """Return attention's output (T, D) by torch's fused kernels, one call per bucket: the form for GPUs.

    As of 2.13, torch's attention over sequences of different lengths (varlen_attn) has neither dropout nor single
    precision, and its flex attention has no dropout.
    """
    inputs = zip(*(buckets.gather(x, heads) for x in (q, k, v)), strict=True)
    return buckets.scatter(
        [F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True) for q, k, v in inputs]
    )


def newest_attention(q: Tensor, x: Tensor, buckets: Buckets, scale: float) -> Tensor:
    """Return softmax(scale q x') x (B, H, D) within each sequence, for queries q (B, H, D) and states x (T, D)."""
    out = torch.empty_like(q)
    for bucket, *numbers in zip(buckets.gather(x, heads=1), buckets.members, buckets.lengths, strict=True):
        rows, lengths = (torch.from_numpy(x).to(q.device) for x in numbers)
        is_past = torch.arange(bucket.shape[2], device=q.device) < lengths[:, None, None]  # (n, 1, L)
        tokens = bucket[: len(rows), 0]  # (n, L, D)
        out[rows] = F.scaled_dot_product_attention(q[rows], tokens, tokens, attn_mask=is_past, scale=scale)
    return out


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
    """Return attention's output (T, D) by matrix products: the form for CPUs without a kernel.

    QUERIES_PER_PRODUCT queries of a bucket meet the keys up to them. The backward pass is written by hand: autograd's
    would keep five (n, L, L) tensors instead of two, and would add up by index although cells and tokens match one to
    one. Reference: tests/reference_model.py.
    """
    return _BucketedAttention.apply(q, k, v, buckets, heads, rate)


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            # of the queries instead of the scores, and of the values instead of the weights
            ctx.scales = 1 / sqrt(q.shape[1] // heads), 1 / keep_probability(rate)
            queries = buckets.gather(q * ctx.scales[0], heads)
            keys = buckets.gather(k, heads)
            values = buckets.gather(v * ctx.scales[1] if rate else v, heads)
            out = [torch.empty_like(x) for x in queries]
            weights, kept = [], []  # per piece; kept: after dropout
            for bucket, begin, end in _pieces(queries):
                scores = queries[bucket][:, :, begin:end] @ keys[bucket][:, :, :end].mT
                weights.append(_softmax_of_past(scores, begin))
                kept.append(weights[-1] * keep_mask(weights[-1], rate) if rate else weights[-1])
                out[bucket][:, :, begin:end] = kept[-1].to(scores.dtype) @ values[bucket][:, :, :end]
        ctx.save_for_backward(*queries, *keys, *values, *out, *weights, *kept)
        ctx.buckets, ctx.heads = buckets, heads
        return buckets.scatter(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        buckets, n = ctx.buckets, len(ctx.buckets.sizes)
        q, k, v, out = (ctx.saved_tensors[i : i + n] for i in range(0, 4 * n, n))
        pieces = _pieces(q)
        weights, kept = ctx.saved_tensors[4 * n :][: len(pieces)], ctx.saved_tensors[4 * n + len(pieces) :]
        cells = q[0].new_zeros(len(buckets.cells), grad.shape[1])
        cells.index_copy_(0, buckets.places, grad[: len(buckets.places)].to(cells.dtype))
        grads = buckets.split(cells, ctx.heads)  # cells without a token are zero, so they add nothing to others
        q_grads, k_grads, v_grads = ([torch.zeros_like(x) for x in bucket] for bucket in (q, k, v))
        for (i, begin, end), weight, used in zip(pieces, weights, kept, strict=True):
            rows, past = slice(begin, end), slice(end)
            row_grads = grads[i][:, :, rows]
            v_grads[i][:, :, past] += used.to(row_grads.dtype).mT @ row_grads
            # softmax's backward pass: weights * (their gradient - its weighted mean), which is the sum of grad * out
            scores_grad = (row_grads @ v[i][:, :, past].mT).to(weight.dtype)
            if used is not weight:
                scores_grad = torch.ops.aten.threshold_backward(scores_grad, used, 0)  # 0 where the weight was dropped
            scores_grad.sub_((row_grads * out[i][:, :, rows]).sum(-1, keepdim=True)).mul_(weight)
            scores_grad = scores_grad.to(row_grads.dtype)
            q_grads[i][:, :, rows] = scores_grad @ k[i][:, :, past]
            k_grads[i][:, :, past] += scores_grad.mT @ q[i][:, :, rows]
        q_grad, k_grad, v_grad = (buckets.scatter(x) for x in (q_grads, k_grads, v_grads))
        return q_grad.mul_(ctx.scales[0]), k_grad, v_grad.mul_(ctx.scales[1]), None, None, None


def _pieces(buckets: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Return (bucket, first query, end of queries) of each product."""
    return [
        (i, begin, min(begin + QUERIES_PER_PRODUCT, x.shape[2]))
        for i, x in enumerate(buckets)
        for begin in range(0, x.shape[2], QUERIES_PER_PRODUCT)
    ]


def _softmax_of_past(scores: Tensor, begin: int) -> Tensor:
    """Return the softmax of scores (n, H, rows, past) over the tokens up to each query; the first query is `begin`.

    The scores are overwritten if they are in full precision.
    """
    rows, past = scores.shape[-2:]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores += torch.full((rows, past), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(begin + 1)
    return torch.softmax(scores, -1, out=scores)
