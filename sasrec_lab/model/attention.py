"""Causal self-attention over packed tokens. B sequences, T tokens, D dim, H heads."""

from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from sasrec_lab import kernels
from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.model.buckets import BucketedAttention, Buckets, fused_attention, newest_attention


class Plan:
    """Where each sequence lies among the tokens, and what attention makes of it, once for all blocks."""

    def __init__(self, batch: PackedBatch):
        self.offsets = torch.from_numpy(batch.offsets)  # (B + 1,) int64, on the CPU
        self.batch = batch

    @property
    def tokens(self) -> int:
        """Those that a sequence holds."""
        return int(self.offsets[-1])

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets.of(self.batch.offsets, len(self.batch.items), self.batch.items.device)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, heads: int, rate: float) -> Tensor:
    """softmax(q k' / sqrt(D / H)) v within each sequence and not into the future; dropout on the weights.

    Tokens behind the last sequence get zeros.
    """  # all (T, D)
    if q.is_cuda:
        return fused_attention(q, k, v, plan.buckets, heads, rate)
    if q.dtype == torch.bfloat16:  # of autocast: single precision is faster here and has a kernel
        q, k, v = q.float(), k.float(), v.float()
    if kernels.serve(q):
        return CompiledAttention.apply(q, k, v, plan, heads, rate)
    return BucketedAttention.apply(q, k, v, plan.buckets, heads, rate)


def attend_newest(q: Tensor, k: Tensor, v: Tensor, plan: Plan, heads: int) -> Tensor:
    """What `attend` gives each sequence's newest token, whose queries alone are given, without dropout or gradients."""
    if not kernels.serve(q):  # q (B, D), k and v (T, D)
        return newest_attention(q, k, v, plan.buckets, heads)
    out = torch.empty_like(q)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    sizes = len(plan.offsets) - 1, q.shape[1], heads, _scale(q, heads)
    kernels.call("newest_attention", q, k, v, plan.offsets, *sizes, out)
    return out  # (B, D)


class CompiledAttention(torch.autograd.Function):
    """One sequence and head after the other, which lies in a core's own cache: nothing is computed for the future, and
    nothing copied into shape. The plain twin is BucketedAttention. A fifth of a training step on MovieLens-1M."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: Plan, heads: int, rate: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.sizes = len(plan.offsets) - 1, q.shape[1], heads, _scale(q, heads), float(rate)
        ctx.plan = plan
        out = torch.empty_like(q)
        out[plan.tokens :] = 0
        weights = q.new_empty(heads * kernels.call("weights_size", plan.offsets, len(plan.offsets) - 1))
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
