"""scripts/parity/training.py: what RecTools gets of a holdout, and our metrics of the states that it returns."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.config.model import QueryTime
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import Sequences

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from parity.training import interactions_of, theirs_measured

ITEMS = [1, 2, 3, 4, 5, 6, 2, 1, 4, 3, 5, 1, 6]  # the second user has four items, the third two
TIMES = np.array([10, 20, 30, 40, 50, 60, 11, 21, 31, 41, 7, 8, 9], np.int32) + 1_000_000_000


@pytest.fixture
def sequences() -> Sequences:
    offsets = np.array([0, 6, 10, 13])
    return Sequences(
        np.array(ITEMS, np.int32), offsets, np.arange(3), np.arange(1, 7), TIMES, None, file="-", sha256=None
    )


def test_rectools_gets_windows_histories_and_query_times(sequences):
    holdout = hold_out(sequences, Windows.last, Catalogue.all, 2, query_time=QueryTime.target)
    found = interactions_of(holdout)
    assert {
        name: (array - 1_000_000_000 if array.max() > 100 else array).tolist() for name, array in found.items()
    } == {
        "user": [0, 0, 0, 1, 1],
        "item": [2, 3, 4, 2, 1],  # the newest maxlen + 1 without the last two
        "time": [20, 30, 40, 11, 21],
        "history_user": [0] * 5 + [1] * 3 + [2] * 2,
        "history_item": [1, 2, 3, 4, 5, 2, 1, 4, 5, 1],
        "history_time": [10, 20, 30, 40, 50, 11, 21, 31, 7, 8],
        "asked_user": [0, 1, 2],
        "asked": [60, 41, 9],
    }


def test_query_time_last_asks_at_the_newest_item(sequences):
    holdout = hold_out(sequences, Windows.last, Catalogue.all, 2, query_time=QueryTime.last)
    assert (interactions_of(holdout)["asked"] - 1_000_000_000).tolist() == [50, 31, 8]


def test_rectools_gets_no_times_of_a_model_without(sequences):
    holdout = hold_out(sequences, Windows.last, Catalogue.all, 2)
    assert set(interactions_of(holdout)) == {"user", "item", "history_user", "history_item"}


@pytest.mark.parametrize(("similarity", "rank"), [("cosine", 1), ("dot", 2)])
def test_states_of_rectools_are_ranked_by_the_similarity(sequences, tmp_path, similarity, rank):
    """Each target's state equals its vector; by the dot product an item with a long vector is ahead of it."""
    holdout = hold_out(sequences, Windows.last, Catalogue.all, 2)
    vectors = np.eye(7, 6, dtype=np.float32)[:6] + np.float32(0.5)
    vectors[1] *= 50  # no target
    order = np.array([3, 1, 2, 6, 5, 4])  # RecTools numbers items in its own order
    users = np.array([2, 0, 1])
    targets = holdout.test.targets[users]
    file = tmp_path / "rectools-seed-0.npz"
    np.savez(file, item_ids=order, vectors=vectors[order - 1], user_ids=users, states=vectors[targets - 1])
    cfg = load(["dataset=csv", "dataset.path=-", f"model.similarity={similarity}", "model.maxlen=2"])
    cfg = replace(cfg, evaluation=replace(cfg.evaluation, filter_seen=False, k=[1, 10]))
    assert theirs_measured(cfg, holdout, file)["test/ndcg@10"] == pytest.approx(1 / np.log2(rank + 1))
