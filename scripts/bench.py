"""How fast training, ranking and loading are on this machine, and how near to the arithmetic.

python scripts/bench.py                                                     every job, some minutes
python scripts/bench.py --jobs a,c --json bench.json                        some of them, also as JSON
python scripts/bench.py --jobs a trainer=gpu trainer.precision=bf16-mixed   any key of conf/ behind them
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.jobs import FOLDER, JOBS, LOADING, Job, job_overrides, made_up_folder
from benchmark.subprocesses import JobFailed, run_module

COLUMNS = "{:<14}{:>13}{:>10}{:>11}{:>10}{:>13}{:>10}{:>10}{:>10}"


def main() -> None:
    args = parse_args()
    print(
        COLUMNS.format(
            "job", "positions/s", "epoch s", "users/s", "peak MB", "floor pos/s", "of floor", "lists/s", "peak MB"
        )
    )
    results, failed = [], False
    for job in args.jobs:
        try:
            results.append(run_job(job, args.overrides, steps=args.steps, small=args.small))
            print(row(results[-1]), flush=True)
        except JobFailed as error:
            failed = True
            print(f"{job.letter} {job.name} could not run: {error}", flush=True)
    if args.json:
        write_json(args.json, results)
    sys.exit(1 if failed else 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="jobs:\n" + "\n".join(f"  {job.letter}  {job.name:<10}{job.about}" for job in JOBS.values()),
    )
    parser.add_argument("--jobs", type=choice_of(JOBS), default=list(JOBS.values()), metavar="a,c", help="which (all)")
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps that are timed (as the job says)")
    parser.add_argument("--small", action="store_true", help="a hundredth of the made-up data: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of python -m sasrec_lab.train")
    return parser.parse_intermixed_args()


def choice_of(options: dict[str, Any]) -> Callable[[str], list[Any]]:
    """What an argument like `a,c` names."""

    def chosen(text: str) -> list[Any]:
        for word in text.split(","):
            if word not in options:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(options)}")
        return [options[word] for word in text.split(",")]

    return chosen


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_job(job: Job, given: list[str], *, steps: int | None, small: bool) -> dict[str, Any]:
    """Each part in a process of its own, so that neither making nor loading the data counts in training's memory.

    Raises:
        JobFailed: the data are missing, a key is wrong, memory was short ...; the message is one line.
    """
    folder = made_up_folder(small)
    overrides = job_overrides(job, given, folder)
    if job.made_up:
        run_module("benchmark.generated_data", job.made_up, str(folder), *(["--small"] if small else []))
    if job is LOADING:
        return load_cold_and_cached(job, overrides)
    run_module("benchmark.loading", *overrides)  # so that the arrays are in the cache
    options = ["--steps", str(steps or job.steps), "--ranked-users", str(job.ranked_users)]
    trained = run_module("benchmark.training", *options, *overrides)
    return {"job": job.letter, "name": job.name} | trained | recommend(job, overrides)


def recommend(job: Job, overrides: list[str]) -> dict[str, Any]:
    return run_module("benchmark.recommending", "--users", str(job.ranked_users), *overrides)


def load_cold_and_cached(job: Job, overrides: list[str]) -> dict[str, Any]:
    """With a cache of its own that begins empty, whichever data set is given; the user's stays as it is."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as cache:
        cold = run_module("benchmark.loading", "--cache", cache, *overrides)
        cached = run_module("benchmark.loading", "--cache", cache, *overrides)
    nothing = dict.fromkeys(("positions_per_s", "users_per_s", "floor_positions_per_s", "fraction_of_floor"))
    return {
        "job": job.letter,
        "name": job.name,
        **nothing,
        **cold,
        "rows_per_s": cold["rows"] / cold["seconds"],
        "cached_seconds": cached["seconds"],
        "cached_peak_rss_mb": cached["peak_rss_mb"],
    }


def row(result: dict[str, Any]) -> str:
    name = f"{result['job']} {result['name']}"
    if result["positions_per_s"] is None:
        return (
            f"{name:<14} {result['rows']:,} rows in {result['seconds']:.2f} s ({result['rows_per_s']:,.0f} rows/s),"
            f" {result['peak_rss_mb']:,} MB; from the cache {result['cached_seconds']:.3f} s"
        )
    return COLUMNS.format(
        name,
        f"{result['positions_per_s']:,.0f}",
        f"{result['epoch_seconds']:,.1f}",
        f"{result['users_per_s']:,.0f}",
        f"{result['peak_rss_mb']:,}",
        f"{result['floor_positions_per_s']:,.0f}",
        f"{result['fraction_of_floor']:.2f}",
        f"{result['lists_per_s']:,.0f}",
        f"{result['lists_peak_rss_mb']:,}",
    )


def write_json(file: Path, results: list[dict[str, Any]]) -> None:
    try:
        file.write_text(json.dumps(results, indent=2) + "\n")
    except OSError as error:
        sys.exit(f"error: --json {file} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
