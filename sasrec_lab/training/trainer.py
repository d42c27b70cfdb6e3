"""Lightning's Trainer as a config asks for it, and what it makes of Ctrl-C."""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from tqdm.contrib.logging import logging_redirect_tqdm

from sasrec_lab.config.schema import OptimizerName, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.training import checkpoints

_STOPS = (signal.SIGINT, signal.SIGTERM)


def build_trainer(cfg: TrainConfig, folder: Path) -> pl.Trainer:
    """Lightning's Trainer with its own callbacks, as the config says.

    Raises:
        InputError: a flag that the Trainer refuses.
    """
    _quiet()
    torch.utils.deterministic.fill_uninitialized_memory = False  # trainer.deterministic would fill what is overwritten
    flags = dict(cfg.trainer)
    flags["enable_progress_bar"] = bool(flags.get("enable_progress_bar", True)) and sys.stderr.isatty()
    monitor = cfg.evaluation.monitor if cfg.has_validation else None
    if monitor is None:
        flags["limit_val_batches"] = 0
    callbacks = checkpoints.callbacks(folder, monitor)
    if monitor and cfg.evaluation.patience:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=cfg.evaluation.patience))
    if cfg.optimizer.ema:
        callbacks.append(EMAWeightAveraging(decay=cfg.optimizer.ema))
    if flags["enable_progress_bar"]:
        callbacks.append(TQDMProgressBar())
    try:
        trainer = pl.Trainer(
            **flags,
            logger=TensorBoardLogger(folder, name="tb", version="", default_hp_metric=False),
            callbacks=callbacks,
            plugins=[checkpoints.AtomicCheckpointIO()],
            default_root_dir=folder,
            use_distributed_sampler=False,  # ours gives each process its own windows and users
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        fix = "; use trainer.accelerator=cpu" if flags["accelerator"] in ("gpu", "cuda", "mps") else ""
        raise InputError(f"trainer: {' '.join(str(error).split())}{fix}") from error
    if trainer.world_size > 1 and cfg.optimizer.name is OptimizerName.rowwise_adam:
        raise InputError(
            f"optimizer.name=rowwise_adam runs on one device, and trainer asks for {trainer.world_size}; set"
            " trainer.devices=1, or optimizer.name=adam"
        )
    if trainer.world_size > 1:
        _set_num_threads_if_needed(trainer.num_devices)  # as fit would, but before the machine's facts are taken
        trainer.callbacks.append(_Signals())
    return trainer


class _Signals(pl.Callback):
    """In a run on several devices: what stops it waits until the processes have met, and stops the first one."""

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    # Lightning's own handler of SIGTERM calls a collective, while the other processes may be in another one.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt here as elsewhere.

    Lightning makes a SystemExit of it, after it has told the system to ignore the next ones.
    """
    handler = signal.getsignal(signal.SIGINT)
    if trainer.world_size > 1:  # a process that Lightning starts here has them blocked until train.py ignores them
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        with logging_redirect_tqdm() if trainer.progress_bar_callback else nullcontext():
            yield
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _quiet() -> None:
    """Warnings go into train.log; of Lightning's messages only warnings are heard."""
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", r".*sync_dist=True")  # what is logged is of all processes already
    logging.raiseExceptions = False  # where the disk is full, the lines that train.log has no room for are lost
    threading.excepthook = _thread_failed
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _thread_failed(failure: Any) -> None:
    """TensorBoard's writer stops on a full disk and raises the error again where it is next written to."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
