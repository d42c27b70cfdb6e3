"""The baseline beside every run: all users get the items in the order of their training counts."""

from functools import cached_property

import torch
from torch import Tensor

from sasrec_lab.config.schema import EvaluationConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.negatives import training_counts
from sasrec_lab.evaluation.metrics import HoldoutMetrics


def popularity_metrics(data: SequenceData, evaluation: EvaluationConfig) -> dict[str, float]:
    """The same users, candidates and metrics as the model's, for validation and test."""
    scores = SharedScores(torch.from_numpy(training_counts(data.holdout)))
    metrics = HoldoutMetrics(len(scores.counts), evaluation)
    values = {}
    for stage in ("val", "test"):
        for batch in data.evaluation_dataloader(stage):
            metrics.update(scores, batch)
        values |= metrics.take(stage)
    return values


class SharedScores:
    """One score an item for all users, so a look into the sorted scores counts what V comparisons a user would."""

    def __init__(self, counts: Tensor):
        self.counts = counts  # (V,)

    @cached_property
    def rising(self) -> Tensor:
        return self.counts.sort().values

    def for_items(self, items: Tensor) -> Tensor:
        return self.counts[items - 1]

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """As Scores'."""  # (U,) int64
        bounds = self.for_items(targets)
        seen = self.for_items(seen_items) >= bounds[seen_rows]
        not_below = len(self.counts) - torch.searchsorted(self.rising, bounds)
        return not_below.index_add_(0, seen_rows, -seen.long())
