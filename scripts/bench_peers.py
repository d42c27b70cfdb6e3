"""Measure RecTools and RePlay on the jobs of bench.py, and this project in the same run.

python scripts/bench_peers.py                                     every peer and job, about half an hour on two cores
python scripts/bench_peers.py --peers replay --jobs ml1m,kion-like --json peers.json

Each library gets an environment of its own below outputs/bench/venvs, the same sizes, and the very sequences that this
project trains on: the softmax over the whole catalogue, the same dropout, Adam. RecTools is measured twice on SASRec:
with its model, and with the newer network of its fast_transformers.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import OVERRIDES_HELP, SMALL_HELP, choice_of, generate, load_cold_and_cached, positive, recommend
from benchmark.figure import draw_speed
from benchmark.jobs import FOLDER, JOBS, LETTERS, LOADING, Job, generated_folder, job_overrides
from benchmark.peer import PEERS, Peer
from benchmark.results import write_results
from benchmark.subprocesses import JobFailed, run_module

COLUMNS = "{:<12}{:<12}{:>13}{:>8}{:>11}{:>8}{:>10}{:>8}{:>10}{:>8}"
OURS = "sasrec_lab"
COMPARED = {name: job for name, job in JOBS.items() if name != "million"}  # its full softmax would take 25 GB
COMPARED_LETTERS = {letter: job for letter, job in LETTERS.items() if job.name in COMPARED}


def main() -> None:
    """Measure the jobs, one row per job and library."""
    args = parse_args()
    results, failures = [], []
    measures = ("positions/s", "users/s", "lists/s", "peak MB")
    print(COLUMNS.format("job", "by", *(heading for measure in measures for heading in (measure, "ratio"))))
    for job in args.jobs:
        measured, failed = compare(job, args.peers, args.overrides, steps=args.steps, small=args.small)
        results += measured
        failures += failed
    if args.json:
        write_results(args.json, results, {name: x for peer in args.peers for name, x in peer.version.items()})
    if args.figure:
        draw_speed(results, args.figure)
    sys.exit(1 if failures else 0)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = choice_of(COMPARED, COMPARED_LETTERS)
    peers = ", ".join(PEERS)
    parser.add_argument(
        "--peers",
        type=choice_of(PEERS),
        default=list(PEERS.values()),
        metavar="NAMES",
        help=f"libraries to compare with (default: {peers})",
    )
    parser.add_argument(
        "--jobs",
        type=jobs,
        default=list(COMPARED.values()),
        metavar="NAMES",
        help=f"jobs to run (default: {', '.join(COMPARED)})",
    )
    parser.add_argument(
        "--steps", type=positive, default=10, metavar="N", help="steps to time of each peer (default: 10)"
    )
    parser.add_argument("--small", action="store_true", help=SMALL_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the results: .svg, .png or .pdf")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser.parse_intermixed_args()


def compare(
    job: Job, peers: list[Peer], given: list[str], *, steps: int, small: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Print each row as it comes; return the rows of this project and its peers, and the failures with reasons."""
    folder = generated_folder(small)
    overrides = [*job_overrides(job, given, folder), "dataset.catalogue=train"]  # the items that peers know
    try:
        generate(job, small)
        if job is LOADING:
            ours = load_cold_and_cached(job, overrides)
            task = {"csv": str(folder / "kion/interactions.csv"), "maxlen": 50}
        else:
            file = FOLDER / "windows" / f"{job.name}.npz"
            task = run_module("benchmark.windows", str(file), *overrides) | {"steps": steps}
            task["ranked_users"] = job.peers_ranked_users
            options = ["--steps", str(job.steps), "--ranked-users", str(job.ranked_users)]
            ours = run_module("benchmark.training", *options, *overrides) | recommend(job, overrides)
    except JobFailed as error:
        return [], [report_failure(job, OURS, error)]
    measured, failures = [entry(job, OURS, ours, ours)], []
    for peer in peers:
        if job.name not in peer.jobs:
            continue
        try:
            measured.append(entry(job, peer.name, peer.run(task), ours))
        except JobFailed as error:
            failures.append(report_failure(job, peer.name, error))
    return measured, failures


def entry(job: Job, name: str, result: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Print and return a result, with how many times faster and leaner this project is."""
    ratios = {
        "times_faster_training": ratio(ours.get("positions_per_s"), result.get("positions_per_s")),
        "times_faster_ranking": ratio(ours.get("users_per_s"), result.get("users_per_s")),
        "times_faster_lists": ratio(ours.get("lists_per_s"), result.get("lists_per_s")),
        "times_faster_loading": ratio(result.get("seconds"), ours.get("seconds")),
        "times_leaner": ratio(result["peak_rss_mb"], ours["peak_rss_mb"]),
    }
    named = {"job": job.name, "about": job.about, "by": name} | result | ratios
    print(row(named), flush=True)
    return named


def ratio(larger: float | None, smaller: float | None) -> float | None:
    """Return larger / smaller, or None if one of them was not measured."""
    return larger / smaller if larger and smaller else None


def row(result: dict[str, Any]) -> str:
    """Format a result as a row of the printed table."""
    if result["job"] == LOADING.name:
        speed = f" ({result['times_faster_loading']:.1f}x)"
        lean = f" ({result['times_leaner']:.1f}x)"
        seconds = f"{result['rows']:,} rows in {result['seconds']:.2f} s{speed}, {result['peak_rss_mb']:,} MB{lean}"
        return f"{result['job']:<12}{result['by']:<12} {seconds}{note(result)}"
    numbers = COLUMNS.format(
        result["job"],
        result["by"],
        f"{result['positions_per_s']:,.0f}",
        f"{result['times_faster_training']:.1f}x",
        f"{result['users_per_s']:,.0f}",
        f"{result['times_faster_ranking']:.1f}x",
        f"{result['lists_per_s']:,.0f}",
        f"{result['times_faster_lists']:.1f}x",
        f"{result['peak_rss_mb']:,}",
        f"{result['times_leaner']:.1f}x",
    )
    return numbers + note(result)


def note(result: dict[str, Any]) -> str:
    """Return the remark behind a row."""
    return f"  ({result['note']})" if "note" in result else ""


def report_failure(job: Job, name: str, error: JobFailed) -> str:
    """Print and return which library failed on which job."""
    line = f"{job.name}: {name} failed: {error}"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
