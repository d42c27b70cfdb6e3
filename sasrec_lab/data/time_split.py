"""The split by time: one cut ends training and another one validation, for all users alike; the test comes after it.

The rules are those of "Time to Split" (RecSys 2025, github.com/monkey0head/time-to-split), except that users and
targets that training has not seen are excluded unless the config keeps them. Training: interactions up to the first
cut, of users with at least two. Validation: the same choice of targets between the cuts as in the test after them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import Cold, Target, TimeSplitConfig, check_cut
from sasrec_lab.data.cleaning import describe_span, describe_time, read_time, time_unit
from sasrec_lab.data.evaluation_rows import EvaluationRows
from sasrec_lab.data.sequences import Sequences, concatenate_ranges
from sasrec_lab.errors import InputError, counted


@dataclass(frozen=True)
class TimeSplit:
    """What training may read, the rows after it, and their counts as metrics.json records them."""

    train_ends: np.ndarray  # (num_users,) one past the last training interaction, the first one for none
    is_trained: np.ndarray  # (num_items,) bool: whether the item is one of training
    val: EvaluationRows
    test: EvaluationRows
    record: dict[str, Any]


def split_by_time(sequences: Sequences, cfg: TimeSplitConfig) -> TimeSplit:
    """Split all interactions at two times.

    Raises:
        InputError: a cut is not within the times, the cuts are not in order, or a stage is left without a row.
    """
    assert sequences.times is not None  # the config asks for their column
    times, items = sequences.times, sequences.items
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    val_cut, test_cut = _find_cuts(times, cfg)
    val_starts, test_starts = (starts + _count_before(times, starts, cut) for cut in (val_cut, test_cut))
    train_ends = np.where(val_starts - starts >= 2, val_starts, starts)
    is_training = (times <= val_cut) & np.repeat(train_ends > starts, ends - starts)  # (N,)
    is_trained = np.zeros(len(sequences.item_ids) + 1, dtype=bool)
    is_trained[items[is_training]] = True
    trained_before = np.append(0, np.cumsum(is_trained[items]))  # (N + 1,) interactions with an item of training

    unit = time_unit(times)
    dates = {"val": describe_time(val_cut, unit), "test": describe_time(test_cut, unit)}
    record: dict[str, Any] = {
        "cold_users": cfg.cold_users.name,
        "cold_items": cfg.cold_items.name,
        "train": {
            "users": int(np.count_nonzero(train_ends > starts)),
            "items": int(np.count_nonzero(is_trained)),
            "interactions": int(np.count_nonzero(is_training)),
        },
    }
    stages: dict[str, EvaluationRows] = {}
    for stage, cut, first, last in (("val", val_cut, val_starts, test_starts), ("test", test_cut, test_starts, ends)):
        rows, cold = _stage_rows(sequences, cfg, first, last, is_trained, trained_before)
        if not len(rows):
            raise InputError(_no_row_message(stage, dates[stage], cfg, cold, sequences.file))
        new = np.count_nonzero(np.diff(rows.users[(train_ends == starts)[rows.users]], append=-1))
        counts = {"users": rows.num_users, "rows": len(rows), "targets": len(rows.targets), "new_users": int(new)}
        record[stage] = {"after": cut, "date": dates[stage]} | counts | cold
        stages[stage] = rows
    return TimeSplit(train_ends, is_trained[1:], stages["val"], stages["test"], record)


def _find_cuts(times: np.ndarray, cfg: TimeSplitConfig) -> tuple[float, float]:
    """Return the last time of training and that of validation."""
    texts = {"dataset.time_split.val": cfg.val, "dataset.time_split.test": cfg.test}
    val, test = (_find_cut(key, text, times) for key, text in texts.items())
    if val >= test:
        unit = time_unit(times)
        raise InputError(
            f"dataset.time_split.val={cfg.val} ({describe_time(val, unit)}) must be before"
            f" dataset.time_split.test={cfg.test} ({describe_time(test, unit)})"
        )
    return val, test


def _find_cut(key: str, text: str, times: np.ndarray) -> float:
    """Return the time of a cut as a number of the file."""
    quantile = check_cut(key, text)
    if quantile is not None:
        cut = float(pd.Series(times).quantile(quantile))  # linear between neighbors
    else:
        cut = read_time(key, text, times, ends_day=True)
    if not times.min() <= cut < times.max():
        unit = time_unit(times)
        raise InputError(
            f"{key}={text} must be a quantile between 0 and 1, or a time with interactions up to it and after it; the"
            f" file's times range {describe_span(times, unit)}" + ("" if unit == "seconds" else f", in {unit}")
        )
    return int(cut // 1) if np.issubdtype(times.dtype, np.integer) else cut


def _count_before(times: np.ndarray, starts: np.ndarray, cut: float) -> np.ndarray:
    """Return how many interactions of each user are not after the cut, (num_users,)."""
    return np.add.reduceat(times <= cut, starts, dtype=np.int64)


def _stage_rows(
    sequences: Sequences,
    cfg: TimeSplitConfig,
    first: np.ndarray,
    last: np.ndarray,
    is_trained: np.ndarray,
    trained_before: np.ndarray,
) -> tuple[EvaluationRows, dict[str, int]]:
    """Return the rows whose targets are among interactions[first:last] of each user, and the counts of what is cold."""
    users = np.repeat(np.arange(len(first)), last - first)
    places = concatenate_ranges(first, last)
    is_cold = ~is_trained[sequences.items[places]]
    if cfg.cold_items is Cold.drop:
        users, places = users[~is_cold], places[~is_cold]
    chosen = _choose(cfg.target, users, sequences.items[places])
    users, places = users[chosen], places[chosen]
    targets = sequences.items[places]
    is_first = np.diff(users, prepend=-1) > 0 if cfg.target is Target.all else np.ones(len(users), dtype=bool)
    offsets = np.append(np.flatnonzero(is_first), len(users))
    row_users = users[is_first]
    starts, ends = sequences.offsets[row_users], places[is_first] if cfg.reads_to_target else first[row_users]
    rows = EvaluationRows(row_users, starts, ends, offsets, targets, places)
    has_history = trained_before[ends] > trained_before[starts]
    cold = {"cold_rows": int(np.count_nonzero(~has_history)), "cold_interactions": int(np.count_nonzero(is_cold))}
    return rows.select(np.flatnonzero(has_history)) if cfg.cold_users is Cold.drop else rows, cold


def _choose(target: Target, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return which of the interactions after a cut, in the order of users and times, are targets."""
    if target is Target.first:
        return np.flatnonzero(np.diff(users, prepend=-1))
    if target is Target.last:
        return np.flatnonzero(np.diff(users, append=-1))
    if target is Target.successive:
        return np.arange(len(users))
    pairs = users * (int(items.max(initial=0)) + 1) + items
    return np.sort(np.unique(pairs, return_index=True)[1])  # an item counts once


def _no_row_message(stage: str, date: str, cfg: TimeSplitConfig, cold: dict[str, int], file: str) -> str:
    name = {"val": "validation", "test": "the test"}[stage]
    reasons = []
    if number := cold["cold_rows"] * (cfg.cold_users is Cold.drop):
        reasons.append(f"{counted(number, 'row')} without an item of training in the history (cold_users=keep)")
    if number := cold["cold_interactions"] * (cfg.cold_items is Cold.drop):
        reasons.append(f"{counted(number, 'interaction')} with a new item (cold_items=keep)")
    dropped = f"; excluded: {' and '.join(reasons)}" if reasons else ""
    return f"{file}: no user is left for {name} after {date}{dropped}; change dataset.time_split"
