"""Is a row better than the baseline on these users? A paired sign-flip test on ranks.npz, corrected by Holm.

Each user has one difference: the metric averaged over the row's seeds less that over the baseline's. Were the rows
alike, its sign would be a coin's; p is how often coins give a sum as far from 0 as the one seen. It speaks of other
users of this kind, not of other seeds.
"""

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from sasrec_lab.report.rows import Row
from sasrec_lab.report.runs import Run

FLIPS = 10_000
GAINS = {"ndcg": lambda rank: 1 / np.log2(rank + 1), "recall": np.ones_like, "mrr": lambda rank: 1 / rank}
_SIGNS_AT_ONCE = 2**22  # 32 MiB


@dataclass(frozen=True)
class PairedTest:
    """Of one row against the baseline in one metric."""

    difference: float  # mean over users
    margin: float  # half the width of its 95 % interval over users
    p: float
    p_holm: float


def compare(baseline: Row, rows: list[Row], metrics: list[str]) -> tuple[dict[tuple[str, str], PairedTest], list[str]]:
    """(row's label, metric) -> test, and notes on what could not be tested; Holm's correction is for each metric."""
    notes = []
    users, targets, values = {}, {}, {}
    for row in (baseline, *rows):
        try:
            ids, items, each = _user_metrics(row.runs, metrics)
            if users and baseline.label in users:
                _check_same_targets(ids, items, users[baseline.label], targets[baseline.label], "the baseline")
            users[row.label], targets[row.label], values[row.label] = ids, items, each
        except ValueError as error:
            notes.append(f"{row.label} is not tested: {error}")
    if baseline.label not in users or len(users) < 2:
        return {}, notes
    common = reduce(_common, users.values())
    if any(len(ids) != len(common) for ids in users.values()):
        notes.append(f"tested on the {len(common):,} users that all rows have")
    aligned = {label: values[label][:, np.searchsorted(users[label], common)] for label in values}
    tested = [row.label for row in rows if row.label in aligned]
    tests = {}
    for number, metric in enumerate(metrics):
        differences = np.stack([aligned[label][number] - aligned[baseline.label][number] for label in tested])
        kept = ~np.isnan(differences).any(1)  # a metric that one of the two does not have
        labels = [label for label, has in zip(tested, kept, strict=True) if has]
        if labels and len(common) > 1:
            tests |= {(label, metric): test for label, test in zip(labels, _tests(differences[kept]), strict=True)}
    return tests, notes


def user_metric(run: Run, ranks: dict[str, np.ndarray], metric: str) -> np.ndarray:
    """`test/ndcg@10-sampled100` of each user from their target's rank, (U,); NaN where the run has no such metric."""
    name, _, sampled = metric.removeprefix("test/").partition("-sampled")
    column = ranks.get("sampled_rank" if sampled else "rank")
    kind, _, cut = name.partition("@")
    if metric not in run.metrics or not metric.startswith("test/") or column is None or kind not in GAINS:
        return np.full(len(ranks["user"]), math.nan)
    hit = (column > 0) & (column <= (int(cut) if cut else np.inf))
    return np.where(hit, GAINS[kind](np.where(hit, column, 1)), 0.0)


def sign_flip(differences: np.ndarray, flips: int = FLIPS) -> np.ndarray:
    """Two-sided p of each row of paired differences (R, U); the coins are the same for all rows, and always the same.

    Where no flip went as far, Hoeffding's bound on the same probability stands in for 1 / (flips + 1) if it is less:
    with hundreds of rows Holm's factors would make nothing of 1 in 10,000.
    """
    differences = differences[:, differences.any(0)]  # a sign of zero changes nothing
    count, seen = differences.shape[1], np.abs(differences.sum(1))
    least = seen - 1e-12 * np.abs(differences).sum(1)  # sums in another order
    rng, as_far = np.random.default_rng(0), np.zeros(len(differences))
    step = max(1, _SIGNS_AT_ONCE // max(1, count))
    for begin in range(0, flips, step):
        shape = (min(step, flips - begin), count)
        bits = np.unpackbits(rng.integers(0, 256, (shape[0], -(-count // 8)), dtype=np.uint8), axis=1, count=count)
        sums = 2 * (bits.astype(np.float64) @ differences.T) - differences.sum(1)  # (flips, R)
        as_far += (np.abs(sums) >= least).sum(0)
    p = (as_far + 1) / (flips + 1)
    bound = 2 * np.exp(-(seen**2) / (2 * np.maximum((differences**2).sum(1), np.finfo(float).tiny)))
    return np.where(as_far == 0, np.minimum(p, bound), p)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction for testing all of them."""
    order = np.argsort(p)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * factors))
    return corrected


def _tests(differences: np.ndarray) -> list[PairedTest]:
    means = differences.mean(1)
    margins = 1.96 * differences.std(1, ddof=1) / math.sqrt(differences.shape[1])
    p = sign_flip(differences)
    return [PairedTest(*map(float, test)) for test in zip(means, margins, p, holm(p), strict=True)]


def _user_metrics(runs: list[Run], metrics: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users (U,) by their own ids, in order, their targets (U,), and of each metric the mean over runs (M, U)."""
    ids, targets, values = [], [], []
    for run in runs:
        ranks = _ranks(run.folder / "ranks.npz")
        order = np.argsort(ranks["user"], kind="stable")
        ids.append(ranks["user"][order])
        targets.append(ranks["target"][order])
        _check_same_targets(ids[-1], targets[-1], ids[0], targets[0], f"{runs[0].folder}")
        values.append(np.stack([user_metric(run, ranks, metric) for metric in metrics])[:, order])
    common = reduce(_common, ids)
    each = [value[:, np.searchsorted(users, common)] for users, value in zip(ids, values, strict=True)]
    return common, targets[0][np.searchsorted(ids[0], common)], np.mean(each, axis=0)


def _ranks(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ranks.npz; ValueError, in one line, where it is not there, cut off, or not what a run writes."""
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if lacking := {"user", "target", "rank"} - columns.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}")
    if len({column.shape for column in columns.values()}) > 1 or columns["user"].ndim != 1:
        raise ValueError(f"{path} has columns of different lengths")
    return columns


def _check_same_targets(
    ids: np.ndarray, targets: np.ndarray, other_ids: np.ndarray, other_targets: np.ndarray, other: str
) -> None:
    """ValueError where ids are of another type, or a user that both have was tested on another item."""
    for one, two, what in ((ids, other_ids, "user"), (targets, other_targets, "item")):
        if one.dtype.kind != two.dtype.kind:
            kinds = ["text" if column.dtype.kind in "US" else "numbers" for column in (one, two)]
            raise ValueError(f"its {what} ids are {kinds[0]}, those of {other} {kinds[1]}")
    common = _common(ids, other_ids)
    differ = targets[np.searchsorted(ids, common)] != other_targets[np.searchsorted(other_ids, common)]
    if differ.any():
        raise ValueError(f"{differ.sum():,} of its users have another target than in {other}")


def _common(users: np.ndarray, others: np.ndarray) -> np.ndarray:
    return users if np.array_equal(users, others) else np.intersect1d(users, others)
