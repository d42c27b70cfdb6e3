"""Run a sweep: one folder with one run per job.

A failed job does not stop the others; the same command with hydra.sweep.dir=<folder> resumes the sweep.
"""

import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sasrec_lab.config.command_line import Job, Sweep
from sasrec_lab.config.convert import to_plain, to_typed
from sasrec_lab.config.job_folders import job_folders
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import FolderInUse, InputError, printable
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import RUN, has_checkpoint, read_metrics
from sasrec_lab.run.lock import check_writable, is_locked, lock_folder
from sasrec_lab.run.provenance import report_command
from sasrec_lab.run.record import describe_failure, mark_failed
from sasrec_lab.run.resume import check_can_run, describe_differences, differences, recorded_config

log = logging.getLogger("sasrec_lab.train")
errors = logging.getLogger("sasrec_lab.errors")

FAILED_VALUE = float("-inf")  # what a sweeper gets for a job that failed

_FOLDER_KEY = "hydra.sweep.dir"


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
    check_writable(folder, _FOLDER_KEY)
    existing, own = job_folders(folder), {job.folder.name for job in jobs}
    if jobs and existing and own.isdisjoint(existing):
        raise InputError(f"{folder} already holds jobs of another sweep ({existing[0]}); choose another {_FOLDER_KEY}")
    invalid = {job.folder: job.cfg for job in jobs if isinstance(job.cfg, InputError)}
    if jobs and len(invalid) == len(jobs):
        raise invalid[jobs[0].folder]
    for job in jobs:
        if isinstance(job.cfg, TrainConfig):
            with suppress(FolderInUse):
                check_can_run(job.folder, job.cfg, _FOLDER_KEY)
    for job_folder, error in invalid.items():
        print(f"job {job_folder.name} is invalid: {error}", file=sys.stderr)


def prepare(sweep: Sweep) -> None:
    """Print how joblib shares the cores, create the folders of new jobs, and requeue a stored search's cut-off trials.

    Raises:
        InputError: the folder holds the runs of another search.
    """
    if sweep.launcher._target_.endswith(".JoblibLauncher"):
        print(_describe_core_sharing(sweep.launcher.n_jobs))
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # equal lines of two jobs are two lines
    for number, job in enumerate(sweep.jobs):
        if not job.folder.name.startswith(f"{number}-"):  # config.job_folders finds the folder if it exists
            job.folder.mkdir(parents=True, exist_ok=True)
    if sweep.search and isinstance(sweep.search.example.cfg, TrainConfig):
        _check_same_search(sweep.sweep_folder, sweep.search.example.cfg, sweep.search.keys)
    if sweep.sweeper._target_.endswith(".OptunaSweeper"):
        _requeue_interrupted_trials(sweep.sweeper, sweep.sweep_folder)


def _check_same_search(folder: Path, cfg: TrainConfig, searched: list[str]) -> None:
    """Raise InputError if a run in the folder differs from `cfg` in a key that is not searched."""
    for file in sorted(folder.glob(f"*/{RUN}")):
        differing = differences(recorded_config(file.parent), to_plain(cfg))
        if others := [key for key in differing if not any(f"{key}.".startswith(f"{own}.") for own in searched)]:
            raise InputError(
                f"{folder} already holds runs of another search ({describe_differences(others)}); choose another"
                f" {_FOLDER_KEY}"
            )


