"""Losses from states, never from logits. T tokens, D dim, V items, N negatives.

Each takes `(states (T, D), items, batch, cfg)`, where `items` has the vectors (V, D) that states are compared with, and
gives the mean over the tokens that have a target; the weight of a target's interaction multiplies its loss and does not
change the number divided by (as RecTools). A sampled loss looks up the batch's rows alone, so with `items.sparse` no
gradient is made of the others. Gradients come from the forward pass and have none of their own: no gradient penalties.
"""

import torch
from torch import Tensor, nn

from sasrec_lab.config.schema import LossConfig, LossName
from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.errors import InputError
from sasrec_lab.ops.cross_entropy import linear_binary_cross_entropy, linear_cross_entropy, sampled_cross_entropy


def softmax(states: Tensor, items: nn.Embedding, batch: PackedBatch, cfg: LossConfig) -> Tensor:
    """Cross-entropy over the whole catalogue ("Turning Dross Into Gold Loss", RecTools)."""
    return linear_cross_entropy(states, items.weight, (batch.targets - 1).clamp(min=0), _shares(batch))


def sampled_softmax(states: Tensor, items: nn.Embedding, batch: PackedBatch, cfg: LossConfig) -> Tensor:
    """log(exp s(target) + sum of w exp s(negative)) - s(target): cross-entropy with the catalogue's sum estimated.

    w is how often an item was drawn over how often it was expected (logQ correction: Jean et al. 2015, arXiv 1412.2007,
    section 3; Yi et al. 2019), and a negative that is the target is left out, as in TensorFlow's sampled_softmax_loss.
    So the sum's expectation is the full softmax's, and the loss, a logarithm, is on average a little below it. The
    target is certain to be there, so nothing corrects it (Khrylchenko et al. 2025, arXiv 2507.09331).
    """
    targets = torch.where(batch.targets > 0, batch.targets, batch.negatives[0])  # (T,) without one: any of the batch's
    rows = items(torch.cat([targets, batch.negatives]) - 1)  # (T + N, D)
    places = torch.searchsorted(batch.negatives, targets).clamp(max=len(batch.negatives) - 1)
    hits = torch.where(batch.negatives[places] == targets, places, len(batch.negatives))  # (T,) N where there is none
    return sampled_cross_entropy(states, rows, hits, batch.log_weights, _shares(batch))


def bce(states: Tensor, items: nn.Embedding, batch: PackedBatch, cfg: LossConfig) -> Tensor:
    """-log s(target) - sum of log s(-negative): the paper's eq. (7), as the authors' code normalises it (model.py)."""
    return _binary(states, items, batch, 1.0)


def gbce(states: Tensor, items: nn.Embedding, batch: PackedBatch, cfg: LossConfig) -> Tensor:
    """-(beta log s(target) + sum of log s(-negative)) / (N + 1): Petrov and Macdonald 2023, arXiv 2308.07192.

    beta = a (t (1 - 1 / a) + 1 / a) with the calibration t and the share of items drawn a = N / (V - 1).
    """
    share = cfg.negatives / max(1, items.num_embeddings - 1)
    beta = 1 - cfg.calibration * (1 - share)
    return _binary(states, items, batch, beta) / (cfg.negatives + 1)


def check_negatives(cfg: LossConfig, num_items: int) -> None:
    """Raises InputError where gbce's share of items drawn would pass 1, and beta with it."""
    if cfg.name is LossName.gbce and cfg.negatives > num_items - 1:
        raise InputError(
            f"loss.negatives={cfg.negatives}: loss=gbce weighs the target by the share of the {num_items - 1} other"
            f" items that is drawn; use at most {num_items - 1}"
        )


LOSSES = {
    LossName.softmax: softmax,
    LossName.sampled_softmax: sampled_softmax,
    LossName.bce: bce,
    LossName.gbce: gbce,
}


def _binary(states: Tensor, items: nn.Embedding, batch: PackedBatch, beta: float) -> Tensor:
    """beta times the target's part, and each negative's, of the mean over targets."""
    targets = torch.where(batch.targets > 0, batch.targets, batch.negatives[:, 0])  # (T,) without one: any item
    places, table = torch.cat([targets[:, None], batch.negatives], 1) - 1, items.weight  # (T, 1 + N)
    if items.sparse:
        rows, places = torch.unique(places, return_inverse=True)
        table = items(rows)
    return linear_binary_cross_entropy(states, table, places, beta, _shares(batch))


def _shares(batch: PackedBatch) -> Tensor:
    """What a token's loss counts in the batch's: its weight over the number of targets, 0 where there is none."""
    has_target = (batch.targets > 0).float()  # (T,)
    weights = has_target if batch.weights is None else has_target * batch.weights
    return weights / has_target.sum().clamp(min=1)
