"""Checkpoints: best.ckpt by validation and last.ckpt of every epoch, each the old file or the new one, never a part."""

import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from sasrec_lab.config.convert import section_of, to_plain
from sasrec_lab.config.schema import ModelConfig, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.files import atomic_write
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.run.folder import ITEMS, RETRAIN_HINT


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; Lightning's own copies from /tmp, of which a full disk keeps a part.

    Neither writing nor reading holds a second copy in memory, which of a million items would be 0.7 GB.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path), locked=True) as draft, draft.open("wb") as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
            except RuntimeError as error:  # what torch makes of "no space left"
                raise error.__context__ or error from None

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)


class MovableCheckpoint(ModelCheckpoint):
    """Still knows the best score where the run folder has been moved, which Lightning tells by its path."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = self.format_checkpoint_name({})
        if self.monitor and Path(path).is_file():
            best = {"best_model_path": path, "kth_best_model_path": path}
            best["best_k_models"] = {path: state_dict["best_model_score"]}
            state_dict = state_dict | best | {"dirpath": self.dirpath}
        super().load_state_dict(state_dict)


def callbacks(folder: Path, monitor: str | None) -> list[pl.Callback]:
    """The best comes first: what is cut off between the two goes on from the epoch before and finds the best again.

    A single one with `save_last` would write last.ckpt only in the epochs that are the best so far.
    """
    names = {"best": monitor, "last": None} if monitor else {"last": None}
    return [
        MovableCheckpoint(
            folder / "checkpoints",
            filename=name,
            monitor=monitored,
            mode="max",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        for name, monitored in names.items()
    ]


def best_or_last(folder: Path) -> Path:
    """The best on validation, or the last where nothing was validated."""
    best = folder / "checkpoints" / "best.ckpt"
    return best if best.is_file() else folder / "checkpoints" / "last.ckpt"


def tested_checkpoint(folder: Path, results: dict[str, Any]) -> Path:
    """The checkpoint that a finished run's metrics.json speaks of.

    Raises:
        InputError: it is gone.
    """
    path = best_or_last(folder)
    if results["best_epoch"] is not None and path.stem != "best":
        raise InputError(f"{path.with_name('best.ckpt')}, which the run was tested with, is gone; train the run again")
    return path


def results(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    """Epochs finished, and epoch and validation metrics of the best checkpoint so far."""
    path = best_or_last(folder)
    if path.stem != "best":
        return {"epochs": trainer.current_epoch}
    best = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return {"epochs": trainer.current_epoch, "best_epoch": best["epoch"], "metrics": dict(best["validation"])}


def load(path: Path, fix: str) -> dict[str, Any]:
    """A checkpoint of this project, weights-only: of one that holds code nothing is run.

    `fix` is what a user can do about one that is none.

    Raises:
        InputError: it is not there, truncated, broken, foreign, or holds code.
    """
    try:
        if broken := zipfile.ZipFile(path).testzip():  # torch itself looks at no checksum
            raise ValueError(f"the checksum of {broken} in it is another")
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        known = saved["hyper_parameters"]
        if not isinstance(known["config"]["model"], dict) or not isinstance(known["num_items"], int):
            raise ValueError("its hyper_parameters are of another form")
    except Exception as error:  # torch's errors vary
        raise InputError(f"{path} is not a checkpoint of this project ({_reason(error)}); {fix}") from error
    return saved


def load_encoder(path: Path, num_items: int) -> tuple[Encoder, ModelConfig]:
    """The encoder that a checkpoint holds, and what it was made by.

    Raises:
        InputError: it is broken, its weights are no numbers, or the run knows another number of items.
    """
    saved = load(path, RETRAIN_HINT)
    if saved["hyper_parameters"]["num_items"] != num_items:
        raise InputError(
            f"{path} knows {saved['hyper_parameters']['num_items']:,} items, {path.parent.parent / ITEMS} has"
            f" {num_items:,}; they are of two runs"
        )
    model = section_of(saved["hyper_parameters"]["config"], "model", ModelConfig)
    encoder = Encoder(num_items, model)
    state = saved.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} holds no state_dict of named weights; {RETRAIN_HINT}")
    weights = {name[len("encoder.") :]: x for name, x in state.items() if name.startswith("encoder.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} does not fit its own configuration: {reason}; {RETRAIN_HINT}") from error
    if not all(weights.isfinite().all() for weights in encoder.parameters()):
        raise InputError(f"{path} holds weights that are no numbers; train the run again with a lower optimizer.lr")
    return encoder, model


def checkpoint_to_resume(cfg: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint that `ckpt` names.

    Raises:
        InputError: it is not there, not one of this project's, of another model, or another run's that leaves no epoch.
    """
    if cfg.ckpt is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if cfg.ckpt == "last" else Path(cfg.ckpt)
    try:
        fix = "choose another checkpoint, or leave ckpt out and start anew in another folder"
        saved = load(path, fix)
        model = saved["hyper_parameters"]["config"]["model"]
    except InputError as error:
        raise InputError(f"ckpt={cfg.ckpt}: {error}") from error
    now = to_plain(cfg.model)
    if differing := [key for key in now if model.get(key) != now[key]]:
        key = differing[0]
        raise InputError(
            f"ckpt={cfg.ckpt}: its model.{key} is {model.get(key)}, not {now[key]}; give the same model.{key}"
        )
    epochs, most = saved["epoch"] + 1, cfg.trainer.get("max_epochs") or 0
    if 0 < most <= epochs and not best_or_last(folder).is_file():
        raise InputError(
            f"ckpt={cfg.ckpt} has {epochs} epochs, and trainer.max_epochs={most} leaves none to train here; give"
            f" trainer.max_epochs of at least {epochs + 1}"
        )
    return path


def check_items(path: Path | None, num_items: int) -> None:
    """Raises InputError where the checkpoint to go on from knows another number of items."""
    if path is None:
        return
    saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["hyper_parameters"]["num_items"]
    if saved != num_items:
        raise InputError(f"ckpt: {path} knows {saved:,} items, the data set has {num_items:,}; give the same data set")


def _reason(error: Exception) -> str:
    if "Weights only load failed" in str(error):
        return "it holds more than weights, such as code, and nothing of it was run"
    return str(error).split("\n")[0] or type(error).__name__
