"""A sweep: one folder, a run below it for each job, of which each ends on its own; the same command goes on with it."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sasrec_lab import run_folder
from sasrec_lab.command_line import Job
from sasrec_lab.config import TrainConfig, to_typed
from sasrec_lab.errors import InputError

errors = logging.getLogger("sasrec_lab.errors")

WORST = float("-inf")  # what a sweeper learns of a job that failed


def check(folder: Path, jobs: list[Job]) -> None:
    """Before the first job runs: can the folder be written, is each job's free for it, is its configuration valid?

    A job whose configuration is not is named and left to fail; the others go on.

    Raises:
        InputError: no job can run, or the folder holds another sweep or other configurations' results.
    """
    run_folder.check_writable(folder, "hydra.sweep.dir")
    for number, job in enumerate(jobs):
        for there in folder.glob(f"{number}-*"):
            if there.name != job.folder.name:
                raise InputError(f"{folder} holds another sweep's jobs ({there.name}); choose another hydra.sweep.dir")
    mistakes = {job.folder: job.cfg for job in jobs if isinstance(job.cfg, InputError)}
    if jobs and len(mistakes) == len(jobs):
        raise mistakes[jobs[0].folder]
    for job in jobs:
        if isinstance(job.cfg, TrainConfig):
            run_folder.check(job.folder, job.cfg)
    for job, mistake in mistakes.items():
        print(f"job {job.name} will fail: {mistake}", file=sys.stderr)


def run_job(cfg: DictConfig, folder: Path, train: Callable[[TrainConfig, Path], dict[str, Any]]) -> float:
    """Run one job, go on with it where it was cut off, or leave it where it has finished.

    Gives the monitored validation metric. A job that fails says so in its folder and lets the others go on.
    """
    try:
        typed = to_typed(cfg)
    except InputError as error:
        run_folder.mark_failed(folder, error)
        return _failed(folder, error)
    results = run_folder.check(folder, typed)
    if results is None:
        if run_folder.has_checkpoint(folder):
            typed.ckpt = "last"
        with run_folder.claimed(folder):
            try:
                results = train(typed, folder)
            except Exception as error:
                return _failed(folder, error)
    return results["metrics"].get(typed.evaluation.monitor, WORST)


def failures(folder: Path, jobs: list[Job]) -> list[str]:
    """A line for each job that has not finished."""
    folders = [job.folder for job in jobs] or sorted(path.parent for path in folder.glob("*/.hydra"))
    ends = {job: run_folder.status(job) for job in folders}
    return [f"{job.name}: {end['error'] or end['status']}" for job, end in ends.items() if end["status"] != "finished"]


def _failed(folder: Path, error: Exception) -> float:
    errors.error(run_folder.explain(error, folder), exc_info=not isinstance(error, (InputError, OSError)))
    print(f"job {folder.name} failed: {run_folder.explain(error, folder)}", file=sys.stderr)
    return WORST
