"""EASE and item-kNN against their definitions, by loops and by one regression per item."""

from math import log, sqrt

import numpy as np
import pytest
import torch

from sasrec_lab.config.closed_form import EaseConfig, ItemKnnConfig, Weighting
from sasrec_lab.model import closed_form
from sasrec_lab.model.closed_form import ItemWeights, fit

USERS, ITEMS = 40, 15


def interactions(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return users and items with repeats, and the binary matrix (U, V); the last item occurs nowhere."""
    random = np.random.default_rng(seed)
    users, items = random.integers(0, USERS, 300), random.integers(1, ITEMS, 300)
    binary = np.zeros((USERS, ITEMS))
    binary[users, items - 1] = 1
    return users, items, binary


def knn(seed: int, weighting: Weighting, neighbors: int = 4, shrink: float = 0.0) -> np.ndarray:
    users, items, _ = interactions(seed)
    cfg = ItemKnnConfig(name="itemknn", neighbors=neighbors, shrink=shrink, weighting=weighting)
    return fit(cfg, users, items, ITEMS).matrix.toarray()


@pytest.mark.parametrize("products", [1, 100, 2**24])
@pytest.mark.parametrize("regularization", [0.5, 30.0])
def test_ease_is_a_ridge_regression_of_each_item_on_the_others(regularization, products, monkeypatch):
    monkeypatch.setattr(closed_form, "PRODUCTS_AT_ONCE", products)
    users, items, binary = interactions(0)
    weights = fit(EaseConfig(name="ease", regularization=regularization), users, items, ITEMS).matrix
    for item in range(ITEMS):
        others = np.delete(np.arange(ITEMS), item)
        inputs = binary[:, others]
        solution = np.linalg.solve(inputs.T @ inputs + regularization * np.eye(len(others)), inputs.T @ binary[:, item])
        assert weights[others, item] == pytest.approx(solution, abs=1e-6)
        assert weights[item, item] == 0


def weigh(binary: np.ndarray, weighting: Weighting) -> np.ndarray:
    """Return the weighted matrix by loops: items are documents, and the users who have them their words."""
    weighted = np.zeros_like(binary)
    lengths = [binary[:, item].sum() for item in range(ITEMS - 1)]  # the last item has no user
    for user in range(USERS):
        idf = log((ITEMS - 1) / (1 + binary[user].sum()))
        for item in np.flatnonzero(binary[user]):
            norm = 0.25 + 0.75 * lengths[item] / np.mean(lengths)
            bm25 = idf * 2.2 / (1.2 * norm + 1)
            weighted[user, item] = {Weighting.none: 1, Weighting.tfidf: idf, Weighting.bm25: bm25}[weighting]
    return weighted


@pytest.mark.parametrize("products", [1, 100, 2**24])
@pytest.mark.parametrize("shrink", [0.0, 2.5])
@pytest.mark.parametrize("weighting", list(Weighting))
def test_item_knn_equals_its_definition(weighting, shrink, products, monkeypatch):
    monkeypatch.setattr(closed_form, "PRODUCTS_AT_ONCE", products)
    shrink = 0.0 if weighting is Weighting.bm25 else shrink
    weighted = weigh(interactions(1)[2], weighting)
    found = knn(1, weighting, shrink=shrink)
    for item in range(ITEMS):
        similar = {}
        for other in range(ITEMS):
            x, y = weighted[:, item], weighted[:, other]
            if other != item and x @ y:
                norm = 1 if weighting is Weighting.bm25 else sqrt(x @ x) * sqrt(y @ y) + shrink
                similar[other] = x @ y / norm
        best = sorted(similar, key=lambda other: (-round(similar[other], 9), other))[:4]
        assert np.flatnonzero(found[item]).tolist() == sorted(best)
        assert found[item, best] == pytest.approx([similar[other] for other in best], rel=1e-5)


def test_neighbors_of_equal_similarity_are_the_first_ones():
    users, items = np.repeat([0, 1], 4), np.array([1, 2, 3, 4] * 2)
    cfg = ItemKnnConfig(name="itemknn", neighbors=2, shrink=0.0, weighting=Weighting.none)
    found = fit(cfg, users, items, 4).matrix.toarray()
    assert [np.flatnonzero(row).tolist() for row in found] == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert found[found > 0] == pytest.approx(1)


@pytest.mark.parametrize("weighting", [Weighting.tfidf, Weighting.bm25])
def test_a_user_with_all_items_but_one_has_no_weight(weighting):
    """log(V / (1 + items of the user)) is 0: item 1, which only this user has, has no neighbors."""
    users, items = np.array([0, 0, 0, 1, 1]), np.array([1, 2, 3, 3, 4])
    cfg = ItemKnnConfig(name="itemknn", neighbors=2, shrink=0.0, weighting=weighting)
    found = fit(cfg, users, items, 4).matrix.toarray()
    assert np.argwhere(found).tolist() == [[2, 3], [3, 2]]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_history_scores_the_sum_of_its_items_weights(is_sparse):
    weights = ItemWeights(knn(2, Weighting.none))
    if is_sparse:
        weights = ItemWeights(closed_form.csr_array(weights.matrix))
    histories = [[3, 7, 8], [], [15], [1]]  # items from 1; no user has item 15
    rows = torch.tensor([row for row, items in enumerate(histories) for _ in items])
    items = torch.tensor([item for items in histories for item in items])
    dense = torch.from_numpy(weights.matrix.toarray() if is_sparse else weights.matrix)
    expected = torch.stack([sum((dense[item - 1] for item in items), torch.zeros(ITEMS)) for items in histories])
    scores = weights.scores(4, rows, items)
    every = torch.arange(1, ITEMS + 1).expand(4, ITEMS)
    torch.testing.assert_close(scores.for_items(every).float(), expected)
    targets, none = torch.tensor([2, 5, 5, 1]), rows[:0]
    counts = (scores.for_items(every) >= scores.for_items(targets[:, None])).sum(1)
    assert torch.equal(scores.count_not_below_target(targets, none, none), counts)
    again = torch.tensor([3, 0, 0])
    assert torch.equal(scores.rows(again).for_items(every[:3]), scores.for_items(every)[again])
    block = weights.block(4, rows, items)
    if is_sparse:
        assert torch.equal(block == float("-inf"), expected == 0)  # no item of the history is a neighbor
    torch.testing.assert_close(block.nan_to_num(neginf=0.0), expected)
