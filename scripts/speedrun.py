"""Time how long a fixed configuration trains until its weights reach a goal on the test, by the rules of a speedrun.

python scripts/speedrun.py                                                    five seeds of experiment=speedrun/ml_1m
python scripts/speedrun.py --seeds 301 302 --json speedrun.json                       some of them, also as JSON
python scripts/speedrun.py --folder outputs/faster batch_size=16                      with any key of conf/

The clock of a seed runs from the start of the training command until the checkpoint of its last epoch is written:
imports, loading and validation count. Kernels are compiled and data are cached before. What reads the test users,
baselines and the test, does not count. The number of epochs is fixed, without early stopping. An attempt counts if the
mean of its seeds minus 2.13 standard errors (the 95% quantile of Student's t for five seeds) reaches the goal.

Finished seeds are kept: the same command continues with the others. A seed that was cut off starts over, because its
clock has stopped; its folder is kept under another name.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmark.results import mean_and_std, write_results

from sasrec_lab.config.composition import load
from sasrec_lab.errors import InputError
from sasrec_lab.run.folder import METRICS, RUN, read_json, read_metrics, write_json

EXPERIMENT, SEEDS, FOLDER = "speedrun/ml_1m", [301, 302, 303, 304, 305], Path("outputs/speedrun_ml_1m")
METRIC, GOAL = "test/ndcg@10", 0.1821  # of SASRec+ in "Turning Dross Into Gold Loss", table 2
STANDARD_ERRORS = 2.13
RECORD = "speedrun.json"  # in the attempt's folder: its settings, and the seconds of each finished seed
WARM_UP = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
COLUMNS = "{:<8}{:>10}{:>14}{:>14}{:>16}  {}"


def main() -> None:
    """Run the seeds that are left, print a row for each, and the mean."""
    args = parse_args()
    words = [f"experiment={args.experiment}", *args.overrides]
    try:
        if len(set(args.seeds)) < len(args.seeds):
            raise InputError("--seeds must not repeat a seed; remove the duplicates")
        check_rules(words)
        record = open_record(args.folder, words)
        if left := [seed for seed in args.seeds if str(seed) not in record["seconds"]]:
            warm_up(words)
        print(COLUMNS.format("seed", "seconds", "val ndcg@10", METRIC, "best epoch", "folder"))
        for seed in args.seeds:
            if seed in left:
                record["seconds"][str(seed)] = run_seed(words, seed, args.folder)
                write_json(args.folder / RECORD, record)
            print(row(args.folder, record, seed), flush=True)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues with the seeds that are left")
    result = summary(args.folder, record, args.seeds)
    print(describe(result))
    if args.json:
        write_results(args.json, [result])


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 301 to 305")
    parser.add_argument("--experiment", default=EXPERIMENT, help=f"file in conf/experiment/ (default: {EXPERIMENT})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of this attempt (default: {FOLDER})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON, with its stamp")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m sasrec_lab.train")
    return parser.parse_intermixed_args()


def check_rules(words: list[str]) -> None:
    """Raise InputError if the configuration is not one of a speedrun, or no configuration."""
    fixed = ("seed=", "hydra.", "ckpt=")
    if given := [word for word in words if word.startswith(fixed)]:
        raise InputError(f"{given[0]}: the script sets this key for each seed; use --seeds, or --folder")
    cfg = load(words)
    if cfg.evaluation.patience is not None:
        raise InputError(
            f"evaluation.patience={cfg.evaluation.patience} may end training early, and the rules fix the number of"
            " epochs; set evaluation.patience=null"
        )
    if not cfg.evaluation.test or 10 not in cfg.evaluation.k:
        raise InputError(f"the result is {METRIC}; set evaluation.test=true and evaluation.k=10")


def open_record(folder: Path, words: list[str]) -> dict[str, Any]:
    """Return the record of an attempt, new or of an earlier call; raise InputError if it has other settings."""
    record = read_json(folder / RECORD) or {"words": words, "seconds": {}}
    if record.get("words") != words:
        raise InputError(f"{folder} has an attempt with other settings ({' '.join(record['words'])}); choose --folder")
    folder.mkdir(parents=True, exist_ok=True)
    return record


def warm_up(words: list[str]) -> None:
    """Compile the kernels and cache the data, by training two batches."""
    with tempfile.TemporaryDirectory() as folder:
        train([*words, *WARM_UP, "evaluation.test=false", f"hydra.run.dir={folder}/run"], "the first batches")


def run_seed(words: list[str], seed: int, folder: Path) -> float:
    """Train and test a seed in its folder and return its seconds."""
    run = folder / str(seed)
    if run.exists():
        run.rename(folder / f"{seed}-cut-off-{time.strftime('%Y%m%d-%H%M%S')}")
    start = time.time()
    train([*words, f"seed={seed}", f"hydra.run.dir={run}"], f"seed {seed}")
    info = read_json(run / RUN)
    assert info is not None
    end = (run / "checkpoints" / "last.ckpt").stat().st_mtime
    return round(end - start - info["seconds"].get("baselines", 0.0), 1)


def train(words: list[str], what: str) -> None:
    """Run the training command; raise InputError with its last line if it fails."""
    command = [sys.executable, "-m", "sasrec_lab.train", *words, "trainer.enable_progress_bar=false"]
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
    )
    if done.returncode:
        printed = done.stderr.strip().splitlines() or ["no error message"]
        raise InputError(f"{what}: {printed[-1].removeprefix('error: ')}")


def row(folder: Path, record: dict[str, Any], seed: int) -> str:
    """Return the line of a finished seed."""
    results = measured(folder, record, seed)
    validation = "-" if results["val_ndcg"] is None else f"{results['val_ndcg']:.4f}"
    best = "-" if results["best_epoch"] is None else f"{results['best_epoch'] + 1} of {results['epochs']}"
    cells = seed, f"{results['seconds']:.1f}", validation, f"{results['ndcg']:.4f}", best, folder / str(seed)
    return COLUMNS.format(*map(str, cells))


def measured(folder: Path, record: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return what is kept of a finished seed; raise InputError if its run folder is gone."""
    run = folder / str(seed)
    results = read_metrics(run)
    if results["status"] != "finished":
        raise InputError(f"{run / METRICS} of a finished seed is missing; put it back, or choose another --folder")
    metrics = results["metrics"]
    return {
        "seed": seed,
        "seconds": record["seconds"][str(seed)],
        "ndcg": metrics[METRIC],
        "recall": metrics["test/recall@10"],
        "val_ndcg": metrics.get("val/ndcg@10"),
        "epochs": results["epochs"],
        "best_epoch": results["best_epoch"],
    }


