"""Scores that most items share among all rows, and counts of items that score at least as high, without a dense matrix.

Items are 1..V. U rows to rank for, M rows of a table, E entries.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**20  # entries of a table that a count gathers, some 30 MiB


@dataclass(frozen=True)
class SparseTable:
    """Scores (M, V) in float64: an item scores `shared` in each row that has no entry for it."""

    shared: Tensor  # (V,)
    offsets: Tensor  # (M + 1,) int64: row m has the entries offsets[m] to offsets[m + 1] - 1
    items: Tensor  # (E,) int64, ascending in each row
    values: Tensor  # (E,) the item's score in this row, in place of the shared one

    @cached_property
    def ascending(self) -> Tensor:
        """Return the shared scores (V,), sorted."""
        return self.shared.sort().values

    @cached_property
    def places(self) -> Tensor:
        """Return row * (V + 1) + item of each entry (E,), ascending."""
        rows = torch.arange(len(self.offsets) - 1).repeat_interleave(self.offsets.diff())
        return rows * (len(self.shared) + 1) + self.items


def shared_by_all(shared: Tensor) -> SparseTable:
    """Return a table of one row without entries, for scores (V,) that are the same for everybody."""
    none = torch.zeros(0, dtype=torch.long)
    return SparseTable(shared.double(), torch.zeros(2, dtype=torch.long), none, none.double())


@dataclass(frozen=True)
class SparseScores:
    """Scores of all items for U rows, as evaluation.metrics.ItemScores: row u has those of the table's row `at[u]`.

    A binary search in the sorted shared scores counts what would be V comparisons per row; the row's entries correct
    the count. Both compare the same float64 numbers as the dense matrix would, so the counts are exact.
    """

    table: SparseTable
    at: Tensor  # (U,) int64

    def rows(self, rows: Tensor) -> "SparseScores":
        """Return the scores of some rows, in their order and as often as they are given."""
        return replace(self, at=self.at[rows])

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores of items (U, n), in the same shape."""
        return self._of_pairs(self.at[:, None].expand_as(items), items)

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each row's target, the target included, (U,) int64."""
        bounds = self._of_pairs(self.at, targets)
        counts = len(self.table.shared) - torch.searchsorted(self.table.ascending, bounds)
        starts, ends = self.table.offsets[self.at], self.table.offsets[self.at + 1]
        for rows in _parts(ends - starts):
            self._count_entries(counts, bounds, rows, starts[rows], ends[rows])
        seen = self._of_pairs(self.at[seen_rows], seen_items) >= bounds[seen_rows]
        return counts.index_add_(0, seen_rows, -seen.long())

    def _count_entries(self, counts: Tensor, bounds: Tensor, rows: Tensor, starts: Tensor, ends: Tensor) -> None:
        """Let the entries of some rows count by their own values; so far each counts by its shared score."""
        lengths = ends - starts
        owners = rows.repeat_interleave(lengths)
        entries = torch.arange(len(owners)) + (ends - lengths.cumsum(0)).repeat_interleave(lengths)
        own, shared = self.table.values[entries], self.table.shared[self.table.items[entries] - 1]
        bounds = bounds[owners]
        counts.index_add_(0, owners, (own >= bounds).long() - (shared >= bounds).long())

    def _of_pairs(self, rows: Tensor, items: Tensor) -> Tensor:
        """Return the scores of pairs of a row of the table and an item, in their shape."""
        table = self.table
        scores = table.shared[items - 1]
        if not len(table.places):
            return scores
        places = (rows * (len(table.shared) + 1) + items).contiguous()
        found = torch.searchsorted(table.places, places).clamp(max=len(table.places) - 1)
        return torch.where(table.places[found] == places, table.values[found], scores)


def _parts(lengths: Tensor) -> list[Tensor]:
    """Return the indices of `lengths`, cut so that each part has about ENTRIES_AT_ONCE entries, or one row."""
    part = (lengths.cumsum(0) - lengths) // ENTRIES_AT_ONCE
    return list(torch.arange(len(lengths)).split(torch.unique_consecutive(part, return_counts=True)[1].tolist()))
