"""Ranks of the targets, and metrics from ranks. U rows with G targets, V items, N candidates.

Rank 1 is the best. Rank 0 means that the target is not among the candidates (it is unknown to the model, or excluded as
seen): a miss at every k.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sasrec_lab.config.dataset import Target
from sasrec_lab.config.evaluation import LOSS, EvaluationConfig, metric_names
from sasrec_lab.config.foreign_code import load
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.evaluation.row_metrics import RankedRows, RowMetric, mean_over_rows
from sasrec_lab.ops.ranking import Scores

TARGETS_AT_ONCE = 1024  # of rows with several targets: the seen items of a row are repeated for each of them

# By metric: the value of a row with one target, from its rank.
GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "ndcg": lambda ranks: 1 / torch.log2(ranks + 1),
    "recall": torch.ones_like,
    "mrr": lambda ranks: 1 / ranks,
}


class ItemScores(Protocol):
    """Scores of the catalogue's items for U rows, such as ops.ranking.Scores."""

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores of items (U, n), in the same shape."""

    def rows(self, rows: Tensor, /) -> "ItemScores":
        """Return the scores of some rows, in their order and as often as they are given."""

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each row's target, the target included, (U,) int64."""


class HoldoutMetrics(nn.Module):
    """Metrics of one pass over the rows of a stage: of the full ranking, and of the sampled one if it is configured.

    `target` says which targets a row has (`DatasetConfig.target`).
    With `only_monitored`, a full ranking is skipped if `evaluation.monitor` is a sampled metric, because the full one
    costs most of the time with a large catalogue and decides nothing then. Several processes add up their rows, except
    with `has_all_rows`, if this one ranks them all. With `has_loss` a full ranking comes with the softmax loss of the
    targets.
    """

    def __init__(
        self,
        num_items: int,
        evaluation: EvaluationConfig,
        target: Target = Target.last,
        *,
        only_monitored: bool = False,
        has_all_rows: bool = False,
        has_loss: bool = False,
    ):
        super().__init__()
        self.filter_seen = evaluation.filter_seen
        self.suffix = f"-sampled{evaluation.sampled}"
        skips_full = only_monitored and evaluation.sampled and evaluation.monitor.endswith(self.suffix)
        own = {name: load(part.name) for name, part in evaluation.metrics.items()}
        kept = evaluation.k, target, own, not has_all_rows
        self.full = None if skips_full else _metrics(num_items, *kept)
        self.sampled = _metrics(evaluation.sampled + 1, *kept) if evaluation.sampled else None
        self.loss = OrderedMeanLoss() if has_loss and not skips_full else None

    def update(self, scores: ItemScores, batch: EvaluationBatch) -> dict[str, Tensor]:
        """Add the ranks of a batch and return them, each (G,)."""
        ranks = {}
        if self.full is not None:
            ranks["rank"] = full_ranks(scores, batch, self.filter_seen)
            self.full.update(ranks["rank"], batch)
        if self.sampled is not None:
            ranks["sampled_rank"] = sampled_ranks(scores, batch)
            self.sampled.update(ranks["sampled_rank"], batch)
        if self.loss is not None:
            assert isinstance(scores, Scores)
            self.loss.update(*softmax_loss(scores, batch), batch.rows)
        return ranks

    def compute_and_reset(self, stage: str) -> dict[str, float]:
        """Return the metrics so far under their full names, such as `val/ndcg@10`, and start over."""
        values: dict[str, float] = {}
        for ranks, suffix in ((self.full, ""), (self.sampled, self.suffix)):
            if ranks is not None:
                values |= {f"{stage}/{name}{suffix}": value for name, value in ranks.compute().items()}
                ranks.reset()
        if self.loss is not None:
            loss = float(self.loss.compute())
            values |= {f"{stage}/{LOSS}": loss} if isfinite(loss) else {}  # it is NaN if no target can be scored
            self.loss.reset()
        return values


def full_ranks(scores: ItemScores, batch: EvaluationBatch, filter_seen: bool) -> Tensor:
    """Return each target's rank in the full catalogue: 1 + the number of other candidates that score at least as high.

    Ties and NaN count against the target, so a model that scores all items alike gets the worst rank. Counting needs no
    sort, and seen items are subtracted from the count instead of being masked. Other targets of the same row count like
    any item, as they do in a list.
    """
    seen = (batch.seen_rows, batch.seen_items) if filter_seen else (batch.seen_rows[:0], batch.seen_items[:0])
    if len(batch.targets) == len(batch.rows):  # one target per row
        return _ranks(scores, batch.targets, *seen)
    parts = zip(batch.target_rows.split(TARGETS_AT_ONCE), batch.targets.split(TARGETS_AT_ONCE), strict=True)
    return torch.cat([_ranks(scores.rows(rows), targets, *_repeat_seen(rows, *seen)) for rows, targets in parts])


