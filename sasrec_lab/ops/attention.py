"""Causal self-attention over packed tokens. B sequences, T tokens, D dim, H heads."""

from dataclasses import replace
from functools import cached_property
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.ops import library as kernels
from sasrec_lab.ops.buckets import BucketedAttention, Buckets, fused_attention, newest_attention


class BatchLayout:
    """Where each sequence lies among the tokens, and what attention makes of it, once for all blocks."""

    def __init__(self, batch: PackedBatch, maxlen: int | None = None):
        self.batch = batch
        self.maxlen = maxlen  # of the rows

    @cached_property
    def offsets(self) -> Tensor:
        return torch.from_numpy(self.batch.offsets)  # (B + 1,) int64, on the CPU

    @property
    def tokens(self) -> int:
        """Those that a sequence holds."""
        return int(self.offsets[-1])

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets.of(self.batch.offsets, len(self.batch.items), self.batch.items.device)

    @cached_property
    def rows(self) -> "PaddedRows":
        return PaddedRows(self.batch, self.maxlen)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BatchLayout, heads: int, rate: float) -> Tensor:
    """softmax(q k' / sqrt(D / H)) v within each sequence and not into the future; dropout on the weights.

    Tokens behind the last sequence get zeros.
    """  # all (T, D)
    if torch.compiler.is_exporting():
        return attend_single_sequence(q, k, v, heads)
    if q.is_cuda:
        return fused_attention(q, k, v, plan.buckets, heads, rate)
    if q.dtype == torch.bfloat16:  # of autocast: single precision is faster here and has a kernel
        q, k, v = q.float(), k.float(), v.float()
    if kernels.supports(q):
        return CompiledAttention.apply(q, k, v, plan, heads, rate)
    return BucketedAttention.apply(q, k, v, plan.buckets, heads, rate)


def attend_newest(q: Tensor, x: Tensor, plan: BatchLayout, scale: float) -> Tensor:
    """softmax(scale q x') x within each sequence, for queries (B, H, D) of its newest token; without gradients."""
    if torch.compiler.is_exporting():
        tokens = x.expand(q.shape[1], -1, -1)  # (H, tokens, D)
        return F.scaled_dot_product_attention(q.transpose(0, 1), tokens, tokens, scale=scale).transpose(0, 1)
    return newest_attention(q, x, plan.buckets, scale)


def attend_single_sequence(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """By torch's own function, where all tokens are one sequence's: in a program that export.py makes."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (H, tokens, D / H)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


class PaddedRows:
    """The tokens as the padded original lays them out: `maxlen` cells a sequence, its newest token in the last one.

    For `pad_keys`. In RecTools a block's input is zero in the cells in front, so all their keys are the bias of the
    keys and all their values that of the values. C = B maxlen cells.
    """

    def __init__(self, batch: PackedBatch, maxlen: int):
        if torch.compiler.is_exporting():  # one sequence, which has no offsets
            self.cells, self.dummies = maxlen - 1 - batch.positions, 0
            self.plan = BatchLayout(replace(batch, items=batch.items.new_zeros(maxlen)))
            return
        lengths = np.diff(batch.offsets)  # (B,)
        ends = torch.from_numpy(np.repeat(np.arange(1, len(lengths) + 1) * maxlen, lengths)).to(batch.items.device)
        self.cells = ends - 1 - batch.positions[: len(ends)]  # (tokens in sequences,)
        self.dummies = len(batch.items) - len(ends)
        items, offsets = batch.items.new_zeros(len(lengths) * maxlen), np.arange(len(lengths) + 1) * maxlen
        self.plan = BatchLayout(replace(batch, items=items, offsets=offsets))  # every sequence has `maxlen` tokens

    def fill(self, x: Tensor, pad: Tensor) -> Tensor:
        """The cells (C, D) of x (T, D), `pad` (D,) in those in front."""
        cells = pad.to(x.dtype).expand(len(self.plan.batch.items), -1)
        return cells.index_copy(0, self.cells, x[: self.cells.shape[0]])

    def take(self, cells: Tensor) -> Tensor:
        """Of the cells (C, D) the tokens' (T, D), zeros behind the last sequence."""
        return F.pad(cells.index_select(0, self.cells), (0, 0, 0, self.dummies))


class CompiledAttention(torch.autograd.Function):
    """One sequence and head after the other, which lies in a core's own cache: nothing is computed for the future, and
    nothing copied into shape. The plain twin is BucketedAttention. A fifth of a training step on MovieLens-1M."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: BatchLayout, heads: int, rate: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.sizes = len(plan.offsets) - 1, q.shape[1], heads, _scale(q, heads), float(rate)
        ctx.plan = plan
        out = torch.empty_like(q)
        out[plan.tokens :] = 0
        size = heads * kernels.call("weights_size", plan.offsets, len(plan.offsets) - 1)
        weights = q.new_empty(size if any(ctx.needs_input_grad) else 0)  # of no use to a ranking
        seed = int(torch.randint(2**62, ())) if rate else 0  # follows torch's own seed
        kernels.call("attention", q, k, v, plan.offsets, *ctx.sizes, seed, out, weights)
        ctx.save_for_backward(q, k, v, out, weights)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, weights = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for x in grads:
            x[ctx.plan.tokens :] = 0
        grad = grad.contiguous()
        kernels.call("attention_backward", q, k, v, out, grad, weights, ctx.plan.offsets, *ctx.sizes, *grads)
        return *grads, None, None, None


def _scale(q: Tensor, heads: int) -> float:
    return 1 / sqrt(q.shape[1] // heads)
