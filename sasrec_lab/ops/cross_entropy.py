"""Cross-entropies between token states and item vectors, without ever storing (T, V) logits.

Gradients are computed in the forward pass, so they have no gradients themselves. T tokens, D dim, V items, N negatives,
G groups of consecutive tokens.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sasrec_lab.ops.softmax_products import Mask, sampled_softmax_products, softmax_products


class SoftTargets(NamedTuple):
    """A distribution over the table for each token, in place of its one target."""

    rows: Tensor  # (T, K) int64, rows of the table ...
    masses: Tensor  # (T, K) ... and the probability of each, 0 for none
    smoothing: float  # probability shared by all rows; with it those of a token have the sum 1

    def mean_vectors(self, table: Tensor) -> Tensor:
        """Return the mean (T, D) of the table under each token's distribution."""
        means = self.smoothing * table.mean(0, keepdim=True)
        for rows, masses in zip(self.rows.T, self.masses.T, strict=True):
            means = torch.addcmul(means, masses[:, None], table.index_select(0, rows))
        return means

    def add_scaled(self, table_grad: Tensor, vectors: Tensor) -> None:
        """Add each token's vector (T, D), times their probability, to the rows (V, D)."""
        for rows, masses in zip(self.rows.T, self.masses.T, strict=True):
            table_grad.index_add_(0, rows, (vectors * masses[:, None]).to(table_grad.dtype))
        if self.smoothing:
            table_grad += (vectors.sum(0) * (self.smoothing / len(table_grad))).to(table_grad.dtype)


def linear_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    mask: Mask | None = None,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Return the sum of token_weights (T,) * cross_entropy(states @ table', targets).

    `states` (T, D), `table` (V, D), `targets` (T,) rows of the table; a token of weight 0 may have any target. With
    `soft` the targets are those distributions, which need no more logits: `targets` only says to which logit others are
    compared. Memory does not grow with T * V. Reference: tests/training/test_losses.py.
    """
    return _LinearCrossEntropy.apply(states, table, targets, token_weights, mask, soft)


def sampled_cross_entropy(
    states: Tensor, vectors: Tensor, excluded_columns: Tensor, log_weights: Tensor, token_weights: Tensor
) -> Tensor:
    """Return the sum of token_weights (T,) * cross-entropy of each token's target against N shared negatives.

    `vectors` (T + N, D) are the targets' vectors, then the negatives'. `log_weights` (N,) are added to the negatives'
    logits; `excluded_columns` (T,) is the negative that does not count for a token, N for none.
    """
    return _SampledCrossEntropy.apply(states, vectors, excluded_columns, log_weights, token_weights)


def grouped_cross_entropy(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, counts: Sequence[int], token_weights: Tensor
) -> Tensor:
    """Return the sum of token_weights (T,) * cross-entropy of each token's target against its group's N negatives.

    `targets` (T,) and `negatives` (G, N) are rows of the table, -1 for none, which is at the end of a group's
    negatives. `counts` are the tokens of each group, one group after the other; tokens behind the last group do not
    count. The negatives of a group contain none of its targets. Only the vectors of one group are looked up at a time.
    """
    return _GroupedCrossEntropy.apply(states, table, targets, negatives, counts, token_weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        mask: Mask | None,
        soft: SoftTargets | None,
    ) -> Tensor:
        matmul_dtype = product_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, weights = states.detach().contiguous(), token_weights[:, None]
            target_vectors = table.index_select(0, targets)  # (T, D)
            log_p, expected, table_grad = softmax_products(
                states, table, targets, target_vectors, weights, matmul_dtype, mask
            )
            loss, wanted = -(weights * log_p).sum(), target_vectors
            if soft is None:
                table_grad.index_add_(0, targets, (states * -weights).to(table_grad.dtype))
            else:
                wanted = soft.mean_vectors(table.detach())
                loss += (states * (target_vectors - wanted) * weights).sum()
                soft.add_scaled(table_grad, states * -weights)
            states_grad = (expected - wanted).to(states.dtype) * weights
        ctx.save_for_backward(states_grad, table_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        states_grad, table_grad = ctx.saved_tensors
        scaled = scale_gradient(states_grad, grad_output), scale_gradient(table_grad, grad_output)
        return *scaled, None, None, None, None


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, vectors: Tensor, excluded_columns: Tensor, log_weights: Tensor, token_weights: Tensor
    ) -> Tensor:
        matmul_dtype = product_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, weights = states.detach().contiguous(), token_weights[:, None]
            target_vectors, negatives = vectors.detach().split([len(states), len(log_weights)])  # (T, D), (N, D)
            log_p, expected, negatives_grad = sampled_softmax_products(
                states, negatives, target_vectors, weights, matmul_dtype, (log_weights, excluded_columns)
            )
            missing = -torch.expm1(log_p) * weights  # (T, 1) (1 - p(target)) * weight
            states_grad = (expected * weights - target_vectors * missing).to(states.dtype)
            vectors_grad = torch.cat([states * -missing, negatives_grad])
        ctx.save_for_backward(states_grad, vectors_grad)
        return -(weights * log_p).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        states_grad, vectors_grad = ctx.saved_tensors
        return scale_gradient(states_grad, grad_output), scale_gradient(vectors_grad, grad_output), None, None, None


class _GroupedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        negatives: Tensor,
        counts: Sequence[int],
        token_weights: Tensor,
    ) -> Tensor:
        matmul_dtype = product_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, table, weights = states.detach().contiguous(), table.detach(), token_weights[:, None]
            targets = targets.clamp(min=0)  # those of weight 0 may be any
            target_vectors, table_grad = table.index_select(0, targets), torch.zeros_like(table)  # (T, D), (V, D)
            log_p = torch.zeros_like(weights, dtype=torch.promote_types(matmul_dtype, torch.float32))
            expected = torch.zeros_like(states, dtype=matmul_dtype)
            groups = zip(
                pairwise(accumulate(counts, initial=0)), negatives, (negatives >= 0).sum(1).tolist(), strict=True
            )
            for (first, last), rows, drawn in groups:
                if first == last or drawn == 0:
                    continue
                tokens, rows = slice(first, last), rows[:drawn]
                log_p[tokens], expected[tokens], negatives_grad = sampled_softmax_products(
                    states[tokens], table.index_select(0, rows), target_vectors[tokens], weights[tokens], matmul_dtype
                )
                table_grad.index_add_(0, rows, negatives_grad)
            missing = -torch.expm1(log_p) * weights  # (T, 1) (1 - p(target)) * weight
            states_grad = (expected * weights - target_vectors * missing).to(states.dtype)
            table_grad.index_add_(0, targets, (states * -missing).to(table_grad.dtype))
        ctx.save_for_backward(states_grad, table_grad)
        return -(weights * log_p).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        states_grad, table_grad = ctx.saved_tensors
        scaled = scale_gradient(states_grad, grad_output), scale_gradient(table_grad, grad_output)
        return *scaled, None, None, None, None


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Scale a gradient.

    On the CPU skip the pass if the factor is 1 (the usual case); on a GPU that check would force a synchronization.
    """
    return gradient if factor.device.type == "cpu" and factor == 1 else gradient * factor


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the type of the products of states: that of autocast if it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
