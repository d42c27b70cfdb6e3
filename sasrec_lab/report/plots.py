"""Plots of rows: a line or heat map of a sweep, bars, learning curves, and a metric by training time."""

import math
import re
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Canvas

from sasrec_lab.config.convert import flatten
from sasrec_lab.report.curves import learning_curve
from sasrec_lab.report.rows import Row
from sasrec_lab.report.tables import mean_and_std

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
BASELINE, GRAY, PUBLISHED = "#222222", "#b8bcc2", "#9aa3ad"
STYLE = {
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
_MAX_BARS = 30
_MAX_TICKS = 12
_MAX_CURVES_PER_FRAME = 4  # more bands cannot be distinguished
_FRAMES_PER_LINE = 3


def line(rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    """Draw the metric over one numeric key: each seed, mean and standard deviation, and the published values."""
    key = keys[0]
    canvas, axes = _new_canvas(5.2, 3.4)
    rows = sorted(rows, key=lambda row: setting(row, key))
    x, spreads = [setting(row, key) for row in rows], [row.spread(metric) for row in rows]
    for row, at in zip(rows, x, strict=True) if len(x) <= _MAX_BARS else ():
        axes.plot([at] * len(row.runs), [run.metrics.get(metric) for run in row.runs], ".", color=COLORS[0], alpha=0.4)
    mean, std = np.array([s.mean for s in spreads]), np.array([s.std or 0.0 for s in spreads])
    axes.fill_between(x, mean - std, mean + std, color=COLORS[0], alpha=0.15, linewidth=0)
    size = 6 if len(x) <= _MAX_BARS else 2  # larger points of a long sweep would overlap
    axes.plot(x, mean, "o-", color=COLORS[0], markersize=size, linewidth=size / 4, label="ours, mean ± std")
    if published := [(at, row.published[metric]) for row, at in zip(rows, x, strict=True) if metric in row.published]:
        axes.plot(*zip(*published, strict=True), "s--", color=PUBLISHED, markerfacecolor="white", label="published")
        axes.legend()
    if min(x) > 0 and max(x) / min(x) >= 8:
        _use_log_scale(axes)
    if len(x) <= _MAX_TICKS:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel=metric)
    return canvas


def heat_map(rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    """Draw the metric over the grid of two keys."""
    down, across = (sorted({setting(row, key) for row in rows}, key=_numbers_first) for key in keys)
    cells = {(setting(row, keys[0]), setting(row, keys[1])): row.spread(metric) for row in rows}
    means = np.array([[cells[y, x].mean if (y, x) in cells else math.nan for x in across] for y in down])
    canvas, axes = _new_canvas(1.9 + 0.85 * len(across), 1.1 + 0.55 * len(down))
    image = axes.imshow(means, cmap="viridis", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(across)), [f"{x:g}" if isinstance(x, float) else x for x in across])
    axes.set_yticks(range(len(down)), [f"{y:g}" if isinstance(y, float) else y for y in down])
    axes.set(xlabel=keys[1], ylabel=keys[0])
    for (y, x), spread in cells.items():
        text, color = mean_and_std(spread).replace(" ±", "\n±"), _text_color(image.to_rgba(spread.mean))
        axes.text(across.index(x), down.index(y), text, ha="center", va="center", color=color, fontsize=7.5)
    canvas.colorbar(image, label=metric)
    return canvas


def bars(rows: list[Row], baseline: Row | None, metric: str) -> Canvas:
    """Draw a bar per row, and another one for its published value; of many rows the best and the baseline."""
    if len(rows) > _MAX_BARS:
        best = sorted(rows, key=lambda row: -row.spread(metric).mean)[:_MAX_BARS]
        rows = [row for row in rows if row in best or row is baseline]
    published = [row for row in rows if metric in row.published]
    names = [_wrap_label(row.label) for row in rows]
    lines = 1 + max(name.count("\n") for name in names)
    canvas, axes = _new_canvas(6.4, 0.9 + len(rows) * max(0.5 if published else 0.3, 0.15 * lines))
    height = 0.38 if published else 0.64
    spreads = [row.spread(metric) for row in rows]
    ends = [max(s.mean + (s.std or 0), row.published.get(metric, 0)) for s, row in zip(spreads, rows, strict=True)]
    longest = max(ends)
    for place, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
        value = row.published.get(metric)
        shift = 0 if value is None else 0.2
        axes.barh(place - shift, spread.mean, height, color=BASELINE if row is baseline else COLORS[0])
        if spread.std is not None:
            axes.errorbar(spread.mean, place - shift, xerr=spread.std, color="#d55e00", capsize=2, linewidth=1.2)
        end = spread.mean + (spread.std or 0) + 0.012 * longest
        axes.text(end, place - shift, mean_and_std(spread), va="center", fontsize=7.5)
        if value is not None:
            bar = axes.barh(place + shift, value, height, color="#d5dae0")
            bar.set_label("published" if row is published[0] else None)
            end = value + 0.012 * longest
            axes.text(end, place + shift, f"{value:.4f}", va="center", fontsize=7.5, color="#667077")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, longest * 1.3)
    axes.set_xlabel(metric)
    if published:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return canvas


