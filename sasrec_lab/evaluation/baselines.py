"""Popularity baseline, reported with every run: items ranked by training count, for all users alike."""

from functools import cached_property

import torch
from torch import Tensor

from sasrec_lab.config.schema import EvaluationConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.negatives import training_counts
from sasrec_lab.evaluation.metrics import HoldoutMetrics


def popularity_metrics(data: SequenceData, evaluation: EvaluationConfig) -> dict[str, float]:
    """Return validation and test metrics of the baseline, for the same users and candidates as the model's."""
    scores = SharedScores(torch.from_numpy(training_counts(data.holdout)))
    metrics = HoldoutMetrics(len(scores.counts), evaluation, data.cfg.dataset.target)
    values: dict[str, float] = {}
    for stage in ("val", "test"):
        for batch in data.evaluation_dataloader(stage):
            metrics.update(scores, batch)
        values |= metrics.compute_and_reset(stage)
    return values


class SharedScores:
    """One score per item for all users, as evaluation.metrics.ItemScores.

    A binary search in the sorted scores counts what would be V comparisons per user.
    """

    def __init__(self, counts: Tensor):
        self.counts = counts  # (V,)

    @cached_property
    def _ascending(self) -> Tensor:
        return self.counts.sort().values

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores of items (any shape), in the same shape."""
        return self.counts[items - 1]

    def rows(self, rows: Tensor) -> "SharedScores":
        """Return the same scores: they are those of any row."""
        return self

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each user's target, the target included, (U,) int64."""
        bounds = self.for_items(targets)
        seen = self.for_items(seen_items) >= bounds[seen_rows]
        not_below = len(self.counts) - torch.searchsorted(self._ascending, bounds)
        return not_below.index_add_(0, seen_rows, -seen.long())
