"""The leak of a last-item holdout: the literal case, and a loop over random users."""

from dataclasses import replace

import numpy as np
from small_data import random_users, sequences_of

from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.leak import leaked_targets


def leak_of(users: list[list[int]], times: list[list[int]] | None, *arguments: Catalogue | HoldoutMode) -> float | None:
    """Return the share for users with these items and times."""
    catalogue, mode = *arguments, *(Catalogue.all, HoldoutMode.last)[len(arguments) :]
    sequences = sequences_of(users)
    if times is not None:
        sequences = replace(sequences, times=np.array([time for each in times for time in each]))
    return leaked_targets(sequences, hold_out(sequences, Windows.last, catalogue, 50, mode))


def test_targets_up_to_the_latest_training_interaction_leak():
    """The latest training interaction is at 50: of the user with two interactions, who is only trained on."""
    users = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3], [1, 2], [3]]
    times = [[10, 20, 90, 91], [1, 2, 50], [1, 2, 51], [40, 50], [99]]
    assert leak_of(users, times) == 1 / 3
    assert leak_of(users, [[10, 20, 21, 22], [1, 2, 3], [1, 2, 4], [40, 50], [99]]) == 1.0
    assert leak_of(users, [[10, 20, 50, 51], [1, 2, 51], [1, 2, 52], [40, 50], [99]]) == 0.0


def test_users_without_validation_leak_their_validation_item():
    users = [[1, 2, 3, 4], [1, 2, 3]]
    sequences = replace(sequences_of(users), times=np.array([1, 2, 30, 31, 4, 5, 6]))
    holdout = hold_out(sequences, Windows.last, Catalogue.all, 50, val_users=1)
    is_first = holdout.val.users[0] == 0  # else the first user is trained on until 30
    assert leaked_targets(sequences, holdout) == (0.0 if is_first else 0.5)
    assert leaked_targets(sequences, hold_out(sequences, Windows.last, Catalogue.all, 50)) == 0.0


def test_without_times_or_held_out_users_there_is_no_leak():
    users = [[1, 2, 3], [1, 2]]
    assert leak_of(users, None) is None
    assert leak_of(users, [[1, 2, 3], [1, 2]], Catalogue.all, HoldoutMode.none) is None


def test_the_leak_equals_a_loop_whatever_the_catalogue():
    rng = np.random.default_rng(0)
    for seed in range(5):
        users = [*random_users(seed), [1, 2, 3]]
        times = [sorted(rng.integers(0, 100, len(items)).tolist()) for items in users]
        trained = [time for each in times for time in (each[:-2] if len(each) > 2 else each) if len(each) > 1]
        targets = [each[-1] for each in times if len(each) > 2]
        expected = np.mean([target <= max(trained) for target in targets])
        assert leak_of(users, times, Catalogue.all) == leak_of(users, times, Catalogue.train) == expected
