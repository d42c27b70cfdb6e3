"""Ways to run the commands in tests: in a fresh process, in this process, or started to be interrupted."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from fresh_cache import cache_in

Done = subprocess.CompletedProcess[str]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a command in this folder: its own cache, one thread, and no data of this machine.

    These runs are tiny: on a busy machine, several threads would mostly wait for each other.
    """
    clean = {name: value for name, value in os.environ.items() if name not in ("SASREC_LAB_DATA", "PYTHONPATH")}
    return clean | {"XDG_CACHE_HOME": cache_in(folder), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def children_seconds() -> float:
    """Return the processor time of all finished children, which depends little on other work on the machine."""
    times = os.times()
    return times.children_user + times.children_system


def in_a_fresh_process(module: str, folder: Path) -> Callable[..., Done]:
    """Return a function that runs `python -m module` in this folder; `env` adds variables."""

    def run(*args: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
        command = [sys.executable, "-m", module, *map(str, args)]
        given = environment(folder) | (env or {})
        return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=timeout)

    return run


def without_the_package(code: str, cwd: Path) -> Done:
    """Run Python code that cannot import this package."""
    return subprocess.run(hiding_the_package(code), cwd=cwd, capture_output=True, text=True, timeout=300)


def hiding_the_package(code: str) -> list[str]:
    """Return the command of such code: -I ignores PYTHONPATH, and `hide` an editable install."""
    hide = "import sys; sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in repr(x).lower()]\n"
    hide += "sys.path[:] = [x for x in sys.path if not __import__('os').path.isdir(x + '/sasrec_lab')]\n"
    return [sys.executable, "-I", "-c", hide + code]


def start(module: str, words: list[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m module` in this folder, with pipes for its output; `options` go to Popen."""
    command = [sys.executable, "-m", module, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **({"env": environment(folder)} | pipes | options))


def in_this_process(module: str, folder: Path) -> Callable[..., Done]:
    """Return a function that runs the command as `in_a_fresh_process` does, but without seconds of imports.

    A test takes the fresh process if the process itself is its point: signals, threads, environment variables, what is
    imported, or whether a second process repeats the first.
    """
    import_module("pytorch_lightning")  # first, so that its log handler gets this process's error stream, not a run's
    loaded = import_module(module)

    def run(*args: str) -> Done:
        command = [loaded.__file__, *map(str, args)]
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with process_state(command, environment(folder), folder), streams[0], streams[1]:
            code = _exit_code(loaded.entry)
        return Done(command, code, *(stream.buffer.getvalue().decode() for stream in (out, err)))

    return run


def _exit_code(entry: Callable[[], None]) -> int:
    """Run a command and return its exit code; like Python, print a message that it exits with."""
    try:
        entry()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


@contextlib.contextmanager
def process_state(argv: list[str], env: dict[str, str], folder: Path) -> Iterator[None]:
    """Let a command use this process, then restore what commands change."""
    before_argv, before_env, before_folder = sys.argv, dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    thread_failed = threading.excepthook
    sys.argv = list(argv)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        with _logging_state(), warnings.catch_warnings():
            yield
    finally:
        sys.argv = before_argv
        os.environ.clear()
        os.environ.update(before_env)
        os.chdir(before_folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        threading.excepthook = thread_failed


@contextlib.contextmanager
def _logging_state() -> Iterator[None]:
    """Restore the handlers and levels of all loggers, because Hydra's handlers write to streams that are closed."""
    errors_raise = logging.raiseExceptions
    before = {logger: (logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in _loggers()}
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.raiseExceptions = errors_raise
        for logger in _loggers():
            handlers, level, propagate, disabled = before.get(logger, ([], logging.NOTSET, True, False))
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled


def _loggers() -> list[logging.Logger]:
    named = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in named if isinstance(logger, logging.Logger))]
