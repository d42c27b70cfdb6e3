"""Baselines, measured with every run for the same users and candidates as its model's. V items.

popularity: items by training count. recent_popularity: by their count in the last days of training. markov: by how
often they follow the user's newest item in training.
"""

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.data.cleaning import days_before
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.ops.sparse_scores import SparseScores, SparseTable, shared_by_all

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
    items, times = items[trained], times[trained]
    since = days_before(times, days)
    return None if since is None else np.bincount(items[times > since], minlength=holdout.num_items + 1)[1:]


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
    first = np.flatnonzero(follows)
    pairs, times = np.unique(items[first].astype(np.int64) * size + items[first + 1], return_counts=True)
    shared = counts / max(1, counts.sum())
    rows, followers = np.divmod(pairs, size)
    return SparseTable(
        shared=torch.from_numpy(shared),
        offsets=torch.from_numpy(np.searchsorted(rows, np.arange(size + 1))),
        items=torch.from_numpy(followers),
        values=torch.from_numpy(times + shared[followers - 1]),
    )


def newest_items(holdout: Holdout, stage: str, rows: Tensor) -> Tensor:
    """Return the newest item of each row's history that the model knows, 0 without one, (U,) int64."""
    starts, ends = holdout.rows(stage).starts[rows.numpy()], holdout.rows(stage).ends[rows.numpy()]
    newest = holdout.items[np.maximum(ends, 1) - 1]
    return torch.from_numpy(np.where(ends > starts, newest, 0).astype(np.int64))
