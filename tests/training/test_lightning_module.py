"""Scores of users whose history has no item that the model knows."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.evaluation.ranks import full_ranks
from sasrec_lab.training.lightning_module import SequentialRecommender

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = load(["dataset=csv", "dataset.path=x.csv", "dataset.catalogue=train", "model=tiny"])
# A user with three interactions has no training window, so only the others' items are known: 1 to 4.
UNKNOWN, KNOWN = [7, 8, 2], [1, 2, 3, 4, 1]


@pytest.mark.parametrize(
    ("users", "histories"), [([UNKNOWN, KNOWN, UNKNOWN], 1), ([UNKNOWN, [1, 2, 3, 4]], 1), ([KNOWN, KNOWN], 2)]
)
@torch.inference_mode()
def test_a_history_of_unknown_items_gives_the_worst_rank(users, histories):
    holdout = holdout_of([[1, 2, 3, 4, 1, 1], *users], catalogue=Catalogue.train)
    pl.seed_everything(0, verbose=False)
    model = SequentialRecommender(holdout.num_items, CONFIG).eval()
    data = SequenceData(holdout, CONFIG)
    (batch,) = data.evaluation_dataloader("test")
    found = dict(
        zip(batch.users.tolist(), full_ranks(model.scores(batch), batch, filter_seen=False).tolist(), strict=True)
    )
    assert len(batch.ranked) == 1 + histories
    for user, items in enumerate(users, 1):
        if items is UNKNOWN:
            assert found[user] == holdout.num_items
        else:
            assert found[user] == rank_alone(model, holdout, user, data)


def rank_alone(model, holdout, user, data) -> int:
    """Return the rank of a user's target in a batch of one."""
    stage = data.evaluation_dataloader("test").dataset
    alone = stage[np.flatnonzero(holdout.test.users == user)]
    return int(full_ranks(model.scores(alone), alone, filter_seen=False))


@torch.inference_mode()
def test_a_batch_without_any_known_item_has_the_worst_ranks():
    holdout = holdout_of([[1, 2, 3, 4, 1], UNKNOWN], catalogue=Catalogue.train)
    model = SequentialRecommender(holdout.num_items, CONFIG).eval()
    assert rank_alone(model, holdout, 1, SequenceData(holdout, CONFIG)) == holdout.num_items
