"""Decide whether a configuration may run in a folder: start there, resume, or be reported as finished."""

from pathlib import Path
from typing import Any

from sasrec_lab.config.convert import is_bookkeeping, to_plain
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run.folder import METRICS, OTHER_FOLDER_HINT, RUN, has_checkpoint, read_json
from sasrec_lab.run.lock import check_unlocked, check_writable

_MAY_CHANGE_ON_RESUME = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


def check_can_run(folder: Path, cfg: TrainConfig) -> dict[str, Any] | None:
    """Return None if the configuration may run in the folder, or the folder's metrics.json if it has already finished.

    Raises:
        InputError: the folder cannot be written, another process runs in it, it holds another configuration's results,
            or there is no checkpoint to resume from.
    """
    check_writable(folder)
    check_unlocked(folder)
    previous = read_json(folder / RUN, OTHER_FOLDER_HINT)
    if previous is None:
        _check_checkpoint_file(cfg.ckpt)
        if cfg.ckpt == "last":
            raise InputError(
                f"ckpt=last: no run found in {folder}; pass the folder to resume as hydra.run.dir=<folder>"
            )
        return None
    differing = differences(previous["config"], to_plain(cfg))
    longer = [key for key in differing if key in _MAY_CHANGE_ON_RESUME]
    if others := [key for key in differing if key not in longer or cfg.ckpt is None]:
        raise InputError(
            f"{folder} already holds results of a different configuration ({describe_differences(others)});"
            f" {OTHER_FOLDER_HINT}"
        )
    metrics = read_json(folder / METRICS, OTHER_FOLDER_HINT)
    if metrics and metrics["status"] == "finished" and "end" in previous and not longer:
        return metrics
    _check_checkpoint_file(cfg.ckpt)
    if cfg.ckpt == "last" and not has_checkpoint(folder):
        raise InputError(f"ckpt=last: {folder} has no checkpoint yet (no epoch was finished); start over without ckpt")
    return None


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
