"""Decide whether a configuration may run in a folder: start there, resume, or be reported as finished."""

import os
import shlex
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from sasrec_lab.config.checks import typed_form
from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import completed, is_bookkeeping, to_plain
from sasrec_lab.config.overrides import format_override
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, counted
from sasrec_lab.files import display_path, read_small_text
from sasrec_lab.run.folder import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    METRICS,
    RUN,
    broken_reason,
    has_checkpoint,
    read_intact_json,
)
from sasrec_lab.run.initial_run import find_initial_run
from sasrec_lab.run.lock import check_unlocked, check_writable
from sasrec_lab.run.provenance import as_typed

_MAY_CHANGE_ON_RESUME = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


def check_can_run(folder: Path, cfg: TrainConfig, key: str = "hydra.run.dir") -> dict[str, Any] | None:
    """Return None if the configuration may run in the folder, or the folder's metrics.json if it has already finished.

    `key` is what the user sets to choose another folder.

    Raises:
        InputError: the folder cannot be written, another process runs in it, it holds another configuration's results,
            there is no checkpoint to resume from, or no run to take initial weights from.
    """
    check_writable(folder, key)
    check_unlocked(folder, key)
    previous = recorded_config(folder)
    if previous is None:
        _check_checkpoint_file(cfg.ckpt)
        if cfg.ckpt == "last":
            raise InputError(f"ckpt=last: no run found in {folder}; pass the folder to resume as {key}=<folder>")
        find_initial_run(cfg)
        return None
    previous = completed(previous)
    differing = differences(previous, to_plain(cfg))
    longer = [key for key in differing if key in _MAY_CHANGE_ON_RESUME]
    if others := [key for key in differing if key not in longer or cfg.ckpt is None]:
        raise _other_run_error(folder, previous, cfg.ckpt, others, key)
    info, metrics = read_intact_json(folder / RUN), read_intact_json(folder / METRICS)
    if metrics.get("status") == "finished" and "end" in info and not longer:
        return metrics
    most, done = cfg.trainer.get("max_epochs") or 0, metrics.get("epochs")
    if isinstance(done, int) and 0 < most < done:
        raise InputError(
            f"trainer.max_epochs={most}: the run in {folder} has {counted(done, 'epoch')} already; set it to at least"
            f" {done}"
        )
    _check_checkpoint_file(cfg.ckpt)
    if cfg.ckpt == "last" and not has_checkpoint(folder):
        raise InputError(f"ckpt=last: {folder} has no checkpoint yet (no epoch was finished); start over without ckpt")
    return None


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """Return the plain config of the run in the folder, None if no run started there.

    If run.json is missing, or a power cut broke it, the config is that of the checkpoint.

    Raises:
        InputError: run.json is broken, and so are the checkpoints, or there are none.
    """
    path = folder / RUN
    config = read_intact_json(path).get("config")
    if isinstance(config, dict):
        return config
    if has_checkpoint(folder):
        return _config_of_checkpoint(folder)
    if _is_blank(path):
        return None
    reason = broken_reason(path) or f"{path} has no config"
    raise InputError(f"{reason}; there is no checkpoint to resume from: delete it to start over")


def _is_blank(path: Path) -> bool:
    """Return whether a file is missing, or left empty or as zeros by a power cut, so that nothing is lost with it."""
    try:
        return not read_small_text(path).strip("\0")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _config_of_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the plain config that the run's checkpoints contain; code in them is never run."""
    from sasrec_lab.run.checkpoint_file import load  # only here: it waits for torch, the command line's check does not

    reasons = []
    for path in (folder / LAST_CHECKPOINT, folder / BEST_CHECKPOINT):
        try:
            config: dict[str, Any] = load(path, "")["hyper_parameters"]["config"]
            return config
        except InputError as error:
            reasons.append(str(error).rstrip("; "))
    raise InputError(
        f"{folder / RUN} is missing or broken, and so are the checkpoints ({'; '.join(reasons)}); delete {folder} to"
        " start over"
    )


