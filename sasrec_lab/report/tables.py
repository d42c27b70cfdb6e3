"""Rows -> tables of text: one a metric, with spread, published value and test; and what the runs took."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import InputError, did_you_mean
from sasrec_lab.report.rows import Comparison, Row, Spread, comparisons, deviation, protocol_differences
from sasrec_lab.report.runs import RunSearch
from sasrec_lab.report.significance import FLIPS, PairedTest, compare
from sasrec_lab.run.protocol import describe_candidates

NONE = "-"


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]  # the first names the rows
    rows: list[list[str]]


@dataclass(frozen=True)
class Part:
    """Everything on the runs of one protocol."""

    comparison: Comparison
    metrics: list[str]  # the first is the one that figures show
    baseline: Row | None
    tests: dict[tuple[str, str], PairedTest]
    notes: list[str]

    @property
    def dataset(self) -> str:
        return self.comparison.protocol["dataset"]

    @property
    def heading(self) -> str:
        return f"{self.dataset}, last item of {self.comparison.protocol['held_out_users']:,} users"

    def legend(self) -> list[str]:
        """How the columns are to be read."""
        rows, lines = self.comparison.rows, []
        if any(len(row.runs) == 1 for row in rows):
            lines.append("n = 1: one seed, so no spread")
        if any(metric in row.published for row in rows for metric in self.metrics):
            lines.append(f"published: {self.comparison.source}; difference: ours less theirs")
            changed = [f"{key}={value}" for key, value in deviation(self.comparison.shared).items()]
            if changed and any(row.published and row.is_named for row in rows):
                lines.append(
                    f"every row here was run with {' '.join(changed)}, which the published ones need not share"
                )
        if self.tests:
            lines.append(
                f"baseline: {self.baseline.label}; vs baseline: mean difference over users, with its 95 % interval;"
                f" p: paired sign-flip test over users ({FLIPS:,} flips), seeds averaged, Holm's correction"
            )
        return lines

    def tables(self) -> list[Table]:
        return [*(_metric_table(self, metric) for metric in self.metrics), _runs_table(self.comparison.rows)]


@dataclass(frozen=True)
class Report:
    found: RunSearch
    parts: list[Part]

    @property
    def protocols(self) -> Table | None:
        """In which keys the protocols differ, where there are several."""
        if len(self.parts) < 2:
            return None
        differing = protocol_differences([part.comparison for part in self.parts])
        return Table(
            f"{len(self.parts)} protocols, which share no table; they differ in",
            ["key", "value (protocols that have it)"],
            [[key, _values(key, each)] for key, each in differing.items()],
        )

    @property
    def headed(self) -> list[tuple[str, Part]]:
        """The parts and their headings, numbered where there are several."""
        if len(self.parts) == 1:
            return [(self.parts[0].heading, self.parts[0])]
        return [(f"{number}: {part.heading}", part) for number, part in enumerate(self.parts, 1)]

    @property
    def without_result(self) -> dict[str, list[str]]:
        """What gave no number, by name."""
        runs: dict[str, list[str]] = {}
        for run in self.found.others:
            runs.setdefault(run.status, []).append(f"{run.folder}" + (f": {run.error}" if run.error else ""))
        lists = {**runs, "missing": self.found.missing, "skipped": self.found.skipped}
        return {name: lines for name, lines in lists.items() if lines}


def build(found: RunSearch, wanted: list[str], baseline: str | None) -> Report:
    """Group, test and check what was asked for.

    Raises:
        InputError: no run has the metric or the row that was asked for.
    """
    compared = comparisons(found.finished, baseline, found.jobs)
    wanted = [metric if "/" in metric else f"test/{metric}" for metric in wanted]
    known = list(dict.fromkeys(metric for part in compared for metric in part.metrics()))
    for metric in wanted if compared else []:
        if metric not in known:
            stage, _, name = metric.partition("/")  # what all names begin with makes none alike
            near = did_you_mean(name, [each.partition("/")[2] for each in known if each.startswith(f"{stage}/")])
            hint = near or f"; there are {', '.join(known)}"
            raise InputError(f"--metric {metric}: no run has it{hint}")
    labels = list(dict.fromkeys(row.label for part in compared for row in part.rows))
    if compared and baseline is not None and not any(part.row(baseline) for part in compared):
        hint = did_you_mean(baseline, labels) or "; the rows are " + ", ".join(labels[:20])
        raise InputError(f"--baseline {baseline}: no row has this name{hint}")
    return Report(found, [_part(comparison, wanted, baseline or "default") for comparison in compared])


def _part(comparison: Comparison, wanted: list[str], baseline: str) -> Part:
    metrics = [metric for metric in wanted if metric in comparison.metrics()] or _usual_metrics(comparison)
    row = comparison.row(baseline)
    others = [other for other in comparison.rows if other is not row]
    notes = list(comparison.notes)
    if lacking := [metric for metric in wanted if metric not in metrics]:
        notes.append(f"no run under this protocol has {', '.join(lacking)}")
    if row is None and len(others) > 1:
        notes.append(f"no row {baseline}, so nothing is tested; --baseline names the row to test against")
    tests, untested = compare(row, others, metrics) if row and others else ({}, [])
    return Part(comparison, metrics, row, tests, notes + untested)


def _usual_metrics(comparison: Comparison) -> list[str]:
    """NDCG and recall at 10 or the first cut, as the checkpoint was chosen first: sampled, or among all items."""
    evaluation = comparison.rows[0].runs[0].config["evaluation"]
    cut = 10 if 10 in evaluation["k"] else evaluation["k"][0]
    endings = ["", f"-sampled{evaluation['sampled']}"] if evaluation["sampled"] else [""]
    if "-sampled" in evaluation["monitor"]:
        endings.reverse()
    names = [f"test/{name}@{cut}{ending}" for ending in endings for name in ("ndcg", "recall")]
    return [name for name in names if name in comparison.metrics()]


def _metric_table(part: Part, metric: str) -> Table:
    comparison, baseline = part.comparison, part.baseline
    spreads = {row.label: row.spread(metric) for row in comparison.rows}
    columns: dict[str, Callable[[Row], str]] = {
        "row": lambda row: row.label,
        "n": lambda row: str(spreads[row.label].n),
        "mean ± std": lambda row: mean_and_std(spreads[row.label]),
    }
    if any(metric in row.published for row in comparison.rows):
        columns["published"] = lambda row: _number(row.published.get(metric))
        columns["difference"] = lambda row: _signed(difference(row, metric))
    tests = {row: test for (row, name), test in part.tests.items() if name == metric}
    if tests and baseline:
        columns["vs baseline"] = lambda row: (
            f"{tests[row.label].difference:+z.4f} ± {tests[row.label].margin:.4f}" if row.label in tests else NONE
        )
        columns["p"] = lambda row: _p(tests[row.label].p_holm) if row.label in tests else NONE
    rows = [[cell(row) for cell in columns.values()] for row in comparison.rows]
    popularity = comparison.rows[0].runs[0].popularity.get(metric)
    if popularity is not None:
        rows.append(["popularity", NONE, _number(popularity), *[NONE] * (len(columns) - 3)])
    return Table(f"{metric}: {describe_candidates(comparison.protocol, metric)}", list(columns), rows)


def _runs_table(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        epochs, best = row.mean(lambda run: run.epochs), row.mean(lambda run: run.best_epoch)
        parameters = f"{row.runs[0].parameters:,}"
        seeds = ",".join(str(run.seed) for run in row.runs)
        best = NONE if math.isnan(best) else f"{best:.0f}"
        cells.append([row.label, seeds, f"{epochs:.0f}", best, clock(row.mean(lambda run: run.seconds)), parameters])
    return Table(
        "What it took, a run (mean over seeds)", ["row", "seeds", "epochs", "best", "training", "parameters"], cells
    )


def difference(row: Row, metric: str) -> float | None:
    """To the published value."""
    spread = row.spread(metric)
    return spread.mean - row.published[metric] if metric in row.published and spread.n else None


def mean_and_std(spread: Spread) -> str:
    return _number(spread.mean if spread.n else None) + (f" ± {spread.std:.4f}" if spread.std is not None else "")


def clock(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+z.4f}"


def protocol_table(comparison: Comparison) -> Table:
    return Table(
        "Protocol",
        ["key", "value"],
        [[key, str(value)] for key, value in flatten(comparison.protocol, joint=".").items()],
    )


def _values(key: str, each: list[Any]) -> str:
    """`5 (1, 3); 0 (2)`: each value once, however many protocols there are."""
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(each, 1):
        numbers.setdefault(_value(key, value), []).append(number)
    return "; ".join(f"{value} ({', '.join(map(str, having))})" for value, having in numbers.items())


def _value(key: str, value: Any) -> str:
    return value[:12] if key == "sha256" and value else NONE if value is None else str(value)
