"""TODO."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.data.sequences import Sequences, concatenate_ranges
from sasrec_lab.errors import InputError

PAIRS_PER_CHUNK = 2**18  # interactions that are sorted at once: 2 MiB


@dataclass(frozen=True)
class Holdout:
    """The last item of each user is the test, the one before it validation, the rest training.

    Users with two interactions serve training only, users with fewer nothing: their range is empty. `items` holds what
    the model knows, so with `catalogue=train` it is shorter than the file, and a target outside the catalogue is 0.
    With `holdout=none` every interaction is training and no user is held out. Where every item is known, `items` and
    `weights` are the sequences' own, mapped from the cache.
    """

    items: np.ndarray  # (N,) int32, 1..num_items
    weights: np.ndarray | None  # (N,) float32
    starts: np.ndarray  # (num_users,) first item of a user in `items`
    train_ends: np.ndarray  # (num_users,) one past the last training item: validation reads items[start:train_end]
    val_ends: np.ndarray  # (num_users,) one past the validation item: the test reads items[start:val_end]
    users: np.ndarray  # (E,) the held-out users
    val_targets: np.ndarray  # (E,) int32
    test_targets: np.ndarray  # (E,) int32
    window_starts: np.ndarray  # (W,) a training window is items[start:end]: inputs all but the last, labels all but the
    window_ends: np.ndarray  # (W,)    first, so at most maxlen + 1 items
    window_users: np.ndarray  # (W,)
    item_ids: np.ndarray  # (num_items,)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def has_repeats(self) -> bool:
        """Whether any user has an item more than once, the test's target left out."""
        firsts = np.unique(np.searchsorted(self.starts, np.arange(0, len(self.items), PAIRS_PER_CHUNK)))
        return any(self._repeats_among(slice(*users)) for users in pairwise([*firsts, len(self.starts)]))

    def _repeats_among(self, users: slice) -> bool:
        starts, ends = self.starts[users], self.val_ends[users]
        rows = np.repeat(np.arange(len(starts)) * (self.num_items + 1), ends - starts)
        pairs = rows + self.items[concatenate_ranges(starts, ends)]
        pairs.sort()
        return bool((pairs[1:] == pairs[:-1]).any())


def hold_out(
    sequences: Sequences, windows: Windows, catalogue: Catalogue, maxlen: int, held: HoldoutMode = HoldoutMode.last
) -> Holdout:
    """Split every sequence and cut the training windows.

    Raises:
        InputError: no user has the three interactions that a holdout needs, or none the two that training needs.
    """
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    lengths = ends - starts  # (num_users,)
    held_out = (lengths >= 3) & (held is HoldoutMode.last)
    users = np.flatnonzero(held_out)
    if held is HoldoutMode.last and not len(users):
        raise InputError(
            f"{sequences.file}: no user has 3 interactions, which a holdout needs (training, validation, test);"
            f" the longest of {len(lengths)} users has {lengths.max(initial=0)}"
        )
    train_ends = np.where(lengths < 2, starts, ends - 2 * held_out)
    window_starts, window_ends, window_users = cut_windows(starts, train_ends, windows, maxlen)
    if not len(window_users):
        held_back = " with the last two of each held out," if held is HoldoutMode.last else ""
        raise InputError(
            f"{sequences.file}: no user has 2 training interactions;{held_back}"
            f" the longest of {len(lengths)} users has {lengths.max()}"
        )
    whole = Holdout(
        items=np.asarray(sequences.items),
        weights=sequences.weights,
        starts=starts,
        train_ends=train_ends,
        val_ends=train_ends + held_out,
        users=users,
        val_targets=sequences.items[train_ends[users]],
        test_targets=sequences.items[train_ends[users] + 1],
        window_starts=window_starts,
        window_ends=window_ends,
        window_users=window_users,
        item_ids=np.asarray(sequences.item_ids),
    )
    if catalogue is Catalogue.all:
        return whole
    return _of_known(whole, _in_windows(sequences, window_starts, window_ends))


def _of_known(holdout: Holdout, known: np.ndarray) -> Holdout:
    """Without the items that are not known (num_items,); those left are numbered anew, in the same order."""
    number = np.concatenate([[0], np.cumsum(known) * known]).astype(np.int32)  # old item number -> new one, 0 unknown
    items = number[holdout.items]
    kept = items > 0
    moved = np.concatenate([[0], np.cumsum(kept)])  # place in the file's sequence -> place among the known items
    places = ("starts", "train_ends", "val_ends", "window_starts", "window_ends")
    return replace(
        holdout,
        items=items[kept],
        weights=None if holdout.weights is None else np.asarray(holdout.weights)[kept],
        val_targets=number[holdout.val_targets],
        test_targets=number[holdout.test_targets],
        item_ids=holdout.item_ids[known],
        **{name: moved[getattr(holdout, name)] for name in places},
    )


def cut_windows(
    starts: np.ndarray, ends: np.ndarray, windows: Windows, maxlen: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and user of the training windows of at most maxlen + 1 items, so maxlen inputs and maxlen labels.

    `last`: the newest window of each user with two items or more (the paper's and RecTools' way). `all`: the windows
    follow one another from the end; the first item of one is the last label of the one before, so every item but a
    user's first is a label exactly once.
    """
    labels = ends - starts - 1  # (num_users,)
    count = np.maximum(0, -(-labels // maxlen))  # windows of each user
    if windows is Windows.last:
        count = np.minimum(count, 1)
    user = np.repeat(np.arange(len(starts)), count)  # (W,)
    back = concatenate_ranges(np.zeros_like(count), count)  # 0 for a user's newest window, 1, ...
    window_ends = ends[user] - back * maxlen
    return np.maximum(starts[user], window_ends - maxlen - 1), window_ends, user


def _in_windows(sequences: Sequences, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which items occur in a training window."""  # (num_items,) bool
    depth = np.bincount(starts, minlength=len(sequences.items) + 1) - np.bincount(
        ends, minlength=len(sequences.items) + 1
    )
    inside = np.cumsum(depth)[:-1] > 0  # (N,)
    return np.bincount(sequences.items[inside], minlength=len(sequences.item_ids) + 1)[1:] > 0
