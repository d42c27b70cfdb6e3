"""Batches of the rows to rank, of similar history lengths. It imports no Lightning, for which lists would wait."""

import numpy as np
from torch.utils.data import Dataset

from sasrec_lab.data.batches import EvaluationBatch, Objective, evaluation_batch
from sasrec_lab.data.holdout import Holdout

# Limit on the states (T, D) of rows that are ranked together, 16 MiB: smaller batches are slower, with and without
# compiled kernels, and larger ones leave the cache in the torch code.
MAX_STATE_ELEMENTS = 2**22


class EvaluationData(Dataset[EvaluationBatch]):
    """Map indices of rows to a batch to rank."""

    def __init__(self, holdout: Holdout, stage: str, objective: Objective, candidates: np.ndarray | None):
        self.holdout, self.stage, self.objective, self.candidates = holdout, stage, objective, candidates

    def __getitem__(self, rows: np.ndarray) -> EvaluationBatch:
        """Return the batch of the rows with these indices."""
        candidates = None if self.candidates is None else self.candidates[rows]
        return evaluation_batch(self.holdout, rows, self.stage, self.objective, candidates)

    def rows_by_length(self, users: int, tokens: int) -> list[np.ndarray]:
        """Return batches of indices, rows of similar history lengths together."""
        rows = self.holdout.rows(self.stage)
        lengths = rows.ends - rows.starts
        order = np.argsort(lengths, kind="stable")
        counts = self.objective.count_tokens(lengths[order])
        return np.split(order, batch_boundaries(counts, users, tokens))


def batch_boundaries(tokens: np.ndarray, max_users: int, max_tokens: int) -> list[int]:
    """Return where to cut users with `tokens` tokens each into batches of at most `max_users` and `max_tokens`.

    A batch has at least one user, whatever the length of the history.
    """
    ends, boundaries = np.cumsum(tokens), []
    start = 0
    while start < len(tokens):
        before = ends[start - 1] if start else 0
        fitting = int(np.searchsorted(ends, before + max_tokens, side="right"))
        start = max(start + 1, min(start + max_users, fitting))
        boundaries.append(start)
    return boundaries[:-1]
