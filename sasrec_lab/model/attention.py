"""Causal self-attention over packed tokens. T tokens, D dim, H heads; a bucket holds n sequences of up to L tokens."""

from math import sqrt

import torch
from torch import Tensor

from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.model.dropout import dropout


def attend(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, heads: int, rate: float) -> Tensor:
    """softmax(q k' / sqrt(D / H)) v within each sequence and not into the future; dropout on the weights.

    One matrix product a bucket: sequences of about one length stand together, so next to nothing is computed for
    positions that are not there, and the cells behind a sequence's newest item are seen by no real token.
    """
    sizes = [n * length for n, length in batch.buckets]
    cells = [x.index_select(0, batch.cells).split(sizes) for x in (q, k, v)]  # three times, a bucket each (n * L, D)
    out = [_attend_bucket(*qkv, n, heads, rate) for (n, _), *qkv in zip(batch.buckets, *cells, strict=True)]
    return torch.cat(out).index_select(0, batch.places)  # (T, D)


def _attend_bucket(q: Tensor, k: Tensor, v: Tensor, n: int, heads: int, rate: float) -> Tensor:
    q, k, v = (_split_heads(x, n, heads) for x in (q, k, v))  # (n * H, L, D / H)
    length = q.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / sqrt(q.shape[-1]))  # (n * H, L, L)
    weights = dropout(scores.softmax(-1), rate)
    return _join_heads(torch.bmm(weights.to(v.dtype), v), n, heads)


def _split_heads(x: Tensor, n: int, heads: int) -> Tensor:
    x = x.view(n, -1, heads, x.shape[-1] // heads)  # (n, L, H, D / H)
    return x.transpose(1, 2).reshape(n * heads, -1, x.shape[-1])


def _join_heads(x: Tensor, n: int, heads: int) -> Tensor:
    x = x.view(n, heads, -1, x.shape[-1]).transpose(1, 2)  # (n, L, H, D / H)
    return x.reshape(-1, heads * x.shape[-1])