def _ranks(scores: ItemScores, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
    """Return the rank of one target for each row of the scores."""
    is_known = targets > 0
    # the count includes the target, so no "+ 1"
    ranks = scores.count_not_below_target(targets.clamp(min=1), seen_rows, seen_items)  # (U,) int64
    is_known[seen_rows[seen_items == targets[seen_rows]]] = False
    return torch.where(is_known, ranks, 0)


def _repeat_seen(rows: Tensor, seen_rows: Tensor, seen_items: Tensor) -> tuple[Tensor, Tensor]:
    """Return the seen items of `rows` (R,), which may repeat a row, and for each the index in `rows`."""
    starts, ends = (torch.searchsorted(seen_rows, rows, right=right) for right in (False, True))
    lengths = ends - starts
    repeated = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
    places = torch.arange(len(repeated), device=rows.device) + (ends - lengths.cumsum(0))[repeated]
    return repeated, seen_items[places]


def sampled_ranks(scores: ItemScores, batch: EvaluationBatch) -> Tensor:
    """Return the rank of a row's one target among itself and the sampled candidates, not counting itself again."""
    assert batch.candidates is not None
    targets = batch.targets.clamp(min=1)[:, None]
    candidate_scores = scores.for_items(torch.cat([targets, batch.candidates], 1))  # (U, 1 + N)
    above = ~(candidate_scores[:, 1:] < candidate_scores[:, :1]) & (batch.candidates != targets)
    return torch.where(batch.targets > 0, 1 + above.sum(1), 0)


def softmax_loss(scores: Scores, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
    """Return the mean of -log p(target) over the targets that a model can score, and their number.

    p is the softmax over the catalogue, seen items included, whatever the model was trained with. A target outside the
    catalogue, and one of a row without a known item, does not count.
    """
    has_state = torch.zeros(len(batch.rows), dtype=torch.bool, device=batch.targets.device)
    has_state[batch.ranked] = True
    counts = (batch.targets > 0) & has_state[batch.target_rows]
    losses = -scores.log_probabilities(batch.target_rows[counts], batch.targets[counts])
    number = counts.sum()
    return losses.sum() / number.clamp(min=1), number


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


class OrderedMeanLoss(Metric):
    """Mean loss over all targets, added up in the order of the batches' rows: the same for any number of processes."""

    full_state_update = False
    rows: list[Tensor]
    losses: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("rows", "losses", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, loss: Tensor, targets: Tensor, rows: Tensor) -> None:
        """Add the mean loss of a batch, its number of targets, and its rows (U,), which no other batch has."""
        self.rows.append(rows[:1])
        self.losses.append(loss.expand(len(rows[:1])))
        self.targets.append(targets.expand(len(rows[:1])))

    def compute(self) -> Tensor:
        """Return the mean."""
        rows, losses, targets = (dim_zero_cat(x).reshape(-1).cpu() for x in (self.rows, self.losses, self.targets))
        order = rows.argsort()
        return (losses.double() * targets)[order].sum() / targets.sum()


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


def _metrics(
    worst_rank: int, k: list[int], target: Target, own: Mapping[str, RowMetric], adds_up: bool
) -> "RankMetrics | RowMetrics":
    """Return an empty metric for rows with these targets, which may add up the rows of all processes."""
    has_one_row_and_target = target in (Target.first, Target.last)
    return RankMetrics(worst_rank, k, adds_up, own) if has_one_row_and_target else RowMetrics(k, target, adds_up, own)


class RankMetrics(Metric):
    """Metrics of rows with one target each, from the number of times that each rank occurred.

    The counts are integers, so their sum over several processes is exact in any order.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, worst_rank: int, k: list[int], adds_up: bool = True, own: Mapping[str, RowMetric] | None = None):
        super().__init__(sync_on_compute=adds_up)
        self.k, self.own = k, own or {}
        self.add_state("counts", torch.zeros(worst_rank + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Tensor, batch: EvaluationBatch | None = None) -> None:
        """Count the ranks (U,) of a batch."""
        self.counts += torch.bincount(ranks, minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, without `val/` or `test/`."""
        return metrics_from_counts(self.counts.cpu().double(), self.k, self.own)


def metrics_from_counts(counts: Tensor, k: list[int], own: Mapping[str, RowMetric] | None = None) -> dict[str, float]:
    """Return the metrics by name, where `counts[r]` rows have rank r and `counts[0]` are misses.

    Each of the user's own ones is asked for one row of every rank.
    """
    rows = counts.sum().clamp(min=1)
    ranks = torch.arange(1, len(counts), dtype=torch.double)
    hits = counts[1:]
    gains = {name: gain(ranks) for name, gain in GAINS.items()}
    values = {"mrr": (hits * gains["mrr"]).sum() / rows}
    for cut in k:
        for name, gain in gains.items():
            values[f"{name}@{cut}"] = (hits[:cut] * gain[:cut]).sum() / rows
    every = np.arange(len(counts))
    one_of_each = RankedRows(every, every)
    for name in [f"{metric}@{cut}" for cut in k for metric in own or ()]:
        values[name] = (counts * torch.from_numpy(one_of_each.values(name, own))).sum() / rows
    return {name: float(values[name]) for name in metric_names(k, sampled=0, own=own or ())}


class RowMetrics(Metric):
    """Metrics of rows with several targets, or of users with several rows, from the ranks of all targets.

    Ranks of several processes are gathered and ordered by row before anything is added up, so that the sums are the
    same as those of one process.
    """

    full_state_update = False
    parts: list[Tensor]

    def __init__(self, k: list[int], target: Target, adds_up: bool = True, own: Mapping[str, RowMetric] | None = None):
        super().__init__(sync_on_compute=adds_up)
        self.names, self.own = metric_names(k, 0, target, own or ()), own or {}
        self.add_state("parts", [], dist_reduce_fx="cat")

    def update(self, ranks: Tensor, batch: EvaluationBatch) -> None:
        """Add the ranks (G,) of a batch."""
        rows = batch.target_rows
        self.parts.append(torch.stack([batch.rows[rows], batch.users[rows], ranks], 1))  # (G, 3) int64

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, without `val/` or `test/`."""
        rows, users, ranks = dim_zero_cat(self.parts).cpu().numpy().T if len(self.parts) else np.zeros((3, 0), np.int64)
        order = np.argsort(rows, kind="stable")
        return mean_over_rows(self.names, rows[order], users[order], ranks[order], self.own)
