"""Random items: negatives to train against, and candidates to rank among.

B windows, R labels, E rows to rank, N draws, V items.
"""

from typing import Protocol

import numpy as np
import torch

from sasrec_lab.config.evaluation import Draw
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import find, load
from sasrec_lab.config.training import LossConfig, SamplerName
from sasrec_lab.data.batches import Labels, Negatives, as_tensor
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import concatenate_ranges
from sasrec_lab.ops.backend import round_up_size

MAX_REDRAWS = 1000  # rounds of redrawing; a user who has seen nearly every item then keeps the last draw


class NegativeSampler(Protocol):
    """A kind of negatives; `count` is `loss.negatives`."""

    per: str  # "position", "sequence" or "batch": each one gets `count` draws

    def __init__(self, holdout: Holdout, count: int): ...

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the negatives of training windows, given by their indices, and of their labels."""


class UniformSampler:
    """Draw each position's negatives uniformly from the catalogue, the target and seen items among them."""

    per = "position"

    def __init__(self, holdout: Holdout, count: int):
        self.holdout, self.count = holdout, count

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the negatives (R, N) of R labels."""
        return per_label(rng.integers(1, self.holdout.num_compared + 1, size=(labels.counts.sum(), self.count)), labels)


class OthersSampler:
    """Draw each position's negatives uniformly from all items but the target.

    HSTU's authors draw from all items, and let draws of the target not count.
    """

    per = "position"

    def __init__(self, holdout: Holdout, count: int):
        self.holdout, self.count = holdout, count

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the negatives (R, N) of R labels."""
        targets = labels.targets[: labels.counts.sum()].numpy()[:, None]
        items = rng.integers(1, self.holdout.num_compared, size=(len(targets), self.count))
        return per_label(items + (items >= targets), labels)


class UnseenSampler:
    """Draw each position's negatives uniformly from the items that its user has not seen in training."""

    per = "position"

    def __init__(self, holdout: Holdout, count: int):
        self.holdout, self.count = holdout, count
        self.seen = training_items(holdout)

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the negatives (R, N) of R labels."""
        users = np.repeat(np.repeat(self.holdout.window_users[windows], labels.counts), self.count)
        return per_label(draw_excluding(users, self.seen, rng).reshape(-1, self.count), labels)


class SequenceSampler:
    """Draw one set of distinct items for all positions of a window, uniformly from the items that are not in it.

    As for SASRec+ with 3,000 negatives in "Turning Dross Into Gold Loss" (2023), arXiv 2309.07602.
    """

    per = "sequence"

    def __init__(self, holdout: Holdout, count: int):
        self.holdout, self.count = holdout, count

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the negatives (B, N) of B windows; 0 fills up a window with fewer than N items outside it."""
        return Negatives(as_tensor(draw_distinct(window_items(self.holdout, windows), len(windows), self.count, rng)))


class SharedSampler:
    """Draw one set of negatives for all labels of a batch, in proportion to training counts, with log weights."""

    per = "batch"

    def __init__(self, holdout: Holdout, count: int):
        # By popularity: on MovieLens-1M with 1,024 negatives, NDCG@10 after 14 epochs was 0.129; with uniform draws
        # 0.118, with the full softmax 0.145. Each count is raised by one, so that every item can be drawn.
        counts = holdout.training_counts()[: holdout.num_compared]
        self.cumulative, self.count = np.cumsum(counts + 1), count

    def draw(self, windows: np.ndarray, labels: Labels, rng: np.random.Generator) -> Negatives:
        """Return the shared negatives (N,); they do not depend on the windows."""
        items, log_weights = draw_shared(self.cumulative, self.count, rng)
        return Negatives(as_tensor(items), torch.from_numpy(log_weights.astype(np.float32)))


SAMPLERS: dict[SamplerName, type[NegativeSampler]] = {
    SamplerName.shared: SharedSampler,
    SamplerName.sequence: SequenceSampler,
    SamplerName.unseen: UnseenSampler,
    SamplerName.uniform: UniformSampler,
    SamplerName.others: OthersSampler,
}


