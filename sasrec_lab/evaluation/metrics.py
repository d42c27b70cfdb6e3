"""Ranks by counting, and NDCG, recall and MRR from ranks. U users, V items, N candidates.

With one target a user, recall@k is the hit rate. Rank 1 is the best; rank 0 says that the target is not among the
candidates (an item the model does not know, or one that was left out as seen): a miss at every k.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sasrec_lab.config.schema import EvaluationConfig, metric_names
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.ops.ranking import Scores


class HoldoutMetrics(nn.Module):
    """What is measured on one pass over the held-out users: the full ranking, and the sampled one where asked.

    With `monitored_alone` only the one that `evaluation.monitor` names: the full ranking of a long catalogue is two
    thirds of an epoch on the paper's Beauty, and chooses nothing where the monitor is a sampled metric.
    """

    def __init__(self, num_items: int, evaluation: EvaluationConfig, monitored_alone: bool = False):
        super().__init__()
        self.filter_seen = evaluation.filter_seen
        self.ending = f"-sampled{evaluation.sampled}"
        unwanted = monitored_alone and evaluation.sampled and evaluation.monitor.endswith(self.ending)
        self.full = None if unwanted else RankMetrics(num_items, evaluation.k)
        self.sampled = RankMetrics(evaluation.sampled + 1, evaluation.k) if evaluation.sampled else None

    def update(self, scores: "Scores", batch: EvaluationBatch) -> dict[str, Tensor]:
        """Count the ranks that these scores give, and return them, each (U,)."""
        ranks = {}
        if self.full is not None:
            ranks["rank"] = full_ranks(scores, batch, self.filter_seen)
            self.full.update(ranks["rank"])
        if self.sampled is not None:
            ranks["sampled_rank"] = sampled_ranks(scores, batch)
            self.sampled.update(ranks["sampled_rank"])
        return ranks

    def take(self, stage: str) -> dict[str, float]:
        """The metrics so far under their full names, `val/ndcg@10`, and start anew."""
        values = {}
        for ranks, ending in ((self.full, ""), (self.sampled, self.ending)):
            if ranks is not None:
                values |= {f"{stage}/{name}{ending}": value for name, value in ranks.compute().items()}
                ranks.reset()
        return values


def full_ranks(scores: Scores, batch: EvaluationBatch, filter_seen: bool) -> Tensor:
    """The target's rank in the whole catalogue: 1 + the other candidates that do not score below it.

    Counting wants no sort, and seen items are taken out of the count afterwards instead of being masked. A model that
    scores everything alike, or NaN, gets the worst rank.
    """  # (U,) int64
    known = batch.targets > 0
    seen = (batch.seen_rows, batch.seen_items) if filter_seen else (batch.seen_rows[:0], batch.seen_items[:0])
    ranks = scores.count_not_below_target(batch.targets.clamp(min=1), *seen)  # the target is one of them: no "1 +"
    known[seen[0][seen[1] == batch.targets[seen[0]]]] = False
    return torch.where(known, ranks, 0)


def sampled_ranks(scores: Scores, batch: EvaluationBatch) -> Tensor:
    """The target's rank among itself and the sampled candidates; a candidate that is the target does not count."""
    targets = batch.targets.clamp(min=1)[:, None]
    own = scores.for_items(torch.cat([targets, batch.candidates], 1))  # (U, 1 + N)
    above = ~(own[:, 1:] < own[:, :1]) & (batch.candidates != targets)
    return torch.where(batch.targets > 0, 1 + above.sum(1), 0)


class MeanLoss(Metric):
    """The mean over all targets; NaN once a loss is, which torchmetrics' MeanMetric would leave out."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("targets", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, targets: Tensor) -> None:
        """A batch's mean and how many it is the mean of."""
        self.total += loss * targets
        self.targets += targets

    def compute(self) -> Tensor:
        return self.total / self.targets


class IntegerConcat(Metric):
    """Whole numbers of all batches and processes, one after the other; torchmetrics' CatMetric has float32, to 2^24."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("parts", [], dist_reduce_fx="cat")

    def update(self, numbers: Tensor) -> None:
        self.parts.append(numbers)  # (U,) int64

    def compute(self) -> Tensor:
        return dim_zero_cat(self.parts)


class RankMetrics(Metric):
    """Counts how often each rank occurred; every metric follows from the counts.

    Counts are whole numbers, so their sum over several processes is exact and in whatever order.
    """

    full_state_update = False

    def __init__(self, worst_rank: int, k: list[int]):
        super().__init__()
        self.k = k
        self.add_state("counts", torch.zeros(worst_rank + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Tensor) -> None:
        self.counts += torch.bincount(ranks, minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        counts = self.counts.cpu().double()
        return metrics_from_counts(counts, self.k)


def metrics_from_counts(counts: Tensor, k: list[int]) -> dict[str, float]:
    """`counts[r]` users have rank r; `counts[0]` misses."""
    users = counts.sum().clamp(min=1)
    ranks = torch.arange(1, len(counts), dtype=torch.double)
    hits = counts[1:]
    gains = {"ndcg": 1 / torch.log2(ranks + 1), "recall": torch.ones_like(ranks), "mrr": 1 / ranks}
    values = {"mrr": (hits * gains["mrr"]).sum() / users}
    for cut in k:
        for name, gain in gains.items():
            values[f"{name}@{cut}"] = (hits[:cut] * gain[:cut]).sum() / users
    return {name: float(values[name]) for name in metric_names(k, sampled=0)}
