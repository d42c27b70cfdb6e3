"""The canvas of a plot: its style, title, legend and labels, which leave the axes their size."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from sasrec_lab.errors import printable

GRAY = "#b8bcc2"  # rows that have no color of their own
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "sasrec_lab",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a label may contain dollars
}
_LINE_INCHES = 0.155  # of a legend or title
_CHARACTERS_PER_INCH = 14.5


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save inside with this module's style, and without matplotlib's warnings on letters it lacks."""
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        warnings.simplefilter("ignore")
        yield


def new_canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    """Return a figure of this size in inches, and its axes."""
    canvas = Canvas(figsize=(width, height))
    return canvas, canvas.subplots()


def add_title(canvas: Canvas, title: str, details: str) -> None:
    """Write a title and smaller details above the axes, so that the figure explains itself outside of its page."""
    width = round(canvas.get_figwidth() * _CHARACTERS_PER_INCH)
    lines, more = wrap(title, width - 10, 3), wrap(details, width + 10, 3)
    space = _LINE_INCHES * (len(lines) + len(more)) + 0.2
    height = canvas.get_figheight() + space
    canvas.set_size_inches(canvas.get_figwidth(), height)
    canvas.set_layout_engine("constrained", rect=(0, 0, 1, 1 - space / height))
    below = 1 - (0.06 + _LINE_INCHES * len(lines)) / height
    canvas.text(0.01, 1 - 0.04 / height, "\n".join(lines), va="top", fontweight="bold", color="#333333")
    canvas.text(0.01, below, "\n".join(more), va="top", fontsize=8, color="#5d6b7a")


def add_legend(canvas: Canvas, axes: Axes, others: int = 0) -> None:
    """Add the legend below the axes and make the figure taller by it, so that the axes keep their size."""
    if others:
        axes.plot([], [], "o", color=GRAY, markersize=3, label=f"{others} other{'s' if others > 1 else ''}")
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of several equal labels
    if not entries:
        return
    longest = max(len(text) for label in entries for text in label.split("\n"))
    columns = max(1, min(len(entries), int(canvas.get_figwidth() * _CHARACTERS_PER_INCH // (longest + 8))))
    space = max(sum(map(_legend_inches, column)) for column in np.array_split(list(entries), columns)) + 0.1
    canvas.set_size_inches(canvas.get_figwidth(), canvas.get_figheight() + space)
    canvas.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)


def _legend_inches(label: str) -> float:
    """Return the height of an entry of a legend: its lines, and half a line below it."""
    return (1.2 * (1 + label.count("\n")) + 0.5) * 8 / 72


def use_log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic with plain numbers as labels."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # its own would be math


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Return text in lines of at most this width, cut at the end."""
    shown = printable(text)[: 2 * width * max_lines]  # textwrap is slow on long texts
    return textwrap.wrap(shown, width, max_lines=max_lines, placeholder="…", break_on_hyphens=False)


def text_color(background: tuple[float, ...] | np.ndarray) -> str:
    """Return black or white, whichever has more contrast to the background."""
    luminance = np.dot(np.array(background[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
    return "black" if luminance > 0.18 else "white"  # 0.18 is the middle of luminance as defined by WCAG