def _describe_core_sharing(n_jobs: int) -> str:
    """Return how many jobs run at a time, with how many threads: joblib's choice, or OMP_NUM_THREADS."""
    import joblib

    jobs, cores = joblib.effective_n_jobs(n_jobs), joblib.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    threads = given or max(1, cores // jobs) if jobs > 1 else cores
    reason = "OMP_NUM_THREADS" if given else f"of {cores} core{'' if cores == 1 else 's'}"
    at_once = f"{jobs} jobs at a time" if jobs > 1 else "one job at a time"
    return f"joblib  {at_once}, {threads} thread{'' if str(threads) == '1' else 's'} each ({reason})"


def _requeue_interrupted_trials(sweeper: DictConfig, folder: Path) -> None:
    """Queue the trials that were cut off again with the same values, so they resume in the same folders.

    Only a study in the sweep's own folder is touched, which one process at a time uses: trials of another study may
    still be running.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Hydra logs the same
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if sweeper.storage != f"sqlite:///{folder}/study.db" or not (folder / "study.db").is_file():
        return
    study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)


def run_job(cfg: DictConfig, folder: Path, train: Callable[[TrainConfig, Path], dict[str, Any]]) -> float | None:
    """Run one job, resume it if it was cut off, or skip it if it has finished.

    Return the monitored validation metric, or None if another process runs the job. A job that fails records that in
    its folder, and the other jobs continue.
    """
    _prefix_job_number()
    try:
        typed = _to_typed(cfg, folder)
        if not HydraConfig.get().launcher._target_.endswith(".BasicLauncher"):
            typed.trainer["enable_progress_bar"] = False  # several would overwrite each other
        results = check_can_run(folder, typed, _FOLDER_KEY)
        if results:
            print(f"job {folder.name} already finished, skipped")
        else:
            if has_checkpoint(folder):
                typed.ckpt = "last"
            with lock_folder(folder, _FOLDER_KEY):
                results = train(typed, folder)
            from sasrec_lab.run.summary import job_line  # late, as it imports pandas

            log.info(job_line(results, typed, folder))
    except Exception as error:
        line = describe_failure(error, folder)
        errors.error(line, exc_info=not isinstance(error, (InputError, OSError)))
        print(f"job {folder.name} failed: {line}", file=sys.stderr)
        return None if isinstance(error, FolderInUse) else FAILED_VALUE
    value = results["metrics"].get(typed.evaluation.monitor, FAILED_VALUE)
    return value if isfinite(value) else FAILED_VALUE


def _to_typed(cfg: DictConfig, folder: Path) -> TrainConfig:
    try:
        return to_typed(cfg)
    except InputError as error:
        mark_failed(folder, error)
        raise


def _prefix_job_number() -> None:
    """Prefix each printed line with the job's number if jobs run at the same time."""
    hydra = HydraConfig.get()
    if not hydra.launcher._target_.endswith(".BasicLauncher"):
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(_NumberedFormatter(hydra.job.num))


class _NumberedFormatter(logging.Formatter):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"#{self.number:<3d} {line}" for line in super().format(record).split("\n"))


def unfinished_jobs(folder: Path, jobs: list[Job]) -> list[str]:
    """Return a line with the reason for each job that has not finished."""
    lines = []
    for job in _job_folders(folder, jobs):
        end = read_metrics(job)
        if end["status"] != "finished":
            running = f"another process is running in {job}" if is_locked(job) else None
            status = end["status"] if job.is_dir() else "not started"
            lines.append(printable(f"{job.name}: {end['error'] or running or status}"))
    return lines


def summary(folder: Path, jobs: list[Job]) -> str:
    """Return the last lines of a sweep whose jobs have all finished, with the commands that look into it."""
    tensorboard_path = display_path(Path(sys.executable).with_name("tensorboard"))
    report = report_command([display_path(folder), "--html", display_path(folder / "report.html")])
    count = len(_job_folders(folder, jobs))
    return "\n".join(
        [
            "",
            f"all {count} jobs have finished" if count > 1 else "the job has finished",
            f"sweep folder {display_path(folder)}",
            f"report       {report}",
            f"TensorBoard  {shlex.join([tensorboard_path, '--logdir', display_path(folder)])}",
        ]
    )


def _job_folders(folder: Path, jobs: list[Job]) -> list[Path]:
    """Return the folders of the jobs; if only the sweeper knows them, of those that have started."""
    return [job.folder for job in jobs] or sorted(path.parent for path in folder.glob("*/.hydra"))
