"""Bars of what this project and its peers reach, from the results of bench_peers.py."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MEASURES = {"positions_per_s": "training: positions/s", "users_per_s": "full ranking: users/s"}
COLOURS = ["#1b6ca8", "#d9822b", "#8a8a8a"]


def draw_speed(results: list[dict[str, Any]], file: Path) -> None:
    """One panel a measure, one group of bars a job, logarithmic; behind a peer's bar how many times slower it is."""
    names = list(dict.fromkeys(result["by"] for result in results))
    jobs = list(dict.fromkeys(result["name"] for result in results if result.get("positions_per_s")))
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(9, 0.5 + 0.9 * len(jobs)), sharey=True)
    for panel, (key, title) in zip(panels, MEASURES.items(), strict=True):
        for place, name in enumerate(names):
            mine = [x for x in results if x["by"] == name and x["name"] in jobs]  # a peer may have failed on a job
            rows = [jobs.index(x["name"]) + 0.27 * (place - 1) for x in mine]
            bars = panel.barh(rows, [x[key] for x in mine], 0.25, color=COLOURS[place], label=name)
            slower = "times_faster_training" if key == "positions_per_s" else "times_faster_ranking"
            labels = [f"{x[key]:,.0f}" + (f"  ({x[slower]:.1f}x)" if place else "") for x in mine]
            panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(100, 12 * max(x[key] for x in results if x.get(key)))
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_yticks(range(len(jobs)), jobs)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
