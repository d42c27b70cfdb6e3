"""Paired sign-flip tests of two rows on the users in ranks.npz or validation_ranks.npz, with Holm's correction.

Each user has one difference: the metric averaged over the row's seeds, minus that of the other row. If the rows were
equal, each sign would be a coin flip; p is the fraction of random sign flips with a sum at least as far from 0 as the
observed one. It generalizes over users, not over seeds.

Shapes: P pairs of rows, M metrics, U users, E test targets, one or more per user.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from sasrec_lab.config.evaluation import BY_USER
from sasrec_lab.evaluation.row_metrics import RankedRows, is_row_metric, user_values
from sasrec_lab.report.records import Run
from sasrec_lab.report.rows import Row
from sasrec_lab.run.folder import RANKS, VALIDATION_RANKS, read_arrays

FLIPS = 10_000
_FILES = {"test/": RANKS, "val/": VALIDATION_RANKS}  # by the start of a metric's name
_SIGNS_PER_CHUNK = 2**22  # 32 MiB of float64


@dataclass(frozen=True)
class PairedTest:
    """The test of one row against another in one metric."""

    difference: float  # mean over users
    margin: float  # half the width of its 95% interval over users
    p: float
    p_holm: float


def compare(
    rows: list[Row], pairs: list[tuple[str, str]], metrics: list[str]
) -> tuple[dict[tuple[str, str, str], PairedTest], list[str]]:
    """Return the tests of pairs of labels by pair and metric, and notes on what was not tested.

    A difference is the first of the pair minus the second. Holm's correction is for all pairs, within each metric.
    Validation metrics are tested if a run has its ranks.
    """
    tests: dict[tuple[str, str, str], PairedTest] = {}
    notes: list[str] = []
    for stage, file in _FILES.items():
        of_stage = [metric for metric in metrics if metric.startswith(stage)]
        if of_stage and (stage == "test/" or any((run.folder / file).exists() for row in rows for run in row.runs)):
            found, why_not = _compare(rows, pairs, of_stage, file)
            tests |= found
            notes += why_not
    return tests, notes


def _compare(
    rows: list[Row], pairs: list[tuple[str, str]], metrics: list[str], file: str
) -> tuple[dict[tuple[str, str, str], PairedTest], list[str]]:
    """Return the tests and notes of the metrics of one stage, whose ranks are in `file`."""
    notes: list[str] = []
    read: dict[str, _UserMetrics] = {}
    for row in rows:
        try:
            found = _read_metrics(row.runs, metrics, file)
            if read:
                first = next(iter(read))
                found.check_same_targets(read[first], first)
            read[row.label] = found
        except ValueError as error:
            notes.append(f"{row.label} is not tested: {error}")
    pairs = [(one, other) for one, other in pairs if one in read and other in read]
    if not pairs:
        return {}, notes
    common = reduce(_common_ids, (each.ids for each in read.values()))
    if any(len(each.ids) != len(common) for each in read.values()):
        notes.append(f"tests use the {len(common):,} users that all rows share")
    values = {label: each.of(common) for label, each in read.items()}
    tests: dict[tuple[str, str, str], PairedTest] = {}
    for number, metric in enumerate(metrics):
        differences = np.stack([values[one][number] - values[other][number] for one, other in pairs])
        kept = ~np.isnan(differences).any(1)  # rows without the metric have NaN
        tested = [pair for pair, has in zip(pairs, kept, strict=True) if has]
        if tested and len(common) > 1:
            tests |= {(*pair, metric): test for pair, test in zip(tested, _test_pairs(differences[kept]), strict=True)}
    return tests, notes


def user_metric(run: Run, ranks: dict[str, np.ndarray], metric: str) -> np.ndarray:
    """Return a metric of each user, in ascending order, shape (U,); NaN if the run lacks the metric.

    `ranks` has the columns of the ranks.npz of the metric's stage. The mean over users is the metric.
    """
    name, _, sampled = metric.partition("/")[2].partition("-sampled")
    column, base = ranks.get("sampled_rank" if sampled else "rank"), name.removesuffix(BY_USER)
    if metric not in run.metrics or column is None or not is_row_metric(base):
        return np.full(len(np.unique(ranks["user"])), math.nan)
    _, firsts, rows = np.unique(ranks.get("row", np.arange(len(column))), return_index=True, return_inverse=True)
    order = np.argsort(rows, kind="stable")
    values = RankedRows(rows[order], column[order].astype(np.int64)).values(base)
    return user_values(name, values, ranks["user"][firsts])


def sign_flip_p(differences: np.ndarray, flips: int = FLIPS) -> np.ndarray:
    """Return the two-sided p of each row of paired differences (P, U); all rows share the same, fixed flips.

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
        sums = 2 * (bits.astype(np.float64) @ differences.T) - differences.sum(1)  # (flips, P)
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


