"""Plots of rows: a line or heat map of a sweep, bars, learning curves, and a metric by training time.

Each returns a canvas whose axes keep their size whatever its title and legend need: both are added outside of them.
"""

import math
import re
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import printable
from sasrec_lab.report.canvas import GRAY, add_legend, new_canvas, text_color, use_log_scale, wrap
from sasrec_lab.report.cells import SIGNIFICANT, mean_and_std
from sasrec_lab.report.contents import ProtocolReport
from sasrec_lab.report.curves import learning_curve
from sasrec_lab.report.rows import Row

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
BASELINE, PUBLISHED, UNTRAINED = "#222222", "#9aa3ad", "#7d8791"
_WIDTH, _HEIGHT = 6.0, 3.2  # inches, of figures that share a line of a page
_MAX_BARS = 30
_MAX_TICKS = 12
_MAX_CURVES_PER_FRAME = 4  # more bands cannot be distinguished
_FRAMES_PER_LINE = 3
_MIN_SEEDS_FOR_SPREAD = 3  # a band or a bar over two seeds would look like certainty; the seeds are drawn instead


def line(part: ProtocolReport, rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    """Draw the metric over one numeric key: seeds, mean and spread, baselines, and the published values."""
    key = keys[0]
    canvas, axes = new_canvas(_WIDTH, _HEIGHT)
    at = {row.label: value for row in rows if isinstance(value := setting(row, key), float)}
    rows = sorted(rows, key=lambda row: at[row.label])
    x, spreads = [at[row.label] for row in rows], [row.spread(metric) for row in rows]
    for row in rows if len(x) <= _MAX_BARS else ():
        if len(seeds := _values(row, metric)) > 1:
            _draw_seeds(axes, [at[row.label]] * len(seeds), seeds, COLORS[0], label="one seed")
    mean, std = np.array([s.mean for s in spreads]), np.array([s.std or 0.0 for s in spreads])
    if has_band := min(spread.n for spread in spreads) >= _MIN_SEEDS_FOR_SPREAD:
        axes.fill_between(x, mean - std, mean + std, color=COLORS[0], alpha=0.15, linewidth=0)
    size = 6 if len(x) <= _MAX_BARS else 2  # larger points of a long sweep would overlap
    label = "mean ± std over seeds" if has_band else "mean over seeds"
    axes.plot(x, mean, "o-", color=COLORS[0], markersize=size, linewidth=size / 4, label=label)
    _mark_points(axes, part, rows, at, metric)
    if published := [(at[row.label], row.published[metric]) for row in rows if metric in row.published]:
        axes.plot(*zip(*published, strict=True), "s--", color=PUBLISHED, markerfacecolor="white", label="published")
    if min(x) > 0 and max(x) / min(x) >= 8:
        use_log_scale(axes)
    if len(x) <= _MAX_TICKS:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    axes.set(xlabel=printable(key), ylabel=printable(metric))
    _draw_untrained(axes, part, metric)
    add_legend(canvas, axes)
    return canvas


def _mark_points(axes: Axes, part: ProtocolReport, rows: list[Row], at: dict[str, float], metric: str) -> None:
    """Mark the baseline, the row that is best on validation, and those that differ from the baseline."""
    for row in rows:
        place = at[row.label], row.spread(metric).mean
        if row is part.baseline:
            axes.plot(*place, "o", color=BASELINE, markersize=6, label="baseline")
        if row is part.best:
            axes.plot(*place, "o", color=COLORS[2], markersize=12, fillstyle="none", label="best on validation")
        if part.is_significant(row, metric):
            axes.annotate("*", place, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=11)


def heat_map(part: ProtocolReport, rows: list[Row], keys: tuple[str, ...], metric: str) -> Canvas:
    """Draw the metric over the grid of two keys."""
    down, across = (sorted({setting(row, key) for row in rows}, key=_numbers_first) for key in keys)
    cells = {(setting(row, keys[0]), setting(row, keys[1])): row for row in rows}
    means = {place: row.spread(metric).mean for place, row in cells.items()}
    grid = np.array([[means.get((y, x), math.nan) for x in across] for y in down])
    canvas, axes = new_canvas(max(_WIDTH, 1.9 + 0.85 * len(across)), max(_HEIGHT, 1.1 + 0.55 * len(down)))
    image = axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(across)), [_shown_value(x) for x in across])
    axes.set_yticks(range(len(down)), [_shown_value(y) for y in down])
    axes.set(xlabel=printable(keys[1]), ylabel=printable(keys[0]))
    for (y, x), row in cells.items():
        spread, column, line_ = row.spread(metric), across.index(x), down.index(y)
        text = mean_and_std(spread).replace(" ±", "\n±") + " *" * part.is_significant(row, metric)
        text += "\nbaseline" * (row is part.baseline)
        color = text_color(image.to_rgba(np.array(spread.mean)))
        weight = "bold" if row is part.best else "normal"
        axes.text(column, line_, text, ha="center", va="center", color=color, fontsize=7.5, fontweight=weight)
        if row is part.best:
            box = Rectangle((column - 0.46, line_ - 0.44), 0.92, 0.88, fill=False, edgecolor=COLORS[1], linewidth=2)
            box.set_label("best on validation")
            axes.add_patch(box)
    untrained = [f"{name}: {value:.4f}" for name, value in part.untrained(metric).items()]
    canvas.colorbar(image, label=printable(metric) + (f"\n({', '.join(untrained)})" if untrained else ""))
    add_legend(canvas, axes)
    return canvas


