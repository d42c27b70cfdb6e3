"""Let the processes of a run on several devices wait for the first one's files, and end together.

When one of them ends, Lightning would kill the first one, so that nothing is recorded and nothing is printed.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytorch_lightning as pl
import torch.distributed
from pytorch_lightning.strategies.launchers import subprocess_script

from sasrec_lab.run.provenance import is_started_with_others
from sasrec_lab.training.trainer import interruptible

_LONGEST_BUILD = timedelta(days=2)
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5  # for the first process to notice a closed connection and to end in its own way


@contextmanager
def first_process_first(trainer: pl.Trainer) -> Iterator[None]:
    """Run the body, which fetches and caches files, in the first process, then once on each other machine, then in all.

    Where machines share their disk, the others find the files there. Processes that Lightning starts need not wait: it
    starts them once the first one has its data.
    """
    if trainer.world_size == 1 or not is_started_with_others():
        yield
        return
    with interruptible(trainer):
        trainer.strategy.setup_environment()  # connects the processes, as fit would
    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_BUILD)
    turn = 0 if trainer.is_global_zero else 1 if trainer.local_rank == 0 else 2
    for _ in range(turn):
        torch.distributed.barrier(group)
    yield
    for _ in range(turn, 2):
        torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


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
