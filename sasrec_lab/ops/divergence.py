"""The cross-entropy of two passes over the same tokens, and the divergence between their softmax distributions.

Both are made of the logits of one chunk of tokens after another, so (T, V) logits are never stored. Gradients are
computed in the forward pass, so they have no gradients themselves. T tokens, D dim, V items, t tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from sasrec_lab.ops import library
from sasrec_lab.ops.cross_entropy import SoftTargets, product_dtype, scale_gradient
from sasrec_lab.ops.library import Floats, Halves, Integers, check_range, check_shape, kernel
from sasrec_lab.ops.softmax_products import Mask, add_product, chunk_tokens, softmax_and_log_p, write_product


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Return in words who computes the loss on a device, for products in `dtype`."""
    return "torch and a CPU kernel" if _is_compiled(dtype, torch.empty(1, device=device)) else "torch, in chunks"


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
    is_compiled = _is_compiled(dtype, weights)
    rows = chunk_tokens(tokens, (2 if is_compiled else 4) * items, "cuda" if states.is_cuda else "cpu")
    memory = table.new_empty(2 * rows * items, dtype=dtype if is_compiled else precise)  # one, to stay in the cache
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        h, target, half = states[:, chunk].to(dtype), targets[chunk, None], (weights[chunk] / 2).to(dtype)  # (2, t, D)
        logits = memory[: 2 * len(target) * items].view(2, len(target), items)
        write_product(h.reshape(-1, dim), columns, logits.view(-1, items))
        if mask is not None:
            for each in logits:
                mask.apply(each, chunk, target)
        turn = _losses_and_gradients_compiled if is_compiled else _losses_and_gradients_torch
        losses[chunk], turned = turn(logits, target, factor)
        gradients = turned.view(-1, items).to(dtype)
        expected[:, chunk] = (gradients @ table).view_as(h)
        add_product(columns_grad, (h * half).reshape(-1, dim).T, gradients)
    return losses, expected, columns_grad.T.contiguous()


def _is_compiled(dtype: torch.dtype, weights: Tensor) -> bool:
    """Return whether a CPU kernel makes gradients of logits."""
    return dtype in (torch.float32, torch.bfloat16) and library.supports(weights)


def _losses_and_gradients_compiled(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return the same as `_losses_and_gradients_torch`, with the gradients in the place of the logits."""
    _, tokens, items = logits.shape
    check_shape("targets", targets, tokens, 1)
    check_range("targets", targets, 0, items - 1)
    log_p, divergence = torch.empty(2, tokens, 1), torch.empty(tokens, 1)
    write = _two_pass_gradients_bf16_kernel if logits.dtype == torch.bfloat16 else _two_pass_gradients_kernel
    write(logits, tokens, items, targets.contiguous(), factor, log_p, divergence)
    return factor * divergence - log_p.mean(0), logits


@kernel
def _two_pass_gradients_kernel(
    logits: Floats, tokens: int, items: int, targets: Integers, factor: float, log_p: Floats, divergence: Floats
) -> None:
    """Overwrite the logits (2, t, V) with gradients, and write log p (2, t) of the targets and the divergence (t,)."""


@kernel
def _two_pass_gradients_bf16_kernel(
    logits: Halves, tokens: int, items: int, targets: Integers, factor: float, log_p: Floats, divergence: Floats
) -> None:
    """Do the same with logits in bfloat16, to which the gradients are rounded."""


def _losses_and_gradients_torch(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return losses (t, 1), and the gradients (2, t, V) of twice them by the logits, which are overwritten.

    With d the difference of the logits, which takes the place of log p - log q because it differs by a number of each
    token, the divergence is half of sum((p - q) d), and the first gradient is
    p + factor * (p * (1 + d - sum(p d)) - q).
    """
    d = torch.nan_to_num(logits[0] - logits[1], nan=0.0)  # items that do not count have -inf in both, and p = q = 0
    log_p = softmax_and_log_p(logits.view(-1, logits.shape[2]), targets.repeat(2, 1)).view(2, -1, 1)
    p, q = logits
    mean_p, mean_q = (torch.mul(x, d).sum(1, keepdim=True) for x in (p, q))  # (t, 1) of d
    of_p = torch.add(1 + factor - factor * mean_p, d, alpha=factor).mul_(p).sub_(q, alpha=factor)
    of_q = torch.add(1 + factor + factor * mean_q, d, alpha=-factor).mul_(q).sub_(p, alpha=factor)
    return factor * (mean_p - mean_q) / 2 - log_p.mean(0), torch.stack([of_p, of_q])
