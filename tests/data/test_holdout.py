"""Properties of the holdout and of training windows, for any lengths of histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import sequences_of

from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.errors import InputError

USERS = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(USERS, st.sampled_from(Windows), st.sampled_from([HoldoutMode.last, HoldoutMode.none]), st.integers(1, 5))
def test_windows_and_targets_against_a_loop(users, windows, mode, maxlen):
    spans, targets = [], []
    for items in users:
        is_held_out = len(items) >= 3 and mode is HoldoutMode.last
        training = items[:-2] if is_held_out else items
        targets += [items[-2:]] * is_held_out
        end = len(training)
        while end > 1 and len(training) > 1:
            spans.append(training[max(0, end - maxlen - 1) : end])
            end = end - maxlen if windows is Windows.all else 0
    try:
        holdout = hold_out(sequences_of(users), windows, Catalogue.all, maxlen, mode)
    except InputError:
        assert not spans or (mode is HoldoutMode.last and not targets)
        return
    cuts = zip(holdout.window_starts, holdout.window_ends, strict=True)
    assert sorted(holdout.items[start:end].tolist() for start, end in cuts) == sorted(spans)
    assert [list(pair) for pair in zip(holdout.val.targets, holdout.test.targets, strict=True)] == targets
    trained = [item for items in users for item in _training(items, mode)]
    assert holdout.training_counts().tolist() == [trained.count(item) for item in range(1, holdout.num_items + 1)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(USERS, st.integers(1, 6))
def test_only_some_users_have_a_validation_item(users, count):
    held_out = [user for user, items in enumerate(users) if len(items) >= 3]
    settings = sequences_of(users), Windows.last, Catalogue.all, 9
    if count >= len(held_out):
        with pytest.raises(InputError, match="must be below the" if held_out else "no user has 3"):
            hold_out(*settings, val_users=count)
        return
    holdout = hold_out(*settings, val_users=count)
    validated = holdout.val.users.tolist()
    assert validated == sorted(set(validated))
    assert len(validated) == count
    assert set(validated) < set(held_out)
    assert holdout.val.targets.tolist() == [users[user][-2] for user in validated]
    assert holdout.test.users.tolist() == held_out
    assert holdout.test.targets.tolist() == [users[user][-1] for user in held_out]
    trained = [
        items[: -2 if user in validated else -1] if user in held_out else items for user, items in enumerate(users)
    ]
    ends = zip(holdout.starts, holdout.train_ends, strict=True)
    expected = [items if len(items) > 1 or user in validated else [] for user, items in enumerate(trained)]
    assert [holdout.items[start:end].tolist() for start, end in ends] == expected
    for rows, left_out in ((holdout.val, 2), (holdout.test, 1)):
        histories = [holdout.items[start:end].tolist() for start, end in zip(rows.starts, rows.ends, strict=True)]
        assert histories == [users[user][:-left_out] for user in rows.users]


def test_the_same_users_are_drawn_for_other_windows():
    users = [[1, 2, 3]] * 100
    drawn = [
        hold_out(sequences_of(users), windows, Catalogue.all, maxlen, val_users=30).val.users.tolist()
        for windows, maxlen in ((Windows.last, 2), (Windows.all, 5))
    ]
    assert drawn[0] == drawn[1]
    assert max(drawn[0]) - min(drawn[0]) > 30  # neither the first nor the last ones


def _training(items: list[int], mode: HoldoutMode) -> list[int]:
    """Return the items that are trained on, none of a user with one interaction."""
    if len(items) < 2:
        return []
    return items[:-2] if len(items) >= 3 and mode is HoldoutMode.last else items
