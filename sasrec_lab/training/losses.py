"""Training losses computed from encoder states, without ever storing the full (T, V) logits.

A loss compares states (R, D), one for each label, or (2, R, D) of two passes, with item vectors (V, D), and returns the
mean over the labels that have a target. The weight of a target's interaction multiplies its term but not the number
divided by, as in RecTools. A sampled loss looks up only the rows of the batch, so with `ItemTable.is_sparse` the other
rows get no gradient. The functions of ops/cross_entropy.py, ops/divergence.py and ops/lookup_loss.py compute gradients
in the forward pass and cannot be differentiated twice (no gradient penalties). R labels, D dim, V items, N negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.training import Exclude, LossConfig, LossName, SamplerName
from sasrec_lab.data.batches import Labels, Negatives
from sasrec_lab.data.negatives import draws_per
from sasrec_lab.errors import InputError, counted
from sasrec_lab.ops.cross_entropy import SoftTargets, grouped_cross_entropy, linear_cross_entropy, sampled_cross_entropy
from sasrec_lab.ops.divergence import two_pass_cross_entropy
from sasrec_lab.ops.lookup_loss import lookup_binary_cross_entropy, lookup_cross_entropy
from sasrec_lab.ops.softmax_products import Mask


class ItemTable(NamedTuple):
    """The item vectors that states are compared with; row i is item i + 1."""

    vectors: Tensor  # (V, D)
    is_sparse: bool = False  # whether only the rows of a batch get gradients

    def rows(self, items: Tensor) -> Tensor:
        """Return the vectors of items (any shape), (..., D)."""
        return F.embedding(items - 1, self.vectors, sparse=self.is_sparse)

    def look_up(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors, all or those of these items, and the row of each item in them, -1 for item 0."""
        if not self.is_sparse:
            return self.vectors, items - 1
        touched, rows = torch.unique(torch.where(items > 0, items, items.max()), return_inverse=True)
        return self.rows(touched), torch.where(items > 0, rows, -1)


@dataclass(frozen=True)
class Loss:
    """A loss, and its rule on the catalogue; config/training.py has the samplers whose negatives it takes."""

    compute: Callable[[Tensor, ItemTable, Labels, Negatives | None, LossConfig], Tensor]
    check: Callable[[LossConfig, int], None] | None = None  # raises InputError if num_items does not suit the config

    def describe(self, cfg: LossConfig) -> str:
        """Return the loss's name, with the number of its negatives: `bce (1 negative per position)`."""
        if cfg.sampler is SamplerName.none:
            parts = ["history excluded"] if cfg.exclude is Exclude.history else []
            parts += [f"horizon {cfg.horizon}"] if cfg.horizon else []
            parts += [f"smoothing {cfg.smoothing:g}"] if cfg.smoothing else []
            parts += [f"rdrop {cfg.rdrop:g}"] if cfg.rdrop else []
            return cfg.name.name + (f" ({', '.join(parts)})" if parts else "")
        return f"{cfg.name.name} ({counted(cfg.negatives, 'negative')} per {draws_per(cfg)})"

    def compared_items(self, cfg: LossConfig, num_items: int) -> int:
        """Return how many items each state is compared with."""
        return num_items if cfg.sampler is SamplerName.none else 1 + cfg.negatives