def describe_unfinished(folder: Path) -> str:
    """Return `unfinished`, or which broken file hides that the run has finished."""
    reasons = [reason for name in (RUN, METRICS) if (reason := broken_reason(folder / name))]
    return f"but {reasons[0]}" if reasons else "unfinished"


def other_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the dotted keys that make two plain configs different runs: all but the length of the training."""
    if before == now:  # as usual; to complete a config takes tens of milliseconds
        return []
    return [key for key in differences(completed(before), now) if key not in _MAY_CHANGE_ON_RESUME]


def _other_run_error(
    folder: Path, before: dict[str, Any], ckpt: str | None, keys: list[str], folder_key: str
) -> InputError:
    """Return the refusal of a folder whose run has other values of the keys, with the command that resumes that run."""
    difference = describe_differences(keys)
    if ckpt != "last":
        return InputError(
            f"{folder} already holds results of a different configuration ({difference}); choose another {folder_key}"
        )
    info = read_intact_json(folder / RUN)
    words = _recorded_words(info.get("command"))
    if not words:
        return InputError(
            f"ckpt=last: the run in {folder} has a different configuration ({difference}); repeat the keys that it was"
            " started with"
        )
    words += _values_since_changed(words, before)
    start = info.get("directory")
    place = f" in {start}" if isinstance(start, str) and start != os.getcwd() else ""
    return InputError(
        f"ckpt=last: the run in {folder} has a different configuration ({difference}); repeat its keys{place}:"
        f" {as_typed(_resuming(words, folder))}"
    )


def _values_since_changed(words: list[str], before: dict[str, Any]) -> list[str]:
    """Return overrides for what a plain config has and these words no longer give, since conf/ has changed."""
    named = [word for word in words if not word.startswith(("-", "hydra", "ckpt="))]
    try:
        now = to_plain(load(named))
    except InputError:  # the words of a sweep, or of the user's own config folder
        return []
    found = []
    for key in differences(before, now):
        *sections, name = key.split(".")
        section = reduce(getitem, sections, before)
        if name in section and key not in _MAY_CHANGE_ON_RESUME:
            found.append(format_override(key, typed_form(section[name])))
    return found


def _recorded_words(command: Any) -> list[str]:
    """Return the words after the program of a command that run.json recorded, none if it is not this program's."""
    try:
        program, *words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # it is malformed or empty
        return []
    if words[:2] == ["-m", "sasrec_lab.train"]:
        return words[2:]
    return words if Path(program).name in ("sasrec-train", "train.py") else []


def _resuming(words: list[str], folder: Path) -> list[str]:
    """Return the words of a command with what makes it resume the run, or the sweep that the run is a job of."""
    is_sweep = any(word in ("-m", "--multirun") for word in words)
    own = ["hydra.sweep.dir"] if is_sweep else ["hydra.run.dir", "ckpt"]
    kept = [word for word in words if word.partition("=")[0] not in own]
    if is_sweep:
        return [*kept, format_override("hydra.sweep.dir", str(folder.absolute().parent))]
    return [*kept, format_override("hydra.run.dir", display_path(folder)), "ckpt=last"]


def _check_checkpoint_file(ckpt: str | None) -> None:
    if ckpt not in (None, "last") and not Path(ckpt).is_file():
        raise InputError(f"ckpt={ckpt}: no such file; pass a checkpoint file, or ckpt=last for the run folder's latest")


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys in which two plain configs differ, without bookkeeping keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = [
            differences(before.get(key), now.get(key), f"{prefix}{key}.")
            for key in keys
            if not is_bookkeeping(f"{prefix}{key}")
        ]
        return [key for keys in inner for key in keys]
    return [] if before == now else [prefix[:-1]]


def describe_differences(keys: list[str]) -> str:
    """Return a phrase such as `model.dim differs`, with at most three keys."""
    named = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{named} differ{'s' if len(keys) == 1 else ''}"
