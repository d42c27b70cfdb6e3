"""Compose and train from Python or a notebook: what the command does, in the caller's process."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sasrec_lab.config.command_line import check_parts, job_of
from sasrec_lab.config.composition import compose_config, explained, load
from sasrec_lab.config.hydra_internals import hydra_state_restored
from sasrec_lab.config.logger import check_installed
from sasrec_lab.config.overrides import check_syntax, format_override, normalize
from sasrec_lab.config.schema import TrainConfig, start_now
from sasrec_lab.data.source import check_user_files
from sasrec_lab.errors import InputError, shown
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import has_checkpoint
from sasrec_lab.run.lock import lock_folder
from sasrec_lab.run.provenance import COMMAND, as_typed
from sasrec_lab.run.record import describe_failure
from sasrec_lab.run.resume import check_can_run, describe_unfinished

if TYPE_CHECKING:
    from sasrec_lab.api.finished_run import Run

log = logging.getLogger(__name__)
errors = logging.getLogger("sasrec_lab.errors")

_ONE_DEVICE = (1, "1", "auto")


def compose(*overrides: str, config_dir: str | Path | None = None) -> TrainConfig:
    """Return the configuration of a run, with its defaults, as typed objects; nothing is read or written.

    Args:
        overrides: keys and choices as on the command line, such as "dataset=ml_1m" and "model.dim=32".
        config_dir: a folder with your own config groups, as the command's --config-dir.

    Raises:
        InputError: an override is not valid; the message names the nearest key.
    """
    return load(_checked(overrides), _text(config_dir))


def train_model(*overrides: str, folder: str | Path | None = None, config_dir: str | Path | None = None) -> "Run":
    """Train, test and record one run as `python -m sasrec_lab.train` does with these overrides; return it.

    The run folder and its numbers are those of the command. Progress is printed. Ctrl-C, or a notebook's stop button,
    raises KeyboardInterrupt; the same call with the run's `folder` and "ckpt=last" resumes the run. If the folder has
    this run, finished, nothing is trained. Afterwards the process is as before: random states, signals, logging.

    Args:
        overrides: keys and choices as on the command line, such as "dataset=ml_1m" and "model.dim=32".
        folder: the run folder; None: outputs/<name>/<time>.
        config_dir: a folder with your own config groups, as the command's --config-dir.

    Raises:
        InputError: what the command would end with in one line: an override, a file or a folder is not valid, training
            diverges, or the disk is full.
    """
    words = _checked(overrides)
    start_now()
    placed = words if folder is None else [*words, format_override("hydra.run.dir", str(folder))]
    composed = compose_config(placed, _text(config_dir))
    with explained("train", placed):
        job = job_of(composed)
    cfg = job.cfg
    assert isinstance(cfg, TrainConfig)
    check_parts(cfg, placed, _text(config_dir))
    _check_devices(cfg)
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    if not check_can_run(job.folder, cfg, "folder"):
        if cfg.ckpt is None and has_checkpoint(job.folder):
            raise InputError(
                f"{job.folder} contains this run, {describe_unfinished(job.folder)}; add the override 'ckpt=last' to"
                " resume it, or choose another folder"
            )
        check_user_files(cfg.dataset, cfg.data_dir)
        check_installed(cfg.logger)
        _train(composed, cfg, job.folder, as_typed([*flags, *placed]))
    from sasrec_lab.api.finished_run import load_run  # late, as all that imports NumPy or torch

    return load_run(job.folder, trust=[part.module for part in cfg.parts])


def _train(composed: DictConfig, cfg: TrainConfig, folder: Path, command: str) -> None:
    """Train in the folder, which is locked meanwhile, and restore what that changes in this process."""
    from sasrec_lab.api.process_state import process_state_restored
    from sasrec_lab.api.run_log import logging_to
    from sasrec_lab.run.summary import results_table

    with hydra_state_restored():
        from sasrec_lab.train import train  # its decorator sets Hydra's version_base
    with process_state_restored(), _one_line(folder), lock_folder(folder, "folder"):
        os.environ[COMMAND] = command
        _write_composed(composed, folder)
        with logging_to(folder, composed.hydra.job_logging), _recorded(folder):
            log.info(results_table(train(cfg, folder), cfg, folder))


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Raise a failure of the disk as InputError, with the line that the command would end with."""
    try:
        yield
    except OSError as error:
        raise InputError(describe_failure(error, folder)) from error


@contextmanager
def _recorded(folder: Path) -> Iterator[None]:
    """Write what ends the run early to train.log, and print after an interruption how to resume."""
    try:
        yield
    except (InputError, OSError) as error:
        errors.error(describe_failure(error, folder))
        raise
    except KeyboardInterrupt:
        errors.error("interrupted")
        place = display_path(folder)
        words = " and the override 'ckpt=last'" if has_checkpoint(folder) else ""
        log.info(f"interrupted; files written so far are in {place}\nresume with folder={place!r}{words}")
        raise


def _write_composed(composed: DictConfig, folder: Path) -> None:
    """Write .hydra/ as Hydra does for a command: the configuration, Hydra's own, and the overrides."""
    own = OmegaConf.masked_copy(composed, ["hydra"])
    config = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    place = folder / ".hydra"
    place.mkdir(exist_ok=True)
    for name, content in (("config", config), ("hydra", own), ("overrides", composed.hydra.overrides.task)):
        (place / f"{name}.yaml").write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def _checked(overrides: tuple[str, ...]) -> list[str]:
    """Return the overrides as Hydra accepts them; raise InputError for one that only a command line can have."""
    for word in overrides:
        if not isinstance(word, str):
            raise InputError(
                f"{shown(word)} is not an override; write each as a text of its own, such as 'model.dim=64'"
            )
        if word.startswith("-"):
            raise InputError(f"{word} is a flag of the command line; give overrides such as 'model.dim=64'")
        if word.lstrip("+~").startswith(("hydra.", "hydra/")):
            raise InputError(f"{word} is for the command line; the argument `folder` chooses the run folder")
    words = normalize(list(overrides))
    check_syntax(words)
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            raise InputError(
                f"{override.input_line} has several values; call this once for each, or write [...] for a list"
            )
    return words


def _text(config_dir: str | Path | None) -> str | None:
    if config_dir is not None and not Path(config_dir).is_dir():
        raise InputError(f"config_dir={config_dir} is not a folder; pass the one that contains your config groups")
    return None if config_dir is None else str(config_dir)


def _check_devices(cfg: TrainConfig) -> None:
    """Raise InputError if the run would need processes of its own, which would repeat the caller's program."""
    devices, nodes = cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1)
    if nodes != 1 or not (devices in _ONE_DEVICE or (isinstance(devices, list) and len(devices) == 1)):
        key = f"trainer.num_nodes={nodes}" if nodes != 1 else f"trainer.devices={devices}"
        raise InputError(f"{key}: from Python a run trains on one device; start this run with the command")
