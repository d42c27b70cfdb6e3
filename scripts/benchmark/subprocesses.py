"""Run one part of a benchmark in a process of its own.

On Linux the peak memory of a new process starts at the memory of the process that called it, so callers should use
little: the commands import neither torch nor NumPy.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent


class JobFailed(Exception):
    """A part of a benchmark failed; the message is the reason, in one line."""


def run_module(module: str, *args: str) -> dict[str, Any]:
    """Return the JSON that `python -m module args` prints as its last line.

    Raises:
        JobFailed: the process failed.
    """
    paths = [SCRIPTS.parent, SCRIPTS]  # the package of this clone, even if another one is installed
    return run([sys.executable, "-m", module, *args], {"PYTHONPATH": os.pathsep.join(map(str, paths))})


def run(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Return the JSON that a command prints as its last line.

    Raises:
        JobFailed: the process failed.
    """
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        printed = done.stderr.strip().splitlines() or ["no error message"]
        signal = f"killed by signal {-done.returncode} (out of memory?); " if done.returncode < 0 else ""
        raise JobFailed(signal + printed[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])