def learning_curves(rows: list[Row], colors: dict[str, str], metric: str) -> Canvas | None:
    """Draw the curves of the rows that have a color: in one frame, or if there are many in a frame each."""
    found = {row.label: [c for run in row.runs if (c := learning_curve(run.folder, metric))] for row in rows}
    curves = {label: _RowCurves(of_seeds) for label, of_seeds in found.items() if of_seeds}
    named = [row.label for row in rows if row.label in colors and row.label in curves]
    if not named:
        return None
    if len(named) > _MAX_CURVES_PER_FRAME:
        return _curves_in_frames(curves, named, colors, metric)
    canvas, axes = _new_canvas(7, 3.6)
    for label in named:
        curves[label].draw(axes, colors[label], _wrap_label(label))
    axes.set(xlabel="epoch", ylabel=metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _add_legend(axes, rows, colors)
    return canvas


class _RowCurves:
    """The learning curves of a row: of each seed, and mean and spread over the epochs that all seeds reached."""

    def __init__(self, of_seeds: list[dict[int, float]]):
        self.of_seeds = of_seeds
        self.epochs = sorted(set.intersection(*map(set, of_seeds)))
        values = np.array([[curve[epoch] for epoch in self.epochs] for curve in of_seeds])  # (seeds, epochs)
        self.mean = values.mean(0)
        self.std = values.std(0, ddof=1) if len(of_seeds) > 1 else None

    def draw(self, axes: Axes, color: str, label: str | None = None) -> None:
        """Draw mean, spread and a thin line per seed."""
        marker = "o" if len(self.epochs) == 1 else None
        axes.plot(self.epochs, self.mean, color=color, linewidth=1.6, label=label, marker=marker)
        if self.std is not None:
            low, high = self.mean - self.std, self.mean + self.std
            axes.fill_between(self.epochs, low, high, color=color, alpha=0.16, linewidth=0)
            for curve in self.of_seeds:
                axes.plot(curve.keys(), curve.values(), color=color, linewidth=0.5, alpha=0.45)


def _curves_in_frames(curves: dict[str, _RowCurves], named: list[str], colors: dict[str, str], metric: str) -> Canvas:
    """Draw a frame for each named row, with all other rows behind it in gray."""
    down = math.ceil(len(named) / _FRAMES_PER_LINE)
    canvas = Canvas(figsize=(10, 0.4 + 2 * down))
    frames = list(canvas.subplots(down, _FRAMES_PER_LINE, sharex=True, sharey=True, squeeze=False).flat)
    for label, axes in zip(named, frames, strict=False):
        behind = LineCollection([list(zip(c.epochs, c.mean, strict=True)) for c in curves.values()])
        axes.add_collection(behind)
        behind.set(color=GRAY, linewidth=0.6, alpha=0.6, rasterized=True)
        curves[label].draw(axes, colors[label])
        axes.set_title(_wrap_label(label), fontsize=8.5, loc="left", color=colors[label], fontweight="bold")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in frames[len(named) :]:
        axes.remove()
    for axes in frames[max(0, len(named) - _FRAMES_PER_LINE) : len(named)]:
        axes.tick_params(labelbottom=True)
    canvas.supxlabel("epoch", fontsize=9)
    canvas.supylabel(metric, fontsize=9)
    return canvas


def by_time(rows: list[Row], colors: dict[str, str], metric: str) -> Canvas:
    """Draw the metric of each row over its training time."""
    canvas, axes = _new_canvas(7, 3.6)
    times = {row.label: row.mean(lambda run: run.seconds) for row in rows}
    longest = max(times.values())
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for row in sorted(rows, key=lambda row: row.label in colors):
        spread, is_named = row.spread(metric), row.label in colors
        axes.errorbar(
            times[row.label] / seconds,
            spread.mean,
            yerr=spread.std if is_named else None,
            fmt="o",
            markersize=6 if is_named else 3,
            color=colors.get(row.label, GRAY),
            label=_wrap_label(row.label) if is_named else None,
            capsize=2,
            linewidth=1,
        )
    if min(times.values()) > 0 and longest / min(times.values()) > 10:
        _use_log_scale(axes)
    else:
        axes.set_xlim(0, 1.05 * longest / seconds or 1)  # leaves room for the last marker
    axes.set(xlabel=f"training time per run in {unit}, mean over seeds", ylabel=metric)
    _add_legend(axes, rows, colors)
    return canvas


def setting(row: Row, key: str) -> float | str:
    """Return the value of a key in a row, from the config if the row does not override it."""
    value = str(row.settings.get(key, flatten(row.runs[0].config, separator=".").get(key)))
    try:
        return float(value)
    except ValueError:
        return value


def _numbers_first(value: float | str) -> tuple[bool, float, str]:
    """Return a sort key: numbers by size, then words."""
    return isinstance(value, str), value if isinstance(value, float) else 0.0, str(value)


def _new_canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    """Return a figure of this size in inches, and its axes."""
    canvas = Canvas(figsize=(width, height))
    return canvas, canvas.subplots()


def _use_log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic with plain numbers as labels."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")


def _add_legend(axes: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    """Add a legend in the order of the table, to the right of the frame."""
    count = len(rows) - len(colors)
    rest = f"{count} other{'s' if count > 1 else ''}"
    if len(rows) > len(colors):
        axes.plot([], [], "o", color=GRAY, markersize=3, label=rest)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in (*(_wrap_label(row.label) for row in rows), rest) if name in handles]
    axes.legend([handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(1, 1))


def _wrap_label(label: str) -> str:
    """Return a label without the sections of its keys, wrapped.

    The table has them in full, and long labels often differ only at the end.
    """
    words = re.sub(r"[\w.]*\.(\w+=)", r"\1", label)
    return textwrap.fill(words, 40, max_lines=3, placeholder="…", break_on_hyphens=False)


def _text_color(background: tuple[float, ...]) -> str:
    """Return black or white, whichever has more contrast to the background."""
    luminance = np.dot(np.array(background[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
    return "black" if luminance > 0.18 else "white"  # 0.18 is the middle of luminance as defined by WCAG
