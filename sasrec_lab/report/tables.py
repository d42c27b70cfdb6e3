"""Tables of a report: one per metric, with spread, published value and test, and one of the cost per run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import InputError, did_you_mean, first_few, nearest
from sasrec_lab.report.cells import (
    EMPTY_CELL,
    SIGNIFICANT,
    format_difference,
    format_duration,
    format_number,
    format_p,
    format_signed,
    format_value,
    mean_and_std,
)
from sasrec_lab.report.rows import (
    DEFAULT,
    Comparison,
    Row,
    changed_overrides,
    comparisons,
    protocol_differences,
)
from sasrec_lab.report.runs import RunSearch
from sasrec_lab.report.significance import FLIPS, PairedTest, compare
from sasrec_lab.run.protocol import LEAK, describe_candidates, describe_test

_MEAN = "mean ± std over seeds"
_MAX_PAIRED = 8  # rows that are tested in pairs; more would make an unreadable table and weak tests


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: list[str]  # the first names the rows
    rows: list[list[str]]

    @property
    def has_numbers(self) -> bool:
        """Return whether the columns after the first contain numbers, as in a table of rows of runs."""
        return self.columns[0] in ("row", "pair")


@dataclass(frozen=True)
class ProtocolReport:
    """Everything reported about the runs of one protocol."""

    comparison: Comparison
    metrics: list[str]  # figures show the first
    baseline: Row | None
    tests: dict[tuple[str, str, str], PairedTest]  # by labels of row and compared row, metric
    notes: list[str]

    @property
    def monitor(self) -> str:
        """Return the validation metric that chose the checkpoints, and by which rows are compared to choose one."""
        return self.comparison.rows[0].runs[0].monitor

    @property
    def best(self) -> Row | None:
        """Return the row that is best on validation, or None if fewer than two rows were validated.

        Test metrics choose nothing: the best of many test results would be too good.
        """
        validated = [row for row in self.comparison.rows if not math.isnan(row.spread(self.monitor).mean)]
        return max(validated, key=self._validation) if len(validated) > 1 else None

    def by_validation(self, rows: list[Row]) -> list[Row]:
        """Return rows from the best on validation to the worst; rows without validation are last."""
        return sorted(rows, key=lambda row: -self._validation(row))

    def _validation(self, row: Row) -> float:
        mean = row.spread(self.monitor).mean
        return -math.inf if math.isnan(mean) else mean

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
        if self.best:
            lines.append(f"best: highest mean of {self.monitor}, on validation")
        if self.tests:
            compared = f"baseline: {self.baseline.label}; vs baseline" if self.baseline else "pairs"
            lines.append(
                f"{compared}: mean difference over users, ± half its 95% interval; p: paired sign-flip test over users"
                f" ({FLIPS:,} flips), seeds averaged, with Holm's correction; *: p ≤ {SIGNIFICANT}"
            )
        return lines

    def first_tables(self) -> list[Table]:
        """Return the table of the first metric, and that of pairs of rows if these are tested."""
        return [*(_metric_table(self, metric) for metric in self.metrics[:1]), *_pairs_table(self)]

    def further_tables(self) -> list[Table]:
        """Return the tables of the other metrics, and that of the cost."""
        return [*(_metric_table(self, metric) for metric in self.metrics[1:]), _cost_table(self.comparison.rows)]

    def tables(self) -> list[Table]:
        """Return all tables."""
        return [*self.first_tables(), *self.further_tables()]


@dataclass(frozen=True)
class Report:
    """The report on all runs found, one part per protocol."""

    found: RunSearch
    parts: list[ProtocolReport]

    @property
    def protocols_table(self) -> Table | None:
        """Return the keys in which the protocols differ; None if there is only one."""
        if len(self.parts) < 2:
            return None
        differing = protocol_differences([part.comparison for part in self.parts])
        return Table(
            f"{len(self.parts)} protocols, each with its own tables; they differ in",
            ["key", "value (protocols that have it)"],
            [[key, _values_with_protocols(key, each)] for key, each in differing.items()],
        )

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


def build_report(found: RunSearch, wanted: list[str], baseline: str | None, *, with_tests: bool = True) -> Report:
    """Group the runs found, and test each row against the baseline's in the wanted metrics.

    Raises:
        InputError: no run has a wanted metric, or no row has the baseline's label.
    """
    compared = comparisons(found.finished, baseline, found.jobs)
    wanted = [metric if "/" in metric else f"test/{metric}" for metric in wanted]
    if compared:
        _check_metrics(wanted, compared)
        _check_baseline(baseline, compared)
    return Report(found, [_protocol_report(comparison, wanted, baseline, with_tests) for comparison in compared])


def _check_metrics(wanted: list[str], compared: list[Comparison]) -> None:
    """Raise InputError if no run has one of the wanted metrics."""
    known = list(dict.fromkeys(metric for comparison in compared for metric in comparison.metrics()))
    for metric in wanted:
        if metric not in known:
            # names are compared without their stage, which would make all of them similar
            stage, _, name = metric.partition("/")
            options = {each.partition("/")[2]: each for each in known if each.startswith(f"{stage}/")}
            options = options or {each: each for each in known}
            suggestion = nearest(name.lower(), options)
            hint = f"did you mean {options[suggestion]}?" if suggestion else f"choose from {first_few(known, 12)}"
            raise InputError(f"--metric {metric}: no run has this metric; {hint}")


def _check_baseline(label: str | None, compared: list[Comparison]) -> None:
    """Raise InputError if a baseline is given and no row has its label."""
    if label is not None and not any(comparison.row(label) for comparison in compared):
        labels = list(dict.fromkeys(row.label for comparison in compared for row in comparison.rows))
        hint = did_you_mean(label, labels) or "; choose from " + ", ".join(labels[:20])
        raise InputError(f"--baseline {label}: no row has this name{hint}")


def _protocol_report(
    comparison: Comparison, wanted: list[str], baseline: str | None, with_tests: bool
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
    return ProtocolReport(comparison, metrics, row, tests, notes + untested)


def _default_metrics(comparison: Comparison) -> list[str]:
    """Return NDCG and recall at 10 or the first cutoff, first on the candidates that chose the checkpoint."""
    evaluation = comparison.rows[0].runs[0].config["evaluation"]
    cutoff = 10 if 10 in evaluation["k"] else evaluation["k"][0]
    suffixes = ["", f"-sampled{evaluation['sampled']}"] if evaluation["sampled"] else [""]
    if "-sampled" in evaluation["monitor"]:
        suffixes.reverse()
    names = [f"test/{name}@{cutoff}{suffix}" for suffix in suffixes for name in ("ndcg", "recall")]
    return [name for name in names if name in comparison.metrics()]


def _metric_table(part: ProtocolReport, metric: str) -> Table:
    """Return a line per row of runs: its mean, and if available the published value and the test."""
    comparison = part.comparison
    spreads = {row.label: row.spread(metric) for row in comparison.rows}
    has_validation = part.best is not None and metric != part.monitor
    columns: dict[str, Callable[[Row], str]] = {"row": lambda row: row.label}
    if len({row.runs[0].model for row in comparison.rows}) > 1:
        columns["model"] = lambda row: row.runs[0].model
    columns["n"] = lambda row: str(spreads[row.label].n)
    if has_validation:
        columns[part.monitor] = lambda row: (
            f"{'best ' * (row is part.best)}{format_number(row.spread(part.monitor).mean)}"
        )
    columns[_MEAN] = lambda row: mean_and_std(spreads[row.label])
    if any(metric in row.published for row in comparison.rows):
        columns["published"] = lambda row: format_number(row.published.get(metric))
        columns["difference"] = lambda row: format_signed(difference_to_published(row, metric))
    tests = {row.label: test for row in comparison.rows if (test := part.test(row, metric))}
    if tests:
        columns["vs baseline ± 95% over users"] = lambda row: format_difference(tests.get(row.label))
        columns["p"] = lambda row: format_p(tests.get(row.label))
    rows = [[cell(row) for cell in columns.values()] for row in comparison.rows]
    validation = part.untrained(part.monitor)
    for name, value in part.untrained(metric).items():
        cells = {"row": name, part.monitor: format_number(validation.get(name)), _MEAN: format_number(value)}
        rows.append([cells.get(column, EMPTY_CELL) for column in columns])
    return Table(f"{metric}: {describe_candidates(comparison.protocol, metric)}", list(columns), rows)


def _pairs_table(part: ProtocolReport) -> list[Table]:
    """Return a table with a line per pair of rows, if rows are tested in pairs."""
    if part.baseline is not None or not part.tests:
        return []
    cells = [
        [f"{label} minus {other}", format_difference(test), format_p(test)]
        for (label, other, _), test in part.tests.items()
    ]
    title = f"{part.metrics[0]} in pairs: each row minus each one above it"
    return [Table(title, ["pair", "difference ± 95% over users", "p"], cells)]


def short_table(part: ProtocolReport, limit: int, differing: str = "") -> Table | None:
    """Return the first metric's means of the rows best on validation, and of baselines; None without a metric.

    `differing` are the overrides that only this protocol has.
    """
    if not part.metrics:
        return None
    names, rows = [part.monitor, part.metrics[0]], part.by_validation(part.comparison.rows)
    cells = [
        [row.label, str(len(row.runs)), *(format_number(row.spread(name).mean) for name in names)]
        for row in rows[:limit]
    ]
    validation, test = map(part.untrained, names)
    cells += [
        [name, EMPTY_CELL, format_number(validation.get(name)), format_number(value)] for name, value in test.items()
    ]
    rest = f" ({limit} of {len(rows):,})" if len(rows) > limit else ""
    name = f"{part.dataset}, {differing}" if differing else part.dataset
    title = f"{name}: mean over seeds, the rows best on {part.monitor} first{rest}"
    return Table(title, ["row", "n", *names], cells)


def _cost_table(rows: list[Row]) -> Table:
    """Return what a run of each row took: epochs, time, parameters."""
    cells = []
    for row in rows:
        epochs, best = row.epochs, row.mean(lambda run: run.best_epoch)
        parameters = f"{row.runs[0].parameters:,}"
        seeds = ",".join(str(run.seed) for run in row.runs)
        trained = EMPTY_CELL if math.isnan(epochs) else f"{epochs:.0f}"
        best_epoch = EMPTY_CELL if math.isnan(best) else f"{best + 1:.0f}"  # recorded from 0
        duration = format_duration(row.mean(lambda run: run.seconds))
        cells.append([row.label, seeds, trained, best_epoch, duration, parameters])
    listed = "seeds" if any(len(row.runs) > 1 for row in rows) else "seed"
    columns = ["row", listed, "epochs", "best epoch", "training", "parameters"]
    return Table("Cost per run (mean over seeds)", columns, cells)


def difference_to_published(row: Row, metric: str) -> float | None:
    """Return a row's mean minus the published value, None without one of the two."""
    spread = row.spread(metric)
    return spread.mean - row.published[metric] if metric in row.published and spread.n else None


def protocol_table(comparison: Comparison) -> Table:
    """Return every key of a protocol with its value."""
    return Table(
        "Protocol",
        ["key", "value"],
        [[key, str(value)] for key, value in flatten(comparison.protocol, separator=".").items()],
    )


def _values_with_protocols(key: str, each: list[Any]) -> str:
    """Return each distinct value with the numbers of the protocols that have it, such as `5 (1, 3); 0 (2)`."""
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(each, 1):
        numbers.setdefault(format_value(key, value), []).append(number)
    return "; ".join(f"{value} ({', '.join(map(str, protocols))})" for value, protocols in numbers.items())
