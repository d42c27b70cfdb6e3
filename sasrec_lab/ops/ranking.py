"""Counts of items that score at least as high, and exact top-k lists, from states and item vectors.

Items are 1..V, so row i of an item table is item i + 1. U users, R rows of a list, V items, D dim, S seen pairs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sasrec_lab.ops import library
from sasrec_lab.ops.library import Floats, Integers, check_range, check_shape, kernel

MAX_SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}  # 16 MiB, which fit the last-level cache; on a GPU 256 MiB
# Rows and items of a block of scores for top-k lists, of that many scores at most
ROWS_PER_BLOCK = 512
ITEMS_PER_BLOCK = {"cpu": 2**13, "cuda": 2**17}


# Top-k lists


@dataclass(frozen=True)
class TopK:
    """The k best items of each row, best first; of equal scores the lower index first.

    A row with fewer than k candidates is filled with 0, with a score of -inf.
    """

    items: Tensor  # (R, k) int64, 1..V
    scores: Tensor  # (R, k) float32


def top_k_items(states: Tensor, table: Tensor, k: int, seen_rows: Tensor, seen_items: Tensor) -> TopK:
    """Return the k items with the highest dot products with each state (R, D), except those that its row has seen.

    `seen_rows` (S,) is sorted and says which row has seen `seen_items` (S,). A score of NaN or -inf never counts.
    """
    form = _top_k_compiled if library.supports(states, table) else _top_k_torch
    return form(states, table, k, seen_rows, seen_items)


def _empty_top_k(states: Tensor, k: int) -> TopK:
    items = torch.zeros(len(states), k, dtype=torch.long, device=states.device)
    return TopK(items, states.new_full((len(states), k), float("-inf")))


def _top_k_compiled(states: Tensor, table: Tensor, k: int, seen_rows: Tensor, seen_items: Tensor) -> TopK:
    (rows, dim), best = states.shape, _empty_top_k(states, k)
    check_shape("table", table, len(table), dim)
    _check_seen(seen_rows, seen_items, rows, len(table))
    seen = seen_rows.contiguous(), seen_items.contiguous(), len(seen_rows)
    _best_items_kernel(states, rows, dim, table, len(table), k, *seen, best.items, best.scores)
    return best


def _check_seen(seen_rows: Tensor, seen_items: Tensor, rows: int, num_items: int) -> None:
    check_shape("seen_items", seen_items, len(seen_rows))
    check_range("seen_rows", seen_rows, 0, rows - 1)
    check_range("seen_items", seen_items, 1, num_items)


@kernel
def _best_items_kernel(
    states: Floats,
    rows: int,
    dim: int,
    table: Floats,
    num_items: int,
    k: int,
    seen_rows: Integers,
    seen_items: Integers,
    num_seen: int,
    items: Integers,
    scores: Floats,
) -> None:
    """Write each row's best items and their scores."""


def _top_k_torch(states: Tensor, table: Tensor, k: int, seen_rows: Tensor, seen_items: Tensor) -> TopK:
    best = _empty_top_k(states, k)
    width = ITEMS_PER_BLOCK["cuda" if states.is_cuda else "cpu"]
    for begin in range(0, len(states), ROWS_PER_BLOCK):
        rows = slice(begin, begin + ROWS_PER_BLOCK)
        first, last = torch.searchsorted(seen_rows, seen_rows.new_tensor([rows.start, rows.stop])).tolist()
        block_rows, block_columns = seen_rows[first:last] - begin, seen_items[first:last] - 1
        part = TopK(best.items[rows], best.scores[rows])
        for item in range(0, len(table), width):
            scores = states[rows] @ table[item : item + width].T
            is_here = (block_columns >= item) & (block_columns < item + width)
            scores[block_rows[is_here], block_columns[is_here] - item] = float("-inf")
            scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
            merge_top_k(part, scores, item)
    return best


