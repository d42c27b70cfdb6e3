"""The contents of a report: the rows of each protocol, their tests against a baseline, and what has no results."""

import math
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import isfinite

from sasrec_lab.config.evaluation import is_lower_better
from sasrec_lab.errors import InputError, did_you_mean, first_few, nearest
from sasrec_lab.report.cells import SIGNIFICANT
from sasrec_lab.report.rows import DEFAULT, Comparison, Row, Spread, changed_overrides, comparisons
from sasrec_lab.report.runs import RunSearch
from sasrec_lab.report.searches import SearchRecord
from sasrec_lab.report.significance import FLIPS, PairedTest, compare
from sasrec_lab.run.protocol import LEAK, describe_test

_MAX_PAIRED = 8  # rows that are tested in pairs; more would make an unreadable table and weak tests


@dataclass(frozen=True)
class ProtocolReport:
    """Everything reported about the runs of one protocol."""

    comparison: Comparison
    metrics: list[str]  # figures show the first
    baseline: Row | None
    tests: dict[tuple[str, str, str], PairedTest]  # by labels of row and compared row, metric
    notes: list[str]
    searches: list[SearchRecord]  # whose trials are among the runs
    best_by: str | None = None  # the validation metric that the user chose to compare rows by

    @property
    def monitor(self) -> str:
        """Return the validation metric by which rows are compared to choose one: that which chose the checkpoints."""
        return self.best_by or self.comparison.rows[0].runs[0].monitor

    @property
    def best(self) -> Row | None:
        """Return the row that is best on validation, or None if fewer than two rows were validated.

        Test metrics choose nothing: the best of many test results would be too good.
        """
        validated = [row for row in self.comparison.rows if not math.isnan(row.spread(self.monitor).mean)]
        return self.by_validation(validated)[0] if len(validated) > 1 else None

    def by_validation(self, rows: list[Row]) -> list[Row]:
        """Return rows from the best on validation to the worst; rows without validation are last."""
        sign = 1 if is_lower_better(self.monitor) else -1

        def worth(row: Row) -> float:
            mean = row.spread(self.monitor).mean
            return math.inf if math.isnan(mean) else sign * mean

        return sorted(rows, key=worth)

    def untrained(self, metric: str) -> dict[str, float]:
        """Return the metric of popularity and other baselines without training, which are the same for all rows."""
        values: dict[str, float] = {}
        for run in chain.from_iterable(row.runs for row in self.comparison.rows):
            values = {name: each[metric] for name, each in run.baselines.items() if metric in each} | values
        return values

    def test(self, row: Row, metric: str) -> PairedTest | None:
        """Return the test of the row against the baseline, if there is one."""
        return self.tests.get((row.label, self.baseline.label, metric)) if self.baseline else None

    def is_significant(self, row: Row, metric: str) -> bool:
        """Return whether the row differs from the baseline at 5%, corrected for the number of rows."""
        test = self.test(row, metric)
        return test is not None and test.p_holm <= SIGNIFICANT

    @property
    def dataset(self) -> str:
        """Return the name of the data set."""
        return str(self.comparison.protocol["dataset"])

    @property
    def heading(self) -> str:
        """Return the data set and what was held out."""
        return f"{self.dataset}, {describe_test(self.comparison.protocol)}"

    def _cold_lines(self, metric: str) -> list[str]:
        """Return a line on cold test targets and, of each row, one with its metric of these and of the others."""
        lines: list[str] = []
        for row in self.comparison.rows:
            groups = {
                name: [
                    run.cold_targets[name]
                    for run in row.runs
                    if {"targets", metric} <= run.cold_targets.get(name, {}).keys()
                ]
                for name in ("cold", "known")
            }
            if not all(groups.values()):
                continue
            if not lines:
                cold, known = (int(found[0]["targets"]) for found in groups.values())
                lines.append(f"cold: {cold:,} of {cold + known:,} test targets are items that training does not have")
            cold_mean, known_mean = (
                math.fsum(each[metric] for each in found) / len(found) for found in groups.values()
            )
            lines.append(f"{metric} of {row.label}: cold targets {cold_mean:.4f}, the others {known_mean:.4f}")
        return lines

    def _tried_lines(self, best: Row) -> list[str]:
        """Return a line on all rows, from which one was chosen: their number, and the mean of the first metric."""
        if not self.metrics:
            return []
        metric = self.metrics[0]
        means = Spread.from_values([mean for row in self.comparison.rows if isfinite(mean := row.spread(metric).mean)])
        if means.std is None:
            return []
        return [
            f"{metric} of the {means.n} settings tried: mean {means.mean:.4f} ± {means.std:.4f}; best on validation"
            f" ({best.label}): {best.spread(metric).mean:.4f}"
        ]

    def legend(self) -> list[str]:
        """Return lines that explain the columns."""
        rows, lines = self.comparison.rows, []
        if any(len(row.runs) == 1 for row in rows):
            lines.append("n = 1: one seed, so no spread")
        if any(metric in row.published for row in rows for metric in self.metrics):
            lines.append(f"published: {'; '.join(self.comparison.sources)}; difference: ours minus published")
            changed = [f"{key}={value}" for key, value in changed_overrides(self.comparison.shared).items()]
            if changed and any(row.published and row.is_named for row in rows):
                lines.append(f"every row here was run with {' '.join(changed)}; the published rows may differ in that")
        if leak := self.comparison.protocol.get(LEAK):
            lines.append(f"leak: {leak:.1%} of the test targets are not later than the latest training interaction")
        lines += self._cold_lines(self.metrics[0]) if self.metrics else []
        lines += [search.describe() for search in self.searches]
        if self.best:
            extreme = "lowest" if is_lower_better(self.monitor) else "highest"
            lines.append(f"best: {extreme} mean of {self.monitor}, on validation")
            lines += self._tried_lines(self.best)
        if self.tests:
            compared = f"baseline: {self.baseline.label}; vs baseline" if self.baseline else "pairs"
            lines.append(
                f"{compared}: mean difference over users, ± half its 95% interval; p: paired sign-flip test over users"
                f" ({FLIPS:,} flips), seeds averaged, with Holm's correction; *: p ≤ {SIGNIFICANT}"
            )
        return lines


