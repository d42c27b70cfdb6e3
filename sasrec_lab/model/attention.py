"""Causal self-attention over packed tokens. T tokens, D dim, H heads; a bucket holds n sequences of up to L tokens."""

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.model.dropout import keep_mask, kept_share


def attend(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, heads: int, rate: float) -> Tensor:
    """softmax(q k' / sqrt(D / H)) v within each sequence and not into the future; dropout on the weights.

    Sequences of about one length stand together in a bucket, so next to nothing is computed for positions that are not
    there, and the cells behind a sequence's newest item are seen by no real token: no mask but the causal one.
    """
    if q.is_cuda:
        return _fused_attention(q, k, v, batch, heads, rate)
    return BucketedAttention.apply(q, k, v, batch, heads, rate)  # (T, D)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, heads: int, rate: float) -> Tensor:
    """torch's own kernels, one call a bucket."""
    buckets = zip(*(_to_buckets(x, batch, heads) for x in (q, k, v)), strict=True)
    out = [F.scaled_dot_product_attention(*qkv, dropout_p=rate, is_causal=True) for qkv in buckets]
    return _from_buckets(out).index_select(0, batch.places)


class BucketedAttention(torch.autograd.Function):
    """Matrix products a bucket, with the backward pass written out.

    autograd's would keep five (n, L, L) tensors where two do and add up by index where cells and tokens match one to
    one: a tenth of a training step on MovieLens-1M. The plain twin is tests/padded_twin.py.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, heads: int, rate: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            ctx.scales = 1 / sqrt(q.shape[1] // heads), 1 / kept_share(rate)  # of q, and of v in place of the weights
            q = _to_buckets(q * ctx.scales[0], batch, heads)
            k = _to_buckets(k, batch, heads)
            v = _to_buckets(v * ctx.scales[1] if rate else v, batch, heads)
            weights = [_softmax_of_past(q_bucket @ k_bucket.mT) for q_bucket, k_bucket in zip(q, k, strict=True)]
            kept = [x * keep_mask(x, rate) if rate else x for x in weights]
            out = [w.to(x.dtype) @ x for w, x in zip(kept, v, strict=True)]
        ctx.save_for_backward(*q, *k, *v, *weights, *kept, *out)
        ctx.batch, ctx.heads = batch, heads
        return _from_buckets(out).index_select(0, batch.places)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        batch, n = ctx.batch, len(ctx.batch.buckets)
        saved = [ctx.saved_tensors[i : i + n] for i in range(0, 6 * n, n)]
        cells = grad.new_zeros(len(batch.cells), grad.shape[1])
        cells.index_copy_(0, batch.places[: batch.tokens], grad[: batch.tokens])
        grads = [_backward_bucket(*bucket) for bucket in zip(*saved, _split(cells, batch, ctx.heads), strict=True)]
        q, k, v = (_from_buckets(x).index_select(0, batch.places) for x in zip(*grads, strict=True))
        for x in (q, k, v):
            x[batch.tokens :] = 0  # dummies stand in no cell
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


def _to_buckets(x: Tensor, batch: PackedBatch, heads: int) -> list[Tensor]:
    return _split(x.index_select(0, batch.cells), batch, heads)


def _split(cells: Tensor, batch: PackedBatch, heads: int) -> list[Tensor]:
    """Of the cells (C, D) each bucket's, (n, H, L, D / H)."""
    parts = cells.split([n * length for n, length in batch.buckets])
    return [x.view(n, length, heads, -1).transpose(1, 2) for x, (n, length) in zip(parts, batch.buckets, strict=True)]


def _from_buckets(buckets: list[Tensor]) -> Tensor:
    return torch.cat([x.transpose(1, 2).flatten(2).flatten(0, 1) for x in buckets])  # (C, D)
