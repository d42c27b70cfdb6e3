"""Start, resume or repeat a run or a sweep from the command line; every user error ends in one line.

`launch` is handed Hydra's entry and the report's comparison of jobs, because both import this part.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sasrec_lab.config.command_line import Job, Sweep, check_command_line
from sasrec_lab.config.hydra_errors import run_hydra
from sasrec_lab.config.job_folders import UNNAMED_KEYS
from sasrec_lab.config.logger import check_installed
from sasrec_lab.config.overrides import format_override, normalize
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.source import check_user_files
from sasrec_lab.errors import InputError
from sasrec_lab.files import display_path, tolerate_closed_pipe
from sasrec_lab.run import signals, sweep
from sasrec_lab.run.folder import has_checkpoint
from sasrec_lab.run.lock import lock_folder
from sasrec_lab.run.provenance import COMMAND, as_typed, is_first_process, is_started_with_others
from sasrec_lab.run.resume import check_can_run, describe_unfinished

Main = Callable[[], object]  # Hydra's entry, which reads sys.argv
Compare = Callable[[Path], str]  # the rows of a sweep's folder, as a table to print


def launch(main: Main, compare: Compare) -> None:
    """Check the command line before Hydra makes a folder, then compose the config and run `main`."""
    signals.exit_at_once()
    logging.raiseExceptions = False  # a full disk has no room for train.log; logging would print a traceback per line
    try:
        sys.argv[1:] = normalize(sys.argv[1:])
        if is_started_with_others():
            _check_run_folder(sys.argv[1:])
        if not is_first_process():
            _run_as_helper(main)
        elif (command := check_command_line(sys.argv[1:])) is None:  # help and the like
            with tolerate_closed_pipe():
                run_hydra(main, "train")
        elif isinstance(command, Sweep):
            _run_sweep(command, main, compare)
        else:
            _run_single(command.jobs[0], main)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # what Hydra writes; a run reports its own
        place = error.filename or "the run folder"
        sys.exit(f"error: {place} cannot be written: {error.strerror}; free space, or choose another folder")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signals.expect_exit()


def _check_run_folder(words: list[str]) -> None:
    """Raise InputError if each of several processes would choose a folder of its own, or run jobs on its own."""
    if not any(word.startswith("hydra.run.dir=") for word in words) or {"-m", "--multirun"} & {*words}:
        raise InputError(
            "processes that torchrun or Slurm starts together run one configuration in one folder; add"
            " hydra.run.dir=<folder>, and start jobs of -m one by one"
        )


def _run_as_helper(main: Main) -> None:
    """Run a further process of a run on several devices: the first one prints, and stops those on its own machine."""
    logging.disable(logging.WARNING)
    signals.raise_interrupt()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        for number in signals.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    check_command_line(sys.argv[1:])  # torchrun starts all at once: code that the first one refuses must not run here
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    main()


def end_with(parent: int) -> None:
    """End this process within a second after the one that started it, for which it would wait."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_single(job: Job, main: Main) -> None:
    cfg = job.cfg
    assert isinstance(cfg, TrainConfig)
    finished = check_can_run(job.folder, cfg)
    if finished:
        from sasrec_lab.run.summary import results_table  # late, as it imports pandas

        print(f"already finished, nothing to run; its results:\n{results_table(finished, cfg, job.folder)}")
    elif cfg.ckpt is None and has_checkpoint(job.folder):
        words = format_override("hydra.run.dir", display_path(job.folder)), "ckpt=last"
        raise InputError(
            f"{job.folder} contains this run, {describe_unfinished(job.folder)}; {_resume_hint(*words)}, or choose"
            " another hydra.run.dir"
        )
    else:
        check_user_files(cfg.dataset, cfg.data_dir)
        check_installed(cfg.logger)
        signals.raise_interrupt()
        with lock_folder(job.folder):
            run_hydra(main, "train")


def _run_sweep(command: Sweep, main: Main, compare: Compare) -> None:
    folder, jobs = command.sweep_folder, command.jobs
    sweep.check(command)
    os.environ[COMMAND] = as_typed()
    sweep_dir = format_override("hydra.sweep.dir", display_path(folder))
    sys.argv[1:] = [*_replace_overrides(sweep_dir), *command.naming]  # one folder for all jobs, whatever their names
    launcher_error = None
    signals.raise_interrupt()
    try:
        with lock_folder(folder, "hydra.sweep.dir"):
            sweep.prepare(command)
            try:
                run_hydra(main, "train")
            except InputError as error:
                launcher_error = error
    except KeyboardInterrupt:
        _exit_with_resume_hint(folder, sweep_dir)
    if comparison := compare(folder):
        print(comparison)
    if unfinished := sweep.unfinished_jobs(jobs):
        count = "1 job" if len(unfinished) == 1 else f"{len(unfinished)} jobs"
        lines = [f"error: {count} in {folder} {'is' if len(unfinished) == 1 else 'are'} not finished:", *unfinished]
        if launcher_error:
            lines.append(f"the launcher failed: {launcher_error}; {_resume_hint(sweep_dir)}")
        sys.exit("\n".join(lines))
    if launcher_error:
        raise launcher_error
    print(sweep.summary(folder, jobs))


def exit_interrupted(folder: Path, is_job: bool) -> NoReturn:
    """End an interrupted process; the first of several prints how to resume the run, or the sweep if it is a job."""
    if not is_first_process():
        sys.exit(130)
    if is_job:
        _exit_with_resume_hint(folder, format_override("hydra.sweep.dir", display_path(folder.parent)))
    ckpt = ["ckpt=last"] if has_checkpoint(folder) else []
    _exit_with_resume_hint(folder, format_override("hydra.run.dir", display_path(folder)), *ckpt)


def _exit_with_resume_hint(folder: Path, *words: str) -> NoReturn:
    print(f"interrupted; files written so far are in {display_path(folder)}\n{_resume_hint(*words)}", file=sys.stderr)
    sys.exit(130)


def _resume_hint(*words: str) -> str:
    """Return the command that resumes the run or the sweep: this one with the words."""
    return f"resume with: {as_typed(_replace_overrides(*words))}"


def _replace_overrides(*words: str) -> list[str]:
    """Return this command's words and the given ones, which replace those with the same keys.

    The names of folders are omitted: they follow from the other words.
    """
    replaced = (f"{UNNAMED_KEYS}=", *(f"{word.partition('=')[0]}=" for word in words))
    return [*(word for word in sys.argv[1:] if not word.startswith(replaced)), *words]
