"""Metrics of each row from the ranks of its targets, and their means over rows and users. R rows, G targets.

Used for rows with several targets, and for the value of each user in a report's tests. Rank 0 is a miss. With g targets
in a row and the hits in their order, at most k of them: recall is hits / g, precision hits / k, NDCG the sum of
1 / log2(1 + rank) over that of the ideal list of min(k, g) targets, MAP the sum of precisions at the hits / min(k, g),
and MRR 1 / rank of the first hit. With one target, recall is the hit rate, and MAP is MRR. RecTools' own default
divides NDCG by the ideal of k targets, and MAP by g.
"""

from collections.abc import Callable, Mapping

import numpy as np

from sasrec_lab.config.evaluation import BY_USER
from sasrec_lab.errors import InputError


class RankedRows:
    """The ranks of all targets, row by row and best first.

    `rows` (G,) is ascending, `ranks` (G,) has 0 for a miss.
    """

    def __init__(self, rows: np.ndarray, ranks: np.ndarray):
        order = np.lexsort((np.where(ranks > 0, ranks, np.iinfo(np.int64).max), rows))
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self.count = np.diff(starts, append=len(rows))  # (R,) number of targets
        self.row = np.repeat(np.arange(len(starts)), self.count)  # (G,)
        self.rank = ranks[order]
        self.place = np.arange(len(rows)) - np.repeat(starts, self.count) + 1  # (G,) 1 for the best target of a row

    def values(self, metric: str, own: "Mapping[str, RowMetric] | None" = None) -> np.ndarray:
        """Return a metric of each row, such as `ndcg@10`, or `mrr` without a cutoff, shape (R,) float64.

        `own` are the metrics of the user's by their names.
        """
        kind, _, cutoff = metric.partition("@")
        k = int(cutoff) if cutoff else np.iinfo(np.int64).max
        if own and kind in own:
            return self._own_values(kind, own[kind], k)
        is_hit = (self.rank > 0) & (self.rank <= k)
        gains = np.where(is_hit, _GAINS[kind](np.where(is_hit, self.rank, 1), self.place), 0.0)
        return np.bincount(self.row, gains, len(self.count)) / _DIVISORS[kind](k, np.minimum(k, self.count), self.count)

    def _own_values(self, name: str, metric: "RowMetric", k: int) -> np.ndarray:
        """Return a metric of the user's of each row; raise InputError if it is not one finite number of each."""
        values = np.asarray(metric(self, k))
        if values.shape != self.count.shape or values.dtype.kind not in "iufb" or not np.isfinite(values).all():
            raise InputError(
                f"evaluation.metrics.{name} must return a finite number for each of {len(self.count):,} rows, but"
                f" returned {values.dtype} of shape {values.shape}"
            )
        return values.astype(np.float64)


RowMetric = Callable[[RankedRows, int], np.ndarray]  # of the user's: the value of each row (R,) of lists of k items

# By metric: what a hit adds, from its rank and its place among the hits of its row
_GAINS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ndcg": lambda rank, place: 1 / np.log2(rank + 1),
    "recall": lambda rank, place: np.ones_like(rank),
    "mrr": lambda rank, place: (place == 1) / rank,
    "hit_rate": lambda rank, place: place == 1,
    "precision": lambda rank, place: np.ones_like(rank),
    "map": lambda rank, place: place / rank,
}
# ... and what the sum is divided by, from k, the number of targets that a list of k can have, and that of all
_DIVISORS: dict[str, Callable[[int, np.ndarray, np.ndarray], np.ndarray | int]] = {
    "ndcg": lambda k, possible, targets: _ideal_gain(possible),
    "recall": lambda k, possible, targets: targets,
    "mrr": lambda k, possible, targets: 1,
    "hit_rate": lambda k, possible, targets: 1,
    "precision": lambda k, possible, targets: k,
    "map": lambda k, possible, targets: possible,
}


def is_row_metric(name: str) -> bool:
    """Return whether the name, without its cutoff, is one of a metric here."""
    return name.partition("@")[0] in _GAINS


def _ideal_gain(hits: np.ndarray) -> np.ndarray:
    """Return the DCG of a list that begins with this many targets."""
    return np.append(0, np.cumsum(1 / np.log2(np.arange(2, hits.max(initial=0) + 2))))[hits]


def mean_over_rows(
    names: list[str],
    rows: np.ndarray,
    users: np.ndarray,
    ranks: np.ndarray,
    own: Mapping[str, RowMetric] | None = None,
) -> dict[str, float]:
    """Return the mean of each metric over all rows, or over users for a name that ends in `-by-user`; 0 without rows.

    `rows` (G,) is ascending; `users` (G,) is the user of each target. `own` are the metrics of the user's.
    """
    if not len(rows):
        return dict.fromkeys(names, 0.0)
    ranked = RankedRows(rows, ranks)
    users = users[np.flatnonzero(np.diff(rows, prepend=-1))]  # (R,)
    means = {}
    for name in names:
        values = ranked.values(name.removesuffix(BY_USER), own)
        means[name] = float((user_values(name, values, users) if name.endswith(BY_USER) else values).mean())
    return means


def user_values(name: str, values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Return one value per user, in ascending order of users, whose mean is the metric, from those of rows (R,).

    For a name that ends in `-by-user` it is the mean of the user's rows. For other names every row counts the same, so
    it is their sum divided by the mean number of rows per user. A user with a single row has its value.
    """
    _, user_of_row, counts = np.unique(users, return_inverse=True, return_counts=True)
    if len(counts) == len(users):
        return values[np.argsort(users)]
    sums = np.bincount(user_of_row, values)
    return sums / counts if name.endswith(BY_USER) else sums * (len(counts) / len(users))
