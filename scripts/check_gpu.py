"""Check the GPU path on this machine's card: whether it computes the right numbers, and how fast.

python scripts/check_gpu.py --json docs/results/gpu.json   every check; none starts after six minutes
python scripts/check_gpu.py --only attention,losses        some of them
python scripts/check_gpu.py --cpu                          tiny sizes without a GPU: whether the checks themselves run

Each row is printed, and the file written again, as soon as it is measured, so that an interrupted call loses nothing.
A check whose data or library is missing is skipped with a line. Data come from SASREC_LAB_DATA; nothing is fetched.
Exits with 1 if a check failed.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from bench import choice_of
from benchmark.results import write_results

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu import attention, device_tests, loss_speed, losses, peer, runs, training
from gpu.check import Row, Setting, measure

from sasrec_lab.ops.backend import choose_matmul

CHECKS = {
    check.name: check
    for check in (
        device_tests.CHECK,
        attention.CHECK,
        losses.CHECK,
        training.CHECK,
        loss_speed.CHECK,
        runs.FULL_RUN,
        runs.SAME_SEEDS,
        peer.CHECK,
    )
}
SECONDS = 360  # of all checks
FORMATS = {"positions_per_s": ",.0f", "users_per_s": ",.0f", "lists_per_s": ",.0f", "allowed": "g"}


def main() -> None:
    """Run the checks, one row each."""
    args = parse_args()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; use --cpu to try the checks on tiny sizes")
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    setting = Setting(torch.device("cpu" if args.cpu else "cuda"), tiny=args.cpu)
    choose_matmul(setting.device)
    rows: list[Row] = []
    start = time.perf_counter()
    for check in args.only:
        left = SECONDS - (time.perf_counter() - start)
        for row in measure(check, setting, left):
            rows.append(row)
            print(f"{row['check']}: {text(row)}", flush=True)
            if args.json:
                write_results(args.json, rows)
    print(f"\n{table(rows)}\n{time.perf_counter() - start:.0f} s")
    sys.exit(1 if any("failed" in row for row in rows) else 0)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="checks:\n" + "\n".join(f"  {x.name:<11} {x.about}, at most {x.seconds} s" for x in CHECKS.values()),
    )
    every = list(CHECKS.values())
    parser.add_argument(
        "--only", type=choice_of(CHECKS), default=every, metavar="NAMES", help="checks to run (default: all)"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON, as in docs/results/")
    return parser.parse_args()


def text(row: Row) -> str:
    """Return a row as one line."""
    return f"{row['what']}: {values(row)}"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"| {row['check']} | {row['what']} | {values(row)} |" for row in rows]
    return "\n".join(["| check | what | measured |", "|---|---|---|", *lines])


def values(row: Row) -> str:
    """Return what a row measured, or why it did not."""
    measured = {name: value for name, value in row.items() if name not in ("check", "what") and value is not None}
    return ", ".join(f"{name} {formatted(name, value)}" for name, value in measured.items())


def formatted(name: str, value: Any) -> str:
    """Format a number by the name of its field."""
    return format(value, FORMATS.get(name, ".3g")) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
