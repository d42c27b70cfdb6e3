"""Text formats of a report: plain text, Markdown, LaTeX, and CSV with every number in full precision."""

import csv
import io
import re
from collections.abc import Callable

from sasrec_lab.report.rows import Row
from sasrec_lab.report.tables import ProtocolReport, Report, Table, difference_to_published

_LATEX_ESCAPES = {
    **{letter: f"\\{letter}" for letter in "_%&#$"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "{": r"\{",
    "}": r"\}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
}
_COLUMNS = ["protocol", "dataset", "row", "metric", "n", "seeds", "mean", "std", "published", "difference"]
_COLUMNS += ["baseline", "vs_baseline", "margin_95", "p", "p_holm"]
_COLUMNS += ["training_seconds", "parameters", "epochs", "best_epoch"]


def plain_text(report: Report) -> str:
    """Return the report for a terminal."""
    return _document(report, _plain_table, lambda text, level: f"{text}\n{('=', '-')[level] * len(text)}", "  ")


def markdown(report: Report) -> str:
    """Return the report in Markdown."""
    return _document(report, _markdown_table, lambda text, level: f"{'##'[: level + 1]} {text}", "- ") + "\n"


def latex(report: Report) -> str:
    """Return the report for `\\input`, with the package booktabs: tables, legends below them, notes as comments."""
    blocks = ["% needs \\usepackage{booktabs}"]
    blocks += [_latex_table(report.protocols_table, "", [])] if report.protocols_table else []
    for heading, part in report.titled_parts:
        shared = [f"every row: {format_overrides(part.comparison.shared)}"] if part.comparison.shared else []
        blocks.append("\n".join(f"% {' '.join(line.split())}" for line in [heading, *shared, *part.notes]))
        first, *rest = part.tables()
        blocks.append(_latex_table(first, heading, part.legend()))
        blocks += [_latex_table(table, heading, []) for table in rest]
    return "\n\n".join(blocks) + "\n"


def csv_text(report: Report) -> str:
    """Return one line per protocol, row and metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for number, part in enumerate(report.parts, 1):
        for row in part.comparison.rows:
            for metric in part.comparison.metrics():
                if row.spread(metric).n:
                    writer.writerow({"protocol": number} | _csv_line(part, row, metric))
    return text.getvalue()


def _csv_line(part: ProtocolReport, row: Row, metric: str) -> dict[str, object]:
    """Return the cells of a line by their columns."""
    spread, test = row.spread(metric), part.tests.get((row.label, metric))
    line = {
        "dataset": part.dataset,
        "row": row.exact_label,
        "metric": metric,
        "n": spread.n,
        "seeds": " ".join(str(run.seed) for run in row.runs),
        "mean": spread.mean,
        "std": spread.std,
        "published": row.published.get(metric),
        "difference": difference_to_published(row, metric),
        "training_seconds": row.mean(lambda run: run.seconds),
        "parameters": row.runs[0].parameters,
        "epochs": row.mean(lambda run: run.epochs),
        "best_epoch": row.mean(lambda run: run.best_epoch),
    }
    if test and part.baseline:
        line |= {"baseline": part.baseline.exact_label, "vs_baseline": test.difference, "margin_95": test.margin}
        line |= {"p": test.p, "p_holm": test.p_holm}
    return line


def _document(report: Report, table: Callable[[Table], str], heading: Callable[[str, int], str], bullet: str) -> str:
    """Return the whole report, with tables, headings (of level 0 or 1) and lists in one format."""
    blocks = [table(report.protocols_table)] if report.protocols_table else []
    for title, part in report.titled_parts:
        blocks.append(heading(title, 0))
        if part.comparison.shared:
            blocks.append(f"every row: {format_overrides(part.comparison.shared)}")
        blocks += [table(each) for each in part.tables()]
        notes = [*part.legend(), *part.notes]
        blocks += ["\n".join(f"{bullet}{note}" for note in notes)] if notes else []
    for name, lines in report.without_result.items():
        blocks.append("\n".join([heading(f"{name} ({len(lines)})", 1), *(f"{bullet}{line}" for line in lines)]))
    return "\n\n".join(blocks)


def format_overrides(overrides: dict[str, str]) -> str:
    """Return overrides as on a command line."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _plain_table(table: Table) -> str:
    """Return a table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    alignment = ">" if table.has_numbers else "<"
    lines = [table.title]
    for row in (table.columns, *table.rows):
        cells = [f"{cell:{alignment}{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"  {row[0]:<{widths[0]}}", *cells]))
    return "\n".join(line.rstrip() for line in lines)


def _markdown_table(table: Table) -> str:
    """Return a table in Markdown, below its title."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.columns, rule, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"**{table.title}**", "", *lines])


def _latex_table(table: Table, heading: str, legend: list[str]) -> str:
    """Return a table in LaTeX; its label contains the protocol's number (if several), the data set and the metric."""
    caption = f"{heading}; {table.title}" if heading else table.title
    label = "-".join(re.findall(r"[^\W_]+", f"{heading.partition(',')[0]} {re.split('[:,(]', table.title)[0]}".lower()))
    columns = "l" + "r" * (len(table.columns) - 1) if table.has_numbers else r"lp{.6\linewidth}"
    lines = [r"\begin{table}", rf"\caption{{{_escape(caption)}}}", rf"\label{{tab:{label}}}", r"\centering"]
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in (table.columns, *table.rows)]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    lines += [r"\end{tabular}", *(rf"\par\smallskip\footnotesize {_escape(line)}" for line in legend)]
    return "\n".join([*lines, r"\end{table}"])


def _escape(text: str) -> str:
    """Return text with LaTeX's special characters escaped, and a leading minus as one."""
    text = "".join(_LATEX_ESCAPES.get(letter, letter) for letter in text)
    return re.sub(r"^-(?=[\d.])", "$-$", text)
