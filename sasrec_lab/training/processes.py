"""End all processes of a run on several devices when one of them ends, in one line and with a failed record.

Lightning kills the first process then, so that nothing is recorded and nothing is printed.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from pytorch_lightning.strategies.launchers import subprocess_script

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5  # for the first process to notice a closed connection and to end in its own way


def watch_processes(record_failure: Callable[[str], bool]) -> None:
    """Let Lightning watch its processes so that, if one fails, the others end and `record_failure` gets the line.

    It returns whether it has recorded the line; it has not if the first process ends in its own way.
    """

    def observe(processes: list[subprocess.Popen[bytes]]) -> None:
        threading.Thread(target=_observe, args=(processes, record_failure), daemon=True).start()

    subprocess_script._launch_process_observer = observe  # type: ignore[attr-defined, assignment]


def _observe(processes: list[subprocess.Popen[bytes]], record_failure: Callable[[str], bool]) -> None:
    while not (failed := [process for process in processes if process.poll()]):
        if all(process.returncode == 0 for process in processes):
            return
        time.sleep(_POLL_SECONDS)
    for process in processes:
        process.kill()
    time.sleep(_GRACE_SECONDS)
    line = describe_end(processes.index(failed[0]) + 1, failed[0].returncode)
    try:
        if record_failure(line):
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_SECONDS)
    finally:
        os._exit(1)  # the main thread waits for the process that ended


def describe_end(number: int, code: int) -> str:
    """Return a line on the end of the process with this number, the first one being 0."""
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit status {code}"
    return f"process {number} of this run {how}, so the run ends; resume it with ckpt=last"
