"""Log a run from Python as the command does: on the screen, and with times in train.log."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

_FILE = "train.log"


@contextmanager
def logging_to(folder: Path, config: DictConfig) -> Iterator[None]:
    """Send what a run logs to the screen and to train.log for the body; `config` is the section hydra.job_logging.

    Only the package's own loggers get these handlers, because the root's are the caller's. As for the command, errors
    and Python's warnings go into the file only; what other libraries log goes there too, from warnings on.
    """
    formats = {name: logging.Formatter(config.formatters[name].format) for name in ("simple", "bare")}
    screen, file, others = logging.StreamHandler(sys.stdout), *(logging.FileHandler(folder / _FILE) for _ in range(2))
    screen.setFormatter(formats["bare"])
    for handler in (file, others):
        handler.setFormatter(formats["simple"])
    others.setLevel(logging.WARNING)
    logging.root.addHandler(others)
    own: dict[str, list[logging.Handler]] = {
        "sasrec_lab": [screen, file],
        "sasrec_lab.errors": [file],
        "py.warnings": [file],
    }
    before = {name: _state(logging.getLogger(name)) for name in own}
    try:
        for name, handlers in own.items():
            _set(logging.getLogger(name), handlers, propagate=False, level=before[name][2] or logging.INFO)
        yield
    finally:
        for name, state in before.items():
            _set(logging.getLogger(name), *state)
        logging.root.removeHandler(others)
        for handler in (file, others):
            handler.close()


def _state(logger: logging.Logger) -> tuple[list[logging.Handler], bool, int]:
    return logger.handlers, logger.propagate, logger.level


def _set(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
