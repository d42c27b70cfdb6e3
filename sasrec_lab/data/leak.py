"""The leak of a last-item holdout: it splits by position, so a model may train on what came after a test target."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sasrec_lab.data.holdout import Holdout
    from sasrec_lab.data.sequences import Sequences


def leaked_targets(sequences: "Sequences", holdout: "Holdout") -> float | None:
    """Return the share of test targets that are not later than the latest training interaction, of any user.

    The holdout is that of the last items. None if interactions have no times, or if no user is held out.
    """
    if sequences.times is None or not len(holdout.test):
        return None
    ends = sequences.offsets[1:].copy()  # (num_users,) one past the last training interaction
    ends[holdout.test.users] = holdout.test.places
    ends[holdout.val.users] = holdout.val.places
    latest = sequences.times[ends[sequences.lengths >= 2] - 1].max()
    return float((sequences.times[holdout.test.places] <= latest).mean())
