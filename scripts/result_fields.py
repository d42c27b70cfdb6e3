"""The fields of docs/results/*.json: their headings and their formats in a table's cell."""

from collections.abc import Callable
from typing import Any

from benchmark.figure import library, times
from benchmark.results import decimal, probability

Row = dict[str, Any]


def ranged(number: str) -> Callable[[Any], str]:
    """Return a format for a number, or for a range as `low to high`."""

    def formatted(value: Any) -> str:
        values = value.values() if isinstance(value, dict) else [value]
        return " to ".join(format(x, number) for x in values)

    return formatted


def code(value: str) -> str:
    """Format a command or an override."""
    return f"`{value}`"


def versions(value: dict[str, str]) -> str:
    """Format the versions of packages, without those of this project and of kernels."""
    return ", ".join(f"{name} {version}" for name, version in value.items() if name not in ("sasrec-lab", "kernels"))


def scientific(value: float) -> str:
    """Format a small difference as `1.9e-06`."""
    return f"{value:.1e}" if value else "0"


def epoch(value: Any) -> str:
    """Format an epoch, or the first and last of some, which are recorded from 0 and shown from 1."""
    return " to ".join(str(each + 1) for each in (value.values() if isinstance(value, dict) else [value]))


def seconds(value: Any) -> str:
    """Format seconds, or those of several seeds as `mean ± std (n)`."""
    if not isinstance(value, dict):
        return f"{value:.3g}"
    return f"{value['mean']:.0f}" + (f" ± {value['std']:.0f}" if value["std"] else "") + f" ({value['n']})"


def percent(value: float) -> str:
    """Format a relative change as `-3 %`."""
    return f"{100 * value:+.0f} %"


FIELDS: dict[str, tuple[str, Callable[[Any], str]]] = {  # by field: heading, format
    "technique": ("technique", str),
    "effect": ("saves or reaches", str),
    "file": ("file", str),
    "model": ("", str),
    "configuration": ("configuration", str),
    "run": ("command", code),
    "overrides": ("configuration", lambda text: code(text) if text else ""),
    "machine_of_run": ("machine", str),
    "implementation": ("implementation", str),
    "data": ("data", str),
    "row": ("row", code),
    "loss": ("loss", code),
    "job": ("job", code),
    "about": ("job", str),
    "by": ("by", library),
    "kernels": ("kernels", str),
    "difference": ("compared", str),
    "largest": ("largest difference", scientific),
    "of": ("in", str),
    "at_most": ("allowed", scientific),
    "ndcg": ("NDCG@10", decimal),
    "val_ndcg": ("validation NDCG@10", decimal),
    "recall": ("recall@10", decimal),
    "bound": ("mean minus 2.13 standard errors", decimal),
    "goal": ("goal", decimal),
    "mrr": ("MRR", decimal),
    "holdout": ("split", str),
    "cold_targets": ("unseen targets", str),
    "cold_recall": ("recall@10 of them", decimal),
    "gain": ("gain in NDCG@10", decimal),
    "p_users": ("p over users", probability),
    "change": ("change", percent),
    "published": ("published", decimal),
    "published_change": ("change", percent),
    "published_table3": ("published NDCG@10", decimal),
    "published_recall": ("published recall@10", decimal),
    "epochs": ("epochs", str),
    "best_epoch": ("best epoch", epoch),
    "minutes": ("minutes", ranged("")),
    "n": ("n", str),
    "positions_per_s": ("positions/s", ranged(",.0f")),
    "users_per_s": ("users/s ranked", ranged(",.0f")),
    "lists_per_s": ("lists/s", ranged(",.0f")),
    "times_faster_training": ("sasrec_lab trains", times),
    "times_faster_ranking": ("sasrec_lab ranks", times),
    "times_faster_lists": ("sasrec_lab makes lists", times),
    "peak_rss_mb": ("peak MB", ranged(",.0f")),
    "seconds": ("seconds", seconds),
    "interactions": ("interactions", "{:,}".format),
    "stage": ("stage", str),
    "cpu_seconds": ("processor seconds", "{:.3g}".format),
    "cpu_us_per_row": ("processor µs per interaction", "{:.2f}".format),
    "cached_seconds": ("from the cache", "{:.3g}".format),
    "tensor_seconds": ("by its `build_sequences`", "{:.3g}".format),
    "fraction_of_roofline": ("of roofline", ranged(".2f")),
    "fault": ("fault", str),
    "tried": ("tried", "{:,}".format),
    "survived": ("survived", "{:,}".format),
    "command": ("command", code),
    "environment": ("environment", str),
    "outcome": ("outcome", str),
    "versions_of_run": ("versions", versions),
    "relative_to_gcc": ("relative to g++", ranged(".2f")),
    "relative_to_float32": ("relative to float32", ranged(".2f")),
}
RATIOS = {  # shown in parentheses next to a speed
    "positions_per_s": "times_faster_training",
    "users_per_s": "times_faster_ranking",
    "lists_per_s": "times_faster_lists",
}


def cell(row: Row, field: str) -> str:
    """Return a table's cell, empty if nothing was measured."""
    if row.get(field) is None:
        return ""
    ratio = row.get(RATIOS.get(field, ""), 1)
    return FIELDS[field][1](row[field]) + (f" ({times(ratio)})" if ratio != 1 else "")
