"""Metrics of top-k lists beyond accuracy: what they show of the catalogue. L lists, N entries, V items, F categories.

Novelty, popularity, coverage and diversity are those of rectools.metrics 0.19 (MeanInvUserFreq, AvgRecPopularity,
CatalogCoverage with normalize=True, IntraListDiversity with PairwiseHammingDistanceCalculator), Gini that of RecBole.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sasrec_lab.data.holdout import Holdout  # the report imports this module, but not pandas

BEYOND_ACCURACY = ("coverage", "gini", "novelty", "popularity", "diversity")


@dataclass(frozen=True)
class TopLists:
    """Lists of items, as one entry per item; no list has an item twice."""

    lists: np.ndarray  # (N,) int64, the list of each entry
    items: np.ndarray  # (N,) int64, 1..V, or 0 for an item outside the catalogue
    ranks: np.ndarray  # (N,) int64, 1 for the first item of a list

    def first(self, k: int) -> "TopLists":
        """Return the entries with a rank of at most k."""
        kept = self.ranks <= k
        return TopLists(self.lists[kept], self.items[kept], self.ranks[kept])

    @property
    def num_lists(self) -> int:
        """Return the number of lists that have an entry."""
        return len(np.unique(self.lists))


@dataclass(frozen=True)
class TrainingCounts:
    """How often each item occurs in training, and with how many users, each (V,) int64."""

    interactions: np.ndarray
    users: np.ndarray
    num_users: int  # in training


def is_beyond_accuracy(name: str) -> bool:
    """Return whether the name, such as `coverage@10`, is one of a metric here."""
    return name.partition("@")[0] in BEYOND_ACCURACY


def training_counts(holdout: "Holdout") -> TrainingCounts:
    """Return the counts of a holdout's training part."""
    users = int((holdout.train_ends > holdout.starts).sum())
    return TrainingCounts(holdout.training_counts(), holdout.training_users(), users)


@dataclass(frozen=True)
class ItemCategories:
    """The distinct categories of each item, the items one after the other."""

    offsets: np.ndarray  # (V + 1,) int64: item i + 1 has the categories offsets[i] to offsets[i + 1] - 1
    categories: np.ndarray  # int64, 0..F-1


def list_metrics(
    lists: TopLists, counts: TrainingCounts, categories: ItemCategories | None, k: list[int]
) -> dict[str, float]:
    """Return the metrics by name, such as `coverage@10`; without categories there is no `diversity@10`.

    All are 0 without a list.
    """
    values: dict[str, float] = {}
    for cut in k:
        top = lists.first(cut)
        shown = np.bincount(top.items, minlength=len(counts.interactions) + 1)[1:]  # (V,) in how many lists
        values[f"coverage@{cut}"] = float((shown > 0).mean())
        values[f"gini@{cut}"] = gini(shown)
        values[f"novelty@{cut}"] = _mean_over_lists(top, self_information(counts))
        values[f"popularity@{cut}"] = _mean_over_lists(top, np.append(0, counts.interactions))
        if categories is not None:
            values[f"diversity@{cut}"] = diversity(top, categories)
    return values


def gini(counts: np.ndarray) -> float:
    """Return the Gini index of counts (V,): 0 if all are equal, near 1 if one has all; 0 without any.

    sum over i of (2 i - V - 1) c_i / (V sum c), with the counts c_1 to c_V in ascending order.
    """
    if not counts.any():
        return 0.0
    places = 2 * np.arange(1, len(counts) + 1) - len(counts) - 1
    return float((places * np.sort(counts)).sum() / (len(counts) * counts.sum()))


def self_information(counts: TrainingCounts) -> np.ndarray:
    """Return -log2 of the share of training users who have an item, shape (V + 1,).

    An item that no user of training has counts as if one had it, and so does place 0, any item outside the catalogue.
    """
    users = np.maximum(np.append(0, counts.users), 1)
    return np.log2(max(counts.num_users, 1) / users)


def diversity(top: TopLists, categories: ItemCategories) -> float:
    """Return the mean over lists of the mean Hamming distance of two items of the list.

    The distance is the number of categories that one of the two has and the other has not. A list of one item has 0.
    If m of a list's n items have a category, it tells m (n - m) pairs apart, so no pair is made.
    """
    if not len(top.lists):
        return 0.0
    _, own, lengths = np.unique(top.lists, return_inverse=True, return_counts=True)  # (N,), (L,)
    starts, ends = np.append(0, categories.offsets[:-1])[top.items], np.append(0, categories.offsets[1:])[top.items]
    sizes = ends - starts  # of an item outside the catalogue 0
    places = np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    num_categories = int(categories.categories.max(initial=0)) + 1
    pairs = np.repeat(own, sizes) * num_categories + categories.categories[places]
    found, having = np.unique(pairs, return_counts=True)  # of a list and a category: how many of its items have it
    owners = found // num_categories
    apart = np.bincount(owners, having * (lengths[owners] - having), len(lengths))
    return float((apart / np.maximum(lengths * (lengths - 1) / 2, 1)).mean())


def _mean_over_lists(top: TopLists, values: np.ndarray) -> float:
    """Return the mean over lists of the mean value of their items; `values` (V + 1,) has item i at place i."""
    if not len(top.lists):
        return 0.0
    _, own, lengths = np.unique(top.lists, return_inverse=True, return_counts=True)
    return float((np.bincount(own, values[top.items]) / lengths).mean())
