"""Samplers of negatives, and the candidates of the sampled evaluation."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from any_users import ANY_USERS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import holdout_of, next_item, random_users

from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.config.evaluation import Draw
from sasrec_lab.data import negatives
from sasrec_lab.data.datamodule import TrainingData
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.negatives import (
    OthersSampler,
    SequenceSampler,
    SharedSampler,
    UniformSampler,
    UnseenSampler,
    UserItems,
    draw_candidates,
    draw_distinct,
    draw_excluding,
    draw_shared,
    training_items,
)
from sasrec_lab.ops.backend import round_up_size

few = settings(max_examples=40, deadline=None, derandomize=True)
USERS = [
    [1, 2, 1, 3, 4, 5],  # training 1, 2, 1, 3; validation 4, test 5
    [6, 5],
    [7, 7, 2, 7],
    [8, 1, 1],
]


def training_sets(holdout: Holdout) -> list[set[int]]:
    spans = zip(holdout.starts, holdout.train_ends, strict=True)
    return [set(holdout.items[start:end].tolist()) for start, end in spans]


def test_user_items_against_sets():
    random = np.random.default_rng(0)
    users, items = random.integers(0, 10, 60), random.integers(1, 21, 60).astype(np.int32)
    seen = UserItems(users, items, num_items=20)
    pairs = set(zip(users.tolist(), items.tolist(), strict=True))
    asked = np.array([(user, item) for user in range(12) for item in range(1, 21)])
    expected = [(int(user), int(item)) in pairs for user, item in asked]
    assert seen.contain(asked[:, 0], asked[:, 1]).tolist() == expected


def test_user_item_keys_may_exceed_32_bits():
    users, items = np.array([3_000_000], dtype=np.int32), np.array([5], dtype=np.int32)
    seen = UserItems(users, items, num_items=2_000_000)
    assert seen.contain(users, items).tolist() == [True]
    assert seen.contain(users - 1, items).tolist() == [False]


@pytest.mark.parametrize("catalogue", list(Catalogue))
@pytest.mark.parametrize("seed", range(3))
def test_training_items_and_counts_against_a_loop(seed, catalogue):
    holdout = holdout_of(random_users(seed), maxlen=3, catalogue=catalogue)
    seen = training_items(holdout)
    sets = training_sets(holdout)
    assert seen.keys.tolist() == [
        user * (holdout.num_items + 1) + item for user, s in enumerate(sets) for item in sorted(s)
    ]
    spans = zip(holdout.starts, holdout.train_ends, strict=True)
    counts = Counter(item for start, end in spans for item in holdout.items[start:end].tolist())
    assert holdout.training_counts().tolist() == [counts[item] for item in range(1, holdout.num_items + 1)]


def test_training_counts_exclude_users_with_one_interaction():
    assert holdout_of([[1, 2], [1], [3], [2, 1, 3]]).training_counts().tolist() == [1, 2, 0]


def test_training_counts_exclude_validation_and_test():
    assert holdout_of(USERS).training_counts().tolist() == [2, 1, 1, 0, 1, 1, 2, 1]


# Drawing


def test_draws_are_uniform_over_unseen_items():
    holdout = holdout_of(USERS)
    drawn = draw_excluding(np.repeat([0, 2], 5000), training_items(holdout), np.random.default_rng(0)).reshape(2, -1)
    for row, allowed in ((0, [4, 5, 6, 7, 8]), (1, [1, 2, 3, 4, 5, 6, 8])):
        assert sorted(set(drawn[row].tolist())) == allowed
        expected = 5000 / len(allowed)
        chi_square = sum((np.sum(drawn[row] == item) - expected) ** 2 / expected for item in allowed)
        assert chi_square < 30  # six degrees of freedom at most: p < 1e-4


def test_draws_are_in_proportion_to_counts():
    holdout = holdout_of(USERS)
    counts = np.array([50, 0, 9, 1, 0, 2, 7, 0])
    drawn = draw_excluding(
        np.zeros(10_000, dtype=int), training_items(holdout), np.random.default_rng(0), np.cumsum(counts)
    )
    found = Counter(drawn.tolist())
    assert sorted(found) == [4, 6, 7]  # the first user has seen 1, 2 and 3; 5 and 8 never occur
    for item, share in ((4, 0.1), (6, 0.2), (7, 0.7)):
        assert abs(found[item] / 10_000 - share) < 0.02


def test_redrawing_ends_for_a_user_who_has_seen_everything(monkeypatch):
    monkeypatch.setattr(negatives, "MAX_REDRAWS", 5)
    seen = UserItems(np.array([0, 0, 0]), np.array([1, 2, 3]), num_items=3)
    drawn = draw_excluding(np.zeros(50, dtype=int), seen, np.random.default_rng(0))
    assert set(drawn.tolist()) == {1, 2, 3}


@few
@given(ANY_USERS, st.sampled_from(Windows), st.sampled_from(Catalogue), st.integers(1, 4), st.integers(0, 99))
def test_unseen_negatives_are_never_training_items_of_the_user(users, windows, catalogue, maxlen, seed):
    # items before a long user's window are excluded too
    holdout = holdout_of(users, maxlen=maxlen, windows=windows, catalogue=catalogue)
    items, sets = set(range(1, holdout.num_items + 1)), training_sets(holdout)
    chosen = np.random.default_rng(seed).permutation(len(holdout.window_users))
    batch = TrainingData(holdout, next_item(5), UnseenSampler(holdout, 3))[chosen, [seed, 0, 0, 0]]
    assert batch.negatives.items.shape == (len(batch.inputs.items), 3)
    place = 0
    for window in chosen:
        unseen = items - sets[holdout.window_users[window]]
        end = place + holdout.window_ends[window] - holdout.window_starts[window] - 1
        assert set(batch.negatives.items[place:end].flatten().tolist()) <= (unseen or items)  # anything if all is seen
        place = end


def test_uniform_negatives_cover_all_items():
    holdout = holdout_of(random_users(0, users=40, items=20))
    data = TrainingData(holdout, next_item(5), UniformSampler(holdout, 100))
    batch = data[np.arange(len(holdout.window_users)), [0] * 4]
    found = Counter(batch.negatives.items[: int((batch.labels.targets > 0).sum())].flatten().tolist())
    assert sorted(found) == list(range(1, 21))
    expected = sum(found.values()) / 20
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 50  # 19 degrees of freedom: p < 1e-4


def test_other_negatives_cover_all_items_but_the_target():
    holdout = holdout_of([list(range(1, 9)), [8, 3, 1, 2]], maxlen=5)
    data = TrainingData(holdout, next_item(5), OthersSampler(holdout, 2000))
    batch = data[np.arange(2), [0] * 4]
    real = int((batch.labels.targets > 0).sum())
    for target, drawn in zip(batch.labels.targets[:real].tolist(), batch.negatives.items[:real].tolist(), strict=True):
        counts = Counter(drawn)
        assert sorted(counts) == [item for item in range(1, 9) if item != target]
        expected = 2000 / 7
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 30  # 6 degrees of freedom


# Negatives that a window's positions share


@few
@given(
    ANY_USERS,
    st.sampled_from(Windows),
    st.sampled_from(Catalogue),
    st.integers(1, 4),
    st.integers(1, 14),
    st.integers(0, 99),
)
def test_negatives_of_a_window_are_distinct_and_outside_it(users, windows, catalogue, maxlen, count, seed):
    holdout = holdout_of(users, maxlen=maxlen, windows=windows, catalogue=catalogue)
    chosen = np.random.default_rng(seed).permutation(len(holdout.window_users))
    data = TrainingData(holdout, next_item(maxlen), SequenceSampler(holdout, count))
    drawn = data[chosen, [seed, 0, 0, 0]].negatives.items
    assert len(drawn) == len(chosen)
    for window, row in zip(chosen, drawn.tolist(), strict=True):
        own = set(holdout.items[holdout.window_starts[window] : holdout.window_ends[window]].tolist())
        outside = set(range(1, holdout.num_items + 1)) - own
        items = row[: min(count, len(outside))]
        assert items == sorted(set(items))
        assert set(items) <= outside
        assert row[len(items) :] == [0] * (len(row) - len(items))
    assert torch.equal(drawn, data[chosen, [seed, 0, 0, 0]].negatives.items)


@pytest.mark.parametrize("count", [2, 4])  # the second is drawn by its complement
def test_each_set_of_items_outside_a_window_is_as_probable(count):
    excluded = UserItems(np.repeat(np.arange(6000), 2), np.tile([3, 8], 6000), num_items=8)
    drawn = draw_distinct(excluded, 6000, count, np.random.default_rng(0))
    found = Counter(map(tuple, drawn.tolist()))
    sets = list(combinations([1, 2, 4, 5, 6, 7], count))
    assert sorted(found) == sets
    expected = 6000 / len(sets)
    assert sum((found[each] - expected) ** 2 / expected for each in sets) < 42  # 14 degrees of freedom: p < 1e-4


def test_windows_with_few_and_with_many_items_are_drawn_together():
    """One has most items outside it and one hardly any, so the second is drawn by its complement."""
    inside = [range(1, 3), range(1, 19), range(1, 21), [4]]
    users = np.concatenate([np.full(len(items), user) for user, items in enumerate(inside)])
    excluded = UserItems(users, np.concatenate(inside), num_items=20)
    drawn = draw_distinct(excluded, 4, 5, np.random.default_rng(0))
    assert drawn.shape == (4, 5)
    assert drawn[1:3].tolist() == [[19, 20, 0, 0, 0], [0] * 5]
    assert all(len(set(drawn[row].tolist()) - {0, *inside[row]}) == 5 for row in (0, 3))


# Negatives that a batch shares


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any), st.integers(1, 60), st.integers(0, 99))
def test_shared_draws_against_a_loop(counts, count, seed):
    items, log_weights = draw_shared(np.cumsum(counts), count, np.random.default_rng(seed))
    tickets = [item for item, tickets in enumerate(counts, 1) for _ in range(tickets)]
    times = Counter(tickets[point] for point in np.random.default_rng(seed).integers(0, len(tickets), count))
    distinct = sorted(times)
    surplus = round_up_size(len(distinct) + 1) - 1 - len(distinct)
    assert items.tolist() == distinct + [distinct[-1]] * surplus
    expected = [math.log(times[item] * len(tickets) / (count * counts[item - 1])) for item in distinct]
    assert log_weights.tolist() == pytest.approx(expected + [-math.inf] * surplus, abs=1e-12)


def test_weighted_shared_draws_estimate_sums_over_the_catalogue():
    counts = np.array([50, 1, 9, 30, 2, 7])
    values = np.array([0.1, 0.4, -1.0, 2.0, 0.5, 3.0])
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(2000):
        items, log_weights = draw_shared(np.cumsum(counts), 40, rng)
        assert np.all(np.diff(items) >= 0)
        assert set(items[log_weights > -np.inf].tolist()) == set(items.tolist())
        estimates.append(np.sum(values[items - 1] * np.exp(log_weights)))
    error = np.std(estimates) / 2000**0.5
    assert abs(np.mean(estimates) - values.sum()) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_surplus_draws_repeat_the_last_one_with_weight_0(count):
    items, log_weights = draw_shared(np.arange(1, 501), count, np.random.default_rng(0))
    distinct = len(np.unique(items))
    assert len(items) + 1 == round_up_size(distinct + 1)
    assert np.all(items[distinct:] == items[distinct - 1])
    assert np.all(log_weights[distinct:] == -np.inf)
    assert np.isfinite(log_weights[:distinct]).all()


def test_shared_negatives_can_be_any_item():
    holdout = holdout_of(USERS)
    data = TrainingData(holdout, next_item(5), SharedSampler(holdout, 200))
    batch = data[np.arange(len(holdout.window_users)), [0, 0, 0, 0]]
    assert batch.negatives.items.tolist()[:8] == [1, 2, 3, 4, 5, 6, 7, 8]  # 4 is in no training window
    assert batch.negatives.items.shape == batch.negatives.log_weights.shape
    assert batch.negatives.log_weights.dtype == torch.float32
    weights, again, other = (data[np.arange(2), [0, 0, step, 0]].negatives.log_weights.tolist() for step in (0, 0, 1))
    assert batch.negatives.log_weights.tolist() == weights == again != other
    expected = 200 * (holdout.training_counts() + 1) / (holdout.training_counts() + 1).sum()
    times = batch.negatives.log_weights[:8].exp().numpy() * expected
    np.testing.assert_allclose(times, np.rint(times), atol=1e-3)
    assert times.sum() == pytest.approx(200)


# Candidates


def candidate_sets(how: Draw, stage: str, count: int = 300, **options) -> list[set[int]]:
    drawn = draw_candidates(holdout_of(USERS, **options), how, count, 0, stage)
    assert drawn.shape == (3, count)
    return [set(row) for row in drawn.tolist()]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_draw_paper_excludes_only_training_items(stage):
    # the validation item and the target itself may be drawn
    assert candidate_sets(Draw.paper, stage) == [{4, 5, 6, 7, 8}, {1, 2, 3, 4, 5, 6, 8}, {1, 2, 3, 4, 5, 6, 7}]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_draw_unseen_excludes_all_items_of_the_user(stage):
    assert candidate_sets(Draw.unseen, stage) == [{6, 7, 8}, {1, 3, 4, 5, 6, 8}, {2, 3, 4, 5, 6, 7}]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_popularity_draws_training_items_that_are_unseen(stage):
    assert candidate_sets(Draw.popularity, stage) == [{6, 7, 8}, {1, 3, 5, 6, 8}, {2, 3, 5, 6, 7}]
    drawn = draw_candidates(holdout_of(USERS), Draw.popularity, 4000, 0, stage)[2]
    share = Counter(drawn.tolist())[7] / 4000
    assert abs(share - 2 / 6) < 0.03  # 7 twice, the four others once


@few
@given(
    ANY_USERS,
    st.sampled_from(Draw),
    st.sampled_from(["val", "test"]),
    st.sampled_from(Catalogue),
    st.integers(0, 99),
)
def test_candidates_against_a_loop(users, how, stage, catalogue, seed):
    holdout = holdout_of(users, catalogue=catalogue)
    drawn = draw_candidates(holdout, how, 6, seed, stage)
    assert drawn.shape == (len(holdout.test), 6)
    counts = holdout.training_counts()
    possible = {item for item in range(1, holdout.num_items + 1) if how is not Draw.popularity or counts[item - 1]}
    for row, user in enumerate(holdout.test.users):
        end = holdout.train_ends[user] if how is Draw.paper else holdout.test.ends[row]
        seen = set(holdout.items[holdout.starts[user] : end].tolist())
        if how is not Draw.paper:
            seen |= {int(holdout.val.targets[row]), int(holdout.test.targets[row])}
        assert set(drawn[row].tolist()) <= (possible - seen or possible)  # anything if all is seen


@pytest.mark.parametrize("how", list(Draw))
def test_seed_and_stage_decide_the_candidates(how):
    holdout = holdout_of(random_users(0, items=40))

    def drawn(seed: int, stage: str) -> list:
        return draw_candidates(holdout, how, 20, seed, stage).tolist()

    assert drawn(0, "val") == drawn(0, "val")
    assert drawn(0, "val") != drawn(0, "test")
    assert drawn(0, "val") != drawn(1, "val")


def test_draw_paper_does_not_depend_on_test_items():
    holdout = holdout_of(random_users(0, items=40))
    other = replace(holdout, test=replace(holdout.test, targets=holdout.val.targets))
    for stage in ("val", "test"):
        one, two = (draw_candidates(each, Draw.paper, 20, 0, stage) for each in (holdout, other))
        np.testing.assert_array_equal(one, two)
