"""Losses of a few items per token, whose vectors are looked up in chunks. T tokens, D dim, N negatives.

Gradients are computed in the forward pass, so they have no gradients themselves.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.cross_entropy import softmax_and_log_p

MAX_LOOKUP_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # of the vectors looked up for one chunk; on the CPU 2 MiB


def lookup_cross_entropy(states: Tensor, table: Tensor, rows: Tensor, token_weights: Tensor) -> Tensor:
    """Return the sum of token_weights (T,) * (log(exp s_0 + ... + exp s_N) - s_0).

    s = table[rows] @ states: `rows` (T, 1 + N) are each token's target and its N negatives. Their vectors (T, 1 + N, D)
    are never stored at once, so memory grows with T * N only, as the negatives themselves do.
    """
    return _LookupLoss.apply(states, table, rows, token_weights, _softmax_terms)


def lookup_binary_cross_entropy(
    states: Tensor, table: Tensor, rows: Tensor, beta: float, token_weights: Tensor
) -> Tensor:
    """Return the sum of token_weights (T,) * (beta softplus(-s_0) + softplus(s_1) + ... + softplus(s_N)).

    s, rows and memory are those of `lookup_cross_entropy`.
    """
    return _LookupLoss.apply(states, table, rows, token_weights, partial(_binary_terms, beta=beta))


class _LookupLoss(torch.autograd.Function):
    """A loss of the logits of few items per token; `terms` turns a chunk's logits into its losses' sum and slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        rows: Tensor,
        token_weights: Tensor,
        terms: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            h, table = states.detach().to(table.dtype), table.detach()
            slopes = table.new_empty(rows.shape)  # (T, 1 + N) derivative of the loss by each logit
            states_grad = torch.empty_like(h)
            losses = []
            for chunk in _lookup_chunks(rows, h):
                vectors = F.embedding(rows[chunk], table)  # (t, 1 + N, D)
                logits = torch.bmm(vectors, h[chunk, :, None]).squeeze(2)
                losses.append(terms(logits, token_weights[chunk, None], slopes[chunk]))
                torch.bmm(slopes[chunk, None], vectors, out=states_grad[chunk, None])
        ctx.save_for_backward(h, slopes, states_grad, rows)
        ctx.num_items, ctx.states_dtype = len(table), states.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        h, slopes, states_grad, rows = ctx.saved_tensors
        slopes = slopes * grad_output
        # the table's gradient is made here, because scaling a finished one would be one more pass over the catalogue
        table_grad = h.new_zeros(ctx.num_items, h.shape[1])
        for chunk in _lookup_chunks(rows, h):
            table_grad.index_add_(0, rows[chunk].flatten(), (slopes[chunk, :, None] * h[chunk, None]).flatten(0, 1))
        return (states_grad * grad_output).to(ctx.states_dtype), table_grad, None, None, None


def _binary_terms(logits: Tensor, weights: Tensor, slopes: Tensor, beta: float) -> Tensor:
    """Return the sum of a chunk's binary cross-entropies, and write their slopes (t, 1 + N); overwrites the logits."""
    weights = weights.expand_as(logits).contiguous()
    weights[:, 0] *= beta
    logits[:, 0].neg_()
    loss = torch.sum(F.softplus(logits) * weights)
    torch.mul(logits.sigmoid_(), weights, out=slopes)
    slopes[:, 0].neg_()
    return loss


def _softmax_terms(logits: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
    """Return the sum of a chunk's cross-entropies, and write their slopes (t, 1 + N); overwrites the logits."""
    log_p = softmax_and_log_p(logits, torch.zeros_like(weights, dtype=torch.long))
    torch.mul(logits, weights, out=slopes)
    slopes[:, :1] -= weights
    return -torch.sum(log_p * weights)


def _lookup_chunks(rows: Tensor, states: Tensor) -> Iterator[slice]:
    """Yield chunks of tokens whose vectors, (1 + N, D) each, have at most MAX_LOOKUP_ELEMENTS elements together."""
    most = MAX_LOOKUP_ELEMENTS["cuda" if states.is_cuda else "cpu"]
    tokens = max(1, most // (rows.shape[1] * states.shape[1]))
    return (slice(start, start + tokens) for start in range(0, len(states), tokens))