def bars(part: ProtocolReport, rows: list[Row], metric: str) -> Canvas:
    """Draw a bar per row, next to its published value, and one per baseline; of many rows the best on validation."""
    if len(rows) > _MAX_BARS:
        best = part.by_validation(rows)[:_MAX_BARS]
        rows = [row for row in rows if row in best or row is part.baseline]
    has_published = any(metric in row.published for row in rows)
    untrained = part.untrained(metric)
    names = [*(_name(part, row) for row in rows), *map(printable, untrained)]
    lines = 1 + max(name.count("\n") for name in names)
    place_inches = max(0.5 if has_published else 0.3, 0.15 * lines, (_HEIGHT - 0.7) / len(names))
    canvas, axes = new_canvas(_WIDTH, 0.7 + len(names) * place_inches)
    height = min(0.38 if has_published else 0.64, 0.3 / place_inches)
    longest = max(*untrained.values(), *(_end(row, metric) for row in rows), 0.0) or 1.0
    for place, row in enumerate(rows):
        value = row.published.get(metric)
        shift = 0.0 if value is None else 0.52 * height
        _draw_bar(axes, part, row, metric, place - shift, height, 0.015 * longest)
        if value is not None:
            axes.barh(place + shift, value, height, color="#d5dae0", label="published")
            end = value + 0.015 * longest
            axes.text(end, place + shift, f"{value:.4f}", va="center", fontsize=7.5, color="#667077")
    for place, value in enumerate(untrained.values(), len(rows)):
        axes.barh(place, value, height, color=GRAY)
        axes.text(value + 0.015 * longest, place, f"{value:.4f}", va="center", fontsize=7.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, longest * 1.3)
    axes.set_xlabel(printable(metric))
    add_legend(canvas, axes)
    return canvas


def _end(row: Row, metric: str) -> float:
    """Return the right end of what is drawn of a row."""
    spread = row.spread(metric)
    return max(*_values(row, metric), spread.mean + (spread.std or 0.0), row.published.get(metric, 0.0))


def _draw_bar(axes: Axes, part: ProtocolReport, row: Row, metric: str, place: float, height: float, gap: float) -> None:
    """Draw the bar of a row with its seeds, its spread and its number."""
    spread, end = row.spread(metric), max(_values(row, metric))
    color = BASELINE if row is part.baseline else COLORS[2] if row is part.best else COLORS[0]
    label = "baseline" if row is part.baseline else "best on validation" if row is part.best else None
    axes.barh(place, spread.mean, height, color=color, label=label)
    if spread.n > 1:
        _draw_seeds(axes, _values(row, metric), [place] * spread.n, COLORS[1], label="one seed")
    if spread.std is not None and spread.n >= _MIN_SEEDS_FOR_SPREAD:
        bar = axes.errorbar(spread.mean, place, xerr=spread.std, color=COLORS[1], capsize=2, linewidth=1.2)
        bar.set_label("std over seeds")
        end = max(end, spread.mean + spread.std)
    text = mean_and_std(spread) + " *" * part.is_significant(row, metric)
    axes.text(max(end, spread.mean) + gap, place, text, va="center", fontsize=7.5)