def build_sampler(holdout: Holdout, cfg: LossConfig) -> NegativeSampler | None:
    """Return the sampler of a loss's negatives, or None if it compares with every item."""
    if cfg.sampler is SamplerName.none:
        return None
    sampler = load(cfg.sampler) if isinstance(cfg.sampler, Foreign) else SAMPLERS[cfg.sampler]
    return sampler(holdout, cfg.negatives)


def draws_per(cfg: LossConfig) -> str:
    """Return what gets `loss.negatives` draws: "position", "sequence" or "batch", or nothing if none are drawn."""
    if cfg.sampler is SamplerName.none:
        return ""
    return find(cfg.sampler).per if isinstance(cfg.sampler, Foreign) else SAMPLERS[cfg.sampler].per


def per_label(items: np.ndarray, labels: Labels) -> Negatives:
    """Return each label's negatives (R, N), those of the last one repeated for the dummies at the end."""
    dummies = len(labels.targets) - len(items)
    return Negatives(as_tensor(np.pad(items, ((0, dummies), (0, 0)), mode="edge")))


def draw_shared(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` items with replacement, in proportion to the increments of `cumulative` (V,).

    Return the distinct items in ascending order, and log(times drawn / times expected) of each, its weight: a sum over
    them with these weights has the catalogue's sum as its expectation. The last item is repeated with weight 0
    (log weight -inf) until the number of items and the target together is one of few sizes.
    """
    points = np.sort(rng.integers(0, cumulative[-1], size=count))  # sorted, so that the search stays in the cache
    items, times = np.unique(np.searchsorted(cumulative, points, side="right"), return_counts=True)
    share = (cumulative[items] - np.where(items > 0, cumulative[items - 1], 0)) / cumulative[-1]
    surplus = (0, round_up_size(len(items) + 1) - 1 - len(items))
    log_weights = np.log(times) - np.log(count * share)
    return np.pad(items + 1, surplus, mode="edge"), np.pad(log_weights, surplus, constant_values=-np.inf)


def draw_distinct(excluded: "UserItems", rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` distinct items for each row, uniformly from those that are not excluded for it, shape (rows, N).

    A row with fewer items to draw from gets them all. Items are in ascending order, with 0 behind them if a row has
    fewer than the others. Where most of a row's items are wanted, those to omit are drawn: a set is as random as its
    complement, and is found in few rounds of redrawing.
    """
    base = excluded.base
    owners = excluded.keys // base
    available = base - 1 - np.bincount(owners, minlength=rows)  # (rows,)
    wanted = np.minimum(count, available)
    omits = wanted > available // 2  # (rows,)
    drawn = _draw_distinct_keys(excluded, np.where(omits, available - wanted, wanted), rng)
    is_omitted = omits[drawn // base]
    others = _other_keys(np.concatenate([excluded.keys[omits[owners]], drawn[is_omitted]]), np.flatnonzero(omits), base)
    return _as_rows(np.sort(np.concatenate([drawn[~is_omitted], others])), base, rows)


def _draw_distinct_keys(excluded: "UserItems", counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw counts[row] distinct items for each row that are not excluded for it; return row * base + item of each.

    Each round draws as many as are missing, with replacement, and keeps the new ones. So any two sets of as many items
    that are not excluded are equally probable.
    """
    base, missing = excluded.base, counts.copy()
    taken = [excluded.keys]
    while missing.any():
        rows = np.repeat(np.arange(len(counts)), missing)
        keys = _distinct(rows * base + rng.integers(1, base, size=len(rows)))
        for earlier in taken:
            keys = keys[~_contain(earlier, keys)]
        if len(keys):
            missing -= np.bincount(keys // base, minlength=len(counts))
            taken.append(keys)
    return np.concatenate(taken[1:]) if len(taken) > 1 else np.empty(0, dtype=np.int64)


def _other_keys(keys: np.ndarray, rows: np.ndarray, base: int) -> np.ndarray:
    """Return row * base + item of every item of these rows, ascending, whose key is not among `keys`, of these rows."""
    is_other = np.ones((len(rows), base), dtype=bool)
    is_other[:, 0] = False
    is_other[np.searchsorted(rows, keys // base), keys % base] = False
    at, items = np.nonzero(is_other)
    return rows[at] * base + items


def window_items(holdout: Holdout, windows: np.ndarray) -> "UserItems":
    """Return the items of each training window, inputs and targets; its place in `windows` is the user of the pairs."""
    starts, ends = holdout.window_starts[windows], holdout.window_ends[windows]
    rows = np.repeat(np.arange(len(windows)), ends - starts)
    return UserItems(rows, holdout.items[concatenate_ranges(starts, ends)], holdout.num_compared)


def _as_rows(keys: np.ndarray, base: int, rows: int) -> np.ndarray:
    """Return the items of ascending keys row * base + item as a matrix with 0 behind the items of a row."""
    counts = np.bincount(keys // base, minlength=rows)
    items = np.zeros((rows, counts.max(initial=0)), dtype=np.int64)
    items[np.arange(items.shape[1]) < counts[:, None]] = keys % base
    return items


def draw_candidates(holdout: Holdout, how: Draw, count: int, seed: int, stage: str) -> np.ndarray:
    """Return `count` items for each row to rank (E, N) int32, the same for the same seed and stage.

    `paper`: as the authors' code (util.py), uniform over the items outside the user's training items; the validation
    item and the target itself may be drawn, and an item twice. `unseen`: uniform over the items that the user has no
    interaction with. `popularity`: the same, in proportion to training counts.
    """
    rng = np.random.default_rng([seed, {"val": 0, "test": 1}[stage]])
    if how is Draw.paper:
        ends = holdout.train_ends
    else:
        ends = np.append(holdout.starts[1:], len(holdout.items))
    excluded = _items_before(holdout, ends, holdout.num_items)
    cumulative = np.cumsum(holdout.training_counts()) if how is Draw.popularity else None
    users = np.repeat(holdout.rows(stage).users, count)
    return draw_excluding(users, excluded, rng, cumulative).reshape(-1, count).astype(np.int32)


class UserItems:
    """A set of (user, item) pairs that answers for many pairs at once."""

    def __init__(self, users: np.ndarray, items: np.ndarray, num_items: int):
        self.base = num_items + 1
        self.keys = _distinct(users.astype(np.int64) * self.base + items)  # (pairs,) in ascending order

    def contain(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return whether each pair (users[i], items[i]) is in the set, shape (R,)."""
        return _contain(self.keys, users.astype(np.int64) * self.base + items)

    def as_rows(self, users: int) -> np.ndarray:
        """Return the items of the first `users` users (users, M), ascending, with 0 behind those of a user."""
        return _as_rows(self.keys, self.base, users)


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Return the distinct keys in ascending order, as np.unique does, whose hash table is far slower than sorting."""
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]


def _contain(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return whether each of `wanted` is among the keys, which are in ascending order and not empty."""
    at = np.searchsorted(keys, wanted)
    return keys[np.minimum(at, len(keys) - 1)] == wanted


def draw_excluding(
    users: np.ndarray, excluded: UserItems, rng: np.random.Generator, cumulative: np.ndarray | None = None
) -> np.ndarray:
    """Draw one item for each entry of `users`, with replacement, that is not excluded for that user.

    Draws are uniform over the catalogue, or in proportion to the increments of `cumulative` (V,).
    """
    items = np.empty(len(users), dtype=np.int64)
    open_entries = np.arange(len(users))
    for _ in range(MAX_REDRAWS):
        items[open_entries] = _draw(len(open_entries), excluded.base - 1, rng, cumulative)
        open_entries = open_entries[excluded.contain(users[open_entries], items[open_entries])]
        if not len(open_entries):
            break
    return items


def _draw(count: int, num_items: int, rng: np.random.Generator, cumulative: np.ndarray | None) -> np.ndarray:
    if cumulative is None:
        return rng.integers(1, num_items + 1, size=count)
    return np.searchsorted(cumulative, rng.integers(0, cumulative[-1], size=count), side="right") + 1


def training_items(holdout: Holdout) -> UserItems:
    """Return the items that each user has seen in training; others are drawn from those that training compares."""
    return _items_before(holdout, holdout.train_ends, holdout.num_compared)


def _items_before(holdout: Holdout, ends: np.ndarray, num_items: int) -> UserItems:
    """Return the items of each user before a place, none above `num_items`, up to which others are drawn."""
    lengths = ends - holdout.starts
    users = np.repeat(np.arange(len(lengths)), lengths)
    return UserItems(users, holdout.items[concatenate_ranges(holdout.starts, ends)], num_items)
