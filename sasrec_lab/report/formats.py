"""Text formats of a report: plain text, Markdown, LaTeX, and CSV with every number in full precision.

Labels, paths and errors come from run folders, which may be a stranger's, so each format escapes what would be more
than text in it: the terminal's control characters, Markdown's marks, LaTeX's commands, a spreadsheet's formulas.
"""

import csv
import io
import math
import re
from collections.abc import Callable

from sasrec_lab.errors import printable
from sasrec_lab.report.contents import ProtocolReport, Report
from sasrec_lab.report.rows import Row
from sasrec_lab.report.tables import Table, all_tables, difference_to_published, protocols_table

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
    "[": "{[}",  # after the line break of the row above, a bracket or a star would be its option
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
}
_MARKDOWN_MARKS = re.compile(r"[\\`*\[\]<>|&~$]|(?<!\w)_|_(?!\w)")
_MARKDOWN_LINE_START = re.compile(r"^(\s*\d*)([#+\-=.)])")
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are wide ones
_COLUMNS = ["protocol", "dataset", "row", "model", "metric", "n", "seeds", "mean", "std", "published", "difference"]
_COLUMNS += ["baseline", "vs_baseline", "margin_95", "p", "p_holm"]
_COLUMNS += ["training_seconds", "parameters", "epochs", "best_epoch", "validation", "best_on_validation"]


def plain_text(report: Report) -> str:
    """Return the report for a terminal."""
    return _document(
        report, plain_table, lambda text, level: f"{text}\n{('=', '-')[level] * len(text)}", "  ", printable
    )


def markdown(report: Report) -> str:
    """Return the report in Markdown."""
    text = _document(report, _markdown_table, lambda text, level: f"{'##'[: level + 1]} {text}", "- ", _escape_markdown)
    return text + "\n"


def latex(report: Report) -> str:
    """Return the report for `\\input`, with the package booktabs: tables, legends below them, notes as comments."""
    blocks = ["% needs \\usepackage{booktabs}"]
    blocks += [_latex_table(differing, "", [])] if (differing := protocols_table(report)) else []
    for heading, part in report.titled_parts:
        shared = [f"every row: {format_overrides(part.comparison.shared)}"] if part.comparison.shared else []
        blocks.append("\n".join(f"% {printable(line)}" for line in [heading, *shared, *part.notes]))
        first, *rest = all_tables(part)
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
                    line = _csv_line(part, row, metric)
                    writer.writerow({"protocol": number} | {name: _guard(cell) for name, cell in line.items()})
    return text.getvalue()


def _csv_line(part: ProtocolReport, row: Row, metric: str) -> dict[str, object]:
    """Return the cells of a line by their columns."""
    spread, test = row.spread(metric), part.test(row, metric)
    line = {
        "dataset": part.dataset,
        "row": row.exact_label,
        "model": row.runs[0].model,
        "metric": metric,
        "n": spread.n,
        "seeds": " ".join(str(run.seed) for run in row.runs),
        "mean": spread.mean,
        "std": spread.std,
        "published": row.published.get(metric),
        "difference": difference_to_published(row, metric),
        "training_seconds": row.mean(lambda run: run.seconds),
        "parameters": row.runs[0].parameters,
        "epochs": _or_empty(row.epochs),
        "best_epoch": _or_empty(row.mean(lambda run: run.best_epoch)),
        "validation": _or_empty(row.spread(part.monitor).mean),
        "best_on_validation": int(row is part.best),
    }
    if test and part.baseline:
        line |= {"baseline": part.baseline.exact_label, "vs_baseline": test.difference, "margin_95": test.margin}
        line |= {"p": test.p, "p_holm": test.p_holm}
    return line


def _or_empty(mean: float) -> float | None:
    """Return a mean, or None, which is an empty cell, for the NaN of no values."""
    return None if math.isnan(mean) else mean


def _guard(cell: object) -> object:
    """Return a cell of a CSV file, behind a quotation mark if a spreadsheet would compute it as a formula.

    Numbers stay numbers, negative ones too: only text is guarded, and only if it is not a number itself.
    """
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    is_formula = text.lstrip().startswith(_FORMULA_STARTS) and not re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text)
    return f"'{text}" if is_formula else text


def _document(
    report: Report,
    table: Callable[[Table], str],
    heading: Callable[[str, int], str],
    bullet: str,
    escape: Callable[[str], str],
) -> str:
    """Return the whole report, with tables, headings (of level 0 or 1), lists and text in one format."""
    blocks = [table(differing)] if (differing := protocols_table(report)) else []
    for title, part in report.titled_parts:
        blocks.append(heading(escape(title), 0))
        if part.comparison.shared:
            blocks.append(f"every row: {escape(format_overrides(part.comparison.shared))}")
        blocks += [table(each) for each in all_tables(part)]
        notes = [*part.legend(), *part.notes]
        blocks += ["\n".join(f"{bullet}{escape(note)}" for note in notes)] if notes else []
    for name, lines in report.without_result.items():
        title = heading(escape(f"{name} ({len(lines)})"), 1)
        blocks.append("\n".join([title, *(f"{bullet}{escape(line)}" for line in lines)]))
    return "\n\n".join(blocks)


def format_overrides(overrides: dict[str, str]) -> str:
    """Return overrides as on a command line."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def plain_table(table: Table) -> str:
    """Return a table in columns of equal width."""
    rows = [[printable(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    alignment = ">" if table.has_numbers else "<"
    lines = [printable(table.title)]
    for row in rows:
        cells = [f"{cell:{alignment}{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"  {row[0]:<{widths[0]}}", *cells]))
    return "\n".join(line.rstrip() for line in lines)


def _markdown_table(table: Table) -> str:
    """Return a table in Markdown, below its title."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    columns, *rows = [
        [_escape_markdown(cell, starts_line=False) for cell in row] for row in (table.columns, *table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]
    return "\n".join([f"**{_escape_markdown(table.title)}**", "", *lines])


def _escape_markdown(text: str, *, starts_line: bool = True) -> str:
    """Return text without a meaning in Markdown: no HTML, links, tables, emphasis, code, math, and no list or heading.

    An underscore inside a word has none, so names such as `no_norm` remain as they are.
    """
    escaped = _MARKDOWN_MARKS.sub(r"\\\g<0>", printable(text))
    return _MARKDOWN_LINE_START.sub(r"\1\\\2", escaped) if starts_line else escaped


def _latex_table(table: Table, heading: str, legend: list[str]) -> str:
    """Return a table in LaTeX; its label contains the protocol's number (if several), the data set and the metric."""
    caption = f"{heading}; {table.title}" if heading else table.title
    label = "-".join(
        re.findall(r"[a-z\d]+", f"{heading.partition(',')[0]} {re.split('[:,(]', table.title)[0]}".lower())
    )
    columns = "l" + "r" * (len(table.columns) - 1) if table.has_numbers else r"lp{.6\linewidth}"
    lines = [r"\begin{table}", rf"\caption{{{_escape(caption)}}}", rf"\label{{tab:{label}}}", r"\centering"]
    rows = [" & ".join(map(_escape, row)) + r" \\" for row in (table.columns, *table.rows)]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    lines += [r"\end{tabular}", *(rf"\par\smallskip\footnotesize {_escape(line)}" for line in legend)]
    return "\n".join([*lines, r"\end{table}"])


def _escape(text: str) -> str:
    """Return text with LaTeX's special characters escaped, and a leading minus as one."""
    text = "".join(_LATEX_ESCAPES.get(letter, letter) for letter in printable(text))
    return re.sub(r"^-(?=[\d.])", "$-$", text)
