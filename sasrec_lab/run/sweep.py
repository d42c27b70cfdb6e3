"""A sweep: one folder, a run below it for each job, of which each ends on its own; the same command goes on with it."""

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

from sasrec_lab.config.command_line import Command, Job
from sasrec_lab.config.convert import to_plain, to_typed
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import FolderInUse, InputError
from sasrec_lab.files import display_path, job_folders
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run.lock import check_writable, is_locked, lock_folder

errors = logging.getLogger("sasrec_lab.errors")

FAILED_VALUE = float("-inf")  # what a sweeper learns of a job that failed


def check(command: Command) -> None:
    """Before the first job runs: can the folder be written, is each job's free for it, is its configuration valid?

    A job whose configuration is not is named and left to fail; the others go on. So do those beside a job that another
    process runs at the moment.

    Raises:
        InputError: no job can run, or the folder holds another sweep or other configurations' results.
    """
    folder, jobs = command.sweep_folder, command.jobs
    if command.launcher._target_.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise InputError(
            "hydra/launcher=slurm: there is no srun here; run this where Slurm is, such as a cluster's login node,"
            " or try hydra/launcher=submitit_local"
        )
    check_writable(folder, "hydra.sweep.dir")
    there, own = job_folders(folder), {job.folder.name for job in jobs}
    if jobs and there and own.isdisjoint(there):
        raise InputError(f"{folder} holds another sweep's jobs ({there[0]}); choose another hydra.sweep.dir")
    mistakes = {job.folder: job.cfg for job in jobs if isinstance(job.cfg, InputError)}
    if jobs and len(mistakes) == len(jobs):
        raise mistakes[jobs[0].folder]
    for job in jobs:
        if isinstance(job.cfg, TrainConfig):
            with suppress(FolderInUse):
                run_folder.check_can_run(job.folder, job.cfg)
    for job, mistake in mistakes.items():
        print(f"job {job.name} will fail: {mistake}", file=sys.stderr)


def prepare(command: Command) -> None:
    """Say how a launcher shares out the machine, make the folders of jobs that are new to an older sweep, and let a
    stored search go on with the trials that were cut off.

    Raises:
        InputError: the folder holds the runs of another search.
    """
    if command.launcher._target_.endswith(".JoblibLauncher"):
        print(_describe_core_sharing(command.launcher.n_jobs))
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of two jobs that are alike are two
    for number, job in enumerate(command.jobs):
        if not job.folder.name.startswith(f"{number}-"):  # where the job will find it: folder_names.job_folder
            job.folder.mkdir(parents=True, exist_ok=True)
    if command.search and isinstance(command.search.example.cfg, TrainConfig):
        _check_same(command.sweep_folder, command.search.example.cfg, command.search.keys)
    if command.sweeper._target_.endswith(".OptunaSweeper"):
        _requeue_interrupted_trials(command.sweeper, command.sweep_folder)


def _check_same(folder: Path, cfg: TrainConfig, searched: list[str]) -> None:
    """Raises InputError where a run in the folder differs in a key that the search does not choose."""
    for file in sorted(folder.glob("*/run.json")):
        differing = run_folder.differences(run_folder.read_config(file.parent), to_plain(cfg))
        if others := [key for key in differing if not any(f"{key}.".startswith(f"{own}.") for own in searched)]:
            raise InputError(
                f"{folder} holds another search's runs ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
                f" differ{'s' if len(others) == 1 else ''}); choose another hydra.sweep.dir"
            )


def _describe_core_sharing(n_jobs: int) -> str:
    """joblib gives each of its processes a share of the cores, unless the user has set OMP_NUM_THREADS."""
    import joblib

    jobs, cores = joblib.effective_n_jobs(n_jobs), joblib.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    threads = given or max(1, cores // jobs) if jobs > 1 else cores
    why = "OMP_NUM_THREADS" if given else f"of {cores} core{'' if cores == 1 else 's'}"
    at_once = f"{jobs} jobs at a time" if jobs > 1 else "one job at a time"
    return f"joblib  {at_once}, {threads} thread{'' if str(threads) == '1' else 's'} each ({why})"


def _requeue_interrupted_trials(sweeper: DictConfig, folder: Path) -> None:
    """Trials that were cut off come next, with the same values: so in their own folders, from their last checkpoint.

    Only of a study in the sweep's own folder, which one process at a time uses: in another the trials may be running.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Hydra says the same
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
    """Run one job, go on with it where it was cut off, or leave it where it has finished.

    Gives the monitored validation metric, or None where another process is at it. A job that fails says so in its
    folder and lets the others go on.
    """
    _prefix_job_number()
    try:
        typed = _typed(cfg, folder)
        if not HydraConfig.get().launcher._target_.endswith(".BasicLauncher"):
            typed.trainer["enable_progress_bar"] = False  # several would overwrite each other
        results = run_folder.check_can_run(folder, typed)
        if results:
            print(f"job {folder.name} finished before")
        else:
            if run_folder.has_checkpoint(folder):
                typed.ckpt = "last"
            with lock_folder(folder):
                results = train(typed, folder)
    except Exception as error:
        errors.error(run_folder.describe_failure(error, folder), exc_info=not isinstance(error, (InputError, OSError)))
        print(f"job {folder.name} failed: {run_folder.describe_failure(error, folder)}", file=sys.stderr)
        return None if isinstance(error, FolderInUse) else FAILED_VALUE
    value = results["metrics"].get(typed.evaluation.monitor, FAILED_VALUE)
    return value if isfinite(value) else FAILED_VALUE


def _typed(cfg: DictConfig, folder: Path) -> TrainConfig:
    try:
        return to_typed(cfg)
    except InputError as error:
        run_folder.mark_failed(folder, error)
        raise


def _prefix_job_number() -> None:
    """Jobs that run side by side say which of them speaks."""
    hydra = HydraConfig.get()
    if not hydra.launcher._target_.endswith(".BasicLauncher"):
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(_Numbered(hydra.job.num))


class _Numbered(logging.Formatter):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"#{self.number:<3d} {line}" for line in super().format(record).split("\n"))


def failures(folder: Path, jobs: list[Job]) -> list[str]:
    """A line for each job that has not finished."""
    lines = []
    for job in _folders(folder, jobs):
        end = run_folder.read_metrics(job)
        if end["status"] != "finished":
            running = f"another process is running in {job}" if is_locked(job) else None
            begun = end["status"] if job.is_dir() else "not begun"
            lines.append(f"{job.name}: {end['error'] or running or begun}")
    return lines


def summary(folder: Path, jobs: list[Job]) -> str:
    """What ends a sweep without failures."""
    board = Path(sys.executable).with_name("tensorboard")
    count = len(_folders(folder, jobs))
    return "\n".join(
        [
            "",
            f"all {count} jobs have finished" if count > 1 else "the job has finished",
            f"sweep folder {display_path(folder)}",
            f"TensorBoard  {shlex.join([display_path(board), '--logdir', display_path(folder)])}",
        ]
    )


def _folders(folder: Path, jobs: list[Job]) -> list[Path]:
    """Of the jobs; where only the sweeper knows them, those that have begun."""
    return [job.folder for job in jobs] or sorted(path.parent for path in folder.glob("*/.hydra"))
