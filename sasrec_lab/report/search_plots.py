"""Plots of a search: the values of its trials in their order, and how much each key matters."""

from itertools import accumulate

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from sasrec_lab.config.evaluation import is_lower_better
from sasrec_lab.errors import printable
from sasrec_lab.report.canvas import GRAY, add_legend, new_canvas
from sasrec_lab.report.plots import COLORS
from sasrec_lab.report.searches import SearchRecord

_WIDTH, _HEIGHT = 6.0, 3.2  # inches, as of other figures that share a line of a page
_MAX_BARS = 30


def history(search: SearchRecord) -> Canvas | None:
    """Draw the value of each trial by its number, and the best one so far; None if no trial has finished."""
    finished = [(trial.number, trial.value) for trial in search.trials if trial.status == "finished"]
    places = [(number, value) for number, value in finished if value is not None]
    if not places:
        return None
    canvas, axes = new_canvas(_WIDTH, _HEIGHT)
    numbers, values = zip(*places, strict=True)
    last = max(trial.number for trial in search.trials)
    is_loss = is_lower_better(search.monitor)
    best = list(accumulate(values, min if is_loss else max))
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=COLORS[2], linewidth=1.6, label="best so far")
    axes.plot(numbers, values, "o", color=COLORS[0], markersize=4, label="finished trial")
    pruned = [(trial.number, trial.value) for trial in search.trials if trial.status == "pruned"]
    if stopped := [(number, value) for number, value in pruned if value is not None]:
        axes.plot(*zip(*stopped, strict=True), "x", color=GRAY, markersize=5, label="pruned trial, when stopped")
    if failed := [trial.number for trial in search.trials if trial.status == "failed"]:
        worst = max(values) if is_loss else min(values)
        axes.plot(failed, [worst] * len(failed), "v", color=COLORS[1], markersize=5, label="failed trial, no value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=printable(search.monitor))
    add_legend(canvas, axes)
    return canvas


def importance(search: SearchRecord) -> Canvas | None:
    """Draw the share of each key in what makes the best trials; None if there are too few trials, or one key."""
    shares = sorted(search.importance.items(), key=lambda item: -item[1])[:_MAX_BARS]
    if len(shares) < 2:
        return None
    canvas, axes = new_canvas(_WIDTH, 0.9 + 0.35 * len(shares))
    places = range(len(shares))
    axes.barh(places, [share for _, share in shares], 0.6, color=COLORS[0])
    for place, (_, share) in enumerate(shares):
        axes.text(share + 0.01, place, f"{share:.2f}", va="center", fontsize=7.5)
    axes.set_yticks(places, [printable(key)[:60] for key, _ in shares])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the importance (PED-ANOVA, finished trials)")
    return canvas