def _test_pairs(differences: np.ndarray) -> list[PairedTest]:
    """Return the test of each pair's differences (P, U)."""
    means = differences.mean(1)
    margins = 1.96 * differences.std(1, ddof=1) / math.sqrt(differences.shape[1])
    p = sign_flip_p(differences)
    return [PairedTest(*map(float, test)) for test in zip(means, margins, p, holm_correction(p), strict=True)]


@dataclass(frozen=True)
class _UserMetrics:
    """Metrics of users, and the targets that they were measured on."""

    ids: np.ndarray  # (U,) raw, sorted
    values: np.ndarray  # (M, U)
    users: np.ndarray  # (E,) raw ids
    targets: np.ndarray  # (E,) raw ids

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return the metrics of some of the users, (M, len(ids))."""
        return self.values[:, np.searchsorted(self.ids, ids)]

    def check_same_targets(self, other: "_UserMetrics", name: str) -> None:
        """Raise ValueError if the raw ids differ in type, or if a user in both has other targets."""
        for one, two, what in ((self.users, other.users, "user"), (self.targets, other.targets, "item")):
            if one.dtype.kind != two.dtype.kind:
                kinds = ["text" if column.dtype.kind in "US" else "numbers" for column in (one, two)]
                raise ValueError(f"its {what} ids are {kinds[0]}, but those of {name} are {kinds[1]}")
        if np.array_equal(self.users, other.users) and np.array_equal(self.targets, other.targets):
            return
        common = _common_ids(self.ids, other.ids)
        items = np.unique(np.concatenate([self.targets, other.targets]))
        differing = np.setxor1d(self._codes(common, items), other._codes(common, items))
        if len(differing):
            users = len(np.unique(differing // len(items)))
            raise ValueError(f"{users:,} of its users have a different target in {name}")

    def _codes(self, ids: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return a number for each pair of user and target, of the users with these ids."""
        kept = np.isin(self.users, ids)
        return np.searchsorted(ids, self.users[kept]) * len(items) + np.searchsorted(items, self.targets[kept])


def _read_metrics(runs: list[Run], metrics: list[str], file: str) -> _UserMetrics:
    """Return the mean over the runs of each user's metrics, of the users that all runs have."""
    read = [_read_run(run, metrics, file) for run in runs]
    for each in read[1:]:
        each.check_same_targets(read[0], f"{runs[0].folder}")
    ids = reduce(_common_ids, (each.ids for each in read))
    return _UserMetrics(ids, np.mean([each.of(ids) for each in read], axis=0), read[0].users, read[0].targets)


def _read_run(run: Run, metrics: list[str], file: str) -> _UserMetrics:
    """Return the metrics of a run's users."""
    ranks = _read_ranks(run.folder / file)
    values = np.stack([user_metric(run, ranks, metric) for metric in metrics])
    return _UserMetrics(np.unique(ranks["user"]), values, ranks["user"], ranks["target"])


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
    kinds = {"user": "iuU", "target": "iuU", "rank": "iu", "sampled_rank": "iu", "row": "iu"}
    if malformed := [name for name in kinds if name in columns and columns[name].dtype.kind not in kinds[name]]:
        raise ValueError(f"{path} has malformed columns: {', '.join(malformed)}")
    return columns


def _common_ids(users: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the sorted ids in both arrays."""
    return users if np.array_equal(users, others) else np.intersect1d(users, others)
