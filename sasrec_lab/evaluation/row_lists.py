"""Lists for the rows of validation or test, by the scores that evaluation ranks them by.

Items with equal scores are listed as evaluation counts them: a target after the others. R rows, U rows of a batch, G
targets, V items.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.config.evaluation import EvaluationConfig
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.data.evaluation_data import MAX_STATE_ELEMENTS, EvaluationData
from sasrec_lab.evaluation.ranks import ItemScores, full_ranks
from sasrec_lab.ops.ranking import TopK

MIXED = "bf16-mixed"  # Lightning's precision under which evaluation, too, computes states in bfloat16


class RowScorer(Protocol):
    """A trained model, as its lists are made of it."""

    def score_and_list(
        self, batch: EvaluationBatch, k: int, excluded: tuple[Tensor, Tensor]
    ) -> tuple[ItemScores, TopK]:
        """Return the scores that the rows of a batch are ranked by, and each row's best items.

        `excluded` are pairs of a row and an item that is not in its list, ordered by row, on the batch's device.
        """


@dataclass(frozen=True)
class RowLists:
    """The list of each row, best item first; where there is no item, a list has 0."""

    items: np.ndarray  # (R, k) int32, 1..V
    ranks: np.ndarray  # (R, k) int32; targets of equal scores share the worse rank
    scores: np.ndarray  # (R, k) float32


@torch.inference_mode()
def lists_of_rows(
    scorer: RowScorer,
    data: EvaluationData,
    evaluation: EvaluationConfig,
    k: int,
    dim: int,
    device: torch.device,
    precision: str | None = None,
) -> RowLists:
    """Return the lists of at most k items of all rows of a stage.

    The scorer is on `device` and has states of `dim` numbers. Batches and `precision` are those of evaluation, because
    others would round differently.
    """
    shape = len(data.holdout.rows(data.stage)), min(k, data.holdout.num_items)
    lists = RowLists(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for rows in data.rows_by_length(evaluation.batch_size, MAX_STATE_ELEMENTS // dim):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == MIXED):
            batch = data[rows].to(device)
            found = _lists_of_batch(scorer, batch, shape[1], data.holdout.num_items, evaluation.filter_seen)
        lists.items[rows], lists.ranks[rows], lists.scores[rows] = found.items, found.ranks, found.scores
    return lists


def _lists_of_batch(scorer: RowScorer, batch: EvaluationBatch, k: int, num_items: int, filter_seen: bool) -> RowLists:
    """Return the best items that are not targets, with the targets at their ranks among them."""
    scores, best = scorer.score_and_list(batch, k, _pairs_to_exclude(batch, num_items, filter_seen))
    ranks = full_ranks(scores, batch, filter_seen)  # (G,)
    hits = torch.nonzero((ranks > 0) & (ranks <= k)).squeeze(1)
    rows, targets = batch.target_rows[hits], batch.targets[hits]
    own = scores.rows(rows).for_items(targets[:, None])[:, 0] if len(hits) else best.scores.new_zeros(0)
    return _insert(best, *(x.cpu().numpy() for x in (rows, targets, ranks[hits], own)))


def _pairs_to_exclude(batch: EvaluationBatch, num_items: int, filter_seen: bool) -> tuple[Tensor, Tensor]:
    """Return row and item of each target and, unless they are ranked, of the seen items; ordered, each pair once."""
    keys = (batch.target_rows * (num_items + 1) + batch.targets)[batch.targets > 0]
    if filter_seen:
        keys = torch.cat([keys, batch.seen_rows * (num_items + 1) + batch.seen_items])
    keys = torch.unique(keys)
    return keys // (num_items + 1), keys % (num_items + 1)


def _insert(best: TopK, rows: np.ndarray, targets: np.ndarray, ranks: np.ndarray, scores: np.ndarray) -> RowLists:
    """Return lists in which each target, given with its row and a rank of at most k, has the place of its rank.

    Of targets that share a rank, one has this place and the others those before it. Other items fill the places that
    are left, in their order.
    """
    (num_rows, k) = best.items.shape
    order = np.lexsort((ranks, rows))
    rows, targets, ranks, scores = rows[order], targets[order], ranks[order], scores[order]
    index = np.arange(len(rows)) - np.searchsorted(rows, rows)  # of a target among those of its row
    # a place is at most its rank, and before the place of the next target of the row
    bounds = rows * 2 * k + ranks - 1 - index
    places = np.minimum.accumulate(bounds[::-1])[::-1] - rows * 2 * k + index
    is_target = np.zeros((num_rows, k), dtype=bool)
    is_target[rows, places] = True
    others = np.cumsum(~is_target, 1) - 1  # which of the best items a place has
    items = np.take_along_axis(best.items.cpu().numpy(), np.maximum(others, 0), 1)
    filled = np.take_along_axis(best.scores.cpu().numpy(), np.maximum(others, 0), 1)
    numbers = np.tile(np.arange(1, k + 1), (num_rows, 1))
    items[rows, places], filled[rows, places], numbers[rows, places] = targets, scores, ranks
    return RowLists(items, numbers, filled)
