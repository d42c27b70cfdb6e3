"""Write docs/results/NAME.json: a row for each configuration of finished runs, compared with the first of its kind.

python scripts/record_comparison.py times outputs/hstu_ml_latest_small/<time>     then: python scripts/render_results.py

The first row of a data set, holdout and kind of block is what its others are compared with. `gain` is over seeds, by
Welch's test; `p_users` is that of the report's sign-flip test over users, seeds averaged, without correction. Rows that
ask at other times have the same targets, so they are compared too.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmark.results import difference, mean_and_std
from record_runs import NOT_OF_THE_ROW, ROOT, STAMP

from sasrec_lab.config.convert import flatten, is_bookkeeping
from sasrec_lab.errors import InputError
from sasrec_lab.ops.backend import processor
from sasrec_lab.report.records import Run, read_overrides
from sasrec_lab.report.rows import Row
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.significance import compare
from sasrec_lab.run.folder import RUN, read_json

NDCG, RECALL = "test/ndcg@10", "test/recall@10"
BASELINES = ("popularity", "markov")
NO_SETTINGS = ("seed", "row", "name")
HOLDOUTS = {"last": "last item", "time": "time"}


def main() -> None:
    """Read the runs and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the file, without .json")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, a sweep, or a folder of some")
    args = parser.parse_args()
    file = ROOT / f"docs/results/{args.name}.json"
    try:
        runs = find_runs(args.folders).finished
        check_published(runs)
        rows, note = compared(configurations(runs))
    except InputError as error:
        sys.exit(f"error: {error}")
    write(file, rows, stamp_of(runs) | {"note": note})
    print(f"{file.relative_to(ROOT)}: {len(rows)} rows of {len(runs)} runs")


def check_published(runs: list[Run]) -> None:
    """Raise InputError if there is no run, or one of changed code."""
    if not runs:
        raise InputError("no run is finished; wait for one, or resume it")
    for run in runs:
        if info_of(run)["git"].get("dirty") is not False:
            raise InputError(f"{run.folder} was not trained by a commit without changes; train again in a clean clone")


def info_of(run: Run) -> dict[str, Any]:
    """Return the content of a run's run.json."""
    info = read_json(run.folder / RUN)
    assert info is not None
    return info


def configurations(runs: list[Run]) -> list[Row]:
    """Return the newest run of each seed by configuration, labeled with its settings, in order of appearance."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = found.setdefault(json.dumps(settings_of(run), sort_keys=True), {})
        if run.seed not in seeds or run.start > seeds[run.seed].start:
            seeds[run.seed] = run
    return [Row(label, label, {}, [seeds[seed] for seed in sorted(seeds)], {}) for label, seeds in found.items()]


def settings_of(run: Run) -> dict[str, Any]:
    """Return the keys of a run's config that decide what is computed, apart from the seed."""
    flat = flatten(run.config, separator=".")
    return {key: value for key, value in flat.items() if key not in NO_SETTINGS and not is_bookkeeping(key)}


def compared(rows: list[Row]) -> tuple[list[dict[str, Any]], str]:
    """Return what is published of the rows, and a note with the overrides that the rows of each data set share.

    The rows of a data set and holdout are followed by rankings that need no training.
    """
    written: list[dict[str, Any]] = []
    notes: list[str] = []
    by_data: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_data.setdefault(data_of(row), []).append(row)
    for (data, holdout), members in by_data.items():
        where = {"data": data, "holdout": holdout}
        keys: set[str] = set()
        for row in members:
            alike = [other for other in members if block_of(other) == block_of(row)]
            label = label_of(row, alike)
            keys |= {word.partition("=")[0] for word in label.split()}
            written.append(where | {"model": row.runs[0].model, "overrides": label, **metrics_of(row)})
            if row is not alike[0]:
                written[-1] |= comparison(row, alike[0])
        if words := [word for word in shared_words(members) if word.partition("=")[0] not in keys]:
            notes.append(f"{data}, {holdout}: `{shlex.join(words)}`")
        for name in BASELINES:
            values = members[0].runs[0].baselines[name]
            written.append(where | {"model": name, "ndcg": values[NDCG], "recall": values[RECALL]})
    commits = sorted({f"{run.commit}"[:7] for row in rows for run in row.runs})
    if len(commits) > 1:
        notes.append(f"runs are of the commits {', '.join(commits)}")
    return written, "; ".join(["overrides of all rows", *notes])


def shared_words(rows: list[Row]) -> list[str]:
    """Return the overrides that the rows share, of those whose command was recorded."""
    recorded = [words for row in rows if (words := read_overrides(row.runs[0].folder))]
    shared = set(recorded[0]).intersection(*recorded) if recorded else set()
    return [word for word in recorded[0] if word in shared and not word.startswith(NOT_OF_THE_ROW)] if shared else []


def label_of(row: Row, others: list[Row]) -> str:
    """Return the keys of the model in which the rows differ, with the values of one of them."""
    settings = [settings_of(other.runs[0]) for other in others]
    own = settings_of(row.runs[0])
    keys = [key for key in own if key.startswith("model.") and any(other.get(key) != own[key] for other in settings)]
    return " ".join(f"{key}={own[key]}" for key in keys)


def block_of(row: Row) -> str:
    """Return the kind of block of a row's model."""
    return str(row.runs[0].config["model"]["block"])


def data_of(row: Row) -> tuple[str, str]:
    """Return the data set and the holdout of a row."""
    dataset = row.runs[0].config["dataset"]
    return dataset["name"], HOLDOUTS[dataset["holdout"]]


def metrics_of(row: Row) -> dict[str, Any]:
    """Return the metrics over the seeds, and the recall of targets that training does not have, if there are any."""
    found: dict[str, Any] = {
        name: mean_and_std([run.metrics[key] for run in row.runs]) for name, key in (("ndcg", NDCG), ("recall", RECALL))
    }
    cold = [run.cold_targets["cold"] for run in row.runs if run.cold_targets]
    if cold:
        found |= {"cold_recall": mean_and_std([each[RECALL] for each in cold]), "cold_targets": cold[0]["targets"]}
    return found


def comparison(row: Row, first: Row) -> dict[str, Any]:
    """Return the gain in NDCG@10 over another row, over seeds and over users."""
    ours, theirs = ([run.metrics[NDCG] for run in each.runs] for each in (row, first))
    tests, notes = compare([first, row], [(row.label, first.label)], [NDCG])
    if not tests:
        raise InputError("; ".join(notes))
    (test,) = tests.values()
    return {"gain": difference(ours, theirs), "p_users": test.p}


def stamp_of(runs: list[Run]) -> dict[str, Any]:
    """Return the stamp of the newest run, with the processor of this machine."""
    newest = max(runs, key=lambda run: run.start)
    stamp = STAMP | {"measured": newest.start[:10], "commit": newest.commit, "dirty": False}
    machine = {"cpu": processor(), "cores": os.cpu_count()}
    return stamp | {"machine": machine, "threads": info_of(newest).get("threads")}


def write(file: Path, rows: list[dict[str, Any]], stamp: dict[str, Any]) -> None:
    """Write the rows, a line for each."""
    lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    head = json.dumps(stamp, indent=2).removesuffix("\n}")
    file.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
