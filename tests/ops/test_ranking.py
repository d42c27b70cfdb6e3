"""Top-k lists against a full stable sort, with and without compiled kernels."""

import pytest
import torch

from sasrec_lab.ops import library, ranking
from sasrec_lab.ops.ranking import Scores, TopK, top_k_items

pytestmark = pytest.mark.usefixtures("one_thread")


def by_sorting(states, table, k, rows, items) -> TopK:
    scores = states @ table.T
    scores[rows, items - 1] = float("-inf")
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return TopK(torch.where(values > float("-inf"), places + 1, 0)[:, :k], values[:, :k])


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("integers", [False, True])  # integers make many ties
@pytest.mark.parametrize(
    ("users", "items", "dim", "k"),
    [(40, 1000, 8, 10), (1, 2, 1, 1), (3, 20, 4, 20), (20, 9000, 6, 10), (5, 130, 3, 100), (600, 300, 2, 3)],
)
def test_top_k_items_equal_a_full_sort(users, items, dim, k, integers):
    random = torch.Generator().manual_seed(users * items)
    states, table = torch.randn(users, dim, generator=random), torch.randn(items, dim, generator=random)
    if integers:
        states, table = states.round(), table.round()
    rows = torch.randint(users, (users * 7,), generator=random).sort().values
    seen = torch.randint(1, items + 1, (users * 7,), generator=random)
    best, expected = top_k_items(states, table, k, rows, seen), by_sorting(states, table, k, rows, seen)
    torch.testing.assert_close(best.scores, expected.scores, rtol=0, atol=1e-5)
    if integers:
        assert torch.equal(best.items, expected.items)
    else:  # products of another shape may round differently, which swaps items of nearly equal scores
        assert (best.items == expected.items).float().mean() > 0.999


@pytest.mark.usefixtures("both_forms")
def test_ties_go_to_the_lower_index_across_blocks(monkeypatch):
    monkeypatch.setitem(ranking.ITEMS_PER_BLOCK, "cpu", 3)
    monkeypatch.setattr(ranking, "ROWS_PER_BLOCK", 2)
    table = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0], [3.0], [2.0]])
    none = torch.zeros(0, dtype=torch.long)
    best = top_k_items(torch.ones(3, 1), table, 4, none, none)
    assert best.items.tolist() == [[6, 2, 3, 5]] * 3
    best = top_k_items(torch.ones(3, 1), table, 4, torch.tensor([1, 1]), torch.tensor([2, 6]))
    assert best.items.tolist() == [[6, 2, 3, 5], [3, 5, 7, 1], [6, 2, 3, 5]]
    assert best.scores[1].tolist() == [2, 2, 2, 1]


@pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dim", [1, 8, 20, 64])
@pytest.mark.parametrize("items", [7, 20])  # one tile of six and a rest, and several
@pytest.mark.parametrize("users", [1, 5, 17, 40])
def test_equal_items_have_equal_scores(users, items, dim):
    """In the kernel, and all are counted: g++ once rounded the scores of some items twice on AMD's processors."""
    none = torch.zeros(0, dtype=torch.long)
    random = torch.Generator().manual_seed(0)
    states, item = torch.randn(users, dim, generator=random), torch.randn(1, dim, generator=random)
    table = item.repeat(items, 1)
    best = top_k_items(states, table, items, none, none)
    assert best.items.tolist() == [list(range(1, items + 1))] * users
    assert (best.scores == best.scores[:, :1]).all()
    targets = torch.arange(users) % items + 1
    assert Scores(states, table).count_not_below_target(targets, none, none).tolist() == [items] * users


@pytest.mark.usefixtures("both_forms")
def test_missing_candidates_are_zeros():
    rows, seen = torch.tensor([0, 0]), torch.tensor([1, 3])
    best = top_k_items(torch.ones(2, 1), torch.tensor([[1.0], [2.0], [3.0]]), 2, rows, seen)
    assert best.items.tolist() == [[2, 0], [3, 2]]
    assert best.scores[0].tolist() == [2.0, float("-inf")]


@pytest.mark.usefixtures("both_forms")
def test_nan_scores_never_count():
    none = torch.zeros(0, dtype=torch.long)
    table = torch.tensor([[1.0], [float("nan")], [3.0], [float("inf")], [2.0]])
    best = top_k_items(torch.tensor([[1.0], [float("nan")]]), table, 4, none, none)
    assert best.items.tolist() == [[4, 3, 5, 1], [0, 0, 0, 0]]
    assert best.scores.tolist() == [[float("inf"), 3.0, 2.0, 1.0], [float("-inf")] * 4]
