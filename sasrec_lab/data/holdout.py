"""The holdout: training windows, and the rows of histories and targets that evaluation ranks."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from sasrec_lab.config.dataset import Catalogue, DatasetConfig, HoldoutMode, TimeSplitConfig, Windows
from sasrec_lab.config.model import AnyModel, ItemVectors, QueryTime
from sasrec_lab.data.cleaning import to_seconds
from sasrec_lab.data.evaluation_rows import EvaluationRows
from sasrec_lab.data.sequences import Sequences, concatenate_ranges
from sasrec_lab.data.time_split import split_by_time
from sasrec_lab.errors import InputError, counted

_ITEMS_PER_CHUNK = 2**24
PAIRS_PER_CHUNK = 2**18  # interactions sorted at a time in the search for repeats, 2 MiB


@dataclass(frozen=True)
class Holdout:
    """A data set split into training windows, and rows to rank for validation and test.

    With `holdout=last` the last item of a user is the test target, the one before it validation's, the rest training.
    Users with two interactions are only trained on; users with fewer are not used, and their range is empty. The rules
    of `holdout=time` are in `time_split.py`; with `holdout=none` all is training and there are no rows. `items` holds
    what the model knows, so with `catalogue=train` it is shorter than the file, and a target outside the catalogue is
    0. If every item is known, `items` and `weights` are the arrays of the sequences, mapped from the cache.
    """

    items: np.ndarray  # (N,) int32, 1..num_items
    weights: np.ndarray | None  # (N,) float32
    starts: np.ndarray  # (num_users,) first item of a user in `items`
    train_ends: np.ndarray  # (num_users,) one past the last training item
    val: EvaluationRows
    test: EvaluationRows
    window_starts: np.ndarray  # (W,) a training window is items[start:end]: inputs all but the last, labels all but the
    window_ends: np.ndarray  # (W,)    first, so at most maxlen + 1 items
    window_users: np.ndarray  # (W,)
    item_ids: np.ndarray  # (num_items,)
    time_split: dict[str, Any] | None = None  # its times and counts, as metrics.json records them
    num_cold: int = 0  # items at the end of the catalogue that training does not have, if they are put there
    times: np.ndarray | None = None  # (N,) integers, seconds since 1970; None if the model does not read them
    window_labels: np.ndarray | None = None  # (W,) first label of each window; None: the item after its first one

    @property
    def num_items(self) -> int:
        """Return the size of the catalogue."""
        return len(self.item_ids)

    @property
    def num_compared(self) -> int:
        """Return how many items, the first ones of the catalogue, training compares with each other."""
        return self.num_items - self.num_cold

    def in_training(self) -> np.ndarray:
        """Return which of the items are training interactions, shape (N,) bool."""
        edges = np.empty(2 * len(self.starts) + 2, dtype=np.int64)  # of ranges outside and inside of training in turn
        edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, self.starts, self.train_ends, len(self.items)
        lengths = np.diff(edges)
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)

    def training_counts(self) -> np.ndarray:
        """Return how often each item occurs in training, shape (num_items,) int64."""
        return self.count_items(self.in_training())

    def count_items(self, is_counted: np.ndarray) -> np.ndarray:
        """Return how often each item occurs among some interactions (N,), in chunks, to save memory; (num_items,)."""
        counts = np.zeros(self.num_items + 1, dtype=np.int64)
        for first in range(0, len(self.items), _ITEMS_PER_CHUNK):
            chunk = slice(first, first + _ITEMS_PER_CHUNK)
            counts += np.bincount(self.items[chunk][is_counted[chunk]], minlength=len(counts))
        return counts[1:]

    def training_users(self) -> np.ndarray:
        """Return how many users have each item in training, shape (num_items,) int64."""
        users = np.zeros(self.num_items + 1, dtype=np.int64)
        first_users = np.unique(np.searchsorted(self.starts, np.arange(0, len(self.items), PAIRS_PER_CHUNK)))
        for part in pairwise([*first_users, len(self.starts)]):
            items = np.unique(self._pairs(slice(*part), self.train_ends)) % (self.num_items + 1)
            users += np.bincount(items, minlength=len(users))
        return users[1:]

    def rows(self, stage: str) -> EvaluationRows:
        """Return the rows of "val" or "test"."""
        return {"val": self.val, "test": self.test}[stage]

    @cached_property
    def has_repeats(self) -> bool:
        """Return whether any user has an item more than once in training or in a history that is read."""
        read_ends = self.train_ends.copy()
        for rows in (self.val, self.test):  # a user may have rows of only one of them
            np.maximum.at(read_ends, rows.users, rows.ends)
        first_users = np.unique(np.searchsorted(self.starts, np.arange(0, len(self.items), PAIRS_PER_CHUNK)))
        return any(self._has_repeats(slice(*users), read_ends) for users in pairwise([*first_users, len(self.starts)]))

    def _has_repeats(self, users: slice, read_ends: np.ndarray) -> bool:
        pairs = np.sort(self._pairs(users, read_ends))
        return bool((pairs[1:] == pairs[:-1]).any())

    def _pairs(self, users: slice, ends: np.ndarray) -> np.ndarray:
        """Return a number for each interaction of some users up to their ends: user * (V + 1) + item."""
        starts, ends = self.starts[users], ends[users]
        rows = np.repeat(np.arange(len(starts)) * (self.num_items + 1), ends - starts)
        return rows + self.items[concatenate_ranges(starts, ends)]


def hold_out(
    sequences: Sequences,
    windows: Windows,
    catalogue: Catalogue,
    maxlen: int,
    mode: HoldoutMode = HoldoutMode.last,
    time_split: TimeSplitConfig | None = None,
    *,
    cold_last: bool = False,
    query_time: QueryTime | None = None,
    overlap: int = 0,
    val_users: int | None = None,
) -> Holdout:
    """Split every sequence and cut the training windows. `time_split` has the cuts of `mode=time`.

    With `mode=last` and `val_users` only this many users have a validation item, drawn at random, the same in every
    run on the data; the others are trained on theirs, as in RecTools with `get_val_mask_func` for some users.
    With `cold_last` items that do not occur in training are put at the end of the catalogue, for models that know them
    by their features. With `query_time` the holdout has the times of interactions, for a model that reads them, and
    rows are asked at the time of their target, or of their newest item. `overlap` is that of `cut_windows`.

    Raises:
        InputError: no user has the three interactions that a holdout needs, or the two that training needs; or a cut in
            time leaves nothing on one side; or the times are not dates; or there are no more users than `val_users`.
    """
    starts, record, times = sequences.offsets[:-1], None, None
    if query_time is not None:
        assert sequences.times is not None  # the config asks for their column
        times = to_seconds(sequences.times, sequences.file)
    if mode is HoldoutMode.time:
        assert time_split is not None
        split = split_by_time(sequences, time_split)
        train_ends, val, test, record = split.train_ends, split.val, split.test, split.record
    else:
        train_ends, val, test = _split_last(sequences, mode, val_users)
    window_starts, window_ends, window_users = cut_windows(starts, train_ends, windows, maxlen, overlap)
    if not len(window_users):
        raise _no_training_error(sequences, mode)
    if times is not None and query_time is QueryTime.target:
        val, test = val.asked_at_targets(times), test.asked_at_targets(times)
    holdout = Holdout(
        items=np.asarray(sequences.items),
        weights=sequences.weights,
        starts=starts,
        train_ends=train_ends,
        val=val,
        test=test,
        window_starts=window_starts,
        window_ends=window_ends,
        window_users=window_users,
        item_ids=np.asarray(sequences.item_ids),
        time_split=record,
        times=times,
    )
    if overlap:
        holdout = replace(holdout, window_labels=_first_labels(holdout, maxlen - overlap))
    if catalogue is not Catalogue.train:
        return _put_cold_last(holdout) if cold_last else holdout
    is_known = _in_windows(sequences, window_starts, window_ends) if record is None else split.is_trained
    return _restrict(holdout, is_known)


def _first_labels(holdout: Holdout, labels: int) -> np.ndarray:
    """Return the first label of each window (W,): `labels` from its end, or in a user's oldest one its second item."""
    is_oldest = holdout.window_starts == holdout.starts[holdout.window_users]
    return np.where(is_oldest, holdout.window_starts + 1, holdout.window_ends - labels)


