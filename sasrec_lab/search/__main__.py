"""Search for the configuration with the best validation metric.

python -m sasrec_lab.search sweep=small                              20 trials on MovieLens-100K
python -m sasrec_lab.search sweep=small trials=50 pruner=hyperband   the same keys as for sasrec_lab.train
python -m sasrec_lab.search --help                                   what there is to choose
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from sasrec_lab.config.hydra_errors import run_hydra
from sasrec_lab.config.hydra_internals import VERSION_BASE
from sasrec_lab.config.logger import check_installed
from sasrec_lab.config.overrides import normalize
from sasrec_lab.config.schema import CONF_DIR
from sasrec_lab.config.search import FOLDER_KEY, SearchPlan, check_search
from sasrec_lab.data.source import check_user_files
from sasrec_lab.errors import InputError, Pruned, counted
from sasrec_lab.files import display_path, tolerate_closed_pipe
from sasrec_lab.run import signals, sweep
from sasrec_lab.run.launch import end_with
from sasrec_lab.run.lock import check_writable
from sasrec_lab.run.provenance import COMMAND, as_typed

if TYPE_CHECKING:
    from optuna.trial import Trial

    from sasrec_lab.search.study import Study

_EXTRA = "pip install 'sasrec-lab[search]'"


def entry() -> None:
    """Run the command; an error is one line on stderr and exit status 1."""
    signals.exit_at_once()
    logging.raiseExceptions = False  # a full disk has no room for train.log; logging would print a traceback per line
    try:
        sys.argv[1:] = normalize(sys.argv[1:])
        if (plan := check_search(sys.argv[1:])) is None:
            sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith("-")]  # help knows the search's keys only
            with tolerate_closed_pipe():
                run_hydra(main, "search")
        else:
            search(plan)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}; the same command resumes the search")
    except KeyboardInterrupt:
        print(f"interrupted\nresume with: {as_typed()}", file=sys.stderr)
        sys.exit(130)
    finally:
        signals.expect_exit()


@hydra.main(config_path=CONF_DIR, config_name="search", **VERSION_BASE)
def main(cfg: DictConfig) -> None:
    """Let Hydra answer its own flags."""


def search(plan: SearchPlan) -> None:
    """Run the trials of a search that are left, and print which one is the best on validation.

    Raises:
        InputError: the search cannot start, all its trials have failed, or one of its processes has.
    """
    _check_optuna()
    check_user_files(plan.example.dataset, plan.example.data_dir)
    check_installed(plan.example.logger)
    check_writable(plan.folder, FOLDER_KEY)
    os.environ[COMMAND] = as_typed()
    signals.raise_interrupt()
    from sasrec_lab.search.study import Study  # late, as it imports Optuna

    study = Study(plan)
    _print_plan(plan, len(study.trials()))
    failed_processes = _run_processes(plan) if plan.cfg.jobs > 1 else 0
    if not failed_processes:
        _run_trials(study)
    _print_end(study)
    if failed_processes:
        raise InputError(f"{counted(failed_processes, 'process')} of the search failed; the same command resumes it")


def _check_optuna() -> None:
    """Raise InputError if Optuna is missing or too old."""
    from importlib import metadata  # late, as in config/logger.py

    try:
        version = metadata.version("optuna")
    except metadata.PackageNotFoundError:
        raise InputError(f"a search needs Optuna 5, which is not installed; {_EXTRA}") from None
    if int(version.partition(".")[0]) < 5:
        raise InputError(f"a search needs Optuna 5, but {version} is installed; {_EXTRA}")


def _print_plan(plan: SearchPlan, existing: int) -> None:
    cfg, keys = plan.cfg, ", ".join(dimension.key for dimension in plan.space)
    seeds = f", {counted(cfg.seeds, 'seed')} each" if cfg.seeds > 1 else ""
    before = f", {existing} of them before" if existing else ""
    print(
        f"search  {counted(plan.trials, 'trial')}{seeds}{before}: {keys}\n"
        f"        sampler {cfg.sampler.name}, pruner {cfg.pruner.name}, best {plan.example.evaluation.monitor}\n"
        f"        in {display_path(plan.folder)}",
        flush=True,
    )


def _run_processes(plan: SearchPlan) -> int:
    """Run trials in several processes, which share the cores, and return how many of the processes failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.cfg.jobs)))
    context = multiprocessing.get_context("fork")  # torch has no thread yet
    processes = [context.Process(target=_run_in_child, args=(plan, os.getpid())) for _ in range(plan.cfg.jobs)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            if process.is_alive():
                process.terminate()  # they ignore Ctrl-C, which a terminal sends to all, so that they get one signal
        for process in processes:
            process.join()
        raise
    return sum(process.exitcode != 0 for process in processes)


def _run_in_child(plan: SearchPlan, parent: int) -> None:
    from sasrec_lab.search.study import Study

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        _run_trials(Study(plan))
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


def _run_trials(study: "Study") -> None:
    """Run trials until the search has as many as it asks for."""
    while True:
        with study.taken_trial() as trial:
            if trial is None:
                return
            _run_trial(study, trial)


def _run_trial(study: "Study", trial: "Trial") -> None:
    """Run a trial and record how it ends; a trial that fails does not stop the search."""
    from optuna.trial import TrialState

    from sasrec_lab.search.study import STATES
    from sasrec_lab.search.trial import run_trial

    params = study.params(trial)
    if earlier := study.repeated(params):
        value = earlier.value if earlier.state is TrialState.COMPLETE else None
        study.end(trial, earlier.state, value, earlier.user_attrs.get("error"))
        print(f"trial {trial.number} repeats trial {earlier.number}, {STATES[earlier.state]}", flush=True)
        return
    try:
        value = run_trial(study, trial, params)
    except Pruned as end:
        study.end(trial, TrialState.PRUNED)
        print(f"trial {trial.number} {end}", flush=True)
    except OSError:
        raise
    except Exception as error:  # of any kind: the next trial has other values
        folder = study.plan.run_folder(trial.number, params, study.plan.seeds[0])
        study.end(trial, TrialState.FAIL, error=sweep.report_failure(error, folder))
    else:
        study.end(trial, TrialState.COMPLETE, value)
        best = study.best()
        assert best is not None
        metric = study.plan.example.evaluation.monitor
        print(f"trial {trial.number}: {metric} {value:.4f}; best {best.value:.4f}, trial {best.number}", flush=True)


def _print_end(study: "Study") -> None:
    """Print the rows of the search, how its trials ended, and which is the best one.

    Raises:
        InputError: all trials have failed.
    """
    from sasrec_lab.report.summary import compare_jobs
    from sasrec_lab.search.study import STATES

    trials, best = study.trials(), study.best()
    states = [STATES[trial.state] for trial in trials]
    if trials and best is None and set(states) == {"failed"}:
        raise InputError(
            f"all {len(trials)} trials failed; the first: {trials[0].user_attrs.get('error')}; failed trials are not"
            f" run again: correct the cause, and remove {display_path(study.folder)} or choose another {FOLDER_KEY}"
        )
    if comparison := compare_jobs(study.folder):
        print(comparison)
    counts = [f"{states.count(name)} {name}" for name in STATES.values() if name in states]
    print(f"\n{counted(len(trials), 'trial')}: {', '.join(counts)}")
    if best is not None:
        words = " ".join(dimension.word(best.params[dimension.key]) for dimension in study.plan.space)
        metric = study.plan.example.evaluation.monitor
        print(f"best trial {best.number} on validation, {metric} {best.value:.4f}: {words}")
    has_tensorboard = study.plan.example.logger.tensorboard is not None
    print(sweep.places(study.folder, "search folder", has_tensorboard))


if __name__ == "__main__":
    entry()
