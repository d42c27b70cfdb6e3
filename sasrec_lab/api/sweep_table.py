"""The runs of a sweep, or of any folder, as a DataFrame with a row per run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import InputError
from sasrec_lab.report.records import Run
from sasrec_lab.report.rows import comparisons
from sasrec_lab.report.runs import RunSearch, find_runs

if TYPE_CHECKING:
    import pandas as pd

_INTEGERS = ("protocol", "seed", "best_epoch", "epochs", "parameters")  # stay integers next to a missing one


def load_sweep(*folders: str | Path) -> "pd.DataFrame":
    """Return a row for each run in and below the folders, in the order of the jobs, also for those without results.

    Columns: `folder`; `status` (finished, failed, interrupted, pruned, unfinished or running) and `error`; `protocol`
    and `row`, the number of the run's table in the report and its line there, so that runs that have both in common
    differ in the seed only; a column for each override in which runs differ, such as `model.dim`; `seed`, `dataset`,
    `model`; the metrics; `best_epoch` (from 0) and `epochs`, `seconds` of training, `parameters`. A missing value is
    NaN, None or NA.

    Raises:
        InputError: a folder does not exist, or none contains a run.
    """
    import pandas as pd

    if not folders:
        raise InputError("load_sweep() needs a folder, such as outputs/ml_100k/<time>")
    found = find_runs([Path(folder).expanduser() for folder in folders])
    lines = _report_lines(found)
    records = [_records(run, *lines.get(run.folder, (None, None))) for run in found.runs]
    settings = [key for key in _differing(found.runs) if key not in records[0]]  # `model` and `dataset` are in there
    metrics = list(dict.fromkeys(name for run in found.runs for name in run.metrics))
    table = pd.DataFrame(
        [
            record | {key: _value(run, key) for key in settings} | {name: run.metrics.get(name) for name in metrics}
            for run, record in zip(found.runs, records, strict=True)
        ]
    )
    first = ["folder", "status", "error", "protocol", "row", *settings, "seed", "dataset", "model", *metrics]
    columns = [*first, *(name for name in table if name not in first)]
    return table[columns].astype(dict.fromkeys(_INTEGERS, "Int64"))


def _report_lines(found: RunSearch) -> dict[Path, tuple[int, str]]:
    """Return the number of each finished run's table, from 1, and the label of its row."""
    tables = comparisons(found.finished, None, found.jobs)
    return {
        run.folder: (number, row.label)
        for number, table in enumerate(tables, 1)
        for row in table.rows
        for run in row.runs
    }


def _differing(runs: list[Run]) -> list[str]:
    """Return the keys of the overrides in which runs differ, without the seed."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "seed")
    return [key for key in keys if any(run.overrides.get(key) != runs[0].overrides.get(key) for run in runs)]


def _records(run: Run, protocol: int | None, row: str | None) -> dict[str, Any]:
    is_finished = run.status == "finished"
    return {
        "folder": str(run.folder),
        "status": run.status,
        "error": run.error,
        "protocol": protocol,
        "row": row,
        "seed": run.seed if is_finished else _value(run, "seed"),
        "dataset": run.config["dataset"]["name"] if is_finished else None,
        "model": run.model or None,
        "best_epoch": run.best_epoch,
        "epochs": run.epochs if is_finished else None,
        "seconds": run.seconds if is_finished else None,
        "parameters": run.parameters if is_finished else None,
    }


def _value(run: Run, key: str) -> Any:
    """Return the value of an overridden key, as the config has it or, without one, as the override's text says."""
    value = flatten(run.config, separator=".").get(key)
    if value is not None or key not in run.overrides:
        return value
    try:
        return yaml.safe_load(run.overrides[key])
    except yaml.YAMLError:
        return run.overrides[key]
