"""Write measured rows with their stamp, as in docs/results/."""

import json
import shlex
import sys
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any

from benchmark.subprocesses import run_module


def mean_and_std(values: list[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single value) and n."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "n": len(values)}


def difference(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """Return the difference of two means, its standard error and p by Welch's test: the seeds of both are unrelated."""
    if min(len(ours), len(theirs)) < 2:
        return {"mean": mean(ours) - mean(theirs), "standard_error": None}
    from scipy.stats import ttest_ind  # late, because callers of subprocesses should use little memory

    error = sqrt(variance(ours) / len(ours) + variance(theirs) / len(theirs))
    p = float(ttest_ind(ours, theirs, equal_var=False).pvalue)
    return {"mean": mean(ours) - mean(theirs), "standard_error": error, "p": p}


def decimal(value: Any) -> str:
    """Format a metric as `0.1758`, several runs as `mean ± std (n)`, a difference with its standard error."""
    if not isinstance(value, dict):
        return f"{value:.4f}"
    if "standard_error" in value:
        error, p = value["standard_error"], value.get("p")
        spread = "" if error is None else f", standard error {error:.4f}"
        return f"{value['mean']:+.4f}{spread}" + ("" if p is None else f", p {probability(p)}")
    spread = "" if value["std"] is None else f" ± {value['std']:.4f}"
    return f"{value['mean']:.4f}{spread} ({value['n']})"


def probability(p: float) -> str:
    """Format a p-value as `0.031`, or as `< 0.0001`."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


@cache
def _stamp() -> dict[str, Any]:
    return run_module("benchmark.stamp")


def write_results(
    file: Path, rows: list[dict[str, Any]], versions: dict[str, str] | None = None, note: str | None = None
) -> None:
    """Write rows as JSON with date, commit, machine, threads, versions and the command that measured them.

    `versions` are those of libraries in environments of their own. `note` is for the caption of tables.
    """
    command = shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    stamp = _stamp() | {"command": command, "note": note}
    stamp["versions"] = stamp["versions"] | (versions or {})
    lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    head = json.dumps(stamp, indent=2, ensure_ascii=False).removesuffix("\n}")
    try:
        file.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    except OSError as error:
        sys.exit(f"error: --json={file} cannot be written: {error.strerror}; choose another file")