def hold_out_for(sequences: Sequences, dataset: DatasetConfig, model: AnyModel) -> Holdout:
    """Split every sequence as `dataset` says, for a model that is trained on the data set.

    Raises:
        InputError: as `hold_out`.
    """
    return hold_out(
        sequences,
        dataset.windows,
        dataset.catalogue,
        model.maxlen,
        dataset.holdout,
        dataset.time_split,
        cold_last=getattr(model, "items", ItemVectors.ids) is not ItemVectors.ids,
        query_time=model.asked_at,
        overlap=dataset.overlap,
        val_users=dataset.val_users,
    )


def _split_last(
    sequences: Sequences, mode: HoldoutMode, val_users: int | None
) -> tuple[np.ndarray, EvaluationRows, EvaluationRows]:
    """Return the ends of training, and the rows of validation and test, none with `mode=none`."""
    starts, lengths = sequences.offsets[:-1], sequences.lengths
    is_held_out = (lengths >= 3) & (mode is HoldoutMode.last)
    users = np.flatnonzero(is_held_out)
    if mode is HoldoutMode.last and not len(users):
        raise InputError(
            f"{sequences.file}: no user has 3 interactions, which a holdout needs (training, validation, test);"
            f" the longest of {counted(len(lengths), 'user')} has {lengths.max(initial=0)};"
            " check that dataset.user is the column of the users, or train only: dataset.holdout=none"
        )
    validated = users if val_users is None else _some_users(users, val_users)
    train_ends = np.where(lengths < 2, starts, sequences.offsets[1:] - is_held_out)
    train_ends[validated] -= 1
    val = _rows_of_one(sequences, validated, starts[validated], train_ends[validated])
    test = _rows_of_one(sequences, users, starts[users], sequences.offsets[1:][users] - 1)
    return train_ends, val, test


