"""Scores that most items share, against the dense matrix that they stand for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec_lab.ops import sparse_scores
from sasrec_lab.ops.sparse_scores import SparseScores, SparseTable, shared_by_all


def random_table(random: np.random.Generator, rows: int, items: int) -> tuple[SparseTable, Tensor]:
    """Return a table with many equal scores, and the same as a dense matrix (M, V)."""
    shared = torch.from_numpy(random.integers(0, 3, items) / 2)
    is_entry = torch.from_numpy(random.random((rows, items)) < random.choice([0.0, 0.2, 1.0]))
    values = torch.from_numpy(random.integers(-1, 4, (rows, items)) / 2)
    lengths = is_entry.sum(1)
    table = SparseTable(
        shared=shared,
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        items=torch.nonzero(is_entry)[:, 1] + 1,
        values=values[is_entry],
    )
    return table, torch.where(is_entry, values, shared)


@pytest.mark.parametrize("seed", range(30))
def test_counts_and_scores_equal_those_of_the_dense_matrix(seed, monkeypatch):
    random = np.random.default_rng(seed)
    monkeypatch.setattr(sparse_scores, "ENTRIES_AT_ONCE", int(random.choice([1, 7, 2**20])))
    rows, items = random.integers(1, 9, 2)
    table, dense = random_table(random, rows, items)
    at = torch.from_numpy(random.integers(0, rows, 12))
    scores, block = SparseScores(table, at), dense[at]
    candidates = torch.from_numpy(random.integers(1, items + 1, (12, 5)))
    assert torch.equal(scores.for_items(candidates), block.gather(1, candidates - 1))
    targets = torch.from_numpy(random.integers(1, items + 1, 12))
    is_seen = torch.from_numpy(random.random((12, items)) < 0.3)
    seen_rows, seen_columns = torch.nonzero(is_seen).T
    expected = ((block >= block.gather(1, targets[:, None] - 1)) & ~is_seen).sum(1)
    assert torch.equal(scores.count_not_below_target(targets, seen_rows, seen_columns + 1), expected)
    chosen = torch.tensor([3, 3, 0])
    none = chosen[:0]
    few = scores.rows(chosen).count_not_below_target(targets[chosen], none, none)
    assert torch.equal(few, (block >= block.gather(1, targets[:, None] - 1)).sum(1)[chosen])


def test_scores_of_everybody_have_one_row():
    scores = SparseScores(shared_by_all(torch.tensor([3, 1, 3, 0])), torch.zeros(2, dtype=torch.long))
    assert scores.for_items(torch.tensor([[1, 4], [2, 2]])).tolist() == [[3, 0], [1, 1]]
    none = torch.zeros(0, dtype=torch.long)
    assert scores.count_not_below_target(torch.tensor([1, 2]), none, none).tolist() == [2, 3]
