"""Baselines, measured with every run for the same users and candidates as its model's. V items.

popularity: items by training count. recent_popularity: by their count in the last days of training. markov: by how
often they follow the user's newest item in training.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.data.cleaning import days_before
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.ops.sparse_scores import SparseScores, SparseTable, shared_by_all

_ITEMS_PER_CHUNK, _PAIRS_PER_RANGE = 2**24, 2**24  # which are sorted at a time, to save memory
POPULARITY, RECENT_POPULARITY, MARKOV = "popularity", "recent_popularity", "markov"


def baseline_metrics(data: SequenceData, sequences: Sequences) -> dict[str, dict[str, float]]:
    """Return validation metrics by baseline, and those of the test if it may be seen."""
    evaluation, holdout = data.cfg.evaluation, data.holdout
    counts = holdout.training_counts()
    tables = {POPULARITY: shared_by_all(torch.from_numpy(counts))}
    recent = recent_counts(sequences, holdout, evaluation.recent_days)
    if recent is not None:
        tables[RECENT_POPULARITY] = shared_by_all(torch.from_numpy(recent))
    tables[MARKOV] = markov_table(holdout, counts)
    settings = holdout.num_items, evaluation, data.cfg.dataset.target
    metrics = {name: HoldoutMetrics(*settings, has_all_rows=True) for name in tables}
    values: dict[str, dict[str, float]] = {name: {} for name in tables}
    for stage in evaluation.stages:
        for batch in data.evaluation_dataloader(stage):
            newest = newest_items(holdout, stage, batch.rows)
            for name, table in tables.items():
                rows = newest if name == MARKOV else torch.zeros_like(newest)
                metrics[name].update(SparseScores(table, rows), batch)
        for name, measured in metrics.items():
            values[name] |= measured.compute_and_reset(stage)
    return values


def recent_counts(sequences: Sequences, holdout: Holdout, days: int | None) -> np.ndarray | None:
    """Return how often each item occurs in the last days of training (V,); None without days or without dates.

    Training ends with its newest interaction.
    """
    if days is None or sequences.times is None:
        return None
    times, items = sequences.times, holdout.items
    if len(items) < len(times):  # the catalogue lacks some of the items
        known = np.flatnonzero(np.isin(sequences.item_ids, holdout.item_ids)) + 1
        times = times[np.isin(sequences.items, known)]
    trained = holdout.in_training()
    since = days_before(times[trained], days)
    return None if since is None else holdout.count_items(trained & (times > since))


def markov_table(holdout: Holdout, counts: np.ndarray) -> SparseTable:
    """Return the scores of a first-order Markov chain in training, a row per newest item; row 0 is for no item.

    The score of item j after item i is (C_ij + p_j) / (C_i + 1): C_ij counts how often j follows i directly, C_i is its
    sum over j, and p_j is j's share of all interactions, of which each row gets one more transition (a Dirichlet prior
    of weight 1). So followers come before other items, and popularity orders equal counts and all other items. Division
    by C_i + 1 is omitted: it does not change the order of a row.
    """
    items, size = holdout.items, holdout.num_items + 1
    trained = holdout.in_training()
    follows = trained[1:] & trained[:-1]
    follows[holdout.starts[(holdout.starts > 0) & (holdout.starts < len(items))] - 1] = False  # of another user
    shared = counts / max(1, counts.sum())
    lengths, followers, values = np.zeros(size, np.int64), [], []
    for low, high in _ranges_of_items(counts):
        pairs, times = np.unique(_transitions(items, follows, size, low, high), return_counts=True)
        rows, chosen = np.divmod(pairs, size)
        lengths += np.bincount(rows, minlength=size)
        followers.append(chosen)
        values.append(times + shared[chosen - 1])
    return SparseTable(
        shared=torch.from_numpy(shared),
        offsets=torch.from_numpy(np.append(0, np.cumsum(lengths))),
        items=torch.from_numpy(np.concatenate(followers)),
        values=torch.from_numpy(np.concatenate(values)),
    )


def _ranges_of_items(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return ranges of items, each with a limited number of transitions from them, all but one item's own."""
    ends = np.cumsum(counts)
    cuts = np.searchsorted(ends, np.arange(_PAIRS_PER_RANGE, max(1, ends[-1]), _PAIRS_PER_RANGE)) + 1
    return list(pairwise(np.unique([0, *cuts, len(counts) + 1]).tolist()))


def _transitions(items: np.ndarray, follows: np.ndarray, size: int, low: int, high: int) -> np.ndarray:
    """Return item * size + follower of each transition from the items low to high - 1."""
    found = []
    for first in range(0, len(follows), _ITEMS_PER_CHUNK):
        chunk = slice(first, first + _ITEMS_PER_CHUNK)
        before = items[:-1][chunk]
        chosen = np.flatnonzero(follows[chunk] & (before >= low) & (before < high))
        found.append(before[chosen].astype(np.int64) * size + items[1:][chunk][chosen])
    return np.concatenate(found)


def newest_items(holdout: Holdout, stage: str, rows: Tensor) -> Tensor:
    """Return the newest item of each row's history that the model knows, 0 without one, (U,) int64."""
    starts, ends = holdout.rows(stage).starts[rows.numpy()], holdout.rows(stage).ends[rows.numpy()]
    newest = holdout.items[np.maximum(ends, 1) - 1]
    return torch.from_numpy(np.where(ends > starts, newest, 0).astype(np.int64))
