"""Attention by torch's own products: sequences of about one length share a bucket, an (n, L) table of cells.

So next to nothing is computed for positions that are not there. The cells behind a sequence's newest item are seen by
no real token: no mask but the causal one. B sequences, T tokens, D dim, H heads, C cells of all buckets.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.data.batches import few_sizes
from sasrec_lab.model.dropout import keep_mask, kept_share


@dataclass(frozen=True)
class Buckets:
    """Sizes are rounded up to one of few; the cells this leaves over hold token 0."""

    sizes: list[tuple[int, int]]  # (n, L) of each bucket: n sequences of up to L tokens
    members: list[Tensor]  # of each bucket: which sequence stands in a row, fewer than n where rows are left over
    lengths: list[Tensor]  # of each bucket: the tokens of its members
    cells: Tensor  # (C,) token in each cell of the buckets laid end to end
    places: Tensor  # (tokens in sequences,) the cell of each
    tokens: int  # T, with those that no sequence holds

    @staticmethod
    def of(offsets: np.ndarray, tokens: int, device: torch.device) -> "Buckets":
        lengths = np.diff(offsets)
        widths = np.array([few_sizes(-(-length // 16) * 16) for length in range(lengths.max() + 1)])[lengths]  # (B,)
        places = np.empty(offsets[-1], dtype=np.int64)
        sizes, members, cells = [], [], []
        end = 0
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            n, steps = few_sizes(len(rows)), np.arange(width)
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
            [torch.from_numpy(rows).to(device) for rows in members],
            [torch.from_numpy(lengths[rows]).to(device) for rows in members],
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
    """By torch's fused kernels, one call a bucket."""  # (T, D)
    inputs = zip(*(buckets.gather(x, heads) for x in (q, k, v)), strict=True)
    return buckets.scatter([F.scaled_dot_product_attention(*qkv, dropout_p=rate, is_causal=True) for qkv in inputs])


def newest_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int) -> Tensor:
    """Of each sequence's newest token alone; q (B, D)."""
    out = torch.empty_like(q)
    inputs = zip(buckets.gather(k, heads), buckets.gather(v, heads), buckets.members, buckets.lengths, strict=True)
    for k_bucket, v_bucket, rows, lengths in inputs:
        past = torch.arange(k_bucket.shape[2], device=q.device) < lengths[:, None, None, None]  # (n, 1, 1, L)
        queries, keys, values = q[rows].view(len(rows), heads, 1, -1), k_bucket[: len(rows)], v_bucket[: len(rows)]
        out[rows] = F.scaled_dot_product_attention(queries, keys, values, attn_mask=past).flatten(1)
    return out  # (B, D)


class BucketedAttention(torch.autograd.Function):
    """By products of matrices, with the backward pass written out.

    autograd's would keep five (n, L, L) tensors where two do and add up by index where cells and tokens match one to
    one: a tenth of a training step on MovieLens-1M. The plain twin is tests/padded_twin.py.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, heads: int, rate: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            ctx.scales = 1 / sqrt(q.shape[1] // heads), 1 / kept_share(rate)  # of q, and of v in place of the weights
            q = buckets.gather(q * ctx.scales[0], heads)
            k = buckets.gather(k, heads)
            v = buckets.gather(v * ctx.scales[1] if rate else v, heads)
            weights = [_softmax_of_past(q_bucket @ k_bucket.mT) for q_bucket, k_bucket in zip(q, k, strict=True)]
            kept = [x * keep_mask(x, rate) if rate else x for x in weights]
            out = [w.to(x.dtype) @ x for w, x in zip(kept, v, strict=True)]
        ctx.save_for_backward(*q, *k, *v, *weights, *kept, *out)
        ctx.buckets, ctx.heads = buckets, heads
        return buckets.scatter(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        buckets, n = ctx.buckets, len(ctx.buckets.sizes)
        saved = [ctx.saved_tensors[i : i + n] for i in range(0, 6 * n, n)]
        cells = grad.new_zeros(len(buckets.cells), grad.shape[1])
        cells.index_copy_(0, buckets.places, grad[: len(buckets.places)])
        grads = [_backward_bucket(*bucket) for bucket in zip(*saved, buckets.split(cells, ctx.heads), strict=True)]
        q, k, v = (buckets.scatter(x) for x in zip(*grads, strict=True))
        return q.mul_(ctx.scales[0]), k, v.mul_(ctx.scales[1]), None, None, None


def _backward_bucket(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, kept: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled q, k and scaled v; rows of `grad` without a token are zero, so they add nothing to others."""
    grad = grad.to(out.dtype)
    v_grad = kept.to(out.dtype).mT @ grad
    # softmax's backward: weights * (their gradient - its weighted mean), which equals the mean of grad * out
    scores_grad = (grad @ v.mT).to(weights.dtype)
    if kept is not weights:
        scores_grad = torch.ops.aten.threshold_backward(scores_grad, kept, 0)  # 0 where the weight was dropped
    scores_grad.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
    scores_grad = scores_grad.to(out.dtype)
    return scores_grad @ k, scores_grad.mT @ q, v_grad


def _softmax_of_past(scores: Tensor) -> Tensor:
    """Over the tokens up to each one itself."""  # (n, H, L, L), overwritten where it is in full precision
    length = scores.shape[-1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores += torch.full((length, length), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    return torch.softmax(scores, -1, out=scores)
