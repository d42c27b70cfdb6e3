"""The k best items of each row of scores, exact, in a stated order. R rows, V items, D dim, S seen pairs.

Order: a higher score first, and of equal scores the item with the lower number.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sasrec_lab.ops import library as kernels

MAX_SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}  # 16 MiB, which lie in the last-level cache; on a GPU 256 MiB

ROWS_AT_ONCE = 512
ITEMS_AT_ONCE = {"cpu": 2**13, "cuda": 2**17}  # 16 MiB of scores, which lie in the last-level cache; on a GPU 256 MiB


@dataclass(frozen=True)
class TopK:
    """The best items of each row so far. Where it has fewer than k candidates the rest are 0, with a score of -inf."""

    items: Tensor  # (R, k) int64, 1..V
    scores: Tensor  # (R, k) float32


def top_k_items(states: Tensor, table: Tensor, k: int, seen_rows: Tensor, seen_items: Tensor) -> TopK:
    """The k items with the highest dot products with each state, those that its row has seen left out.

    Row r of `table` is item r + 1; `seen_rows` (S,) is in order. A score of NaN is none.
    """
    best = TopK(
        torch.zeros(len(states), k, dtype=torch.long, device=states.device),
        states.new_full((len(states), k), float("-inf")),
    )
    if kernels.supports(states, table):
        seen = seen_rows.contiguous(), seen_items.contiguous(), len(seen_rows)
        kernels.call("best_items", states, *states.shape, table, len(table), k, *seen, best.items, best.scores)
        return best
    width = ITEMS_AT_ONCE["cuda" if states.is_cuda else "cpu"]
    for begin in range(0, len(states), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        first, last = torch.searchsorted(seen_rows, seen_rows.new_tensor([rows.start, rows.stop])).tolist()
        own_rows, own_items = seen_rows[first:last] - begin, seen_items[first:last] - 1
        part = TopK(best.items[rows], best.scores[rows])
        for item in range(0, len(table), width):
            scores = states[rows] @ table[item : item + width].T
            here = (own_items >= item) & (own_items < item + width)
            scores[own_rows[here], own_items[here] - item] = float("-inf")
            scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
            merge_top_k(part, scores, item)
    return best


def merge_top_k(best: TopK, scores: Tensor, before: int) -> None:
    """Update the best so far, in place, by the scores (R, n) of the items before + 1, before + 2, ...; -inf is none."""
    k = best.scores.shape[1]
    values, places = _top(scores, min(k, scores.shape[1]))
    items = torch.where(values > float("-inf"), places + before + 1, 0)
    # the sort is stable and the old ones stand first: of equal scores they, with the lower numbers, stay ahead
    values, order = torch.cat([best.scores, values], 1).sort(dim=1, descending=True, stable=True)
    best.items.copy_(torch.cat([best.items, items], 1).gather(1, order)[:, :k])
    best.scores.copy_(values[:, :k])


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places of the k best (R, k). Which of equal ones torch.topk takes is not said: it is sorted then."""
    values, places = scores.topk(k)
    places, order = places.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)
    tied = torch.nonzero((scores >= values[:, -1:]).sum(1) > k).squeeze(1)
    if len(tied):
        ranked, at = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], places[tied] = ranked[:, :k], at[:, :k]
    return values, places


@dataclass(frozen=True)
class Scores:
    """Of every item for each user, states @ table', made in parts; a user whose state is NaN has the worst ranks.

    In the table's own precision under autocast too: half as many digits make ties, which rank the target last.
    """

    states: Tensor  # (U, D)
    table: Tensor  # (V, D)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_items(self) -> int:
        return len(self.table)

    def block(self, begin: int, end: int) -> Tensor:
        """Of items begin + 1 to end."""
        with torch.autocast(self.states.device.type, enabled=False):
            return self.states @ self.table[begin:end].T  # (U, end - begin)

    def for_targets(self, items: Tensor) -> Tensor:
        """Of one item for each user (U,): by a product like the blocks', so that it rounds like theirs."""
        with torch.autocast(self.states.device.type, enabled=False):
            return (self.states @ self.table[items - 1].T).diagonal()[:, None]  # (U, 1)

    def for_items(self, items: Tensor) -> Tensor:
        """Of each user's own items (U, N)."""
        with torch.autocast(self.states.device.type, enabled=False):
            return torch.bmm(self.table[items - 1], self.states[:, :, None]).squeeze(2)  # (U, N)

    def rows(self, chosen: Tensor) -> "Scores":
        return replace(self, states=self.states[chosen])

    def count_not_below_target(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """How many unseen items do not score below the target, the target among them.

        The compiled form counts while the scores are in registers: nine tenths of the rate of a product that writes
        them nowhere, torch's form two thirds.
        """  # (U,) int64
        if kernels.supports(self.states, self.table):
            counts = torch.empty_like(targets)
            sizes = (*self.states.shape, self.table, self.num_items)
            pairs = targets.contiguous(), seen_rows.contiguous(), seen_items.contiguous(), len(seen_rows)
            kernels.call("count_not_below", self.states, *sizes, *pairs, counts)
            return counts
        return self._count_torch(targets, seen_rows, seen_items)

    def _count_torch(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        device = "cuda" if targets.is_cuda else "cpu"
        width = max(1, MAX_SCORES_PER_BLOCK[device] // max(1, len(self)))
        if self.num_items <= width:
            return self._count_at_once(targets, seen_rows, seen_items)
        expected = self.for_targets(targets).contiguous()  # (U, 1)
        counts, found = torch.zeros_like(targets), expected.clone()
        for begin in range(0, self.num_items, width):
            block = self.block(begin, min(begin + width, self.num_items))
            here = (seen_items > begin) & (seen_items <= begin + width)
            counts += _count(block, expected, seen_rows[here], seen_items[here] - 1 - begin)
            rows = torch.nonzero((targets > begin) & (targets <= begin + width)).squeeze(1)
            found[rows] = block[rows].gather(1, targets[rows, None] - 1 - begin)
        # a product of other shape may round otherwise: such users are counted again with the score that the block gave
        off = torch.nonzero((found != expected)[:, 0]).squeeze(1)
        for again in off.split(max(1, MAX_SCORES_PER_BLOCK[device] // self.num_items)) if len(off) else ():
            own = torch.isin(seen_rows, again)
            pairs = torch.searchsorted(again, seen_rows[own]), seen_items[own]
            counts[again] = self.rows(again)._count_at_once(targets[again], *pairs)
        return counts

    def _count_at_once(self, targets: Tensor, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        block = self.block(0, self.num_items)
        return _count(block, block.gather(1, targets[:, None] - 1), seen_rows, seen_items - 1)


def _count(block: Tensor, target_score: Tensor, seen_rows: Tensor, seen_columns: Tensor) -> Tensor:
    """In each row of `block` (U, n) what is not below its target's score (U, 1), seen columns left out."""
    seen_scores = block[seen_rows, seen_columns]  # (S,)
    above = ~(seen_scores < target_score[seen_rows, 0])
    not_below = block.shape[1] - torch.lt(block, target_score).sum(1)  # (U,)
    return not_below.index_add_(0, seen_rows, -above.long())