def merge_top_k(best: TopK, scores: Tensor, offset: int) -> None:
    """Update the best so far, in place, with the scores (R, n) of items offset + 1 to offset + n; -inf never counts."""
    k = best.scores.shape[1]
    values, columns = _top_columns(scores, min(k, scores.shape[1]))
    items = torch.where(values > float("-inf"), columns + offset + 1, 0)
    # the sort is stable and the earlier items come first: of equal scores these, with the lower indices, stay ahead
    values, order = torch.cat([best.scores, values], 1).sort(dim=1, descending=True, stable=True)
    best.items.copy_(torch.cat([best.items, items], 1).gather(1, order)[:, :k])
    best.scores.copy_(values[:, :k])


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and columns (R, k) of the k best scores, of equal ones the first columns.

    torch.topk does not define which of equal scores it takes, so a row with a tie at the k-th place is sorted.
    """
    values, columns = scores.topk(k)
    columns, order = columns.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    tied = torch.nonzero((scores >= values[:, -1:]).sum(1) > k).squeeze(1)
    if len(tied):
        ranked, at = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ranked[:, :k], at[:, :k]
    return values, columns


# Ranks


@dataclass(frozen=True)
class Scores:
    """Scores of all items for each user, states @ table', computed in parts.

    A user whose state is NaN gets the worst ranks. Under autocast too, scores are in the table's own precision: half as
    many digits would make ties, which rank the target last.
    """

    states: Tensor  # (U, D)
    table: Tensor  # (V, D)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_items(self) -> int:
        """Return V."""
        return len(self.table)

    def block(self, begin: int, end: int) -> Tensor:
        """Return the scores (U, end - begin) of the items begin + 1 to end."""
        with torch.autocast(self.states.device.type, enabled=False):
            return self.states @ self.table[begin:end].T

    def for_targets(self, items: Tensor) -> Tensor:
        """Return the score (U, 1) of one item per user (U,), by a matrix product as in `block`, so both round alike."""
        with torch.autocast(self.states.device.type, enabled=False):
            return (self.states @ self.table[items - 1].T).diagonal()[:, None]

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores (U, N) of each user's own items (U, N)."""
        with torch.autocast(self.states.device.type, enabled=False):
            return torch.bmm(self.table[items - 1], self.states[:, :, None]).squeeze(2)

    def log_probabilities(self, users: Tensor, items: Tensor) -> Tensor:
        """Return log p (G,) of items (G,) by the softmax over all items of the users (G,), ascending, who have them."""
        width = max(1, MAX_SCORES_PER_BLOCK["cuda" if users.is_cuda else "cpu"] // max(1, len(self)))
        sums = self.states.new_full((len(self),), float("-inf"))  # logarithms of the sums of exponentials
        for begin in range(0, self.num_items, width):
            sums = torch.logaddexp(sums, self.block(begin, min(begin + width, self.num_items)).logsumexp(1))
        scores = (self.states[users] * self.table[items - 1]).sum(1)
        return scores - sums[users]

    def rows(self, users: Tensor) -> "Scores":
        """Return the scores for some of the users only."""
        return replace(self, states=self.states[users])

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each user's target, the target included.  (U,) int64"""
        form = self._count_compiled if library.supports(self.states, self.table) else self._count_torch
        return form(targets, seen_rows, seen_items)

    def _count_compiled(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Count while the scores are in registers, so that they are written nowhere."""
        (users, dim), counts = self.states.shape, torch.empty_like(targets)
        check_shape("table", self.table, self.num_items, dim)
        check_shape("targets", targets, users)
        _check_seen(seen_rows, seen_items, users, self.num_items)
        check_range("targets", targets, 1, self.num_items)
        seen = seen_rows.contiguous(), seen_items.contiguous(), len(seen_rows)
        _count_not_below_kernel(
            self.states, users, dim, self.table, self.num_items, targets.contiguous(), *seen, counts
        )
        return counts

    def _count_torch(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Count in blocks of items, each of which fits the cache."""
        device = "cuda" if targets.is_cuda else "cpu"
        width = max(1, MAX_SCORES_PER_BLOCK[device] // max(1, len(self)))
        if self.num_items <= width:
            return self._count_at_once(targets, seen_rows, seen_items)
        expected = self.for_targets(targets).contiguous()  # (U, 1)
        counts, found = torch.zeros_like(targets), expected.clone()
        for begin in range(0, self.num_items, width):
            block = self.block(begin, min(begin + width, self.num_items))
            is_here = (seen_items > begin) & (seen_items <= begin + width)
            counts += _count(block, expected, seen_rows[is_here], seen_items[is_here] - 1 - begin)
            rows = torch.nonzero((targets > begin) & (targets <= begin + width)).squeeze(1)
            found[rows] = block[rows].gather(1, targets[rows, None] - 1 - begin)
        # products of different shapes may round differently: such users are counted again with the block's own score
        off = torch.nonzero((found != expected)[:, 0]).squeeze(1)
        for again in off.split(max(1, MAX_SCORES_PER_BLOCK[device] // self.num_items)) if len(off) else ():
            is_again = torch.isin(seen_rows, again)
            pairs = torch.searchsorted(again, seen_rows[is_again]), seen_items[is_again]
            counts[again] = self.rows(again)._count_at_once(targets[again], *pairs)
        return counts

    def _count_at_once(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        return DenseScores(self.block(0, self.num_items)).count_not_below_target(targets, seen_rows, seen_items)


@dataclass(frozen=True)
class DenseScores:
    """Scores of all items for each row, as a matrix."""

    block: Tensor  # (U, V)

    def rows(self, rows: Tensor) -> "DenseScores":
        """Return the scores of some rows, in their order and as often as they are given."""
        return replace(self, block=self.block[rows])

    def for_items(self, items: Tensor) -> Tensor:
        """Return the scores (U, N) of each row's own items (U, N)."""
        return self.block.gather(1, items - 1)

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return how many unseen items do not score below each row's target, the target included.  (U,) int64"""
        return _count(self.block, self.for_items(targets[:, None]), seen_rows, seen_items - 1)


@kernel
def _count_not_below_kernel(
    states: Floats,
    users: int,
    dim: int,
    table: Floats,
    num_items: int,
    targets: Integers,
    seen_rows: Integers,
    seen_items: Integers,
    num_seen: int,
    counts: Integers,
) -> None:
    """Write each user's count."""


def _count(block: Tensor, target_score: Tensor, seen_rows: Tensor, seen_columns: Tensor) -> Tensor:
    """Return for each row of `block` (U, n) how many unseen columns are not below the target's score (U, 1)."""
    seen_scores = block[seen_rows, seen_columns]  # (S,)
    not_below_seen = ~(seen_scores < target_score[seen_rows, 0])
    not_below = block.shape[1] - torch.lt(block, target_score).sum(1)  # (U,)
    return not_below.index_add_(0, seen_rows, -not_below_seen.long())