def learning_curves(part: ProtocolReport, rows: list[Row], colors: dict[str, str]) -> Canvas | None:
    """Draw the curves of the rows that have a color: in one frame, or if there are many in a frame each."""
    metric = part.monitor
    found = {row.label: [c for run in row.runs if (c := learning_curve(run.folder, metric))] for row in rows}
    curves = {label: _RowCurves(of_seeds) for label, of_seeds in found.items() if of_seeds}
    named = [row for row in rows if row.label in colors and row.label in curves]
    if not named:
        return None
    if len(named) > _MAX_CURVES_PER_FRAME:
        return _curves_in_frames(part, curves, named, colors)
    canvas, axes = new_canvas(_WIDTH, _HEIGHT)
    for row in named:
        curves[row.label].draw(axes, colors[row.label], _name(part, row))
    axes.set(xlabel="epoch", ylabel=printable(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_untrained(axes, part, metric)
    add_legend(canvas, axes)
    return canvas


class _RowCurves:
    """The learning curves of a row: of each seed, and mean and spread over the epochs that all seeds reached.

    Epochs count from 1, as in all that people read.
    """

    def __init__(self, of_seeds: list[dict[int, float]]):
        self.of_seeds = of_seeds
        common = sorted(set.intersection(*map(set, of_seeds)))
        values = np.array([[curve[epoch] for epoch in common] for curve in of_seeds])  # (seeds, epochs)
        self.epochs = [epoch + 1 for epoch in common]
        self.mean = values.mean(0)
        self.std = values.std(0, ddof=1) if len(of_seeds) >= _MIN_SEEDS_FOR_SPREAD else None

    def draw(self, axes: Axes, color: str, label: str | None = None) -> None:
        """Draw mean, spread and a thin line per seed."""
        marker = "o" if len(self.epochs) == 1 else None
        axes.plot(self.epochs, self.mean, color=color, linewidth=1.6, label=label, marker=marker)
        if self.std is not None:
            low, high = self.mean - self.std, self.mean + self.std
            axes.fill_between(self.epochs, low, high, color=color, alpha=0.16, linewidth=0)
        for curve in self.of_seeds if len(self.of_seeds) > 1 else ():
            epochs = [epoch + 1 for epoch in curve]
            axes.plot(epochs, list(curve.values()), color=color, linewidth=0.6, alpha=0.6)


def _curves_in_frames(
    part: ProtocolReport, curves: dict[str, _RowCurves], named: list[Row], colors: dict[str, str]
) -> Canvas:
    """Draw a frame for each named row, with all other rows behind it in gray."""
    down = math.ceil(len(named) / _FRAMES_PER_LINE)
    canvas = Canvas(figsize=(10, 0.4 + 2 * down))
    frames = list(canvas.subplots(down, _FRAMES_PER_LINE, sharex=True, sharey=True, squeeze=False).flat)
    for row, axes in zip(named, frames, strict=False):
        behind = LineCollection([list(zip(c.epochs, c.mean, strict=True)) for c in curves.values()])
        axes.add_collection(behind)
        behind.set(color=GRAY, linewidth=0.6, alpha=0.6, rasterized=True)
        curves[row.label].draw(axes, colors[row.label])
        axes.set_title(_name(part, row), fontsize=8.5, loc="left", color=colors[row.label], fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _draw_untrained(axes, part, part.monitor)
    for axes in frames[len(named) :]:
        axes.remove()
    for axes in frames[max(0, len(named) - _FRAMES_PER_LINE) : len(named)]:
        axes.tick_params(labelbottom=True)
    canvas.supxlabel("epoch", fontsize=9)
    canvas.supylabel(printable(part.monitor), fontsize=9)
    add_legend(canvas, frames[0])
    return canvas


def by_time(part: ProtocolReport, rows: list[Row], colors: dict[str, str], metric: str) -> Canvas:
    """Draw the metric of each row and seed over its training time."""
    canvas, axes = new_canvas(_WIDTH, _HEIGHT)
    times = {row.label: row.mean(lambda run: run.seconds) for row in rows}
    longest = max(run.seconds for row in rows for run in row.runs)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for row in [*(row for row in rows if row.label not in colors), *(row for row in rows if row.label in colors)]:
        is_named = row.label in colors
        color = colors.get(row.label, GRAY)
        if is_named and len(row.runs) > 1:
            runs = [run for run in row.runs if metric in run.metrics]
            _draw_seeds(axes, [run.seconds / seconds for run in runs], [run.metrics[metric] for run in runs], color)
        axes.plot(
            times[row.label] / seconds,
            row.spread(metric).mean,
            "*" if row is part.best else "o",
            markersize=12 if row is part.best else 6 if is_named else 3,
            color=color,
            label=_name(part, row, metric) if is_named else None,
        )
    if min(times.values()) > 0 and longest / min(times.values()) > 10:
        use_log_scale(axes)
    else:
        axes.set_xlim(0, 1.05 * longest / seconds or 1)  # leaves room for the last marker
    axes.set(xlabel=f"training time per run in {unit}", ylabel=printable(metric))
    _draw_untrained(axes, part, metric)
    add_legend(canvas, axes, others=len(rows) - len(colors))
    return canvas


def describe_marks(part: ProtocolReport, rows: list[Row], metric: str) -> str:
    """Return what the star means in a figure that has one."""
    if part.baseline is None or not any(part.is_significant(row, metric) for row in rows):
        return ""
    return (
        f"; *\N{NO-BREAK SPACE}differs from {part.baseline.label} (p\N{NO-BREAK SPACE}≤\N{NO-BREAK SPACE}{SIGNIFICANT})"
    )


def setting(row: Row, key: str) -> float | str:
    """Return the value of a key in a row, from the config if the row does not override it."""
    value = str(row.settings.get(key, flatten(row.runs[0].config, separator=".").get(key)))
    try:
        return number if math.isfinite(number := float(value)) else value
    except ValueError:
        return value


def _values(row: Row, metric: str) -> list[float]:
    """Return the metric of each of the row's runs that has it."""
    return [run.metrics[metric] for run in row.runs if metric in run.metrics]


def _numbers_first(value: float | str) -> tuple[bool, float, str]:
    """Return a sort key: numbers by size, then words."""
    return isinstance(value, str), value if isinstance(value, float) else 0.0, str(value)


def _shown_value(value: float | str) -> str:
    """Return a value of a key as the label of a tick."""
    return f"{value:g}" if isinstance(value, float) else "\n".join(wrap(value, 12, 2))


def _draw_seeds(axes: Axes, x: list[float], y: list[float], color: str, label: str | None = None) -> None:
    """Draw a small point per seed."""
    axes.plot(x, y, "o", color=color, markersize=3, markeredgecolor="white", markeredgewidth=0.4, label=label)


def _draw_untrained(axes: Axes, part: ProtocolReport, metric: str) -> None:
    """Draw popularity and other baselines without training as lines across, each in a style of its own."""
    for (name, value), style in zip(part.untrained(metric).items(), cycle((":", "-.", "--"))):
        axes.axhline(value, color=UNTRAINED, linestyle=style, linewidth=1.2, label=printable(name))


def _name(part: ProtocolReport, row: Row, metric: str | None = None) -> str:
    """Return a row's label for a figure, with the marks of the best row and of a significant difference.

    It is without the sections of its keys, wrapped. The table has them in full, and long labels often differ only at
    the end.
    """
    words = re.sub(r"[\w.]*\.(\w+=)", r"\1", row.label)
    marks = " *" * (metric is not None and part.is_significant(row, metric))
    best = "\n(best on validation)" if row is part.best else ""
    return "\n".join(wrap(words, 40, 3)) + marks + best
