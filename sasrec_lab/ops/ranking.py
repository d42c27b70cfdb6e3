"""The k best items of each row of scores, exact, in a stated order. R rows, V items, D dim, S seen pairs.

Order: a higher score first, and of equal scores the item with the lower number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sasrec_lab.ops import library as kernels

ROWS_AT_ONCE = 512
ITEMS_AT_ONCE = {"cpu": 2**13, "cuda": 2**17}  # 16 MiB of scores, which lie in the last-level cache; on a GPU 256 MiB


@dataclass(frozen=True)
class Best:
    """The best items of each row so far. Where it has fewer than k candidates the rest are 0, with a score of -inf."""

    items: Tensor  # (R, k) int64, 1..V
    scores: Tensor  # (R, k) float32


def best_items(states: Tensor, table: Tensor, k: int, seen_rows: Tensor, seen_items: Tensor) -> Best:
    """The k items with the highest dot products with each state, those that its row has seen left out.

    Row r of `table` is item r + 1; `seen_rows` (S,) is in order. A score of NaN is none.
    """
    best = Best(
        torch.zeros(len(states), k, dtype=torch.long, device=states.device),
        states.new_full((len(states), k), float("-inf")),
    )
    if kernels.serve(states, table):
        seen = seen_rows.contiguous(), seen_items.contiguous(), len(seen_rows)
        kernels.call("best_items", states, *states.shape, table, len(table), k, *seen, best.items, best.scores)
        return best
    width = ITEMS_AT_ONCE["cuda" if states.is_cuda else "cpu"]
    for begin in range(0, len(states), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        first, last = torch.searchsorted(seen_rows, seen_rows.new_tensor([rows.start, rows.stop])).tolist()
        own_rows, own_items = seen_rows[first:last] - begin, seen_items[first:last] - 1
        part = Best(best.items[rows], best.scores[rows])
        for item in range(0, len(table), width):
            scores = states[rows] @ table[item : item + width].T
            here = (own_items >= item) & (own_items < item + width)
            scores[own_rows[here], own_items[here] - item] = float("-inf")
            scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
            take_best(part, scores, item)
    return best


def take_best(best: Best, scores: Tensor, before: int) -> None:
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
