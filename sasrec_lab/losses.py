"""Losses from states, never from logits. T tokens, D dim, V items, N negatives.

Each takes `(states (T, D), item_table (V, D), batch)` and gives the mean over the tokens that have a target; the weight
of a target's interaction multiplies its loss and does not change the number divided by (as RecTools).
"""

from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab import kernels
from sasrec_lab.config import LossName
from sasrec_lab.data.batches import PackedBatch

# Logits at once. From 256 rows on products reach their rate (on two cores 174 of 215 GFLOP/s with all else, 130 with 64
# rows); of a long catalogue 2 ** 22 logits, 16 MiB, still lie in the last-level cache.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
CHUNK_ROWS = {"cpu": 256, "cuda": 2**20}


def softmax(states: Tensor, item_table: Tensor, batch: PackedBatch) -> Tensor:
    """Cross-entropy over the whole catalogue ("Turning Dross Into Gold Loss", RecTools)."""
    return LinearCrossEntropy.apply(states, item_table, (batch.targets - 1).clamp(min=0), _shares(batch))


def bce(states: Tensor, item_table: Tensor, batch: PackedBatch) -> Tensor:
    """-log s(target) - sum of log s(-negative): the paper's eq. (7), as the authors' code normalises it (model.py)."""
    positive = (states * F.embedding(batch.targets.clamp(min=1) - 1, item_table)).sum(-1)  # (T,)
    negatives = F.embedding(batch.negatives - 1, item_table)  # (T, N, D)
    negative = torch.einsum("td,tnd->tn", states, negatives)  # (T, N)
    return ((F.softplus(-positive) + F.softplus(negative).sum(-1)) * _shares(batch)).sum()


LOSSES = {LossName.softmax: softmax, LossName.bce: bce}


def _shares(batch: PackedBatch) -> Tensor:
    """What a token's loss counts in the batch's: its weight over the number of targets, 0 where there is none."""
    has_target = (batch.targets > 0).float()  # (T,)
    weights = has_target if batch.weights is None else has_target * batch.weights
    return weights / has_target.sum().clamp(min=1)


class LinearCrossEntropy(torch.autograd.Function):
    """sum of shares * cross_entropy(states @ item_table', targets), gradients made in the forward pass.

    A chunk of tokens at a time its logits are made, turned into probabilities and used up for both gradients while they
    lie in the cache, so (T, V) logits never exist: half the time of logits and autograd, and memory that does not
    grow with T * V. The plain twin is in tests/test_losses.py.
    """

    @staticmethod
    def forward(ctx, states: Tensor, item_table: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        matmul_dtype = _matmul_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            loss, states_grad, table_grad = _cross_entropy_and_gradients(
                states, item_table, targets, shares, matmul_dtype=matmul_dtype
            )
        ctx.save_for_backward(states_grad, table_grad)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states_grad, table_grad = ctx.saved_tensors
        return states_grad * grad_output, table_grad * grad_output, None, None


def _matmul_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _cross_entropy_and_gradients(
    states: Tensor, item_table: Tensor, targets: Tensor, shares: Tensor, *, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    states, shares = states.detach().contiguous(), shares[:, None]
    table = item_table.detach().to(matmul_dtype)
    columns = table.T.contiguous()  # (D, V): with table and gradient this way round products are a fifth faster
    columns_grad = torch.zeros_like(columns, dtype=item_table.dtype)
    states_grad = torch.empty_like(states, dtype=matmul_dtype)
    losses = torch.empty_like(shares)
    rows = _chunk_rows(len(states), len(table), "cuda" if states.is_cuda else "cpu")
    precise = torch.promote_types(matmul_dtype, torch.float32)
    buffer = table.new_empty(rows, len(table), dtype=precise)  # one for all chunks: it is in the cache
    for start in range(0, len(states), rows):
        chunk = slice(start, start + rows)
        h, target, share = states[chunk].to(matmul_dtype), targets[chunk, None].contiguous(), shares[chunk]
        p = _logits(h, columns, buffer[: len(h)])  # (rows, V)
        losses[chunk] = share * softmax_and_loss(p, target)
        p = p.to(matmul_dtype)
        torch.mm(p, table, out=states_grad[chunk])
        _add_product(columns_grad, (h * share.to(matmul_dtype)).T, p)
    states_grad = (states_grad - table[targets]).to(states.dtype) * shares
    table_grad = columns_grad.T.contiguous().index_add_(0, targets, states * -shares)
    return losses.sum(), states_grad, table_grad


def softmax_and_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (R, V) into probabilities in place; gives log sum exp(logits) - the target's, (R, 1).

    The compiled form is a pass less and knows the sum: half the time of this part of the step.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and kernels.library() is not None:
        losses = logits.new_empty(len(logits), 1)
        kernels.call("softmax_loss", logits, *logits.shape, targets, losses)
        return losses
    target_logits, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    p = torch.softmax(logits, 1, out=logits)
    return largest - p.amax(1, keepdim=True).log() - target_logits


def _logits(states: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """states @ columns in `out`, which may be of a wider type than they."""
    return torch.mm(states, columns, out=out) if out.dtype == states.dtype else out.copy_(states @ columns)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b"""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunk_rows(tokens: int, items: int, device: str) -> int:
    """Tokens a chunk: all chunks about alike, which keeps shapes few."""
    rows = min(max(16, CHUNK_ELEMENTS[device] // items), CHUNK_ROWS[device])
    return ceil(tokens / ceil(tokens / rows))
