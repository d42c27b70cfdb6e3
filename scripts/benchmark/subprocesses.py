"""Run one part of a benchmark in a process of its own.

Linux counts the memory that a process had before it became another program in its peak, so whoever calls this should
hold little: the commands import neither torch nor NumPy.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent


class JobFailed(Exception):
    """The reason, in one line."""


def run_module(module: str, *args: str) -> dict[str, Any]:
    """The JSON that `python -m module args` prints in its last line.

    Raises:
        JobFailed: it ended otherwise.
    """
    paths = [SCRIPTS.parent, SCRIPTS]  # this clone's package, whichever is installed
    return run([sys.executable, "-m", module, *args], {"PYTHONPATH": os.pathsep.join(map(str, paths))})


def run(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        signal = f"killed by signal {-done.returncode} (memory short?); " if done.returncode < 0 else ""
        raise JobFailed(signal + said[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])
