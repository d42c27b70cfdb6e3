"""Metrics of lists beyond accuracy: small cases, and a slow reference that follows the definitions word by word."""

from itertools import combinations
from math import log2

import numpy as np
import pytest

from sasrec_lab.evaluation.list_metrics import ItemCategories, TopLists, TrainingCounts, diversity, gini, list_metrics

ITEMS, LENGTH, KS = 30, 12, [1, 2, 5, 12, 20]


def top_lists(lists: list[list[int]]) -> TopLists:
    entries = [(number, item, rank) for number, items in enumerate(lists) for rank, item in enumerate(items, 1)]
    return TopLists(*(np.array(column, dtype=np.int64) for column in zip(*entries, strict=True)))


def of_categories(sets: list[set[int]]) -> ItemCategories:
    offsets = np.cumsum([0, *map(len, sets)])
    return ItemCategories(offsets, np.array([each for own in sets for each in sorted(own)], dtype=np.int64))


def by_definition(
    lists: list[list[int]], trained: list[tuple[int, int]], sets: list[set[int]], k: int
) -> dict[str, float]:
    """Return the metrics at k from the training pairs of user and item; lists and pairs are in plain Python."""
    tops = [items[:k] for items in lists if items]
    shown = [sum(item in top for top in tops) for item in range(1, ITEMS + 1)]
    users = {user for user, _ in trained}
    takers = {item: {user for user, taken in trained if taken == item} for item in range(ITEMS + 1)}
    often = {item: sum(taken == item for _, taken in trained) for item in range(ITEMS + 1)}
    pairs = sum(abs(one - other) for one in shown for other in shown)
    apart = [
        [len((sets[a - 1] if a else set()) ^ (sets[b - 1] if b else set())) for a, b in combinations(top, 2)] or [0]
        for top in tops
    ]

    def mean(values: list[list[float]]) -> float:
        return float(np.mean([np.mean(each) for each in values]))

    return {
        f"coverage@{k}": sum(count > 0 for count in shown) / ITEMS,
        f"gini@{k}": pairs / (2 * ITEMS * sum(shown)),  # half the relative mean difference
        f"novelty@{k}": mean([[-log2(max(len(takers[i]), 1) / len(users)) for i in top] for top in tops]),
        f"popularity@{k}": mean([[often[i] for i in top] for top in tops]),
        f"diversity@{k}": mean(apart),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_definitions(seed):
    random = np.random.default_rng(seed)
    # lists of 1 to LENGTH items, some outside the catalogue; repeats in training; items without a category
    lists = [random.permutation(ITEMS + 1)[: random.integers(1, LENGTH + 1)].tolist() for _ in range(25)]
    trained = [(int(random.integers(20)), int(random.zipf(1.5) % ITEMS) + 1) for _ in range(150)]
    sets = [set(random.integers(0, 8, random.integers(0, 4)).tolist()) for _ in range(ITEMS)]
    interactions = np.bincount([item for _, item in trained], minlength=ITEMS + 1)[1:]
    takers = np.bincount([item for _, item in set(trained)], minlength=ITEMS + 1)[1:]
    counts = TrainingCounts(interactions, takers, len({user for user, _ in trained}))
    values = list_metrics(top_lists(lists), counts, of_categories(sets), KS)
    expected = {}
    for k in KS:
        expected |= by_definition(lists, trained, sets, k)
    assert values == pytest.approx(expected, abs=1e-12)


def test_gini_index_of_small_cases():
    assert gini(np.array([3, 3, 3, 3])) == 0
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)  # (V - 1) / V
    assert gini(np.array([1, 3])) == pytest.approx(0.25)
    assert gini(np.zeros(4, dtype=int)) == 0


def test_distances_are_those_of_rectools_example():
    """The features of IntraListDiversity's documentation: (0, 0), (0, 1), (1, 1) and (0, 0)."""
    categories = of_categories([set(), {1}, {0, 1}, set()])
    lists = top_lists([[1, 2, 3], [1, 4]])
    assert [diversity(lists.first(k), categories) for k in (1, 2, 3)] == pytest.approx([0, 1 / 2, (4 / 3) / 2])


def test_self_information_is_that_of_rectools_example():
    counts = TrainingCounts(np.array([3, 1, 0]), np.array([3, 1, 0]), 3)
    lists = TopLists(np.array([0, 1, 1, 2, 2]), np.array([3, 2, 3, 1, 2]), np.array([1, 1, 2, 1, 2]))
    values = list_metrics(lists, counts, None, [1, 3])
    assert values["novelty@1"] == pytest.approx((1.5849625 + 1.5849625 + 0) / 3)
    assert values["novelty@3"] == pytest.approx((1.5849625 + 1.5849625 + 0.79248125) / 3)
    assert values["popularity@3"] == pytest.approx((0 + 0.5 + 2) / 3)
    assert "diversity@1" not in values


def test_without_a_list_all_metrics_are_zero():
    none = np.zeros(0, dtype=np.int64)
    counts = TrainingCounts(np.ones(4, dtype=int), np.ones(4, dtype=int), 2)
    values = list_metrics(TopLists(none, none, none), counts, of_categories([{0}] * 4), [3])
    assert set(values.values()) == {0}
    assert len(values) == 5
