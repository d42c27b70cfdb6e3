"""Models that read times learn what no other model can: a next item that only the gap or the query time decides."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.config.model import ModelConfig, QueryTime, TimeBias
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.objectives import OBJECTIVES
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

MINUTE, MONTH, KINDS, USERS = 60, 30 * 86_400, 6, 300
WORDS = ["dataset=csv", "dataset.path=x.csv", "dataset.time=ts", "model.dim=16", "model.maxlen=2", "model.dropout=0"]
CONFIG = load([*WORDS, "model.time_bias=decay"])
MODELS = {"decay": CONFIG.model, "hstu": load([*WORDS, "model=hstu", "model.temperature=0.1"]).model}


def users_of(seed: int, *, gap_decides: bool) -> Sequences:
    """Return users with two items of 1..K and a third one, which is K + one of them: an old item counts less.

    If `gap_decides`, it is the first if a minute has passed to the second, the second after a month; the third is at
    the time of the second. If not, a month is between the first two, and the third is that of the second if it follows
    within a minute, that of the first after another month.
    """
    random = np.random.default_rng(seed)
    first, second = random.integers(1, KINDS + 1, (2, USERS))
    is_short = random.random(USERS) < 0.5
    passed = np.where(is_short, MINUTE, MONTH)
    gaps = [passed, 0 * passed] if gap_decides else [0 * passed + MONTH, passed]
    times = 1_500_000_000 + np.cumsum([0 * passed, *gaps], axis=0)  # (3, users)
    items = np.stack([first, second, KINDS + np.where(is_short == gap_decides, first, second)], 1)
    ids = np.arange(USERS), np.arange(1, 2 * KINDS + 1)
    offsets = np.arange(0, 3 * USERS + 1, 3)
    return Sequences(items.ravel().astype(np.int32), offsets, *ids, times.T.ravel(), None, "users", None)


def trained(cfg: ModelConfig, sequences: Sequences) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(2 * KINDS, cfg)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.03)
    kept = Windows.last, Catalogue.all
    holdout = hold_out(sequences, *kept, cfg.maxlen, HoldoutMode.none, query_time=cfg.asked_at)
    objective = OBJECTIVES[CONFIG.objective.name](CONFIG.objective, cfg)
    inputs, labels = objective.training(holdout, np.arange(USERS), np.random.default_rng(0))
    for _ in range(250):
        states = encoder.head(encoder(inputs)[inputs.last])  # the third item's only: the second is any
        loss = F.cross_entropy(states @ encoder.item_table.T, labels.targets[inputs.last] - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


@torch.no_grad()
def accuracy(encoder: Encoder, cfg: ModelConfig, sequences: Sequences, query_time: QueryTime) -> float:
    """Return the share of users whose third item has the highest score after the first two."""
    objective = OBJECTIVES[CONFIG.objective.name](CONFIG.objective, cfg)
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:] - 1
    asked = sequences.times[ends] if query_time is QueryTime.target else None
    states = encoder.newest(objective.inference(sequences.items, starts, ends, sequences.times, asked))
    found = (states @ encoder.item_table.T).argmax(1) + 1
    return float((found.numpy() == sequences.items[ends]).mean())


@pytest.mark.parametrize("name", MODELS)
def test_the_gap_between_two_items_decides_the_next(name):
    training, test = users_of(0, gap_decides=True), users_of(1, gap_decides=True)
    found = {}
    for bias in (MODELS[name].time_bias, TimeBias.none):
        cfg = ModelConfig(**vars(MODELS[name]) | {"time_bias": bias})
        found[bias] = accuracy(trained(cfg, training), cfg, test, QueryTime.last)
    assert found[MODELS[name].time_bias] > 0.9
    assert found[TimeBias.none] < 0.7  # one of two at random, which are the same for 1 of 6 users


@pytest.mark.parametrize("name", MODELS)
def test_the_query_time_decides_the_next_item(name):
    training, test = users_of(0, gap_decides=False), users_of(1, gap_decides=False)
    encoder = trained(MODELS[name], training)
    assert accuracy(encoder, MODELS[name], test, QueryTime.target) > 0.9
    assert accuracy(encoder, MODELS[name], test, QueryTime.last) < 0.7
