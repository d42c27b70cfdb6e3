"""RecTools and RePlay on the jobs of bench.py, with this project beside them in the same run.

python scripts/bench_peers.py                                     every peer and job, about half an hour on two cores
python scripts/bench_peers.py --peers replay --jobs a,c --json peers.json

Each peer gets an environment of its own below outputs/bench/venvs, the same sizes, and the very sequences that this
project trains on: the softmax over the whole catalogue, the same dropout, Adam.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import choice_of, load_cold_and_cached, positive, recommend, write_json
from benchmark.jobs import FOLDER, JOBS, LOADING, Job, job_overrides, made_up_folder
from benchmark.peer import PEERS, Peer
from benchmark.subprocesses import JobFailed, run_module

COLUMNS = "{:<14}{:<12}{:>13}{:>8}{:>11}{:>8}{:>10}{:>8}{:>10}{:>8}"
OURS = "sasrec_lab"
COMPARED = {letter: job for letter, job in JOBS.items() if letter != "d"}  # full softmax over it would take 25 GB


def main() -> None:
    args = parse_args()
    results, failures = [], []
    print(
        COLUMNS.format("job", "by", "positions/s", "ratio", "users/s", "ratio", "lists/s", "ratio", "peak MB", "ratio")
    )
    for job in args.jobs:
        measured, failed = compare(job, args.peers, args.overrides, steps=args.steps, small=args.small)
        results += measured
        failures += failed
    if args.json:
        write_json(args.json, results)
    if args.figure:
        from benchmark.figure import draw_speed  # at the end: a child's peak memory starts at its parent's

        draw_speed([result | {"job": result["name"]} for result in results], args.figure)
    sys.exit(1 if failures else 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=choice_of(PEERS), default=list(PEERS.values()), metavar="rectools,replay")
    parser.add_argument("--jobs", type=choice_of(COMPARED), default=list(COMPARED.values()), metavar="a,c")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="steps that are timed of a peer (10)")
    parser.add_argument("--small", action="store_true", help="a hundredth of the made-up data: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them there: .svg, .png or .pdf")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of python -m sasrec_lab.train")
    return parser.parse_intermixed_args()


def compare(
    job: Job, peers: list[Peer], given: list[str], *, steps: int, small: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """What this project and each peer reached, the rows printed as they come; and who could not run, and why."""
    folder = made_up_folder(small)
    overrides = [*job_overrides(job, given, folder), "dataset.catalogue=train"]  # the items that peers know
    try:
        if job.made_up:
            run_module("benchmark.generated_data", job.made_up, str(folder), *(["--small"] if small else []))
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
        if job is LOADING and not peer.loads:
            continue
        try:
            measured.append(entry(job, peer.name, peer.run(task), ours))
        except JobFailed as error:
            failures.append(report_failure(job, peer.name, error))
    return measured, failures


def entry(job: Job, name: str, result: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A result with how many times faster and leaner this project is; printed on the way."""
    ratios = {
        "times_faster_training": ratio(ours.get("positions_per_s"), result.get("positions_per_s")),
        "times_faster_ranking": ratio(ours.get("users_per_s"), result.get("users_per_s")),
        "times_faster_lists": ratio(ours.get("lists_per_s"), result.get("lists_per_s")),
        "times_faster_loading": ratio(result.get("seconds"), ours.get("seconds")),
        "times_leaner": ratio(result["peak_rss_mb"], ours["peak_rss_mb"]),
    }
    named = {"job": job.letter, "name": job.name, "by": name} | result | ratios
    print(row(named), flush=True)
    return named


def ratio(larger: float | None, smaller: float | None) -> float | None:
    return larger / smaller if larger and smaller else None


def row(result: dict[str, Any]) -> str:
    name = f"{result['job']} {result['name']}"
    if result["job"] == LOADING.letter:
        speed = f" ({result['times_faster_loading']:.1f}x)"
        lean = f" ({result['times_leaner']:.1f}x)"
        seconds = f"{result['rows']:,} rows in {result['seconds']:.2f} s{speed}, {result['peak_rss_mb']:,} MB{lean}"
        return f"{name:<14}{result['by']:<12} {seconds}{note(result)}"
    numbers = COLUMNS.format(
        name,
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
    return f"  {result['note']}" if "note" in result else ""


def report_failure(job: Job, name: str, error: JobFailed) -> str:
    line = f"{job.letter} {job.name}: {name} could not run: {error}"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
