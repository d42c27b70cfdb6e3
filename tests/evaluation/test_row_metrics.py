"""Metrics of rows with several targets against a loop, and over users with several rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec_lab.config.dataset import Target
from sasrec_lab.config.evaluation import metric_names
from sasrec_lab.evaluation.row_metrics import RankedRows, mean_over_rows, user_values

NAMES = metric_names([1, 5, 20], 0, Target.all)


def by_loop(name: str, ranks: list[int]) -> float:
    """Return a metric of one row from the definition: walk down the list and look at what is a target."""
    kind, _, cutoff = name.partition("@")
    k = int(cutoff) if cutoff else 10**6
    found, precisions, gain, first = 0, 0.0, 0.0, 0.0
    for place in range(1, min(k, max(ranks, default=0)) + 1):
        if place in ranks:
            found += 1
            precisions += found / place
            gain += 1 / math.log2(place + 1)
            first = first or 1 / place
    possible = min(k, len(ranks))
    ideal = sum(1 / math.log2(place + 1) for place in range(1, possible + 1))
    return {
        "recall": found / len(ranks),
        "precision": found / k,
        "hit_rate": float(found > 0),
        "ndcg": gain / ideal,
        "map": precisions / possible,
        "mrr": first,
    }[kind]


def random_rows(seed: int, rows: int = 60) -> list[list[int]]:
    """Return the ranks of 1 to 30 targets a row, distinct but for misses."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        ranks = random.permutation(np.arange(1, 45))[: random.integers(1, 31)]
        made.append((ranks * (random.random(len(ranks)) < 0.8)).tolist())
    return made


def columns(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(len(rows)), [len(row) for row in rows]), np.array([rank for row in rows for rank in row])


@pytest.mark.parametrize("name", [*NAMES, *(f"{kind}@{k}" for kind in ("ndcg", "map") for k in range(2, 20))])
def test_rows_with_several_targets_against_a_loop(name):
    rows = random_rows(0)
    values = RankedRows(*columns(rows)).values(name)
    assert values == pytest.approx([by_loop(name, row) for row in rows], rel=1e-12, abs=1e-15)


def test_a_worked_example():
    """Two of three targets are in the first five, at 2 and 5."""
    values = {
        name: RankedRows(np.zeros(3, int), np.array([5, 0, 2])).values(f"{name}@5")[0] for name in ("ndcg", "map")
    }
    assert values["map"] == pytest.approx((1 / 2 + 2 / 5) / 3)
    assert values["ndcg"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / (1 + 1 / math.log2(3) + 1 / 2))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 12))
def test_values_are_between_0_and_1_and_agree(rows, k):
    """Ranks of a row are distinct here; targets of equal scores share the worst one, so k hold at most k."""
    rows = [[rank if row.count(rank) == 1 else 9 + len(row) for rank in row] for row in rows]
    ranked = RankedRows(*columns(rows))
    values = {name: ranked.values(f"{name}@{k}") for name in ("ndcg", "recall", "mrr", "hit_rate", "precision", "map")}
    counts = np.array([len(row) for row in rows])
    for each in values.values():
        assert ((each >= 0) & (each <= 1 + 1e-12)).all()
    assert values["precision"] * k == pytest.approx(values["recall"] * counts)
    assert ((values["mrr"] > 0) == (values["hit_rate"] == 1)).all()
    single = counts == 1
    assert values["map"][single].tolist() == values["mrr"][single].tolist()
    assert values["recall"][single].tolist() == values["hit_rate"][single].tolist()


def test_means_over_rows_and_users():
    users = np.array([3, 3, 3, 5, 8, 8])
    ranks = np.array([1, 2, 0, 2, 1, 4])
    means = mean_over_rows(metric_names([2], 0, Target.successive), np.arange(6), users, ranks)
    assert means["recall@2"] == pytest.approx(4 / 6)
    assert means["recall@2-by-user"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert means["mrr"] == pytest.approx((1 + 1 / 2 + 0 + 1 / 2 + 1 + 1 / 4) / 6)
    assert means["mrr-by-user"] == pytest.approx((1.5 / 3 + 1 / 2 + 1.25 / 2) / 3)
    assert set(mean_over_rows(["mrr"], *np.zeros((3, 0), int)).values()) == {0.0}


def test_user_values_have_the_metric_as_their_mean():
    random = np.random.default_rng(0)
    users, values = random.integers(0, 9, 50), random.random(50)
    assert user_values("mrr", values, users).mean() == pytest.approx(values.mean())
    by_user = user_values("mrr-by-user", values, users)
    assert by_user == pytest.approx([values[users == user].mean() for user in np.unique(users)])
    np.testing.assert_array_equal(user_values("mrr", values[:3], np.array([7, 2, 5])), values[[1, 2, 0]])
