"""Tables of a report: one per metric, with spread, published value and test, and one of the cost per run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sasrec_lab.config.convert import flatten
from sasrec_lab.evaluation.list_metrics import is_beyond_accuracy
from sasrec_lab.report.cells import (
    EMPTY_CELL,
    format_difference,
    format_duration,
    format_number,
    format_p,
    format_signed,
    format_value,
    mean_and_std,
)
from sasrec_lab.report.contents import ProtocolReport, Report
from sasrec_lab.report.rows import Comparison, Row, protocol_differences
from sasrec_lab.run.protocol import describe_candidates

_MEAN = "mean ± std over seeds"


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


def all_tables(part: ProtocolReport) -> list[Table]:
    """Return all tables of a protocol's runs."""
    return [*first_tables(part), *further_tables(part)]


def first_tables(part: ProtocolReport) -> list[Table]:
    """Return the table of the first metric, and that of pairs of rows if these are tested."""
    return [*(_metric_table(part, metric) for metric in part.metrics[:1]), *_pairs_table(part)]


def further_tables(part: ProtocolReport) -> list[Table]:
    """Return the tables of the other metrics, that of lists beyond accuracy if measured, and that of the cost."""
    metrics = (_metric_table(part, metric) for metric in part.metrics[1:])
    return [*metrics, *_lists_table(part), _cost_table(part.comparison.rows)]


def protocols_table(report: Report) -> Table | None:
    """Return the keys in which the protocols differ; None if there is only one."""
    if len(report.parts) < 2:
        return None
    differing = protocol_differences([part.comparison for part in report.parts])
    return Table(
        f"{len(report.parts)} protocols, each with its own tables; they differ in",
        ["key", "value (protocols that have it)"],
        [[key, _values_with_protocols(key, each)] for key, each in differing.items()],
    )


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


def _lists_table(part: ProtocolReport) -> list[Table]:
    """Return a table of what the lists of each row show, with a column per metric, if a run has measured it.

    Runs that have not seen the test measure their lists of validation, which have a table of their own.
    """
    tables = []
    for stage, title in {"test": "the test", "val": "validation"}.items():
        known = [name.partition("/") for name in part.comparison.metrics()]
        names = [name for prefix, _, name in known if prefix == stage and is_beyond_accuracy(name)]
        if names:
            rows = [
                [row.label, *(mean_and_std(row.spread(f"{stage}/{name}")) for name in names)]
                for row in part.comparison.rows
            ]
            tables.append(Table(f"lists of {title} beyond accuracy: {_MEAN}", ["row", *names], rows))
    return tables


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
    rows, names = part.by_validation(part.comparison.rows), list(dict.fromkeys([part.monitor, part.metrics[0]]))
    cells = [
        [row.label, str(len(row.runs)), *(format_number(row.spread(name).mean) for name in names)]
        for row in rows[:limit]
    ]
    untrained = [part.untrained(name) for name in names]
    cells += [[name, EMPTY_CELL, *(format_number(values.get(name)) for values in untrained)] for name in untrained[-1]]
    rest = f" ({limit} of {len(rows):,})" if len(rows) > limit else ""
    protocol = part.comparison.protocol
    asked = f", asked at {protocol['query_time']}" if "query_time" in protocol else ""
    name = (f"{part.dataset}, {differing}" if differing else part.dataset) + asked
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
