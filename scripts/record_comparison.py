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

from sasrec_lab.errors import InputError
from sasrec_lab.ops.backend import processor
from sasrec_lab.report.records import Run, read_overrides
from sasrec_lab.report.rows import Row
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.significance import compare
from sasrec_lab.run.folder import RUN, read_json

NDCG, RECALL = "test/ndcg@10", "test/recall@10"
BASELINES = ("popularity", "markov")
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
    """Return the runs by configuration, each labeled with its overrides, in the order in which they first appear."""
    found: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        words = [word for word in read_overrides(run.folder) if not word.lstrip("+~").startswith(NOT_OF_THE_ROW)]
        found.setdefault(tuple(sorted(words)), {})[run.seed] = run
    labels = [shlex.join(words) for words in found]
    return [
        Row(label, label, {}, list(seeds.values()), {}) for label, seeds in zip(labels, found.values(), strict=True)
    ]


def compared(rows: list[Row]) -> tuple[list[dict[str, Any]], str]:
    """Return what is published of the rows, and a note with the overrides that the rows of each data set share.

    The rows of a data set and holdout are followed by rankings that need no training.
    """
    written, notes = [], []
    by_data: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_data.setdefault(data_of(row), []).append(row)
    for (data, holdout), members in by_data.items():
        words = [shlex.split(row.label) for row in members]
        shared = set(words[0]).intersection(*words)
        notes.append(f"{data}, {holdout}: `{shlex.join(word for word in words[0] if word in shared)}`")
        firsts: dict[str, Row] = {}
        for row, own in zip(members, words, strict=True):
            first = firsts.setdefault(row.runs[0].config["model"]["block"], row)
            label = shlex.join(word for word in own if word not in shared)
            written.append({"data": data, "holdout": holdout, "overrides": label, **metrics_of(row)})
            if row is not first:
                written[-1] |= comparison(row, first)
        for name in BASELINES:
            values = members[0].runs[0].baselines[name]
            metrics = {"ndcg": values[NDCG], "recall": values[RECALL]}
            written.append({"data": data, "holdout": holdout, "overrides": name, **metrics})
    return written, "; ".join(notes)


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
