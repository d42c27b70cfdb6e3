"""Times in batches for models that read them, in whole seconds whatever the file has."""

import numpy as np
import pytest
import torch
from small_data import holdout_of, next_item, sequences_of

from sasrec_lab.config.dataset import Catalogue, Cold, HoldoutMode, Target, TimeSplitConfig, Windows
from sasrec_lab.config.model import QueryTime
from sasrec_lab.data.batches import PackedBatch, evaluation_batch
from sasrec_lab.data.cleaning import to_seconds
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.errors import InputError

START = 1_500_000_000
USERS = [[1, 2, 3, 4, 5], [6, 7], [2, 2, 6, 1]]
TIMES = [[0, 10, 10, 40, 100], [5, 6], [1, 3, 7, 2000]]


def timed_holdout(query_time: QueryTime | None, **changes):
    times = [[START + time for time in row] for row in TIMES]
    return holdout_of(USERS, times=times, query_time=query_time, **changes)


def times_of(batch: PackedBatch) -> tuple[list[int], list[int]]:
    """Return the times of the tokens and of their questions, from the start."""
    assert batch.times.dtype == batch.query_times.dtype == torch.int64
    return (batch.times - START).tolist(), (batch.query_times - START).tolist()


def test_a_training_token_is_asked_at_the_time_of_the_next_item():
    holdout = timed_holdout(QueryTime.target)
    windows = np.array([1, 0])
    inputs, labels = next_item(50, reads_times=True).training(holdout, windows, np.random.default_rng(0))
    assert inputs.items.tolist() == [6, 1, 2]
    assert labels.targets.tolist() == [7, 2, 3]
    assert times_of(inputs) == ([5, 0, 10], [6, 10, 10])


def test_windows_within_a_history_have_their_own_times():
    holdout = timed_holdout(QueryTime.target, maxlen=1, windows=Windows.all)
    windows = np.arange(len(holdout.window_users))
    inputs, _ = next_item(1, reads_times=True).training(holdout, windows, np.random.default_rng(0))
    assert inputs.items.tolist() == [2, 1, 6, 2]
    assert times_of(inputs) == ([10, 0, 5, 1], [10, 10, 6, 3])


@pytest.mark.parametrize(("query_time", "asked"), [(QueryTime.target, [40, 7]), (QueryTime.last, [10, 3])])
def test_validation_is_asked_at_the_target_or_the_newest_item(query_time, asked):
    holdout = timed_holdout(query_time)
    batch = evaluation_batch(holdout, np.array([0, 1]), "val", next_item(2, reads_times=True), None)
    assert batch.inputs.items.tolist() == [2, 3, 2, 2]
    assert times_of(batch.inputs) == ([10, 10, 1, 3], [10, asked[0], 3, asked[1]])


@pytest.mark.parametrize(("query_time", "asked"), [(QueryTime.target, [2000, 100]), (QueryTime.last, [7, 40])])
def test_the_test_is_asked_at_the_target_or_the_newest_item(query_time, asked):
    holdout = timed_holdout(query_time)
    batch = evaluation_batch(holdout, np.array([1, 0]), "test", next_item(3, reads_times=True), None)
    assert batch.inputs.items.tolist() == [2, 2, 6, 2, 3, 4]
    assert times_of(batch.inputs) == ([1, 3, 7, 10, 10, 40], [3, 7, asked[0], 10, 40, asked[1]])


def test_dummies_repeat_the_last_token():
    users = [list(range(1, 21)) for _ in range(2)]
    holdout = holdout_of(users, times=[[START + 10 * item for item in row] for row in users], query_time=QueryTime.last)
    objective = next_item(50, reads_times=True)
    training, _ = objective.training(holdout, np.arange(2), np.random.default_rng(0))
    assert len(training.items) > training.offsets[-1]
    batch = evaluation_batch(holdout, np.arange(2), "val", objective, None).inputs
    for inputs in (training, batch):
        assert len(inputs.times) == len(inputs.query_times) == len(inputs.items)
        end = inputs.offsets[-1] - 1
        for values in (inputs.times, inputs.query_times):
            assert set(values[end:].tolist()) == {int(values[end])}


