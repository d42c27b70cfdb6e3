"""Ranks by counting, and NDCG, recall and MRR from ranks. U users, V items, N candidates.

With one target a user, recall@k is the hit rate. Rank 1 is the best; rank 0 says that the target is not among the
candidates (an item the model does not know, or one that was left out as seen): a miss at every k.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from sasrec_lab.config import EvaluationConfig, metric_names
from sasrec_lab.data.batches import EvaluationBatch


class HoldoutMetrics(nn.Module):
    """What is measured on one pass over the held-out users: the full ranking, and the sampled one where asked."""

    def __init__(self, num_items: int, evaluation: EvaluationConfig):
        super().__init__()
        self.filter_seen = evaluation.filter_seen
        self.ending = f"-sampled{evaluation.sampled}"
        self.full = RankMetrics(num_items, evaluation.k)
        self.sampled = RankMetrics(evaluation.sampled + 1, evaluation.k) if evaluation.sampled else None

    def update(self, scores: Tensor, batch: EvaluationBatch) -> dict[str, Tensor]:
        """Count the ranks that these scores (U, V) give, and return them, each (U,)."""
        ranks = {"rank": full_ranks(scores, batch, self.filter_seen)}
        self.full.update(ranks["rank"])
        if self.sampled is not None:
            ranks["sampled_rank"] = sampled_ranks(scores, batch)
            self.sampled.update(ranks["sampled_rank"])
        return ranks

    def take(self, stage: str) -> dict[str, float]:
        """The metrics so far under their full names, `val/ndcg@10`, and start anew."""
        values = {f"{stage}/{name}": value for name, value in self.full.compute().items()}
        self.full.reset()
        if self.sampled is not None:
            values |= {f"{stage}/{name}{self.ending}": value for name, value in self.sampled.compute().items()}
            self.sampled.reset()
        return values


def full_ranks(scores: Tensor, batch: EvaluationBatch, filter_seen: bool) -> Tensor:
    """The target's rank in the whole catalogue: 1 + the other candidates that do not score below it.

    Counting wants no sort, and seen items are taken out of the count afterwards instead of being masked. A model that
    scores everything alike, or NaN, gets the worst rank.
    """  # scores (U, V), column i is item i + 1; -> (U,) int64
    known = batch.targets > 0
    column = batch.targets.clamp(min=1)[:, None] - 1
    target_score = scores.gather(1, column)  # (U, 1)
    ranks = (~(scores < target_score)).sum(1)  # the target is one of those counted: no "1 +"
    if filter_seen:
        seen_scores = scores[batch.seen_rows, batch.seen_items - 1]  # (S,)
        above = ~(seen_scores < target_score[batch.seen_rows, 0])
        ranks = ranks.index_add(0, batch.seen_rows, -above.long())
        known[batch.seen_rows[batch.seen_items == batch.targets[batch.seen_rows]]] = False
    return torch.where(known, ranks, 0)


def sampled_ranks(scores: Tensor, batch: EvaluationBatch) -> Tensor:
    """The target's rank among itself and the sampled candidates; a candidate that is the target does not count."""
    candidates = batch.candidates  # (U, N)
    target_score = scores.gather(1, batch.targets.clamp(min=1)[:, None] - 1)
    above = ~(scores.gather(1, candidates - 1) < target_score) & (candidates != batch.targets[:, None])
    return torch.where(batch.targets > 0, 1 + above.sum(1), 0)


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
