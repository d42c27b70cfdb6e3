"""The cross-entropy of two passes over the same tokens, and the divergence between their softmax distributions.

Both are made of the logits of one chunk of tokens after another, so (T, V) logits are never stored. Gradients are
computed in the forward pass, so they have no gradients themselves. T tokens, D dim, V items, t tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from sasrec_lab.ops.cross_entropy import SoftTargets, product_dtype, scale_gradient
from sasrec_lab.ops.softmax_products import Mask, add_product, chunk_tokens, softmax_and_log_p, write_product

_BUFFERS = 4  # of a chunk's logits: one for each pass, and one for the gradient of each


def two_pass_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    factor: float,
    mask: Mask | None = None,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Return the sum of token_weights (T,) * (mean cross-entropy of two passes + factor * divergence).

    `states` (2, T, D) are those of the passes; the rest is as in `linear_cross_entropy`. The divergence of a token is
    the mean of KL(p || q) and KL(q || p), with p the softmax over the table in one pass and q that in the other. Memory
    does not grow with T * V. Reference: tests/ops/test_divergence.py.
    """
    return _TwoPassCrossEntropy.apply(states, table, targets, token_weights, factor, mask, soft)


class _TwoPassCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        factor: float,
        mask: Mask | None,
        soft: SoftTargets | None,
    ) -> Tensor:
        dtype = product_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, table, weights = states.detach(), table.detach(), token_weights[:, None]
            losses, expected, table_grad = _products(states, table, targets, weights, factor, dtype, mask)
            # targets add to the loss what is linear in the states, so that the mean of both passes is enough
            mean, target_vectors = states.mean(0), table.index_select(0, targets)  # (T, D)
            loss, wanted = (weights * losses).sum(), target_vectors
            if soft is None:
                table_grad.index_add_(0, targets, (mean * -weights).to(table_grad.dtype))
            else:
                wanted = soft.mean_vectors(table)
                loss += (mean * (target_vectors - wanted) * weights).sum()
                soft.add_scaled(table_grad, mean * -weights)
            states_grad = (expected - wanted).to(states.dtype) * (weights / 2)
        ctx.save_for_backward(states_grad, table_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        states_grad, table_grad = ctx.saved_tensors
        scaled = scale_gradient(states_grad, grad_output), scale_gradient(table_grad, grad_output)
        return *scaled, None, None, None, None, None


def _products(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    weights: Tensor,
    factor: float,
    dtype: torch.dtype,
    mask: Mask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses (T, 1), gradients @ table (2, T, D), and gradients' @ (states * weights / 2) (V, D).

    The gradients are those of twice the losses by the logits, without the targets' -1.
    """
    (_, tokens, dim), items, grad_dtype = states.shape, len(table), table.dtype
    table = table.to(dtype)
    columns = table.T.contiguous()  # (D, V), because products are faster with table and gradient transposed
    columns_grad = torch.zeros_like(columns, dtype=grad_dtype)
    expected = torch.empty_like(states, dtype=dtype)
    precise = torch.promote_types(dtype, torch.float32)
    losses = torch.empty_like(weights, dtype=precise)
    rows = chunk_tokens(tokens, _BUFFERS * items, "cuda" if states.is_cuda else "cpu")
    memory = table.new_empty(_BUFFERS * rows * items, dtype=precise)  # the same for all chunks, to stay in the cache
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        h, target, half = states[:, chunk].to(dtype), targets[chunk, None], (weights[chunk] / 2).to(dtype)  # (2, t, D)
        buffers = memory[: _BUFFERS * len(target) * items].view(_BUFFERS, len(target), items)
        p, space = buffers[:2], buffers[2:]  # (2, t, V)
        logits = write_product(h.reshape(-1, dim), columns, chunk, p.view(-1, items)).view_as(p)
        torch.sub(logits[0], logits[1], out=space[1])
        if mask is not None:
            for each in logits:
                mask.apply(each, chunk, target)
        log_p = softmax_and_log_p(logits.view(-1, items), target.repeat(2, 1)).view(2, -1, 1)
        losses[chunk] = factor * _divergence_and_gradients(p, space, factor) - log_p.mean(0)
        gradients = space.view(-1, items).to(dtype)
        expected[:, chunk] = (gradients @ table).view_as(h)
        add_product(columns_grad, (h * half).reshape(-1, dim).T, gradients)
    return losses, expected, columns_grad.T.contiguous()


def _divergence_and_gradients(p: Tensor, space: Tensor, factor: float) -> Tensor:
    """Return the divergence (t, 1) of two softmax distributions p (2, t, V), and write the gradients to `space`.

    space[1] is d, the difference of their logits. It takes the place of log p[0] - log p[1], which differs by a number
    of each token: the divergence is half of sum((p[0] - p[1]) d), and the first gradient is
    p[0] + factor * (p[0] * (1 + d - sum(p[0] d)) - p[1]). Items that do not count have any d, and p = 0.
    """
    (first, second), (of_first, of_second) = p, space
    means = [torch.mul(x, of_second, out=of_first).sum(1, keepdim=True) for x in p]  # (t, 1) of d
    torch.add(1 + factor - factor * means[0], of_second, alpha=factor, out=of_first)
    torch.add(1 + factor + factor * means[1], of_second, alpha=-factor, out=of_second)
    of_first.mul_(first).sub_(second, alpha=factor)
    of_second.mul_(second).sub_(first, alpha=factor)
    return (means[0] - means[1]) / 2