def summary(folder: Path, record: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Return the attempt: its seeds, means, and whether it counts."""
    runs = [measured(folder, record, seed) for seed in seeds]
    ndcg = [run["ndcg"] for run in runs]
    bound = mean(ndcg) - STANDARD_ERRORS * stdev(ndcg) / sqrt(len(ndcg)) if len(ndcg) > 1 else None
    return {
        "run": " ".join(["python -m sasrec_lab.train", *record["words"]]),
        "seconds": mean_and_std([run["seconds"] for run in runs]),
        "ndcg": mean_and_std(ndcg),
        "bound": bound,
        "goal": GOAL,
        "counts": sorted(seeds) == SEEDS and bound is not None and bound >= GOAL,
        "by_seed": runs,
    }


def describe(result: dict[str, Any]) -> str:
    """Return the last lines: the machine, the mean, the bound, and whether the attempt counts."""
    from sasrec_lab.ops.backend import processor  # late, as it imports torch

    n, seconds, ndcg = len(result["by_seed"]), result["seconds"], result["ndcg"]
    threads = os.environ.get("OMP_NUM_THREADS") or "all"
    lines = [
        f"place: {processor()}, {os.cpu_count()} cores, {threads} threads",
        f"mean of {n}: {seconds['mean']:.1f} s, {METRIC} {ndcg['mean']:.4f}",
    ]
    if result["bound"] is not None:
        lines[-1] += f", minus {STANDARD_ERRORS} standard errors {result['bound']:.4f} (goal {GOAL})"
    if sorted(run["seed"] for run in result["by_seed"]) != SEEDS:
        lines.append(f"an attempt counts with the seeds {', '.join(map(str, SEEDS))}")
    else:
        lines.append("the attempt counts" if result["counts"] else "the attempt does not reach the goal")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