def softmax(states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return -log p(target), with p the softmax over the whole catalogue.

    As in RecTools and in Klenitskiy and Vasilev, "Turning Dross Into Gold Loss" (2023), arXiv 2309.07602. With
    `loss.exclude=history` the catalogue is without the other items of the window. Their SASRec+ with 3,000 negatives
    samples from that catalogue. With `loss.horizon` or `loss.smoothing` the target shares its probability. With
    `loss.rdrop`, as in R-Drop (Wu et al. 2021, arXiv 2106.14448), the divergence between two passes is added.
    """
    targets, mask = (labels.targets - 1).clamp(min=0), None
    if labels.excluded is not None:
        owners = np.repeat(np.arange(len(labels.counts)), labels.counts)
        owners = np.pad(owners, (0, len(targets) - len(owners)), mode="edge")  # the dummies may have any
        mask = Mask(labels.excluded - 1, torch.from_numpy(owners))
    weights, soft = _label_weights(labels), _soft_targets(labels, targets, cfg)
    if cfg.rdrop:
        return two_pass_cross_entropy(states, table.vectors, targets, weights, cfg.rdrop, mask, soft)
    return linear_cross_entropy(states, table.vectors, targets, weights, mask, soft)


def _soft_targets(labels: Labels, targets: Tensor, cfg: LossConfig) -> SoftTargets | None:
    """Return the distribution that takes the place of each target, None if the target has all of it.

    The item j places after a target, up to `horizon`, has decay^j times its probability, as long as it is a label of
    the same window. `smoothing` (Szegedy et al. 2016, arXiv 1512.00567, 7) takes a part of it for all items.
    """
    if not cfg.horizon and not cfg.smoothing:
        return None
    places = torch.arange(len(targets), device=targets.device)
    ends = torch.from_numpy(np.repeat(np.cumsum(labels.counts), labels.counts)).to(targets.device)
    ends = F.pad(ends, (0, len(targets) - len(ends)))  # dummies have no target
    rows, masses = [targets], [torch.ones_like(targets, dtype=torch.float32)]
    for step in range(1, min(cfg.horizon + 1, int(labels.counts.max()))):  # a window has no later labels than these
        others = (places + step).clamp(max=len(targets) - 1)
        has_other = (places + step < ends) & (labels.targets[others] > 0)
        rows.append(targets[others])
        masses.append(cfg.decay**step * has_other)
    each = torch.stack(masses, 1)  # (R, 1 + horizon)
    return SoftTargets(torch.stack(rows, 1), each * ((1 - cfg.smoothing) / each.sum(1, keepdim=True)), cfg.smoothing)


def sampled_softmax(
    states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, cfg: LossConfig
) -> Tensor:
    """Return log(exp s(target) + sum of exp s(negative)) - s(target), with a correction for shared negatives.

    Negatives of a sequence are as in "Turning Dross Into Gold Loss", negatives of a position as in RecTools and in
    eSASRec (Tikhonovich et al. 2025), where a uniform draw may equal the target and then counts as any other.
    """
    assert negatives is not None
    weights = _label_weights(labels)
    if cfg.sampler is SamplerName.shared:
        return _corrected_softmax(states, table, labels.targets, negatives, weights)
    if cfg.sampler is SamplerName.sequence:
        vectors, rows = table.look_up(torch.cat([labels.targets, negatives.items.flatten()]))
        targets, drawn = rows.split([len(states), negatives.items.numel()])
        return grouped_cross_entropy(
            states, vectors, targets, drawn.view_as(negatives.items), labels.counts.tolist(), weights
        )
    vectors, rows = table.look_up(_target_and_negatives(labels, negatives))
    return lookup_cross_entropy(states, vectors, rows, weights)


def _corrected_softmax(
    states: Tensor, table: ItemTable, targets: Tensor, negatives: Negatives, weights: Tensor
) -> Tensor:
    """Return log(exp s(target) + sum of w exp s(negative)) - s(target), an estimate of the full softmax.

    w is how often an item was drawn over how often that was expected (logQ correction: Jean et al. 2015, arXiv
    1412.2007, section 3; Yi et al. 2019); a negative that equals the target is excluded, as in TensorFlow's
    sampled_softmax_loss. The expectation of the sum is then that of the full softmax, and the loss, a logarithm, is on
    average slightly smaller. The target is always present, so it has no correction (Khrylchenko et al. 2025, arXiv
    2507.09331).
    """
    assert negatives.log_weights is not None
    drawn = negatives.items
    targets = torch.where(targets > 0, targets, drawn[0])  # (R,) any of the batch's if none
    vectors = table.rows(torch.cat([targets, drawn]))  # (R + N, D)
    columns = torch.searchsorted(drawn, targets).clamp(max=len(drawn) - 1)
    is_target = drawn[columns] == targets
    excluded_columns = torch.where(is_target, columns, len(drawn))  # (R,) N if the target was not drawn
    return sampled_cross_entropy(states, vectors, excluded_columns, negatives.log_weights, weights)


def bce(states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return -log sigmoid(s(target)) - sum of log sigmoid(-s(negative)).

    Kang and McAuley 2018, arXiv 1808.09781, eq. (7), normalized as in the authors' code (model.py). "Turning Dross Into
    Gold Loss" divides by 1 + N in addition, which is only a scale, and Adam does not depend on it.
    """
    return _binary_cross_entropy(states, table, labels, negatives, 1.0)


def gbce(states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return -(beta log sigmoid(s(target)) + sum of log sigmoid(-s(negative))) / (N + 1).

    Petrov and Macdonald 2023, arXiv 2308.07192: beta = a (t (1 - 1 / a) + 1 / a), with the calibration t and the
    sampling rate a = N / (V - 1).
    """
    sampling_rate = cfg.negatives / max(1, len(table.vectors) - 1)
    beta = 1 - cfg.calibration * (1 - sampling_rate)
    return _binary_cross_entropy(states, table, labels, negatives, beta) / (cfg.negatives + 1)


def check_sampling_rate(cfg: LossConfig, num_items: int) -> None:
    """Raise InputError if gbce's sampling rate, and with it beta, would exceed 1."""
    if cfg.negatives > num_items - 1:
        raise InputError(
            f"loss.negatives={cfg.negatives} must be at most {num_items - 1} with loss=gbce, the number of items other"
            " than the target; lower it"
        )


def bpr(states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return the mean over the negatives of -log sigmoid(s(target) - s(negative)).

    Bayesian personalized ranking: Rendle et al. 2009, arXiv 1205.2618, without its regularization term, which is
    optimizer.weight_decay. Meant for few negatives, because their vectors (R, 1 + N, D) are all in memory at once.
    """
    with torch.autocast(states.device.type, enabled=False):
        vectors = table.rows(_target_and_negatives(labels, negatives))  # (R, 1 + N, D)
        scores = torch.bmm(vectors, states.to(vectors.dtype)[:, :, None])[:, :, 0]  # (R, 1 + N)
        losses = F.softplus(scores[:, 1:] - scores[:, :1]).mean(1)  # (R,)
        return torch.sum(losses * _label_weights(labels))


LOSSES = {
    LossName.softmax: Loss(softmax),
    LossName.sampled_softmax: Loss(sampled_softmax),
    LossName.bce: Loss(bce),
    LossName.gbce: Loss(gbce, check_sampling_rate),
    LossName.bpr: Loss(bpr),
}


def find_loss(cfg: LossConfig) -> Loss:
    """Return the loss that a config names, which may be a function of the user's."""
    return Loss(load(cfg.name)) if isinstance(cfg.name, Foreign) else LOSSES[cfg.name]


def _binary_cross_entropy(
    states: Tensor, table: ItemTable, labels: Labels, negatives: Negatives | None, beta: float
) -> Tensor:
    """Return the mean of -beta log sigmoid(s(target)) - sum of log sigmoid(-s(negative))."""
    vectors, rows = table.look_up(_target_and_negatives(labels, negatives))
    return lookup_binary_cross_entropy(states, vectors, rows, beta, _label_weights(labels))


def _target_and_negatives(labels: Labels, negatives: Negatives | None) -> Tensor:
    """Return each label's target and negatives, shape (R, 1 + N); a label without a target gets a negative instead."""
    assert negatives is not None
    targets = torch.where(labels.targets > 0, labels.targets, negatives.items[:, 0])
    return torch.cat([targets[:, None], negatives.items], 1)


def _label_weights(labels: Labels) -> Tensor:
    """Return each label's weight in the batch loss: interaction weight / number of targets, 0 if it has no target."""
    has_target = (labels.targets > 0).float()  # (R,)
    weights = has_target if labels.weights is None else has_target * labels.weights
    return weights / has_target.sum().clamp(min=1)
