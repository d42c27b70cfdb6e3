"""Add finished runs to docs/results/papers.json or records.json, a row for each configuration.

python scripts/record_runs.py outputs/dross_ml_1m outputs/esasrec_beauty     then: python scripts/render_results.py
python scripts/record_runs.py --search outputs/speedrun_ml_1m                runs of a search, to records.json

A search is judged by validation only, so --search refuses runs that have seen the test.

Runs of one configuration that differ in their seed are kept one by one and shown as mean and deviation; a run replaces
an earlier one with its seed. The processor is that of the machine that this script runs on.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from sasrec_lab.errors import InputError
from sasrec_lab.ops.backend import processor
from sasrec_lab.report.records import Run, read_overrides
from sasrec_lab.report.runs import find_runs
from sasrec_lab.run.folder import RUN, read_json

ROOT = Path(__file__).resolve().parent.parent
FILES = {"papers": ROOT / "docs/results/papers.json", "search": ROOT / "docs/results/records.json"}
STAMP = dict.fromkeys(["measured", "commit", "dirty", "machine", "threads", "versions", "command"])
NOTES = {
    "papers": "minutes depend on the machine and on what else it did",
    "search": "a command means the files of conf/ at its commit",
}
COMMAND = ["python", "-m", "sasrec_lab.train"]
METRICS = {"test/ndcg@10": "published", "test/recall@10": "published_recall"}  # -> field of the published value
CHOSEN_BY = "val/ndcg@10"
# Overrides that a row's command is without
NOT_OF_THE_ROW = ("seed=", "hydra.", "data_dir=", "ckpt=", "trainer.enable_progress_bar=", "evaluation.test=")


def main() -> None:
    """Read the runs and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, a sweep, or a folder of some")
    parser.add_argument("--search", action="store_true", help="runs of a search, which have no test")
    args = parser.parse_args()
    kind = "search" if args.search else "papers"
    file = FILES[kind]
    try:
        rows = with_runs(json.loads(file.read_text())["rows"] if file.exists() else [], args.folders, args.search)
    except InputError as error:
        sys.exit(f"error: {error}")
    write(file, rows, NOTES[kind])
    print(f"{file.relative_to(ROOT)}: {len(rows)} rows, {sum(len(row['runs']) for row in rows)} runs")


def with_runs(rows: list[dict[str, Any]], folders: list[Path], search: bool = False) -> list[dict[str, Any]]:
    """Return the rows with the finished runs in some folders; raise InputError if one cannot be published."""
    runs = find_runs(folders).finished
    if not runs:
        raise InputError(f"{', '.join(map(str, folders))}: no finished run; wait for one, or resume it")
    for run in runs:
        info = read_json(run.folder / RUN)
        assert info is not None
        if info["git"].get("dirty") is not False:
            raise InputError(f"{run.folder} was not trained by a commit without changes; train again in a clean clone")
        if search and "test/ndcg@10" in run.metrics:
            raise InputError(f"{run.folder} has seen the test; runs of a search are trained with evaluation.test=false")
        if missing := [metric for metric in ([CHOSEN_BY] if search else METRICS) if metric not in run.metrics]:
            raise InputError(f"{run.folder} has no {missing[0]}; train with evaluation.k=10 and without sampled items")
        add_run(rows, run, read_overrides(run.folder), info["device"])
    data = list(dict.fromkeys(row["data"] for row in rows))
    return sorted(rows, key=lambda row: data.index(row["data"]))


def add_run(rows: list[dict[str, Any]], run: Run, words: list[str], device: str) -> None:
    """Add a run, started with these words, to its row, in the order of seeds; a new row goes to the end."""
    words = [word for word in words if not word.lstrip("+~").startswith(NOT_OF_THE_ROW)]
    row = next((row for row in rows if sorted(shlex.split(row["run"])[len(COMMAND) :]) == sorted(words)), None)
    if row is None:
        row = {
            "data": run.config["dataset"]["name"],
            "run": shlex.join([*COMMAND, *words]),
            **published(run),
            "runs": [],
        }
        rows.append(row)
    others = [other for other in row["runs"] if other["seed"] != run.seed]
    row["runs"] = sorted([*others, entry(run, device)], key=lambda each: each["seed"])


def published(run: Run) -> dict[str, float]:
    """Return the values that the paper has for this row on this data set, if any."""
    cells = run.config["published"] or {}
    if cells.get("dataset") != run.config["dataset"]["name"]:
        return {}
    values = cells["cells"].get(run.config["row"], {})
    return {name: values[metric] for metric, name in METRICS.items() if metric in values}


def entry(run: Run, device: str) -> dict[str, Any]:
    """Return what is kept of a run; one of a search has no test."""
    fields = {"ndcg": "test/ndcg@10", "recall": "test/recall@10"}
    tested = {name: run.metrics[metric] for name, metric in fields.items() if metric in run.metrics}
    return {
        "seed": run.seed,
        **tested,
        "val_ndcg": run.metrics.get(CHOSEN_BY),
        "epochs": run.epochs,
        "best_epoch": run.best_epoch,
        "minutes": round(run.seconds / 60, 1),
        "device": device,
        "processor": processor(),
        "measured": run.start[:16],
        "commit": run.commit,
    }


def write(file: Path, rows: list[dict[str, Any]], note: str) -> None:
    """Write the rows, with a line for each run."""
    blocks = []
    for row in rows:
        head = json.dumps({key: value for key, value in row.items() if key != "runs"}, ensure_ascii=False)
        runs = ",\n".join(f"      {json.dumps(run)}" for run in row["runs"])
        blocks.append(f'    {head[:-1]}, "runs": [\n{runs}\n    ]}}')
    newest = max((run for row in rows for run in row["runs"]), key=lambda run: run["measured"])
    stamp = STAMP | {"measured": newest["measured"][:10], "commit": newest["commit"], "dirty": False, "note": note}
    head = json.dumps(stamp, indent=2).removesuffix("\n}")
    file.write_text(f'{head},\n  "rows": [\n' + ",\n".join(blocks) + "\n  ]\n}\n")


if __name__ == "__main__":
    main()