def _some_users(users: np.ndarray, count: int) -> np.ndarray:
    """Return some users, drawn at random, in ascending order."""
    if count >= len(users):
        raise InputError(
            f"dataset.val_users={count} must be below the {counted(len(users), 'user')} with 3 interactions; lower it,"
            " or set it to null, for all of them"
        )
    return np.sort(np.random.default_rng(0).choice(users, count, replace=False))


def _no_training_error(sequences: Sequences, mode: HoldoutMode) -> InputError:
    lengths = sequences.lengths
    held_out = {
        HoldoutMode.last: " with the last two of each held out,",
        HoldoutMode.time: " up to dataset.time_split.val;",
        HoldoutMode.none: "",
    }[mode]
    return InputError(
        f"{sequences.file}: no user has 2 training interactions;{held_out}"
        f" the longest of {counted(len(lengths), 'user')} has {lengths.max()};"
        " check that dataset.user is the column of the users, or use more data"
    )


def _rows_of_one(sequences: Sequences, users: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> EvaluationRows:
    """Return rows whose only target is the item after the history."""
    return EvaluationRows(users, starts, ends, np.arange(len(users) + 1), sequences.items[ends], places=ends)


def cut_windows(
    starts: np.ndarray, ends: np.ndarray, windows: Windows, maxlen: int, overlap: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return start, end and user of the training windows of at most maxlen + 1 items: maxlen inputs, maxlen labels.

    `last`: the newest window of each user with at least two items (as in the paper and RecTools). `all`: windows are
    cut from the end; the first item of a window is the last label of the next older one, so every item except a user's
    first is a label exactly once. With `overlap` a window that is not the user's oldest one has only maxlen - overlap
    labels, its last items; those before them are also items of the next older window.
    """
    labels, stride = ends - starts - 1, maxlen - overlap  # (num_users,)
    count = np.where(labels > 0, 1 + np.maximum(0, -(-(labels - maxlen) // stride)), 0)  # windows of each user
    if windows is Windows.last:
        count = np.minimum(count, 1)
    users = np.repeat(np.arange(len(starts)), count)  # (W,)
    age = concatenate_ranges(np.zeros_like(count), count)  # (W,) 0 for a user's newest window, then 1, 2, ...
    window_ends = ends[users] - age * stride
    return np.maximum(starts[users], window_ends - maxlen - 1), window_ends, users


def _in_windows(sequences: Sequences, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return which items occur in a training window, shape (num_items,) bool."""
    size = len(sequences.items) + 1
    depth = np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size)
    inside = np.cumsum(depth)[:-1] > 0  # (N,)
    return np.bincount(sequences.items[inside], minlength=len(sequences.item_ids) + 1)[1:] > 0


def _put_cold_last(holdout: Holdout) -> Holdout:
    """Return the holdout with the items that training has, then the others, each in the same order as before."""
    is_cold = holdout.training_counts() == 0
    order = np.argsort(is_cold, kind="stable")  # old indices, from 0
    new_index = np.zeros(len(order) + 1, dtype=np.int32)
    new_index[order + 1] = np.arange(1, len(order) + 1)

    def renumber(rows: EvaluationRows) -> EvaluationRows:
        return replace(rows, targets=new_index[rows.targets])

    return replace(
        holdout,
        items=new_index[holdout.items],
        val=renumber(holdout.val),
        test=renumber(holdout.test),
        item_ids=holdout.item_ids[order],
        num_cold=int(is_cold.sum()),
    )


def _restrict(holdout: Holdout, known: np.ndarray) -> Holdout:
    """Return the holdout with the known items (num_items,) only, renumbered in the same order."""
    new_index = np.concatenate([[0], np.cumsum(known) * known]).astype(np.int32)  # old index -> new one, 0 if unknown
    items = new_index[holdout.items]
    kept = items > 0
    new_place = np.concatenate([[0], np.cumsum(kept)])  # place among all items -> place among the known ones
    places = ["starts", "train_ends", "window_starts", "window_ends"]
    places += [] if holdout.window_labels is None else ["window_labels"]

    def restrict_rows(rows: EvaluationRows) -> EvaluationRows:
        starts, ends = new_place[rows.starts], new_place[rows.ends]
        return replace(rows, starts=starts, ends=ends, targets=new_index[rows.targets])

    return replace(
        holdout,
        items=items[kept],
        weights=None if holdout.weights is None else np.asarray(holdout.weights)[kept],
        times=None if holdout.times is None else holdout.times[kept],
        val=restrict_rows(holdout.val),
        test=restrict_rows(holdout.test),
        item_ids=holdout.item_ids[known],
        **{name: new_place[getattr(holdout, name)] for name in places},
    )
