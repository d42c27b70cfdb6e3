"""Training losses computed from encoder states, without ever storing the full (T, V) logits.

A loss compares states (T, D) with item vectors (V, D) and returns the mean over the tokens that have a target. The
weight of a target's interaction multiplies its term but not the number divided by, as in RecTools. A sampled loss looks
up only the rows of the batch, so with `items.sparse` the other rows get no gradient. The functions of
ops/cross_entropy.py compute gradients in the forward pass and cannot be differentiated twice (no gradient penalties).
T tokens, D dim, V items, N negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.schema import LossConfig, LossName
from sasrec_lab.data.batches import TrainingBatch
from sasrec_lab.data.negatives import NegativeSampler, SharedSampler, UniformSampler, UnseenSampler
from sasrec_lab.errors import InputError, counted
from sasrec_lab.ops.cross_entropy import linear_binary_cross_entropy, linear_cross_entropy, sampled_cross_entropy


@dataclass(frozen=True)
class Loss:
    """A loss, the negatives it needs (None: it compares with the whole catalogue), and its rule on the catalogue."""

    compute: Callable[[Tensor, nn.Embedding, TrainingBatch, LossConfig], Tensor]
    sampler: type[NegativeSampler] | None = None
    check: Callable[[LossConfig, int], None] | None = None  # raises InputError if num_items does not suit the config

    def describe(self, cfg: LossConfig) -> str:
        """Return the loss's name, with the number of its negatives: `bce (1 negative per position)`."""
        if self.sampler is None:
            return cfg.name.name
        return f"{cfg.name.name} ({counted(cfg.negatives, 'negative')} per {self.sampler.per})"

    def compared_items(self, cfg: LossConfig, num_items: int) -> int:
        """Return how many items each state is compared with."""
        return num_items if self.sampler is None else 1 + cfg.negatives


def softmax(states: Tensor, items: nn.Embedding, batch: TrainingBatch, cfg: LossConfig) -> Tensor:
    """Return -log p(target), with p the softmax over the whole catalogue.

    As in RecTools and in Klenitskiy and Vasilev, "Turning Dross Into Gold Loss" (2023), arXiv 2309.07602.
    """
    return linear_cross_entropy(states, items.weight, (batch.targets - 1).clamp(min=0), _token_weights(batch))


def sampled_softmax(states: Tensor, items: nn.Embedding, batch: TrainingBatch, cfg: LossConfig) -> Tensor:
    """Return log(exp s(target) + sum of w exp s(negative)) - s(target), an estimate of the full softmax.

    w is how often an item was drawn over how often that was expected (logQ correction: Jean et al. 2015, arXiv
    1412.2007, section 3; Yi et al. 2019); a negative that equals the target is excluded, as in TensorFlow's
    sampled_softmax_loss. The expectation of the sum is then that of the full softmax, and the loss, a logarithm, is on
    average slightly smaller. The target is always present, so it has no correction (Khrylchenko et al. 2025, arXiv
    2507.09331).
    """
    assert batch.negatives is not None
    assert batch.log_weights is not None
    targets = torch.where(batch.targets > 0, batch.targets, batch.negatives[0])  # (T,) any of the batch's if none
    vectors = items(torch.cat([targets, batch.negatives]) - 1)  # (T + N, D)
    columns = torch.searchsorted(batch.negatives, targets).clamp(max=len(batch.negatives) - 1)
    is_target = batch.negatives[columns] == targets
    excluded_columns = torch.where(is_target, columns, len(batch.negatives))  # (T,) N if the target was not drawn
    return sampled_cross_entropy(states, vectors, excluded_columns, batch.log_weights, _token_weights(batch))


def bce(states: Tensor, items: nn.Embedding, batch: TrainingBatch, cfg: LossConfig) -> Tensor:
    """Return -log sigmoid(s(target)) - sum of log sigmoid(-s(negative)).

    Kang and McAuley 2018, arXiv 1808.09781, eq. (7), normalized as in the authors' code (model.py).
    """
    return _binary_cross_entropy(states, items, batch, 1.0)


def gbce(states: Tensor, items: nn.Embedding, batch: TrainingBatch, cfg: LossConfig) -> Tensor:
    """Return -(beta log sigmoid(s(target)) + sum of log sigmoid(-s(negative))) / (N + 1).

    Petrov and Macdonald 2023, arXiv 2308.07192: beta = a (t (1 - 1 / a) + 1 / a), with the calibration t and the
    sampling rate a = N / (V - 1).
    """
    sampling_rate = cfg.negatives / max(1, items.num_embeddings - 1)
    beta = 1 - cfg.calibration * (1 - sampling_rate)
    return _binary_cross_entropy(states, items, batch, beta) / (cfg.negatives + 1)


def check_sampling_rate(cfg: LossConfig, num_items: int) -> None:
    """Raise InputError if gbce's sampling rate, and with it beta, would exceed 1."""
    if cfg.negatives > num_items - 1:
        raise InputError(
            f"loss.negatives={cfg.negatives} must be at most {num_items - 1} with loss=gbce, the number of items other"
            " than the target; lower it"
        )


def bpr(states: Tensor, items: nn.Embedding, batch: TrainingBatch, cfg: LossConfig) -> Tensor:
    """Return the mean over the negatives of -log sigmoid(s(target) - s(negative)).

    Bayesian personalized ranking: Rendle et al. 2009, arXiv 1205.2618, without its regularization term, which is
    optimizer.weight_decay. Meant for few negatives, because their vectors (T, 1 + N, D) are all in memory at once.
    """
    with torch.autocast(states.device.type, enabled=False):
        vectors = items(_target_and_negatives(batch) - 1)  # (T, 1 + N, D)
        scores = torch.bmm(vectors, states.to(vectors.dtype)[:, :, None])[:, :, 0]  # (T, 1 + N)
        losses = F.softplus(scores[:, 1:] - scores[:, :1]).mean(1)  # (T,)
        return torch.sum(losses * _token_weights(batch))


LOSSES = {
    LossName.softmax: Loss(softmax),
    LossName.sampled_softmax: Loss(sampled_softmax, SharedSampler),
    LossName.bce: Loss(bce, UnseenSampler),
    LossName.gbce: Loss(gbce, UniformSampler, check_sampling_rate),
    LossName.bpr: Loss(bpr, UnseenSampler),
}


def _binary_cross_entropy(states: Tensor, items: nn.Embedding, batch: TrainingBatch, beta: float) -> Tensor:
    """Return the mean of -beta log sigmoid(s(target)) - sum of log sigmoid(-s(negative))."""
    rows, table = _target_and_negatives(batch) - 1, items.weight  # (T, 1 + N)
    if items.sparse:
        touched, rows = torch.unique(rows, return_inverse=True)
        table = items(touched)
    return linear_binary_cross_entropy(states, table, rows, beta, _token_weights(batch))


def _target_and_negatives(batch: TrainingBatch) -> Tensor:
    """Return each token's target and negatives, shape (T, 1 + N); a token without a target gets a negative instead."""
    assert batch.negatives is not None
    targets = torch.where(batch.targets > 0, batch.targets, batch.negatives[:, 0])
    return torch.cat([targets[:, None], batch.negatives], 1)


def _token_weights(batch: TrainingBatch) -> Tensor:
    """Return each token's weight in the batch loss: interaction weight / number of targets, 0 if it has no target."""
    has_target = (batch.targets > 0).float()  # (T,)
    weights = has_target if batch.weights is None else has_target * batch.weights
    return weights / has_target.sum().clamp(min=1)
