"""Baselines against their definitions: dense scores, and ranks by comparing each item with the target."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import log2

import numpy as np
import pytest
import torch
from small_data import holdout_of, random_users, sequences_of

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.data import holdout
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.evaluation import baselines
from sasrec_lab.evaluation.baselines import baseline_metrics, markov_table, recent_counts

DAY = 86_400
START = 1_600_000_000  # in 2020
CONFIG = load(["dataset=csv", "dataset.path=x.csv", "evaluation.k=[1,5,10]"])


def measure(users: list[list[int]], **changes) -> dict[str, dict[str, float]]:
    """Return the metrics of the baselines for these users."""
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, batch_size=16, **changes))
    return baseline_metrics(SequenceData(holdout_of(users), cfg), sequences_of(users))


def known(users: list[list[int]], catalogue: Catalogue) -> set[int]:
    """Return the items of the catalogue."""
    trained = {item for user in users for item in user[:-2]}
    return trained if catalogue is Catalogue.train else {item for user in users for item in user}


def markov_ranks(users: list[list[int]], items: set[int], filter_seen: bool, held_out: int) -> list[int]:
    """Return the ranks, 0 for a miss, of the item `held_out` from the end of each user with three items or more."""
    histories = [[item for item in user[: -2 if len(user) > 2 else None] if item in items] for user in users]
    histories = [history for history, user in zip(histories, users, strict=True) if len(user) > 1]
    counts = Counter(item for history in histories for item in history)
    follows = Counter(pair for history in histories for pair in pairwise(history))
    share = {item: counts[item] / counts.total() for item in items}
    ranks = []
    for user in users:
        if len(user) < 3:
            continue
        seen, target = [item for item in user[:-held_out] if item in items], user[-held_out]
        scores = {item: share[item] + follows[seen[-1] if seen else 0, item] for item in items}
        candidates = items - set(seen) if filter_seen else items
        ranks.append(sum(scores[item] >= scores[target] for item in candidates) if target in candidates else 0)
    return ranks


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("catalogue", list(Catalogue))
@pytest.mark.parametrize("seed", range(3))
def test_markov_equals_its_definition(seed, catalogue, filter_seen):
    users = random_users(seed, users=70, items=25, longest=12)
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, filter_seen=filter_seen, batch_size=16))
    data = SequenceData(holdout_of(users, catalogue=catalogue), cfg)
    values = baseline_metrics(data, sequences_of(users))["markov"]
    for stage, held_out in (("val", 2), ("test", 1)):
        ranks = markov_ranks(users, known(users, catalogue), filter_seen, held_out)
        ndcg = [1 / log2(rank + 1) if 1 <= rank <= 10 else 0 for rank in ranks]
        assert values[f"{stage}/ndcg@10"] == pytest.approx(np.mean(ndcg), rel=1e-9)
        assert values[f"{stage}/mrr"] == pytest.approx(np.mean([1 / rank if rank else 0 for rank in ranks]), rel=1e-9)


def test_markov_counts_what_follows_directly_within_a_user():
    holdout = holdout_of([[1, 2, 1, 2, 3, 9, 9], [2, 3, 9, 9], [3, 1]])
    table = markov_table(holdout, holdout.training_counts())
    assert table.offsets.tolist() == [0, 0, 1, 3, 4, 4, 4, 4, 4, 4, 4]  # of no item, then of the items 1 to 9
    assert table.items.tolist() == [2, 1, 3, 1]
    assert (table.values - table.shared[table.items - 1]).tolist() == pytest.approx([2, 1, 2, 1])
    assert table.shared.tolist() == pytest.approx([3 / 9, 3 / 9, 3 / 9, 0, 0, 0, 0, 0, 0])


def test_followers_come_first_and_popularity_orders_the_rest():
    """After 5, item 6 followed twice and 7 once; the target 7 is second, and 8, the most popular other item, third."""
    users = [[5, 6, 5, 6, 5, 7, 8, 8, 8, 8, 1, 1], [4, 6, 5, 7], [4, 3, 5, 8]]
    values = measure(users, k=[1, 2, 3], monitor="val/mrr", filter_seen=False)["markov"]
    assert (values["test/recall@1"], values["test/recall@2"], values["test/recall@3"]) == (0, 1 / 3, 2 / 3)


def test_recent_popularity_counts_the_last_days_of_training():
    users = [[1, 2, 3, 4, 5], [2, 2, 1, 3]]
    days = np.array([0, 1, 9, 20, 21, 2, 9.5, 22, 23])
    sequences = replace(sequences_of(users), times=START + (days * DAY).astype(np.int64))
    holdout = holdout_of(users)  # training ends on day 9.5
    assert recent_counts(sequences, holdout, 1).tolist() == [0, 1, 1, 0, 0]
    assert recent_counts(sequences, holdout, 8).tolist() == [0, 2, 1, 0, 0]
    assert recent_counts(sequences, holdout, 100).tolist() == holdout.training_counts().tolist()
    for unit in (10**3, 10**6, 10**9):
        other = replace(sequences, times=sequences.times * unit)
        assert recent_counts(other, holdout, 8).tolist() == [0, 2, 1, 0, 0]


def test_recent_popularity_needs_dates_and_a_number_of_days():
    users = [[1, 2, 3, 4, 5], [2, 2, 1, 3]]
    sequences, holdout = sequences_of(users), holdout_of(users)
    assert recent_counts(sequences, holdout, 7) is None
    assert recent_counts(replace(sequences, times=np.arange(9)), holdout, 7) is None  # the order of the rows
    dated = replace(sequences, times=START + np.arange(9))
    assert recent_counts(dated, holdout, None) is None
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, recent_days=7))
    assert list(baseline_metrics(SequenceData(holdout, cfg), dated)) == ["popularity", "recent_popularity", "markov"]
    assert list(baseline_metrics(SequenceData(holdout, cfg), sequences)) == ["popularity", "markov"]


def test_recent_popularity_follows_a_smaller_catalogue():
    users = [[4, 1, 2, 3, 3], [1, 1, 1, 2, 5]]
    times = START + DAY * np.array([0, 1, 2, 9, 9, 0, 3, 4, 9, 9])
    sequences = replace(sequences_of(users), times=times)
    holdout = hold_out(sequences, Windows.last, Catalogue.train, 1, HoldoutMode.last)
    assert holdout.item_ids.tolist() == [10, 20]  # items 1 and 2
    assert recent_counts(sequences, holdout, 2).tolist() == [2, 0]
    assert recent_counts(sequences, holdout, 3).tolist() == [2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_chunks_give_the_same_counts_and_table(seed, monkeypatch):
    for catalogue in (Catalogue.all, Catalogue.train):
        split = holdout_of(random_users(seed, users=60, items=20, longest=9), catalogue=catalogue)
        trained = np.zeros(len(split.items), bool)
        for start, end in zip(split.starts, split.train_ends, strict=True):
            trained[start:end] = True
        np.testing.assert_array_equal(split.in_training(), trained)
        counts = np.bincount(split.items[trained], minlength=split.num_items + 1)[1:]
        whole = markov_table(split, counts)
        with monkeypatch.context() as patch:
            patch.setattr(holdout, "_ITEMS_PER_CHUNK", 11)
            patch.setattr(baselines, "_ITEMS_PER_CHUNK", 5)
            patch.setattr(baselines, "_PAIRS_PER_RANGE", 7)
            np.testing.assert_array_equal(split.training_counts(), counts)
            parts = markov_table(split, counts)
        for name in ("shared", "offsets", "items", "values"):
            assert torch.equal(getattr(parts, name), getattr(whole, name))
