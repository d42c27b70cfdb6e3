"""Ranks of the targets, and metrics from how often each rank occurred. U rows with G targets, V items, N candidates.

Rank 1 is the best. Rank 0 means that the target is not among the candidates (it is unknown to the model, or excluded as
seen): a miss at every k. It imports neither Lightning nor torchmetrics, for which lists would wait some seconds.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.config.evaluation import metric_names
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.evaluation.row_metrics import RankedRows, RowMetric

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