def test_times_follow_their_items_in_a_smaller_catalogue():
    """Items 4 and 5 are in no window; as a target 5 keeps its time."""
    holdout = timed_holdout(QueryTime.target, catalogue=Catalogue.train)
    known = [1, 2, 3, 6, 7]
    raw = [int(holdout.item_ids[item - 1]) // 10 for item in holdout.items]
    assert raw == [1, 2, 3, 6, 7, 2, 2, 6, 1]
    assert set(raw) == set(known)
    assert (holdout.times - START).tolist() == [0, 10, 10, 5, 6, 1, 3, 7, 2000]
    batch = evaluation_batch(holdout, np.array([0]), "test", next_item(9, reads_times=True), None)
    assert times_of(batch.inputs) == ([0, 10, 10], [10, 10, 100])


def test_a_row_with_several_targets_is_asked_at_the_earliest():
    users = [[1, 2, 3, 4, 5, 6], [2, 1, 3, 6, 4, 5]]
    times = [[START + time for time in row] for row in ([0, 1, 50, 60, 90, 91], [2, 3, 55, 61, 95, 99])]
    cuts = {"val": str(START + 40), "test": str(START + 80)}
    for target, asked in ((Target.all, [90, 95]), (Target.first, [90, 95]), (Target.last, [91, 99])):
        split = TimeSplitConfig(**cuts, target=target, cold_items=Cold.keep, cold_users=Cold.keep)
        sequences = sequences_of(users, times=times)
        given = Windows.last, Catalogue.all, 9, HoldoutMode.time, split
        assert (hold_out(sequences, *given, query_time=QueryTime.target).test.query_times - START).tolist() == asked
        assert hold_out(sequences, *given, query_time=QueryTime.last).test.query_times is None


def test_a_model_without_times_gets_none():
    batch = evaluation_batch(timed_holdout(QueryTime.target), np.array([0]), "val", next_item(2), None).inputs
    assert (batch.times, batch.query_times) == (None, None)
    assert timed_holdout(None).times is None


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (np.array([1_500_000_000, 1_500_000_007], np.int32), [1_500_000_000, 1_500_000_007]),
        (np.array([1_500_000_000.9, 1_500_000_001.0]), [1_500_000_000, 1_500_000_001]),
        (np.array([1_500_000_000_999, 1_500_000_001_000]), [1_500_000_000, 1_500_000_001]),
        (np.array([1.5e15 + 999_999, 1.5e15 + 1e6]), [1_500_000_000, 1_500_000_001]),
        (np.array([1_500_000_000_999_999_999, 1_500_000_001_000_000_000]), [1_500_000_000, 1_500_000_001]),
        (np.array([0, -1, 1_500_000_000, 1_500_000_000, 1_500_000_000]), [0, -1, *[1_500_000_000] * 3]),
    ],
)
def test_times_become_whole_seconds(times, seconds):
    found = to_seconds(times, "x.csv")
    assert np.issubdtype(found.dtype, np.integer)
    assert found.tolist() == seconds


def test_times_of_an_unknown_unit_are_refused():
    for days in ([17_000, 18_000], [1, 2, 3], [0.5, 99_999_999.0]):
        with pytest.raises(InputError, match="too small for seconds since 1970, so their unit is unknown"):
            to_seconds(np.array(days), "x.csv")
    with pytest.raises(InputError, match=r"x.csv: the time 1e\+30 is not within 5,000 years of 1970 \(in seconds\)"):
        to_seconds(np.array([1.5e9, 1.5e9, 1e30]), "x.csv")
    with pytest.raises(InputError, match=r"x\.csv: times up to 2000 "):
        holdout_of(USERS, times=TIMES, query_time=QueryTime.last)
