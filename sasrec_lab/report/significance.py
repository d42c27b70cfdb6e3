"""Paired sign-flip tests of rows against the baseline on the users in ranks.npz, with Holm's correction.

Each user has one difference: the metric averaged over the row's seeds, minus that of the baseline. If the rows were
equal, each sign would be a coin flip; p is the fraction of random sign flips with a sum at least as far from 0 as the
observed one. It generalizes over users, not over seeds.

Shapes: R rows, M metrics, U users.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from sasrec_lab.config.schema import GAINS
from sasrec_lab.report.records import Run
from sasrec_lab.report.rows import Row
from sasrec_lab.run.folder import read_arrays

FLIPS = 10_000
_SIGNS_PER_CHUNK = 2**22  # 32 MiB of float64


@dataclass(frozen=True)
class PairedTest:
    """The test of one row against the baseline in one metric."""

    difference: float  # mean over users
    margin: float  # half the width of its 95% interval over users
    p: float
    p_holm: float


def compare(baseline: Row, rows: list[Row], metrics: list[str]) -> tuple[dict[tuple[str, str], PairedTest], list[str]]:
    """Return the tests by row label and metric, and notes on what was not tested; Holm corrects within each metric."""
    notes = []
    users: dict[str, np.ndarray] = {}
    targets: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
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
    common = reduce(_common_ids, users.values())
    if any(len(ids) != len(common) for ids in users.values()):
        notes.append(f"tests use the {len(common):,} users that all rows share")
    aligned = {label: values[label][:, np.searchsorted(users[label], common)] for label in values}
    tested = [row.label for row in rows if row.label in aligned]
    tests: dict[tuple[str, str], PairedTest] = {}
    for number, metric in enumerate(metrics):
        differences = np.stack([aligned[label][number] - aligned[baseline.label][number] for label in tested])
        kept = ~np.isnan(differences).any(1)  # rows without the metric have NaN
        labels = [label for label, has in zip(tested, kept, strict=True) if has]
        if labels and len(common) > 1:
            tests |= {(label, metric): test for label, test in zip(labels, _test_rows(differences[kept]), strict=True)}
    return tests, notes


def user_metric(run: Run, ranks: dict[str, np.ndarray], metric: str) -> np.ndarray:
    """Return a test metric of each user from their target's rank, shape (U,); NaN if the run lacks the metric."""
    name, _, sampled = metric.removeprefix("test/").partition("-sampled")
    column = ranks.get("sampled_rank" if sampled else "rank")
    kind, _, cutoff = name.partition("@")
    if metric not in run.metrics or not metric.startswith("test/") or column is None or kind not in GAINS:
        return np.full(len(ranks["user"]), math.nan)
    hit = (column > 0) & (column <= (int(cutoff) if cutoff else np.inf))
    return np.where(hit, GAINS[kind](np, np.where(hit, column, 1)), 0.0)


def sign_flip_p(differences: np.ndarray, flips: int = FLIPS) -> np.ndarray:
    """Return the two-sided p of each row of paired differences (R, U); all rows share the same, fixed flips.

    If no flip reaches the observed sum, Hoeffding's bound on the probability replaces 1 / (flips + 1) when it is
    smaller. Without it Holm's correction over hundreds of rows would leave no p small.
    """
    differences = differences[:, differences.any(0)]  # flipping a difference of 0 changes nothing
    count, observed = differences.shape[1], np.abs(differences.sum(1))
    threshold = observed - 1e-12 * np.abs(differences).sum(1)  # summing in another order may round an equal sum down
    rng, reached = np.random.default_rng(0), np.zeros(len(differences))
    step = max(1, _SIGNS_PER_CHUNK // max(1, count))
    for begin in range(0, flips, step):
        shape = (min(step, flips - begin), count)
        bits = np.unpackbits(rng.integers(0, 256, (shape[0], -(-count // 8)), dtype=np.uint8), axis=1, count=count)
        sums = 2 * (bits.astype(np.float64) @ differences.T) - differences.sum(1)  # (flips, R)
        reached += (np.abs(sums) >= threshold).sum(0)
    p = (reached + 1) / (flips + 1)
    bound = 2 * np.exp(-(observed**2) / (2 * np.maximum((differences**2).sum(1), np.finfo(float).tiny)))
    return np.where(reached == 0, np.minimum(p, bound), p)


def holm_correction(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values with Holm's step-down correction for testing all of them."""
    order = np.argsort(p)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * factors))
    return corrected


def _test_rows(differences: np.ndarray) -> list[PairedTest]:
    """Return the test of each row of differences (R, U)."""
    means = differences.mean(1)
    margins = 1.96 * differences.std(1, ddof=1) / math.sqrt(differences.shape[1])
    p = sign_flip_p(differences)
    return [PairedTest(*map(float, test)) for test in zip(means, margins, p, holm_correction(p), strict=True)]


def _user_metrics(runs: list[Run], metrics: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted raw ids of users (U,), their targets (U,), and each metric's mean over the runs (M, U)."""
    ids, targets, values = [], [], []
    for run in runs:
        ranks = _read_ranks(run.folder / "ranks.npz")
        order = np.argsort(ranks["user"], kind="stable")
        ids.append(ranks["user"][order])
        targets.append(ranks["target"][order])
        _check_same_targets(ids[-1], targets[-1], ids[0], targets[0], f"{runs[0].folder}")
        values.append(np.stack([user_metric(run, ranks, metric) for metric in metrics])[:, order])
    common = reduce(_common_ids, ids)
    each = [value[:, np.searchsorted(users, common)] for users, value in zip(ids, values, strict=True)]
    return common, targets[0][np.searchsorted(ids[0], common)], np.mean(each, axis=0)


def _read_ranks(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a ranks.npz; raise ValueError, in one line, if it is missing or malformed."""
    try:
        columns = read_arrays(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if lacking := {"user", "target", "rank"} - columns.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}")
    if len({column.shape for column in columns.values()}) > 1 or columns["user"].ndim != 1:
        raise ValueError(f"{path} has columns of different lengths")
    kinds = {"user": "iuU", "target": "iuU", "rank": "iu", "sampled_rank": "iu"}
    if malformed := [name for name in kinds if name in columns and columns[name].dtype.kind not in kinds[name]]:
        raise ValueError(f"{path} has malformed columns: {', '.join(malformed)}")
    return columns


def _check_same_targets(
    ids: np.ndarray, targets: np.ndarray, other_ids: np.ndarray, other_targets: np.ndarray, other: str
) -> None:
    """Raise ValueError if ids differ in type, or if a user in both has different targets."""
    for one, two, what in ((ids, other_ids, "user"), (targets, other_targets, "item")):
        if one.dtype.kind != two.dtype.kind:
            kinds = ["text" if column.dtype.kind in "US" else "numbers" for column in (one, two)]
            raise ValueError(f"its {what} ids are {kinds[0]}, but those of {other} are {kinds[1]}")
    common = _common_ids(ids, other_ids)
    differ = targets[np.searchsorted(ids, common)] != other_targets[np.searchsorted(other_ids, common)]
    if differ.any():
        raise ValueError(f"{differ.sum():,} of its users have a different target in {other}")


def _common_ids(users: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the sorted ids in both arrays."""
    return users if np.array_equal(users, others) else np.intersect1d(users, others)
