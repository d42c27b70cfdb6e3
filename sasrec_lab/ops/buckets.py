"""Attention by torch's own products: sequences of about one length share a bucket, an (n, L) table of cells.

So next to nothing is computed for positions that are not there. The cells behind a sequence's newest item are seen by
no real token: no mask but the causal one. B sequences, T tokens, D dim, H heads, C cells of all buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.backend import round_up_size
from sasrec_lab.ops.dropout import keep_mask, keep_probability

QUERIES_AT_ONCE = 128  # with the keys up to them: a fifth less work on MovieLens-1M; 64 save more, in more calls


@dataclass(frozen=True)
class Buckets:
    """Sizes are rounded up to one of few; the cells this leaves over hold token 0."""

    sizes: list[tuple[int, int]]  # (n, L) of each bucket: n sequences of up to L tokens
    members: list[np.ndarray]  # of each bucket: which sequence stands in a row, fewer than n where rows are left over
    lengths: list[np.ndarray]  # of each bucket: the tokens of its members
    cells: Tensor  # (C,) token in each cell of the buckets laid end to end
    places: Tensor  # (tokens in sequences,) the cell of each
    tokens: int  # T, with those that no sequence holds

    @staticmethod
    def of(offsets: np.ndarray, tokens: int, device: torch.device) -> "Buckets":
        lengths = np.diff(offsets)
        widths = np.array([round_up_size(-(-length // 16) * 16) for length in range(lengths.max() + 1)])[
            lengths
        ]  # (B,)
        places = np.empty(offsets[-1], dtype=np.int64)
        sizes, members, cells = [], [], []
        end = 0
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            n, steps = round_up_size(len(rows), steps_per_octave=2), np.arange(width)
            real = steps < lengths[rows][:, None]  # (sequences, L)
            table = np.zeros((n, width), dtype=np.int64)
            table[: len(rows)][real] = (offsets[rows][:, None] + steps)[real]
            places[table[: len(rows)][real]] = end + np.flatnonzero(real)
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
            tokens,
        )

    def split(self, cells: Tensor, heads: int) -> list[Tensor]:
        """Of the cells (C, D) each bucket's, (n, H, L, D / H)."""
        parts = cells.split([n * length for n, length in self.sizes])
        return [x.view(n, length, heads, -1).transpose(1, 2) for x, (n, length) in zip(parts, self.sizes, strict=True)]

    def gather(self, x: Tensor, heads: int) -> list[Tensor]:
        return self.split(x.index_select(0, self.cells), heads)

    def scatter(self, buckets: list[Tensor]) -> Tensor:
        """The tokens' rows (T, D) of buckets (n, H, L, D / H); zeros behind the last sequence."""
        cells = torch.cat([x.transpose(1, 2).flatten(2).flatten(0, 1) for x in buckets])  # (C, D)
        return F.pad(cells.index_select(0, self.places), (0, 0, 0, self.tokens - len(self.places)))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
    """By torch's fused kernels, one call a bucket.

    Its attention of variable length (varlen_attn) has neither dropout nor single precision, its flex attention no
    dropout, as of 2.13.
    """  # (T, D)
    inputs = zip(*(buckets.gather(x, heads) for x in (q, k, v)), strict=True)
    return buckets.scatter([F.scaled_dot_product_attention(*qkv, dropout_p=rate, is_causal=True) for qkv in inputs])


def newest_attention(q: Tensor, x: Tensor, buckets: Buckets, scale: float) -> Tensor:
    """Of each sequence's newest token alone, by queries q (B, H, D) compared with whole tokens x (T, D)."""
    out = torch.empty_like(q)
    for bucket, *numbers in zip(buckets.gather(x, heads=1), buckets.members, buckets.lengths, strict=True):
        rows, lengths = (torch.from_numpy(x).to(q.device) for x in numbers)
        past = torch.arange(bucket.shape[2], device=q.device) < lengths[:, None, None]  # (n, 1, L)
        tokens = bucket[: len(rows), 0]  # (n, L, D)
        out[rows] = F.scaled_dot_product_attention(q[rows], tokens, tokens, attn_mask=past, scale=scale)
    return out  # (B, H, D)


class BucketedAttention(torch.autograd.Function):
    """By products of matrices, QUERIES_AT_ONCE queries of a bucket with the keys up to them, and the backward pass
    written out.

    autograd's would keep five (n, L, L) tensors where two do and add up by index where cells and tokens match one to
    one: a tenth of a training step on MovieLens-1M. The plain twin is tests/padded_twin.py.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            ctx.scales = (
                1 / sqrt(q.shape[1] // heads),
                1 / keep_probability(rate),
            )  # of q; of v instead of weights
            q = buckets.gather(q * ctx.scales[0], heads)
            k = buckets.gather(k, heads)
            v = buckets.gather(v * ctx.scales[1] if rate else v, heads)
            out = [torch.empty_like(x) for x in q]
            weights, kept = [], []
            for bucket, begin, end in _pieces(q):
                scores = q[bucket][:, :, begin:end] @ k[bucket][:, :, :end].mT
                weights.append(_softmax_of_past(scores, begin))
                kept.append(weights[-1] * keep_mask(weights[-1], rate) if rate else weights[-1])
                out[bucket][:, :, begin:end] = kept[-1].to(scores.dtype) @ v[bucket][:, :, :end]
        ctx.save_for_backward(*q, *k, *v, *out, *weights, *kept)
        ctx.buckets, ctx.heads = buckets, heads
        return buckets.scatter(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        buckets, n = ctx.buckets, len(ctx.buckets.sizes)
        q, k, v, out = (ctx.saved_tensors[i : i + n] for i in range(0, 4 * n, n))
        pieces = _pieces(q)
        weights, kept = ctx.saved_tensors[4 * n :][: len(pieces)], ctx.saved_tensors[4 * n + len(pieces) :]
        cells = q[0].new_zeros(len(buckets.cells), grad.shape[1])
        cells.index_copy_(0, buckets.places, grad[: len(buckets.places)].to(cells.dtype))
        grads = buckets.split(cells, ctx.heads)  # rows without a token are zero, so they add nothing to others
        q_grads, k_grads, v_grads = ([torch.zeros_like(x) for x in bucket] for bucket in (q, k, v))
        for (i, begin, end), weight, used in zip(pieces, weights, kept, strict=True):
            rows, past = slice(begin, end), slice(end)
            row_grads = grads[i][:, :, rows]
            v_grads[i][:, :, past] += used.to(row_grads.dtype).mT @ row_grads
            # softmax's backward: weights * (their gradient - its weighted mean), which is the sum of grad * out
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
    """(bucket, first query, behind the last one)."""
    return [
        (i, begin, min(begin + QUERIES_AT_ONCE, x.shape[2]))
        for i, x in enumerate(buckets)
        for begin in range(0, x.shape[2], QUERIES_AT_ONCE)
    ]


def _softmax_of_past(scores: Tensor, begin: int) -> Tensor:
    """Over the tokens up to each one itself; the first query is number `begin`."""
    rows, past = scores.shape[-2:]  # scores (n, H, rows, past), overwritten where they are in full precision
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores += torch.full((rows, past), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(begin + 1)
    return torch.softmax(scores, -1, out=scores)
