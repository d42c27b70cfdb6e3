"""The baseline beside every run: all users get the items in the order of their training counts."""

import torch

from sasrec_lab.config import EvaluationConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.negatives import training_counts
from sasrec_lab.metrics import HoldoutMetrics, Scores


def popularity_metrics(data: SequenceData, evaluation: EvaluationConfig) -> dict[str, float]:
    """The same users, candidates and metrics as the model's, for validation and test."""
    counts = torch.from_numpy(training_counts(data.holdout)).double()[:, None]  # (V, 1)
    metrics = HoldoutMetrics(len(counts), evaluation)
    values = {}
    for stage in ("val", "test"):
        for batch in data.evaluation_dataloader(stage):
            metrics.update(Scores(torch.ones(len(batch.users), 1, dtype=torch.double), counts), batch)
        values |= metrics.take(stage)
    return values
