"""Rows -> figures: learning curves, bars beside the published ones, a line or heat map for a sweep, metric by time."""

import base64
import io
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Canvas

from sasrec_lab.config.convert import flatten
from sasrec_lab.report.curves import learning_curve
from sasrec_lab.report.rows import DEFAULT, Row
from sasrec_lab.report.tables import Part, Report, mean_and_std

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
BASELINE, GREY, PUBLISHED = "#222222", "#b8bcc2", "#9aa3ad"
_BARS = 30  # more are no figure
_TICKS = 12
_IN_ONE_FRAME = 4  # learning curves whose bands can be told apart
_WIDE = 8  # inches; at half a page's width the text of a wider figure cannot be read
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "svg.hashsalt": "sasrec_lab",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    part: Part
    canvas: Canvas

    @property
    def width(self) -> float:
        return self.canvas.get_figwidth()

    @property
    def stands_alone(self) -> bool:
        """Too wide for half a page, or so tall that whatever stands beside it leaves a blank."""
        return self.width > _WIDE or self.canvas.get_figheight() > 0.75 * self.width

    def save(self, folder: Path) -> None:
        with matplotlib.rc_context(_STYLE):
            self.canvas.savefig(folder / f"{self.name}.png", dpi=160)
            self.canvas.savefig(folder / f"{self.name}.pdf", metadata={"CreationDate": None})

    def svg(self) -> str:
        """As the address of an `<img>`, so that no two figures of a page share an id."""
        text = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.canvas.savefig(text, format="svg", dpi=160, metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue()).decode()}"


def draw(report: Report) -> list[Figure]:
    """All figures, part by part; a part of one row has few."""
    figures = []
    with matplotlib.rc_context(_STYLE):
        for number, part in enumerate(report.parts, 1):
            before = f"{number}-" if len(report.parts) > 1 else ""
            figures += [Figure(f"{before}{name}", title, part, canvas) for name, title, canvas in _figures(part)]
    return figures


def _figures(part: Part) -> Iterator[tuple[str, str, Canvas]]:
    if not part.metrics:
        return
    metric = part.metrics[0]
    rows = [row for row in part.comparison.rows if math.isfinite(row.spread(metric).mean)]
    left = rows
    for keys, members in _sweeps(rows).items():
        drawing = _line if len(keys) == 1 else _heat_map
        yield "-".join(["by", *keys]), f"{metric} by {' and '.join(keys)}", drawing(part, members, keys, metric)
        left = [row for row in left if row not in members or row is part.baseline]
    if len(left) > 1 or any(metric in row.published for row in left):
        yield "rows", f"{metric} by row", _bars(part, left, metric)
    colours = _colours(part, rows, metric)
    if curves := _curves(part, rows, colours):
        yield "curves", f"{_monitor(part)} while training", curves
    if len(rows) > 1:
        yield "time", f"{metric} and training time", _by_time(rows, colours, metric)


def _colours(part: Part, rows: list[Row], metric: str) -> dict[str, str]:
    """Of the baseline and of the best rows, which alone are named where there are many."""
    best = sorted((row for row in rows if row is not part.baseline), key=lambda row: -row.spread(metric).mean)
    chosen = [row for row in rows if row in best[: len(COLOURS)]]
    colours = {part.baseline.label: BASELINE} if part.baseline in rows else {}
    return colours | {row.label: colour for row, colour in zip(chosen, COLOURS, strict=False)}