@dataclass(frozen=True)
class Report:
    """The report on all runs found, one part per protocol."""

    found: RunSearch
    parts: list[ProtocolReport]

    @property
    def titled_parts(self) -> list[tuple[str, ProtocolReport]]:
        """Return the parts with their headings, numbered if there are several."""
        if len(self.parts) == 1:
            return [(self.parts[0].heading, self.parts[0])]
        return [(f"{number}: {part.heading}", part) for number, part in enumerate(self.parts, 1)]

    @property
    def without_result(self) -> dict[str, list[str]]:
        """Return what has no results, as lines by status."""
        runs: dict[str, list[str]] = {}
        for run in self.found.others:
            runs.setdefault(run.status, []).append(f"{run.folder}" + (f": {run.error}" if run.error else ""))
        lists = {**runs, "missing": self.found.missing, "skipped": self.found.skipped}
        return {name: lines for name, lines in lists.items() if lines}


def build_report(
    found: RunSearch,
    wanted: list[str],
    baseline: str | None,
    *,
    best_by: str | None = None,
    with_tests: bool = True,
) -> Report:
    """Group the runs found, and test each row against the baseline's in the wanted metrics.

    `best_by` is the validation metric that says which row is best; without it, the one that chose the checkpoints.

    Raises:
        InputError: no run has a wanted metric, no row has the baseline's label, or `best_by` is not of validation.
    """
    if best_by is not None and not best_by.startswith("val/"):
        raise InputError(
            f"--best-by {best_by} must be a metric of validation, because the best of many test results would be too"
            f" good; use --best-by val/{best_by.rpartition('/')[2]}"
        )
    compared = comparisons(found.finished, baseline, found.jobs)
    wanted = [metric if "/" in metric else f"test/{metric}" for metric in wanted]
    if compared:
        _check_metrics("--metric", wanted, compared)
        _check_metrics("--best-by", [best_by] if best_by else [], compared)
        _check_baseline(baseline, compared)
    parts = [_protocol_report(comparison, found.searches, wanted, baseline, with_tests) for comparison in compared]
    return Report(found, [replace(part, best_by=best_by) for part in parts])


