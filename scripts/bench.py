"""Measure training, ranking and loading on this machine, and how close training is to the arithmetic roofline.

python scripts/bench.py                                                        every job, some minutes
python scripts/bench.py --jobs ml1m,kion-like --json bench.json                some of them, also as JSON
python scripts/bench.py --jobs ml1m trainer=gpu trainer.precision=bf16-mixed   with any key of conf/
python scripts/bench.py --scale 1e6,1e7,1e8 --json scale.json                  data of these sizes, from file to ranks
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.jobs import FOLDER, JOBS, LETTERS, LOADING, Job, generated_folder, job_overrides
from benchmark.results import write_results
from benchmark.subprocesses import JobFailed, run_module

COLUMNS = "{:<12}{:>13}{:>10}{:>11}{:>10}{:>16}{:>13}{:>10}{:>10}"
SCALE_STAGES = ("generate", "build", "prepare", "train")
SCALE_NOTE = "on a machine with other work, so that processor seconds compare, and seconds do so less"
SMALL_HELP = "smoke test on 1/100 of the generated data"
OVERRIDES_HELP = "overrides, as for python -m sasrec_lab.train"


def main() -> None:
    """Measure the jobs, one row each."""
    args = parse_args()
    if args.scale:
        sys.exit(measure_scale(args))
    headings = ("job", "positions/s", "epoch s", "users/s", "peak MB", "roofline pos/s", "of roofline", "lists/s")
    print(COLUMNS.format(*headings, "peak MB"))
    results, failed = [], False
    for job in args.jobs:
        try:
            results.append(run_job(job, args.overrides, steps=args.steps, small=args.small))
            print(row(results[-1]), flush=True)
        except JobFailed as error:
            failed = True
            print(f"{job.name} failed: {error}", flush=True)
    if args.json:
        write_results(args.json, results)
    sys.exit(1 if failed else 0)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="jobs:\n" + "\n".join(f"  {job.name:<10} {job.about}" for job in JOBS.values()),
    )
    jobs = choice_of(JOBS, LETTERS)
    parser.add_argument(
        "--jobs", type=jobs, default=list(JOBS.values()), metavar="NAMES", help="jobs to run (default: all)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps to time (default: the job's)")
    parser.add_argument("--small", action="store_true", help=SMALL_HELP)
    parser.add_argument("--scale", type=sizes, metavar="SIZES", help="numbers of interactions to go through, not jobs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser.parse_intermixed_args()


def choice_of(options: dict[str, Any], aliases: dict[str, Any] | None = None) -> Callable[[str], list[Any]]:
    """Return a parser of an argument such as `ml1m,sparse` into the options that it names."""
    accepted = options | (aliases or {})

    def chosen(text: str) -> list[Any]:
        for word in text.split(","):
            if word not in accepted:
                raise argparse.ArgumentTypeError(f"{word!r} must be one of {', '.join(options)}")
        return [accepted[word] for word in text.split(",")]

    return chosen


def sizes(text: str) -> list[int]:
    """Parse numbers of interactions, such as `1e6,1e7`."""
    try:
        found = [int(float(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        found = []
    if not found or min(found) < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of interactions from 1000, such as 1e6,1e7")
    return found


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def run_job(job: Job, given: list[str], *, steps: int | None, small: bool) -> dict[str, Any]:
    """Run each part in a process of its own, so that generating and loading the data does not count as training memory.

    Raises:
        JobFailed: data are missing, a key is wrong, memory was short ...; the message is one line.
    """
    overrides = job_overrides(job, given, generated_folder(small))
    generate(job, small)
    if job is LOADING:
        return load_cold_and_cached(job, overrides)
    run_module("benchmark.loading", *overrides)  # so that the arrays are in the cache
    options = ["--steps", str(steps or job.steps), "--ranked-users", str(job.ranked_users)]
    trained = run_module("benchmark.training", *options, *overrides)
    return {"job": job.name} | trained | recommend(job, overrides)


def measure_scale(args: argparse.Namespace) -> int:
    """Take data of each size through every stage, each in a process of its own; return the exit status."""
    rows: list[dict[str, Any]] = []
    columns = "{:>14}  {:<9}{:>10}{:>19}{:>21}{:>10}"
    print(columns.format("interactions", "stage", "seconds", "processor seconds", "microseconds a row", "peak MB"))
    options = ["--steps", str(args.steps)] if args.steps else []
    failed = False
    for size in args.scale:
        try:
            for stage in SCALE_STAGES:
                folder = str(FOLDER / f"scale-{size:.0e}".replace("+0", ""))
                for row in run_module("benchmark.scale", *options, stage, str(size), folder, *args.overrides)["rows"]:
                    rows.append(row)
                    per_row = f"{row['cpu_us_per_row']:.2f}" if "cpu_us_per_row" in row else ""
                    numbers = (f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", per_row, f"{row['peak_rss_mb']:,}")
                    print(columns.format(f"{size:,}", row["stage"], *numbers), flush=True)
                if args.json:  # after each stage, because the next one may take an hour
                    write_results(args.json, rows, note=SCALE_NOTE)
        except JobFailed as error:
            failed = True
            print(f"{size:,} interactions failed: {error}", flush=True)
    return int(failed)


def generate(job: Job, small: bool) -> None:
    """Write the generated file that a job reads, if it reads one."""
    if job.generated:
        folder = str(generated_folder(small))
        run_module("benchmark.generated_data", job.generated, folder, *(["--small"] if small else []))


def recommend(job: Job, overrides: list[str]) -> dict[str, Any]:
    """Time the making of top-10 lists."""
    return run_module("benchmark.recommending", "--users", str(job.ranked_users), *overrides)


def load_cold_and_cached(job: Job, overrides: list[str]) -> dict[str, Any]:
    """Time loading with an empty cache and a full one, in a temporary folder: the user's cache stays unchanged."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as cache:
        cold = run_module("benchmark.loading", "--cache", cache, *overrides)
        cached = run_module("benchmark.loading", "--cache", cache, *overrides)
    nothing = dict.fromkeys(("positions_per_s", "users_per_s", "roofline_positions_per_s", "fraction_of_roofline"))
    return {
        "job": job.name,
        **nothing,
        **cold,
        "rows_per_s": cold["rows"] / cold["seconds"],
        "cached_seconds": cached["seconds"],
        "cached_peak_rss_mb": cached["peak_rss_mb"],
    }


def row(result: dict[str, Any]) -> str:
    """Format a result as a row of the printed table."""
    if result["positions_per_s"] is None:
        return (
            f"{result['job']:<12} {result['rows']:,} rows in {result['seconds']:.2f} s"
            f" ({result['rows_per_s']:,.0f} rows/s), {result['peak_rss_mb']:,} MB;"
            f" from the cache {result['cached_seconds']:.3f} s"
        )
    return COLUMNS.format(
        result["job"],
        f"{result['positions_per_s']:,.0f}",
        f"{result['epoch_seconds']:,.1f}",
        f"{result['users_per_s']:,.0f}",
        f"{result['peak_rss_mb']:,}",
        f"{result['roofline_positions_per_s']:,.0f}",
        f"{result['fraction_of_roofline']:.2f}",
        f"{result['lists_per_s']:,.0f}",
        f"{result['lists_peak_rss_mb']:,}",
    )


if __name__ == "__main__":
    main()