def _sweeps(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Keys -> the rows in which these alone are set: one key with numbers, or two that make a grid."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.settings), []).append(row)
    return {keys: _with_default(keys, members, rows) for keys, members in groups.items() if _is_sweep(keys, members)}


def _is_sweep(keys: tuple[str, ...], members: list[Row]) -> bool:
    values = [{_setting(row, key) for row in members} for key in keys]
    if len(keys) == 1:
        return len(values[0]) > 1 and all(isinstance(value, float) for value in values[0])
    return len(keys) == 2 and min(map(len, values)) > 1


def _with_default(keys: tuple[str, ...], members: list[Row], rows: list[Row]) -> list[Row]:
    """The unchanged row is a point of a line too, where its value is not swept anyway."""
    taken = [_setting(row, keys[0]) for row in members]
    default = [row for row in rows if row.label == DEFAULT and len(keys) == 1]
    return members + [row for row in default if isinstance(at := _setting(row, keys[0]), float) and at not in taken]


def _setting(row: Row, key: str) -> float | str:
    """The key's value in a row, from the config where the row does not override it."""
    value = str(row.settings.get(key, flatten(row.runs[0].config, joint=".").get(key)))
    try:
        return float(value)
    except ValueError:
        return value


def _line(part: Part, rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    canvas, axes = _canvas(5.2, 3.4)
    rows = sorted(rows, key=lambda row: _setting(row, keys[0]))
    x, spreads = [_setting(row, keys[0]) for row in rows], [row.spread(metric) for row in rows]
    for row, at in zip(rows, x, strict=True) if len(x) <= _BARS else ():
        axes.plot([at] * len(row.runs), [run.metrics.get(metric) for run in row.runs], ".", color=COLOURS[0], alpha=0.4)
    mean, std = np.array([s.mean for s in spreads]), np.array([s.std or 0.0 for s in spreads])
    axes.fill_between(x, mean - std, mean + std, color=COLOURS[0], alpha=0.15, linewidth=0)
    size = 6 if len(x) <= _BARS else 2  # points of a long sweep would cover each other
    axes.plot(x, mean, "o-", color=COLOURS[0], markersize=size, linewidth=size / 4, label="ours, mean ± std")
    if published := [(at, row.published[metric]) for row, at in zip(rows, x, strict=True) if metric in row.published]:
        axes.plot(*zip(*published, strict=True), "s--", color=PUBLISHED, markerfacecolor="white", label="published")
        axes.legend()
    if min(x) > 0 and max(x) / min(x) >= 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if len(x) <= _TICKS:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    axes.set(xlabel=keys[0], ylabel=metric)
    return canvas


def _heat_map(part: Part, rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    down, across = (sorted({_setting(row, key) for row in rows}, key=_in_order) for key in keys)
    cells = {(_setting(row, keys[0]), _setting(row, keys[1])): row.spread(metric) for row in rows}
    means = np.array([[cells[y, x].mean if (y, x) in cells else math.nan for x in across] for y in down])
    canvas, axes = _canvas(1.9 + 0.85 * len(across), 1.1 + 0.55 * len(down))
    image = axes.imshow(means, cmap="viridis", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(across)), [f"{x:g}" if isinstance(x, float) else x for x in across])
    axes.set_yticks(range(len(down)), [f"{y:g}" if isinstance(y, float) else y for y in down])
    axes.set(xlabel=keys[1], ylabel=keys[0])
    for (y, x), spread in cells.items():
        text, colour = mean_and_std(spread).replace(" ±", "\n±"), _ink(image.to_rgba(spread.mean))
        axes.text(across.index(x), down.index(y), text, ha="center", va="center", color=colour, fontsize=7.5)
    canvas.colorbar(image, label=metric)
    return canvas


def _ink(ground: tuple[float, ...]) -> str:
    """Black or white, whichever has more contrast to the ground: WCAG's luminance, of which 0.18 is the middle."""
    luminance = np.dot(np.array(ground[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
    return "black" if luminance > 0.18 else "white"


def _bars(part: Part, rows: list[Row], metric: str) -> Canvas:
    if len(rows) > _BARS:
        best = sorted(rows, key=lambda row: -row.spread(metric).mean)[:_BARS]
        rows = [row for row in rows if row in best or row is part.baseline]
    published = [row for row in rows if metric in row.published]
    names = [_wrapped(row.label) for row in rows]
    lines = 1 + max(name.count("\n") for name in names)
    canvas, axes = _canvas(6.4, 0.9 + len(rows) * max(0.5 if published else 0.3, 0.15 * lines))
    height = 0.38 if published else 0.64
    spreads = [row.spread(metric) for row in rows]
    ends = [max(s.mean + (s.std or 0), row.published.get(metric, 0)) for s, row in zip(spreads, rows, strict=True)]
    most = max(ends)
    for place, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        cell = row.published.get(metric)
        shift = 0 if cell is None else 0.2
        axes.barh(place - shift, spread.mean, height, color=BASELINE if row is part.baseline else COLOURS[0])
        if spread.std is not None:
            axes.errorbar(spread.mean, place - shift, xerr=spread.std, color="#d55e00", capsize=2, linewidth=1.2)
        end = spread.mean + (spread.std or 0) + 0.012 * most
        axes.text(end, place - shift, mean_and_std(spread), va="center", fontsize=7.5)
        if cell is not None:
            bar = axes.barh(place + shift, cell, height, color="#d5dae0")
            bar.set_label("published" if row is published[0] else None)
            axes.text(cell + 0.012 * most, place + shift, f"{cell:.4f}", va="center", fontsize=7.5, color="#667077")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, most * 1.3)
    axes.set_xlabel(metric)
    if published:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return canvas


def _monitor(part: Part) -> str:
    return part.comparison.rows[0].runs[0].config["evaluation"]["monitor"]


def _curves(part: Part, rows: list[Row], colours: dict[str, str]) -> Canvas | None:
    """In one frame, or a frame for each named row with the others behind it in grey where they would cover another."""
    read = {row.label: [c for run in row.runs if (c := learning_curve(run.folder, _monitor(part)))] for row in rows}
    curves = {label: Curves(found) for label, found in read.items() if found}
    named = [row.label for row in rows if row.label in colours and row.label in curves]
    if not named:
        return None
    if len(named) <= _IN_ONE_FRAME:
        canvas, axes = _canvas(7, 3.6)
        for label in named:
            curves[label].draw(axes, colours[label], _wrapped(label))
        axes.set(xlabel="epoch", ylabel=_monitor(part))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes, rows, colours)
        return canvas
    across = 3
    down = math.ceil(len(named) / across)
    canvas = Canvas(figsize=(10, 0.4 + 2 * down))
    frames = list(canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for label, axes in zip(named, frames, strict=False):
        behind = LineCollection([list(zip(c.epochs, c.mean, strict=True)) for c in curves.values()])
        axes.add_collection(behind)
        behind.set(color=GREY, linewidth=0.6, alpha=0.6, rasterized=True)
        curves[label].draw(axes, colours[label])
        axes.set_title(_wrapped(label), fontsize=8.5, loc="left", color=colours[label], fontweight="bold")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in frames[len(named) :]:
        axes.remove()
    for axes in frames[max(0, len(named) - across) : len(named)]:
        axes.tick_params(labelbottom=True)
    canvas.supxlabel("epoch", fontsize=9)
    canvas.supylabel(_monitor(part), fontsize=9)
    return canvas


class Curves:
    """Of one row: of each seed, and mean and spread as far as all seeds came."""

    def __init__(self, of_seeds: list[dict[int, float]]):
        self.of_seeds = of_seeds
        self.epochs = sorted(set.intersection(*map(set, of_seeds)))
        values = np.array([[curve[epoch] for epoch in self.epochs] for curve in of_seeds])  # (seeds, epochs)
        self.mean = values.mean(0)
        self.std = values.std(0, ddof=1) if len(of_seeds) > 1 else None

    def draw(self, axes: Axes, colour: str, label: str | None = None) -> None:
        marker = "o" if len(self.epochs) == 1 else None
        axes.plot(self.epochs, self.mean, color=colour, linewidth=1.6, label=label, marker=marker)
        if self.std is not None:
            low, high = self.mean - self.std, self.mean + self.std
            axes.fill_between(self.epochs, low, high, color=colour, alpha=0.16, linewidth=0)
            for curve in self.of_seeds:
                axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.5, alpha=0.45)


def _by_time(rows: list[Row], colours: dict[str, str], metric: str) -> Canvas:
    canvas, axes = _canvas(7, 3.6)
    times = {row.label: row.mean(lambda run: run.seconds) for row in rows}
    longest = max(times.values())
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for row in sorted(rows, key=lambda row: row.label in colours):
        spread, named = row.spread(metric), row.label in colours
        axes.errorbar(
            times[row.label] / seconds,
            spread.mean,
            yerr=spread.std if named else None,
            fmt="o",
            markersize=6 if named else 3,
            color=colours.get(row.label, GREY),
            label=_wrapped(row.label) if named else None,
            capsize=2,
            linewidth=1,
        )
    if min(times.values()) > 0 and longest / min(times.values()) > 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, 1.05 * longest / seconds or 1)  # room for the whole of the last point
    axes.set(xlabel=f"training time of a run in {unit}, mean over seeds", ylabel=metric)
    _legend(axes, rows, colours)
    return canvas


def _legend(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    """In the order of the table, beside the frame."""
    count = len(rows) - len(colours)
    rest = f"{count} other{'s' if count > 1 else ''}"
    if len(rows) > len(colours):
        axes.plot([], [], "o", color=GREY, markersize=3, label=rest)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in (*(_wrapped(row.label) for row in rows), rest) if name in handles]
    axes.legend([handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(1, 1))


def _canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width, height))
    return canvas, canvas.subplots()


def _wrapped(label: str) -> str:
    """Without the sections of keys, which the table has. Often only the end of a long label tells it from others."""
    words = re.sub(r"[\w.]*\.(\w+=)", r"\1", label)
    return textwrap.fill(words, 40, max_lines=3, placeholder="…", break_on_hyphens=False)


def _in_order(value: float | str) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    return isinstance(value, str), value if isinstance(value, float) else 0.0, str(value)
