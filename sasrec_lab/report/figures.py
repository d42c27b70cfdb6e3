"""Figures of a report: which ones a protocol's rows call for, which rows get a color, and how figures are saved."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from sasrec_lab.report import plots, search_plots
from sasrec_lab.report.canvas import add_title, drawing
from sasrec_lab.report.contents import ProtocolReport, Report
from sasrec_lab.report.plots import setting
from sasrec_lab.report.rows import DEFAULT, Row
from sasrec_lab.run.protocol import describe_candidates

_MAX_CELLS = 2500  # of a heat map
_HALF_PAGE_INCHES = 7  # the text of a wider figure is illegible at half a page's width


@dataclass(frozen=True)
class Figure:
    """A drawn figure of one protocol."""

    name: str  # of its files, from the keys
    title: str
    part: ProtocolReport
    canvas: Canvas

    @property
    def width(self) -> float:
        """Return the width in inches."""
        return self.canvas.get_figwidth()

    @property
    def is_full_width(self) -> bool:
        """Return whether the figure is too wide for half a page, or too tall to share a line with another one."""
        return self.width > _HALF_PAGE_INCHES or self.canvas.get_figheight() > self.width

    def save(self, folder: Path) -> None:
        """Write the figure as PNG and PDF."""
        with drawing():
            self.canvas.savefig(folder / f"{self.name}.png", dpi=160)
            self.canvas.savefig(folder / f"{self.name}.pdf", metadata={"CreationDate": None})

    def svg(self) -> str:
        """Return the figure as the address of an `<img>`, so that no two figures of a page share an id."""
        text = io.BytesIO()
        with drawing():
            self.canvas.savefig(text, format="svg", dpi=160, metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue()).decode()}"


def draw_figures(report: Report) -> list[Figure]:
    """Return the figures of all protocols, their names numbered if there are several protocols."""
    figures = []
    with drawing():
        for number, part in enumerate(report.parts, 1):
            prefix = f"{number}-" if len(report.parts) > 1 else ""
            figures += [Figure(f"{prefix}{name}", title, part, canvas) for name, title, canvas in _draw(part)]
    return figures


def _draw(part: ProtocolReport) -> Iterator[tuple[str, str, Canvas]]:
    """Yield name, title and canvas of each figure of a protocol."""
    if not part.metrics:
        return
    metric = part.metrics[0]
    rows = [row for row in part.comparison.rows if math.isfinite(row.spread(metric).mean)]
    details = f"{part.heading}; {describe_candidates(part.comparison.protocol, metric)}"
    for name, subject, drawn, canvas in _plots(part, rows, metric):
        title = f"{part.dataset}: {subject}"
        add_title(canvas, title, details.partition(", ")[2] + plots.describe_marks(part, drawn, metric))
        yield name, title, canvas


def _plots(part: ProtocolReport, rows: list[Row], metric: str) -> Iterator[tuple[str, str, list[Row], Canvas]]:
    """Yield name, subject, rows with a star where they differ from the baseline, and canvas of each plot."""
    remaining = rows
    for keys, members in _sweeps(rows).items():
        plot = plots.line if len(keys) == 1 else plots.heat_map
        canvas = plot(part, members, keys, metric)
        yield "-".join(["by", *keys]), f"{metric} by {' and '.join(keys)}", members, canvas
        remaining = [row for row in remaining if row not in members or row is part.baseline]
    if len(remaining) > 1 or any(metric in row.published for row in remaining):
        yield "rows", f"{metric} by row", remaining, plots.bars(part, remaining, metric)
    colors = _colors(part, rows)
    if curves := plots.learning_curves(part, rows, colors):
        yield "curves", f"{part.monitor} during training", [], curves
    yield from _search_plots(part)
    if len(rows) > 1:
        yield "time", f"{metric} and training time", rows, plots.by_time(part, rows, colors, metric)


def _search_plots(part: ProtocolReport) -> Iterator[tuple[str, str, list[Row], Canvas]]:
    """Yield the plots of the searches, in the form of `_plots`."""
    for number, search in enumerate(part.searches, 1):
        suffix = f"-{number}" if len(part.searches) > 1 else ""
        if canvas := search_plots.history(search):
            yield f"search{suffix}", f"{search.monitor} of the trials of a search", [], canvas
        if canvas := search_plots.importance(search):
            yield f"importance{suffix}", f"what {search.monitor} depends on in a search", [], canvas


def _colors(part: ProtocolReport, rows: list[Row]) -> dict[str, str]:
    """Return the colors of the baseline and of the rows best on validation, the only ones named if there are many."""
    best = part.by_validation([row for row in rows if row is not part.baseline])
    chosen = [row for row in rows if row in best[: len(plots.COLORS)]]
    colors = {part.baseline.label: plots.BASELINE} if part.baseline in rows and part.baseline else {}
    return colors | {row.label: color for row, color in zip(chosen, plots.COLORS, strict=False)}


def _sweeps(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Return keys -> the rows that set only these: one key with numbers, or two keys that form a grid."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.settings), []).append(row)
    return {keys: _with_default(keys, members, rows) for keys, members in groups.items() if _is_sweep(keys, members)}


def _is_sweep(keys: tuple[str, ...], members: list[Row]) -> bool:
    """Return whether the rows that set these keys form a line or a grid."""
    values = [{setting(row, key) for row in members} for key in keys]
    if len(keys) == 1:
        return len(values[0]) > 1 and all(isinstance(value, float) for value in values[0])
    cells = math.prod(map(len, values))
    # a search over two intervals has a cell in each line and column, which is not a grid
    return len(keys) == 2 and min(map(len, values)) > 1 and cells <= min(_MAX_CELLS, 2 * len(members))


def _with_default(keys: tuple[str, ...], members: list[Row], rows: list[Row]) -> list[Row]:
    """Return the rows of a sweep, with the unchanged row added to a line that lacks its value."""
    swept = [setting(row, keys[0]) for row in members]
    default = [row for row in rows if row.label == DEFAULT and len(keys) == 1]
    return members + [row for row in default if isinstance(at := setting(row, keys[0]), float) and at not in swept]
