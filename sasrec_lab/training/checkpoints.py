"""Save and choose checkpoints: best.ckpt (by validation) and last.ckpt (every epoch), both written atomically."""

import logging
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from sasrec_lab.config.checks import typed_form
from sasrec_lab.config.convert import completed, to_plain
from sasrec_lab.config.evaluation import is_lower_better
from sasrec_lab.config.overrides import format_override
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, counted
from sasrec_lab.files import atomic_write, display_path, make_folder
from sasrec_lab.run.checkpoint_file import load
from sasrec_lab.run.folder import BEST_CHECKPOINT, LAST_CHECKPOINT, has_checkpoint
from sasrec_lab.run.resume import describe_differences, other_keys

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a checkpoint as a draft in the target's folder and renames it.

    Lightning's own copies from /tmp, so that a full disk would keep half a file. Neither saving nor loading holds a
    second copy in memory, which takes 0.7 GB with a million items.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        """Write the checkpoint to `path`, which keeps its old content if that fails."""
        if not Path(path).parent.is_dir():
            make_folder(Path(path).parent)
        with atomic_write(Path(path), locked=True) as draft, draft.open("wb") as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
            except RuntimeError as error:  # torch hides "no space left" behind it
                raise error.__context__ or error from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return the checkpoint, memory-mapped."""
        saved: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
        return saved


class MovableCheckpoint(ModelCheckpoint):
    """Remembers the best score after the run folder was moved, although Lightning identifies it by its path.

    `has_lost_best` says that the run resumed with a best.ckpt that is not its best epoch, so that only a better one can
    replace it. The callback of last.ckpt reports an epoch once that is saved.
    """

    has_lost_best = False
    resumes_here = False  # from a checkpoint of the folder to which this one writes

    @property
    def state_key(self) -> str:
        """Return the key of this callback's state in a checkpoint, which must not change with the class name."""
        return super().state_key.replace(type(self).__qualname__, "Checkpoint", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, with the paths of the folder that the run is in now.

        No path of the checkpoint is taken over: Lightning removes what it takes for an older file of its own.
        """
        path, score = self.format_checkpoint_name({}), state_dict["best_model_score"]
        is_score = isinstance(score, torch.Tensor) and score.numel() == 1
        if self.monitor and is_score and self.resumes_here:
            scores = {"best_model_score": score, "kth_value": score, "best_k_models": {path: score}}
            paths = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            super().load_state_dict(scores | paths | {"last_model_path": ""})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the run resumes without its best epoch."""
        super().on_fit_start(trainer, pl_module)
        if reason := _best_fault(self, pl_module.hparams):
            self.has_lost_best = True
            log.warning(f"{reason}: unless a later epoch is better, the last one will be tested")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the epoch, and report it if that was last.ckpt: an epoch that was reported survives a power cut."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None and trainer.is_global_zero:
            log.info(pl_module.epoch_line)


def callbacks(folder: Path, monitor: str | None, ckpt: str | None = None) -> list[pl.Callback]:
    """Return the callbacks that save best.ckpt, if a metric is monitored, and last.ckpt, in a run that resumes `ckpt`.

    best.ckpt is written before last.ckpt: a crash in between resumes from the previous epoch and finds the best one
    again. A single callback with `save_last` would write last.ckpt only in the epochs that are the best so far.
    """
    paths = {BEST_CHECKPOINT: monitor, LAST_CHECKPOINT: None} if monitor else {LAST_CHECKPOINT: None}
    made: list[pl.Callback] = []
    for path, monitored in paths.items():
        callback = MovableCheckpoint(
            folder / path.parent,
            filename=path.stem,
            monitor=monitored,
            mode="min" if monitored and is_lower_better(monitored) else "max",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        own = (folder / path.parent).resolve()
        callback.resumes_here = ckpt == "last" or (ckpt is not None and Path(ckpt).resolve().parent == own)
        made.append(callback)
    return made


def results(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the number of finished epochs, and the epoch and validation metrics of the best checkpoint so far.

    The latter are missing if best.ckpt is not the best epoch of this run.
    """
    done = {"epochs": max(trainer.current_epoch, _saved_epochs(Path(trainer.default_root_dir)))}
    callback = _best_callback(trainer)
    if callback is None or callback.best_model_score is None or _best_fault(callback, trainer.lightning_module.hparams):
        return done
    best = torch.load(callback.best_model_path, weights_only=True, map_location="cpu", mmap=True)
    return done | {"best_epoch": best["epoch"], "metrics": dict(best["validation"])}


def _saved_epochs(folder: Path) -> int:
    """Return the number of epochs in last.ckpt, which an interruption right after it was saved leaves uncounted."""
    with suppress(Exception):  # torch's errors vary; a run that fails before its first epoch has no file
        saved = torch.load(folder / LAST_CHECKPOINT, weights_only=True, map_location="cpu", mmap=True)
        epochs: int = saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return epochs
    return 0


def checkpoint_to_test(trainer: pl.Trainer, folder: Path, best_epoch: int | None) -> Path:
    """Return the path of the checkpoint of which `results` has given the validation metrics.

    That is the last one if nothing was validated, or if the run resumed without its best epoch and found no better one.

    Raises:
        InputError: it is missing, broken or replaced.
    """
    if best_epoch is not None:
        return folder / BEST_CHECKPOINT
    callback = _best_callback(trainer)
    fault = _best_fault(callback, trainer.lightning_module.hparams) if callback else None
    if callback and fault and not callback.has_lost_best:
        raise InputError(f"{fault}: put it back, or resume with ckpt=last to test the last epoch instead")
    load(folder / LAST_CHECKPOINT, f"delete {folder / LAST_CHECKPOINT.parent} and start over")
    return folder / LAST_CHECKPOINT


def _best_callback(trainer: pl.Trainer) -> MovableCheckpoint | None:
    callbacks = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, MovableCheckpoint))
    return next((callback for callback in callbacks if callback.monitor), None)


def _best_fault(callback: MovableCheckpoint, hyper_parameters: Mapping[str, Any]) -> str | None:
    """Return why best.ckpt is not the epoch that has the callback's best score, None if it is or there is no score.

    One with a better score is this run's too: of an epoch whose last.ckpt a crash has prevented.
    """
    score = callback.best_model_score
    if callback.monitor is None or score is None:
        return None
    path = Path(callback.best_model_path)
    try:
        saved = load(path, "")
        found = float(saved["validation"][callback.monitor])
    except InputError as error:
        return str(error).rstrip("; ")
    except (KeyError, TypeError, ValueError):
        return f"{path} has no {callback.monitor}"
    if differing := other_keys(saved["hyper_parameters"]["config"], hyper_parameters["config"]):
        return f"{path} is of another run ({describe_differences(differing)})"
    other = torch.tensor(found, dtype=score.dtype)
    if other > score.cpu() if is_lower_better(callback.monitor) else other < score.cpu():
        return f"{path} is of another epoch ({callback.monitor} {found:.4f}, not {score:.4f})"
    return None


def checkpoint_to_resume(cfg: TrainConfig, folder: Path) -> Path | None:
    """Return the path of the checkpoint that `ckpt` names, None without `ckpt`.

    Raises:
        InputError: the file is missing, foreign or broken, is of a run with other settings, or has no epoch left to
            train.
    """
    if cfg.ckpt is None:
        return None
    path = folder / LAST_CHECKPOINT if cfg.ckpt == "last" else Path(cfg.ckpt)
    if cfg.ckpt == "last" and not path.is_file() and (folder / BEST_CHECKPOINT).is_file():
        path = folder / BEST_CHECKPOINT  # the last one was deleted, or a crash has prevented that of the first epoch
        log.warning(f"{folder / LAST_CHECKPOINT} is missing: resuming from the best epoch, {path.name}")
    try:
        saved = load(path, _fix_for_broken(path, folder))
        model = completed(saved["hyper_parameters"]["config"])["model"]
    except InputError as error:
        raise InputError(f"ckpt={cfg.ckpt}: {error}") from error
    now = to_plain(cfg.model)
    if differing := [key for key in now if model.get(key) != now[key]]:
        key = differing[0]
        had, has = typed_form(model.get(key)), typed_form(now[key])
        raise InputError(f"ckpt={cfg.ckpt} has model.{key}={had}, not {has}; set model.{key} to that value")
    others = other_keys(saved["hyper_parameters"]["config"], to_plain(cfg))
    if cfg.ckpt == "last" and others:
        raise InputError(
            f"ckpt=last: {path} is of another run ({describe_differences(others)}); put this run's back, or delete it"
            " and start over"
        )
    if others:  # the optimizer continues with its own keys, and what the run has seen may be the test of this one
        raise InputError(
            f"ckpt={cfg.ckpt} is of another run ({describe_differences(others)}); repeat its keys, or take only its"
            " weights, with init_from=<its run folder>"
        )
    epochs, most = saved["epoch"] + 1, cfg.trainer.get("max_epochs") or 0
    least = epochs if has_checkpoint(folder) else epochs + 1  # an own run may only lack its test
    if 0 < most < least:
        raise InputError(
            f"ckpt={cfg.ckpt} has {counted(epochs, 'epoch')}, and trainer.max_epochs={most} leaves none to train here;"
            f" set trainer.max_epochs to at least {least}"
        )
    return path


def _fix_for_broken(path: Path, folder: Path) -> str:
    """Return what to do if a checkpoint to resume from is broken: take the run's best epoch if that is whole."""
    own, best = folder / LAST_CHECKPOINT.parent, folder / BEST_CHECKPOINT
    if path.resolve().parent != own.resolve():
        return "choose another checkpoint, or omit ckpt and start over in another folder"
    with suppress(InputError):
        if path != best and load(best, ""):
            return f"resume from the best epoch with {shlex.quote(format_override('ckpt', display_path(best)))}"
    return f"delete {own} and start over without ckpt"


def check_items(path: Path | None, num_items: int) -> None:
    """Raise InputError if the checkpoint to resume was trained on another number of items."""
    if path is None:
        return
    saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["hyper_parameters"]["num_items"]
    if saved != num_items:
        raise InputError(
            f"ckpt: {path} was trained on {saved:,} items, but the data set has {num_items:,}; use the same data set"
        )