def _check_metrics(option: str, wanted: list[str], compared: list[Comparison]) -> None:
    """Raise InputError if no run has one of the metrics wanted with an option."""
    known = list(dict.fromkeys(metric for comparison in compared for metric in comparison.metrics()))
    if option == "--best-by":
        known = [metric for metric in known if metric.startswith("val/")]
    for metric in wanted:
        if metric not in known:
            # names are compared without their stage, which would make all of them similar
            stage, _, name = metric.partition("/")
            options = {each.partition("/")[2]: each for each in known if each.startswith(f"{stage}/")}
            options = options or {each: each for each in known}
            suggestion = nearest(name.lower(), options)
            hint = f"did you mean {options[suggestion]}?" if suggestion else f"choose from {first_few(known, 12)}"
            raise InputError(f"{option} {metric}: no run has this metric; {hint}")


def _check_baseline(label: str | None, compared: list[Comparison]) -> None:
    """Raise InputError if a baseline is given and no row has its label."""
    if label is not None and not any(comparison.row(label) for comparison in compared):
        labels = list(dict.fromkeys(row.label for comparison in compared for row in comparison.rows))
        hint = did_you_mean(label, labels) or "; choose from " + ", ".join(labels[:20])
        raise InputError(f"--baseline {label}: no row has this name{hint}")


def _protocol_report(
    comparison: Comparison, searches: list[SearchRecord], wanted: list[str], baseline: str | None, with_tests: bool
) -> ProtocolReport:
    """Test the rows of one protocol against the baseline, and note what is not tested.

    If no row is named as the baseline or called `default`, a few rows are tested in pairs, in the first metric; of two
    rows the first is the baseline.
    """
    metrics = [metric for metric in wanted if metric in comparison.metrics()] or _default_metrics(comparison)
    row = comparison.row(baseline or DEFAULT)
    if row is None and baseline is None and len(comparison.rows) == 2:
        row = comparison.rows[0]
    tested = metrics
    if row:
        pairs = [(other.label, row.label) for other in comparison.rows if other is not row]
    elif len(comparison.rows) <= _MAX_PAIRED and baseline is None:
        pairs, tested = [(other.label, one.label) for one, other in combinations(comparison.rows, 2)], metrics[:1]
    else:
        pairs = []
    notes = list(comparison.notes)
    if lacking := [metric for metric in wanted if metric not in metrics]:
        notes.append(f"no run under this protocol has {', '.join(lacking)}")
    if not pairs and len(comparison.rows) > 1:
        notes.append(f"no row named {baseline or DEFAULT}, so nothing is tested; choose a baseline row with --baseline")
    tests, untested = compare(comparison.rows, pairs, tested) if pairs and with_tests else ({}, [])
    folders = {run.folder.parent for row in comparison.rows for run in row.runs}
    own_searches = [search for search in searches if search.folder in folders]
    return ProtocolReport(comparison, metrics, row, tests, notes + untested, own_searches)


def _default_metrics(comparison: Comparison) -> list[str]:
    """Return NDCG and recall at 10 or the first cutoff, first on the candidates that chose the checkpoint.

    They are of the test or, if no run has seen it, of validation.
    """
    evaluation = comparison.rows[0].runs[0].config["evaluation"]
    cutoff = 10 if 10 in evaluation["k"] else evaluation["k"][0]
    suffixes = ["", f"-sampled{evaluation['sampled']}"] if evaluation["sampled"] else [""]
    if "-sampled" in evaluation["monitor"]:
        suffixes.reverse()
    names = [f"{name}@{cutoff}{suffix}" for suffix in suffixes for name in ("ndcg", "recall")]
    known = comparison.metrics()
    tested = [f"test/{name}" for name in names if f"test/{name}" in known]
    return tested or [f"val/{name}" for name in names if f"val/{name}" in known]
