"""Metrics of a pass over rows to rank, which several processes may share. U rows with G targets."""

from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sasrec_lab.config.dataset import Target
from sasrec_lab.config.evaluation import LOSS, EvaluationConfig, metric_names
from sasrec_lab.config.foreign_code import load
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.evaluation.ranks import ItemScores, full_ranks, metrics_from_counts, sampled_ranks
from sasrec_lab.evaluation.row_metrics import RowMetric, mean_over_rows
from sasrec_lab.ops.ranking import Scores


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
