"""Figures: the speed of this project and its peers (bench_peers.py), and costs by the size of data (bench.py)."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

MEASURES = {  # by field: title, ratio to a peer
    "positions_per_s": ("training: positions/s", "times_faster_training"),
    "users_per_s": ("full ranking: users/s", "times_faster_ranking"),
}
COLORS = {"sasrec_lab": "#1b6ca8", "rectools": "#d9822b", "rectools-flat": "#efc08f", "replay": "#8a8a8a"}
TEXT = "#76808c"  # legible on white and on dark pages, whose theme an image cannot know


def data_of(results: list[dict[str, Any]]) -> str:
    """Return a checksum of the results, which an SVG figure of them contains."""
    return "data " + hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def library(value: str) -> str:
    """Return a library's name as it is written."""
    names = {"rectools": "RecTools", "rectools-flat": "RecTools, flat network", "replay": "RePlay"}
    return names.get(value, value)


def times(value: float) -> str:
    """Format a ratio as `8.5x` or `16x`."""
    return f"{value:.1f}x" if value < 9.95 else f"{value:.0f}x"


def draw_speed(results: list[dict[str, Any]], file: Path) -> None:
    """Draw one panel per measure and one group of bars per job, with the ratio to a peer next to its bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    description = data_of(results)
    names = list(dict.fromkeys(result["by"] for result in results))
    jobs = list(dict.fromkeys(result["job"] for result in results if result.get("positions_per_s")))
    abouts = {result["job"]: result["about"] for result in results}
    labels_of_jobs = [re.split("[,:]", abouts[job])[0] for job in jobs]
    results = [result for result in results if result["job"] in jobs]
    svg = file.suffix == ".svg"
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed", **colors}):
        figure, panels = plt.subplots(1, len(MEASURES), figsize=(9, 0.8 + 0.9 * len(jobs)), sharey=True)
        for panel, (key, (title, ratio)) in zip(panels, MEASURES.items(), strict=True):
            for place, name in enumerate(names):
                mine = [x for x in results if x["by"] == name]  # a peer may have failed on a job
                rows = [jobs.index(x["job"]) + 0.81 / len(names) * (place - (len(names) - 1) / 2) for x in mine]
                bars = panel.barh(
                    rows, [x[key] for x in mine], 0.75 / len(names), color=COLORS[name], label=library(name)
                )
                labels = [f"{x[key]:,.0f}" + (f"  ({times(x[ratio])})" if place else "") for x in mine]
                panel.bar_label(bars, labels, padding=3, fontsize=8)
            style_panel(panel, title, labels_of_jobs, 12 * max(x[key] for x in results))
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower center", ncols=4)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": description} if svg else None
        figure.savefig(file, metadata=metadata, transparent=svg)
        plt.close(figure)


def draw_scale(results: list[dict[str, Any]], file: Path) -> None:
    """Draw the processor time and the peak memory of each stage by the number of interactions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = list(dict.fromkeys(result["stage"] for result in results))
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), TEXT)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scale", **colors}):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
        for stage, color in zip(stages, COLORS.values(), strict=True):
            rows = [result for result in results if result["stage"] == stage]
            sizes = [row["interactions"] for row in rows]
            panels[0].plot(sizes, [row["cpu_seconds"] for row in rows], "o-", color=color, label=stage, markersize=4)
            panels[1].plot(sizes, [row["peak_rss_mb"] / 1000 for row in rows], "o-", color=color, markersize=4)
        panels[0].set_yscale("log")
        panels[1].set_ylim(0)
        for panel, title in zip(panels, ("processor seconds", "peak memory, GB"), strict=True):
            panel.set_xscale("log")
            panel.set_xlabel("interactions")
            panel.set_title(title, fontsize=10, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower center", ncols=4)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        metadata = {"Date": None, "Description": data_of(results)} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=metadata, transparent=file.suffix == ".svg")
        plt.close(figure)


def style_panel(panel: Any, title: str, labels: list[str], limit: float) -> None:
    """Set a panel's logarithmic scale, title and labels."""
    panel.set_xscale("log")
    panel.set_xlim(100, limit)
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_yticks(range(len(labels)), labels)
    panel.spines[["top", "right"]].set_visible(False)
