"""Ranks of the targets, and NDCG, recall and MRR from ranks. U users, V items, N candidates.

With one target per user, recall@k is the hit rate. Rank 1 is the best. Rank 0 means that the target is not among the
candidates (it is unknown to the model, or excluded as seen): a miss at every k.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sasrec_lab.config.schema import GAINS, EvaluationConfig, metric_names
from sasrec_lab.data.batches import EvaluationBatch


class ItemScores(Protocol):
    """Scores of the catalogue's items for U users, such as ops.ranking.Scores."""

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores of items (U, n), in the same shape."""

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each user's target, the target included, (U,) int64."""


class HoldoutMetrics(nn.Module):
    """Metrics of one pass over the held-out users: of the full ranking, and of the sampled one if it is configured.

    With `only_monitored`, a full ranking is skipped if `evaluation.monitor` is a sampled metric, because the full one
    costs most of the time with a large catalogue and decides nothing then.
    """

    def __init__(self, num_items: int, evaluation: EvaluationConfig, only_monitored: bool = False):
        super().__init__()
        self.filter_seen = evaluation.filter_seen
        self.suffix = f"-sampled{evaluation.sampled}"
        skips_full = only_monitored and evaluation.sampled and evaluation.monitor.endswith(self.suffix)
        self.full = None if skips_full else RankMetrics(num_items, evaluation.k)
        self.sampled = RankMetrics(evaluation.sampled + 1, evaluation.k) if evaluation.sampled else None

    def update(self, scores: ItemScores, batch: EvaluationBatch) -> dict[str, Tensor]:
        """Count the ranks of a batch and return them, each (U,)."""
        ranks = {}
        if self.full is not None:
            ranks["rank"] = full_ranks(scores, batch, self.filter_seen)
            self.full.update(ranks["rank"])
        if self.sampled is not None:
            ranks["sampled_rank"] = sampled_ranks(scores, batch)
            self.sampled.update(ranks["sampled_rank"])
        return ranks

    def compute_and_reset(self, stage: str) -> dict[str, float]:
        """Return the metrics so far under their full names, such as `val/ndcg@10`, and start over."""
        values: dict[str, float] = {}
        for ranks, suffix in ((self.full, ""), (self.sampled, self.suffix)):
            if ranks is not None:
                values |= {f"{stage}/{name}{suffix}": value for name, value in ranks.compute().items()}
                ranks.reset()
        return values


def full_ranks(scores: ItemScores, batch: EvaluationBatch, filter_seen: bool) -> Tensor:
    """Return the target's rank in the full catalogue: 1 + the number of other candidates that score at least as high.

    Ties and NaN count against the target, so a model that scores all items alike gets the worst rank. Counting needs no
    sort, and seen items are subtracted from the count instead of being masked.
    """
    is_known = batch.targets > 0
    seen = (batch.seen_rows, batch.seen_items) if filter_seen else (batch.seen_rows[:0], batch.seen_items[:0])
    # the count includes the target, so no "+ 1"
    ranks = scores.count_not_below_target(batch.targets.clamp(min=1), *seen)  # (U,) int64
    is_known[seen[0][seen[1] == batch.targets[seen[0]]]] = False
    return torch.where(is_known, ranks, 0)


def sampled_ranks(scores: ItemScores, batch: EvaluationBatch) -> Tensor:
    """Return the target's rank among itself and the sampled candidates; a candidate equal to it does not count."""
    assert batch.candidates is not None
    targets = batch.targets.clamp(min=1)[:, None]
    candidate_scores = scores.for_items(torch.cat([targets, batch.candidates], 1))  # (U, 1 + N)
    above = ~(candidate_scores[:, 1:] < candidate_scores[:, :1]) & (batch.candidates != targets)
    return torch.where(batch.targets > 0, 1 + above.sum(1), 0)


class MeanLoss(Metric):
    """Mean loss over all targets; NaN if any loss is NaN, which torchmetrics' MeanMetric would ignore."""

    full_state_update = False
    total: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("targets", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, targets: Tensor) -> None:
        """Add the mean loss of a batch and its number of targets."""
        self.total += loss * targets
        self.targets += targets

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.targets


class IntegerConcat(Metric):
    """Integers of all batches and processes, concatenated; torchmetrics' CatMetric is float32, exact only to 2^24."""

    full_state_update = False
    parts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("parts", [], dist_reduce_fx="cat")

    def update(self, numbers: Tensor) -> None:
        """Add the integers of a batch."""
        self.parts.append(numbers)  # (U,) int64

    def compute(self) -> Tensor:
        """Return all integers."""
        return dim_zero_cat(self.parts)


class RankMetrics(Metric):
    """Metrics from the number of times that each rank occurred.

    The counts are integers, so their sum over several processes is exact in any order.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, worst_rank: int, k: list[int]):
        super().__init__()
        self.k = k
        self.add_state("counts", torch.zeros(worst_rank + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Tensor) -> None:
        """Count the ranks (U,) of a batch."""
        self.counts += torch.bincount(ranks, minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, without `val/` or `test/`."""
        return metrics_from_counts(self.counts.cpu().double(), self.k)


def metrics_from_counts(counts: Tensor, k: list[int]) -> dict[str, float]:
    """Return the metrics by name, where `counts[r]` users have rank r and `counts[0]` are misses."""
    users = counts.sum().clamp(min=1)
    ranks = torch.arange(1, len(counts), dtype=torch.double)
    hits = counts[1:]
    gains = {name: gain(torch, ranks) for name, gain in GAINS.items()}
    values = {"mrr": (hits * gains["mrr"]).sum() / users}
    for cut in k:
        for name, gain in gains.items():
            values[f"{name}@{cut}"] = (hits[:cut] * gain[:cut]).sum() / users
    return {name: float(values[name]) for name in metric_names(k, sampled=0)}
