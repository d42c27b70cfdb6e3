"""Restore what a training changes in its process, so that a notebook continues as before."""

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from sasrec_lab.run.signals import STOP_SIGNALS

_LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")  # loggers that a training quietens


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Restore random states, torch's switches, environment, signals and warnings after the body, however it ends."""
    with ExitStack() as stack:
        for state in (_random_states, _torch_switches, _environment, _signal_handlers, _warnings_and_hooks):
            stack.enter_context(contextmanager(state)())
        yield


def _random_states() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  Lightning seeds NumPy's global generator
        torch.random.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _torch_switches() -> Iterator[None]:
    """Restore what Trainer flags and the choice of the matrix product set for the whole process."""
    cudnn, deterministic = torch.backends.cudnn, torch.utils.deterministic
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    is_strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    has_anomaly, checks_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    fills = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(is_strict, warn_only=only_warns)
        torch.autograd.set_detect_anomaly(has_anomaly, checks_nan)
        deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _signal_handlers() -> Iterator[None]:
    """Restore the handlers of Ctrl-C and SIGTERM, which Lightning replaces; only the main thread may set them."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _warnings_and_hooks() -> Iterator[None]:
    """Restore filters of warnings, where these are shown, the hook of failing threads, and Lightning's loggers."""
    hook, errors_raise = threading.excepthook, logging.raiseExceptions
    levels = {name: logging.getLogger(name).level for name in _LIGHTNING}
    are_logged = warnings.showwarning.__module__ == "logging"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm.auto, which Lightning imports unused
            yield
    finally:
        if not are_logged:
            logging.captureWarnings(False)
        threading.excepthook, logging.raiseExceptions = hook, errors_raise
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
