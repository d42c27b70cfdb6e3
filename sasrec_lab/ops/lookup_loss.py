"""Losses of a few items per token, whose vectors are looked up in a table. T tokens, D dim, V items, N negatives.

Gradients are computed in the forward pass, so they have no gradients themselves.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops import library
from sasrec_lab.ops.cross_entropy import scale_gradient
from sasrec_lab.ops.library import Floats, Integers, check_range, check_shape, kernel
from sasrec_lab.ops.softmax_products import softmax_and_log_p

# Elements of the vectors that torch copies for one chunk, on the CPU 2 MiB; a kernel reads as many, and more at once
MAX_LOOKUP_ELEMENTS = {"cpu": 2**19, "cuda": 2**26, "compiled": 2**22}


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
            lookup = _lookup(h, table, rows)
            for chunk in _chunks(rows, h, lookup.max_elements(h)):
                found = lookup(table, rows[chunk])
                losses.append(terms(found.logits(h[chunk]), token_weights[chunk, None], slopes[chunk]))
                found.mix(slopes[chunk], states_grad[chunk])
        ctx.save_for_backward(h, slopes, states_grad, rows)
        ctx.num_items, ctx.states_dtype = len(table), states.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        h, slopes, states_grad, rows = ctx.saved_tensors
        # the table's gradient is made here, because scaling a finished one would be one more pass over the catalogue
        scaled = scale_gradient(slopes, grad_output)
        table_grad = _lookup(h, scaled, rows).table_grad(h, scaled, rows, ctx.num_items)
        return scale_gradient(states_grad, grad_output).to(ctx.states_dtype), table_grad, None, None, None


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


class _Copies:
    """Copies of the vectors of a chunk's rows (t, 1 + N, D): the form in torch."""

    def __init__(self, table: Tensor, rows: Tensor):
        self.vectors = F.embedding(rows, table)

    def logits(self, states: Tensor) -> Tensor:
        """Return the products (t, 1 + N) with the token's state."""
        return torch.bmm(self.vectors, states[:, :, None]).squeeze(2)

    def mix(self, slopes: Tensor, out: Tensor) -> None:
        """Write the sums (t, D) of the vectors times the slopes (t, 1 + N) to `out`."""
        torch.bmm(slopes[:, None], self.vectors, out=out[:, None])

    @staticmethod
    def max_elements(states: Tensor) -> int:
        """Return how many elements the vectors of a chunk may have."""
        return MAX_LOOKUP_ELEMENTS["cuda" if states.is_cuda else "cpu"]

    @staticmethod
    def table_grad(states: Tensor, slopes: Tensor, rows: Tensor, num_items: int) -> Tensor:
        """Return the sum (V, D) of the states that looked up each row of the table, times the slopes."""
        grad = states.new_zeros(num_items, states.shape[1])
        for chunk in _chunks(rows, states, _Copies.max_elements(states)):
            grad.index_add_(0, rows[chunk].flatten(), (slopes[chunk, :, None] * states[chunk, None]).flatten(0, 1))
        return grad


class _InPlace:
    """The vectors of a chunk's rows, read in the table by kernels; the methods do what those of _Copies do."""

    def __init__(self, table: Tensor, rows: Tensor):
        check_range("rows", rows, 0, len(table) - 1)
        self.table, self.rows = table, rows

    def logits(self, states: Tensor) -> Tensor:
        check_shape("states", states, len(self.rows), self.table.shape[1])
        logits = states.new_empty(self.rows.shape)
        _lookup_logits_kernel(states, *states.shape, self.table, self.rows, self.rows.shape[1], logits)
        return logits

    def mix(self, slopes: Tensor, out: Tensor) -> None:
        check_shape("slopes", slopes, *self.rows.shape)
        check_shape("out", out, len(self.rows), self.table.shape[1])
        _lookup_mix_kernel(slopes, *out.shape, self.table, self.rows, self.rows.shape[1], out)

    @staticmethod
    def max_elements(states: Tensor) -> int:
        return MAX_LOOKUP_ELEMENTS["compiled"]

    @staticmethod
    def table_grad(states: Tensor, slopes: Tensor, rows: Tensor, num_items: int) -> Tensor:
        check_range("rows", rows, 0, num_items - 1)
        check_shape("slopes", slopes, *rows.shape)
        check_shape("states", states, len(rows), states.shape[1])
        grad = states.new_empty(num_items, states.shape[1])
        _lookup_table_grad_kernel(states, slopes, *states.shape, rows, rows.shape[1], num_items, grad)
        return grad


@kernel
def _lookup_logits_kernel(
    states: Floats, tokens: int, dim: int, table: Floats, rows: Integers, width: int, logits: Floats
) -> None:
    """Write the logits (T, 1 + N)."""


@kernel
def _lookup_mix_kernel(
    slopes: Floats, tokens: int, dim: int, table: Floats, rows: Integers, width: int, out: Floats
) -> None:
    """Write the sums (T, D) of the vectors times the slopes."""


@kernel
def _lookup_table_grad_kernel(
    states: Floats, slopes: Floats, tokens: int, dim: int, rows: Integers, width: int, items: int, grad: Floats
) -> None:
    """Write the table's gradient (V, D)."""


def _lookup(states: Tensor, table: Tensor, rows: Tensor) -> type[_Copies | _InPlace]:
    return _InPlace if library.supports(states, table) and rows.is_contiguous() else _Copies


def _chunks(rows: Tensor, states: Tensor, max_elements: int) -> Iterator[slice]:
    """Yield chunks of tokens whose vectors, (1 + N, D) each, have at most this many elements together."""
    tokens = max(1, max_elements // (rows.shape[1] * states.shape[1]))
    return (slice(start, start + tokens) for start in range(0, len(states), tokens))
