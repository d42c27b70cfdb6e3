"""The report as one self-contained HTML page: no script, no network, figures embedded."""

import html

from sasrec_lab.errors import printable
from sasrec_lab.report.contents import ProtocolReport, Report
from sasrec_lab.report.figures import Figure
from sasrec_lab.report.formats import format_overrides
from sasrec_lab.report.tables import Table, first_tables, further_tables, protocol_table, protocols_table

_STYLE = """
:root { color-scheme: only light; --ink: #1d2733; --soft: #5d6b7a; --line: #e1e5ea; --tint: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p, li { color: var(--soft); overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
code { font: .87em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; color: var(--ink); }
.chips { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 1rem 0 0; list-style: none; }
.chips li { padding: .15rem .7rem; border-radius: 1rem; background: var(--tint); border: 1px solid var(--line); }
.chips b { color: var(--ink); }
.chips .bad { background: #fdf0ee; border-color: #f2c9c2; }
.wide { overflow: auto; max-height: 44rem; }
.wide th { position: sticky; top: 0; background: #fff; box-shadow: inset 0 -1px var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
td:first-child { white-space: normal; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
tr.baseline td { background: var(--tint); font-weight: 600; }
tr.best td { color: #00734f; font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem;
  grid-auto-flow: dense; margin-top: 1.5rem; }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; break-inside: avoid;
  overflow-x: auto; min-width: 0; }
figure img { display: block; width: 100%; min-width: min(27rem, var(--own)); max-width: calc(1.2 * var(--own));
  height: auto; margin: auto; }
figure.full { grid-column: 1 / -1; } .full img { min-width: var(--own); }
details { margin-top: 1.5rem; } summary { cursor: pointer; font-weight: 600; }
@media print { body { max-width: none; padding: 0; } .wide { max-height: none; } table { break-inside: avoid; }
  figure img, .full img { min-width: 0; } }
"""


def html_page(report: Report, figures: list[Figure]) -> str:
    """Return the page."""
    title = ", ".join(dict.fromkeys(part.dataset for part in report.parts))
    folders = " ".join(map(str, report.found.folders))
    body = [f"<h1>{_escape(title)}</h1>", f"<p>Runs in <code>{_escape(folders)}</code></p>", _counts(report)]
    if differing := protocols_table(report):
        body.append(_table(differing))
    for heading, part in report.titled_parts:
        body += [f"<h2>{_escape(heading)}</h2>", *_part(part, [f for f in figures if f.part is part])]
    if report.without_result:
        body.append("<h2>Without a result</h2>")
    for name, lines in report.without_result.items():
        body += [f"<h3>{_escape(name)} ({len(lines)})</h3>", _list(lines)]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}: report</title>\n<style>{_STYLE}</style>\n<body>\n" + "\n".join(body) + "\n</html>\n"
    )


def _counts(report: Report) -> str:
    """Return the numbers of runs by how they ended."""
    counts = {"finished": len(report.found.finished)} | {
        name: len(lines) for name, lines in report.without_result.items()
    }
    good = ("finished", "running", "pruned")
    chips = [f"<li{'' if name in good else ' class=bad'}><b>{n}</b> {_escape(name)}</li>" for name, n in counts.items()]
    return f'<ul class="chips">{"".join(chips)}</ul>'


def _part(part: ProtocolReport, figures: list[Figure]) -> list[str]:
    """Return tables, notes and figures of one protocol."""
    blocks = []
    if part.comparison.shared:
        blocks.append(f"<p>Every row: <code>{_escape(format_overrides(part.comparison.shared))}</code></p>")
    marks = {row.label: "best" for row in part.comparison.rows if row is part.best}
    if part.baseline and len(part.comparison.rows) > 1:
        marks[part.baseline.label] = "baseline best" if part.baseline is part.best else "baseline"
    blocks += [_table(table, marks) for table in first_tables(part)]
    if notes := [*part.legend(), *part.notes]:
        blocks.append(_list(notes))
    blocks.append(_figures(figures) if figures else "")
    blocks += [_table(table, marks) for table in further_tables(part)]
    blocks.append(f"<details><summary>Protocol</summary>{_table(protocol_table(part.comparison))}</details>")
    return blocks


def _figures(figures: list[Figure]) -> str:
    """Return the figures, two in a line if the window is wide; one that is left over keeps their size."""
    drawn = [
        f"<figure{' class=full' if figure.is_full_width else ''}>"
        f'<img alt="{title}" style="--own:{figure.width:.2f}in" src="{figure.svg()}"></figure>'
        for figure in figures
        for title in [_escape(figure.title)]
    ]
    return f'<div class="figures">{"".join(drawn)}</div>'


def _table(table: Table, marks: dict[str, str] | None = None) -> str:
    """Return a table below its title; `marks` has the classes of rows to emphasize, by their labels."""
    head = "".join(f"<th>{_escape(column)}</th>" for column in table.columns)
    rows = [
        f'<tr class="{(marks or {}).get(row[0], "")}">{"".join(f"<td>{_escape(cell)}</td>" for cell in row)}</tr>'
        for row in table.rows
    ]
    kind = "wide" if table.has_numbers else "wide text"
    return f'<h3>{_escape(table.title)}</h3><div class="{kind}"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _list(lines: list[str]) -> str:
    """Return lines as a list."""
    return f"<ul>{''.join(f'<li>{_escape(line)}</li>' for line in lines)}</ul>"


def _escape(text: str) -> str:
    """Return text for the page, in quoted attributes too: no markup, and control characters as visible escapes."""
    return html.escape(printable(text))
