"""Sampled items: negatives to train against and candidates to rank among. E held-out users, N draws, V items."""

import numpy as np

from sasrec_lab.config.schema import Draw
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.ops.backend import round_up_size

MAX_REDRAWS = 1000  # rounds of drawing anew; a user who has had nearly every item then keeps what came last


class UserItems:
    """Which user has had which item, answered for many pairs at once."""

    def __init__(self, users: np.ndarray, items: np.ndarray, num_items: int):
        self.base = num_items + 1
        self.keys = np.unique(users.astype(np.int64) * self.base + items)  # (pairs,) sorted

    def contain(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether users[i] has had items[i]."""  # (R,) bool
        wanted = users.astype(np.int64) * self.base + items
        at = np.searchsorted(self.keys, wanted)
        return self.keys[np.minimum(at, len(self.keys) - 1)] == wanted


def training_items(holdout: Holdout) -> UserItems:
    """What each user has had in training."""
    return _items_until(holdout, holdout.train_ends)


def draw_excluding(
    users: np.ndarray, had: UserItems, rng: np.random.Generator, cumulative: np.ndarray | None = None
) -> np.ndarray:
    """One item for each entry of `users`, none that the user has had, with replacement.

    Uniform over the catalogue, or in proportion to the increments of `cumulative` (V,).
    """
    items = np.empty(len(users), dtype=np.int64)
    open_entries = np.arange(len(users))
    for _ in range(MAX_REDRAWS):
        items[open_entries] = _any_items(len(open_entries), had.base - 1, rng, cumulative)
        open_entries = open_entries[had.contain(users[open_entries], items[open_entries])]
        if not len(open_entries):
            break
    return items


def draw_shared(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` draws with replacement in proportion to the increments of `cumulative` (V,), for all tokens of a batch.

    Gives the distinct items drawn, in order, and of each log(times drawn / times expected): a sum over them, weighted
    so, has the catalogue's as its expectation. Surplus entries, up to one of few sizes (with the target as one item
    more), repeat the last item with weight 0.
    """  # (N,) int64, (N,) float64
    points = np.sort(rng.integers(0, cumulative[-1], size=count))  # in order: the search then stays in the cache
    items, times = np.unique(np.searchsorted(cumulative, points, side="right"), return_counts=True)
    share = (cumulative[items] - np.where(items > 0, cumulative[items - 1], 0)) / cumulative[-1]
    surplus = (0, round_up_size(len(items) + 1) - 1 - len(items))
    log_weights = np.log(times) - np.log(count * share)
    return np.pad(items + 1, surplus, mode="edge"), np.pad(log_weights, surplus, constant_values=-np.inf)


def draw_candidates(holdout: Holdout, how: Draw, count: int, seed: int, stage: str) -> np.ndarray:
    """`count` items for each held-out user, the same for the same seed and stage.

    `paper`: as the authors' code (util.py), uniform over what is not among the user's training items; the validation
    item and the target itself may be drawn, and an item twice. `unseen`: uniform over what the user never had.
    `popularity`: the same, in proportion to training counts.
    """  # (E, N) int32
    rng = np.random.default_rng([seed, {"val": 0, "test": 1}[stage]])
    if how is Draw.paper:
        had = training_items(holdout)
    else:
        before = _items_until(holdout, holdout.val_ends)
        had = UserItems(
            np.concatenate([before.keys // before.base, holdout.users, holdout.users]),
            np.concatenate([before.keys % before.base, holdout.val_targets, holdout.test_targets]),
            holdout.num_items,
        )
    cumulative = np.cumsum(training_counts(holdout)) if how is Draw.popularity else None
    users = np.repeat(holdout.users, count)
    return draw_excluding(users, had, rng, cumulative).reshape(-1, count).astype(np.int32)


def training_counts(holdout: Holdout) -> np.ndarray:
    """How often each item occurs in training: the scores of the popularity baseline."""  # (V,) int64
    had = np.zeros(len(holdout.items) + 1, dtype=np.int64)
    np.add.at(had, holdout.starts, 1)
    np.add.at(had, holdout.train_ends, -1)
    return np.bincount(holdout.items[np.cumsum(had)[:-1] > 0], minlength=holdout.num_items + 1)[1:]


def _items_until(holdout: Holdout, ends: np.ndarray) -> UserItems:
    lengths = ends - holdout.starts
    users = np.repeat(np.arange(len(lengths)), lengths)
    places = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    return UserItems(users, holdout.items[places], holdout.num_items)


def _any_items(count: int, num_items: int, rng: np.random.Generator, cumulative: np.ndarray | None) -> np.ndarray:
    if cumulative is None:
        return rng.integers(1, num_items + 1, size=count)
    return np.searchsorted(cumulative, rng.integers(0, cumulative[-1], size=count), side="right") + 1
