"""Run a sweep: one folder with one run per job.

A failed job does not stop the others; the same command with hydra.sweep.dir=<folder> resumes the sweep.
"""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sasrec_lab.config.command_line import Job, Sweep
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.job_folders import job_folders
from sasrec_lab.config.logger import check_installed
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import FolderInUse, InputError, printable
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import has_checkpoint, read_metrics
from sasrec_lab.run.lock import check_writable, is_locked, lock_folder
from sasrec_lab.run.provenance import report_command
from sasrec_lab.run.record import describe_failure, mark_failed
from sasrec_lab.run.resume import check_can_run

log = logging.getLogger("sasrec_lab.train")
errors = logging.getLogger("sasrec_lab.errors")

FOLDER_KEY = "hydra.sweep.dir"


def check(sweep: Sweep) -> None:
    """Check before the first job that the folder can be written, and that each job may run in its own folder.

    An invalid job is reported and left to fail, and a job that another process runs is passed over: neither stops the
    other jobs.

    Raises:
        InputError: no job can run, or the folder holds another sweep or other configurations' results.
    """
    folder, jobs = sweep.sweep_folder, sweep.jobs
    if sweep.launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise InputError(
            "hydra/launcher=slurm: srun was not found; run this on a machine with Slurm, such as a cluster's login"
            " node, or try hydra/launcher=submitit_local"
        )
    check_writable(folder, FOLDER_KEY)
    existing, own = job_folders(folder), {job.folder.name for job in jobs}
    _check_shared_folders(jobs)
    if existing and own.isdisjoint(existing):
        raise InputError(f"{folder} already holds jobs of another sweep ({existing[0]}); choose another {FOLDER_KEY}")
    invalid = {job.folder: job.cfg for job in jobs if isinstance(job.cfg, InputError)}
    if len(invalid) == len(jobs):
        raise invalid[jobs[0].folder]
    for job in jobs:
        if isinstance(job.cfg, TrainConfig):
            check_installed(job.cfg.logger)
            with suppress(FolderInUse):
                check_can_run(job.folder, job.cfg, FOLDER_KEY)
    for job_folder, error in invalid.items():
        print(f"job {job_folder.name} is invalid: {error}", file=sys.stderr)


def _check_shared_folders(jobs: list[Job]) -> None:
    """Raise InputError if different jobs have the same folder; equal ones may."""
    owners: dict[Path, Job] = {}
    for job in jobs:
        if owners.setdefault(job.folder, job).cfg != job.cfg:
            raise InputError(
                f"hydra.sweep.subdir gives different jobs the folder {job.folder.name}; remove it, or let it have"
                " ${hydra.job.num}"
            )


def prepare(sweep: Sweep) -> None:
    """Print how joblib shares the cores, and create the folders of new jobs."""
    if sweep.launcher._target_.endswith(".JoblibLauncher"):
        print(_describe_core_sharing(sweep.launcher.n_jobs))
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # equal lines of two jobs are two lines
    for number, job in enumerate(sweep.jobs):
        if not job.folder.name.startswith(f"{number}-"):  # config.job_folders finds the folder if it exists
            job.folder.mkdir(parents=True, exist_ok=True)


def _describe_core_sharing(n_jobs: int) -> str:
    """Return how many jobs run at a time, with how many threads: joblib's choice, or OMP_NUM_THREADS."""
    import joblib

    jobs, cores = joblib.effective_n_jobs(n_jobs), joblib.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    threads = given or max(1, cores // jobs) if jobs > 1 else cores
    reason = "OMP_NUM_THREADS" if given else f"of {cores} core{'' if cores == 1 else 's'}"
    at_once = f"{jobs} jobs at a time" if jobs > 1 else "one job at a time"
    return f"joblib  {at_once}, {threads} thread{'' if str(threads) == '1' else 's'} each ({reason})"


Train = Callable[[TrainConfig, Path], dict[str, Any]]  # train.train, which this part does not import


def run_job(cfg: DictConfig, folder: Path, train: Train) -> None:
    """Run one job, resume it if it was cut off, or skip it if it has finished.

    A job that fails records that in its folder, and the other jobs continue.
    """
    is_parallel = not HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
    if is_parallel:
        prefix_lines(HydraConfig.get().job.num)
    try:
        typed = typed_job(cfg, folder)
        if is_parallel:
            typed.trainer["enable_progress_bar"] = False  # several would overwrite each other
        results, is_new = run_or_resume(typed, folder, train)
        if not is_new:
            print(f"job {folder.name} already finished, skipped")
            return
        from sasrec_lab.run.summary import job_line  # late, as it imports pandas

        log.info(job_line(results, typed, folder))
    except Exception as error:
        report_failure(error, folder)


def run_or_resume(cfg: TrainConfig, folder: Path, train: Train) -> tuple[dict[str, Any], bool]:
    """Run a job of a sweep or a search, from its last epoch if it was cut off, and return its metrics.json.

    The second value is False if the job had finished before, so that nothing ran.
    """
    if results := check_can_run(folder, cfg, FOLDER_KEY):
        return results, False
    if has_checkpoint(folder):
        cfg.ckpt = "last"
    with lock_folder(folder, FOLDER_KEY):
        return train(cfg, folder), True


def report_failure(error: Exception, folder: Path) -> str:
    """Write what ended a job to its train.log and to stderr, and return the line."""
    line = describe_failure(error, folder)
    errors.error(line, exc_info=not isinstance(error, (InputError, OSError)))
    print(f"job {folder.name} failed: {line}", file=sys.stderr)
    return line


def typed_job(cfg: DictConfig, folder: Path) -> TrainConfig:
    """Return the config of a job, or record in its folder that it is invalid and raise the InputError."""
    try:
        typed: TrainConfig = to_typed(cfg)
        return typed
    except InputError as error:
        mark_failed(folder, error)
        raise


def prefix_lines(number: int) -> None:
    """Prefix each printed line with the number of its job, because jobs run at the same time."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_NumberedFormatter(number))


class _NumberedFormatter(logging.Formatter):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"#{self.number:<3d} {line}" for line in super().format(record).split("\n"))


def unfinished_jobs(jobs: list[Job]) -> list[str]:
    """Return a line with the reason for each job that has not finished."""
    lines = []
    for job in (job.folder for job in jobs):
        end = read_metrics(job)
        if end["status"] != "finished":
            running = f"another process is running in {job}" if is_locked(job) else None
            status = end["status"] if job.is_dir() else "not started"
            lines.append(printable(f"{job.name}: {end['error'] or running or status}"))
    return lines


def summary(folder: Path, jobs: list[Job]) -> str:
    """Return the last lines of a sweep whose jobs have all finished, with the commands that look into it."""
    count = len(jobs)
    finished = f"all {count} jobs have finished" if count > 1 else "the job has finished"
    has_tensorboard = any(isinstance(job.cfg, TrainConfig) and job.cfg.logger.tensorboard is not None for job in jobs)
    return f"\n{finished}\n{places(folder, 'sweep folder', has_tensorboard)}"


def places(folder: Path, name: str, has_tensorboard: bool) -> str:
    """Return lines with the folder of a sweep or a search, under this name, and the commands that look into it."""
    tensorboard_path = display_path(Path(sys.executable).with_name("tensorboard"))
    report = report_command([display_path(folder), "--html", display_path(folder / "report.html")])
    lines = [f"{name} {display_path(folder)}", f"report       {report}"]
    if has_tensorboard:
        lines.append(f"TensorBoard  {shlex.join([tensorboard_path, '--logdir', display_path(folder)])}")
    return "\n".join(lines)
