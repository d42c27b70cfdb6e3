"""Build the Lightning Trainer from a config, and handle Ctrl-C."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.trainer.states import TrainerFn
from tqdm.contrib.logging import logging_redirect_tqdm

from sasrec_lab.config.evaluation import is_lower_better
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import OptimizerName
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.run.signals import STOP_SIGNALS, raise_interrupt, use_defaults
from sasrec_lab.training import checkpoints
from sasrec_lab.training.ray_workers import ray_strategy


def build_trainer(
    cfg: TrainConfig, folder: Path, loggers: Sequence[Logger] = (), callbacks: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """Return the Trainer with these loggers and, in addition to those of the config, callbacks; it writes to `folder`.

    Raises:
        InputError: the Trainer rejects a flag.
    """
    _configure_logging(cfg.trainer)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # all of it is written anyway
    flags = dict(cfg.trainer)
    flags["enable_progress_bar"] = bool(flags.get("enable_progress_bar", True)) and _shows_progress()
    if not cfg.has_validation:
        flags["limit_val_batches"] = 0
    plugins: list[Any] = [checkpoints.AtomicCheckpointIO()]
    if cfg.cluster is not None:
        strategy, environment = ray_strategy()
        flags |= {"strategy": strategy, "devices": "auto"}
        plugins.append(environment)
    try:
        trainer = pl.Trainer(
            **flags,
            logger=list(loggers) or False,
            callbacks=[*_callbacks(cfg, folder, has_progress_bar=flags["enable_progress_bar"]), *callbacks],
            plugins=plugins,
            default_root_dir=folder,
            use_distributed_sampler=False,  # the data module divides windows and users among processes
        )
    except Exception as error:  # whatever its flags make the Trainer raise
        fix = "; use trainer.accelerator=cpu" if flags["accelerator"] in ("gpu", "cuda", "mps") else ""
        raise InputError(f"trainer: {' '.join(str(error).split())}{fix}") from error
    # With max_steps Lightning resumes as if each checkpoint were of an unfinished epoch, and trains on no batch of it.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    if trainer.world_size > 1 and cfg.optimizer.name is OptimizerName.rowwise_adam:
        raise InputError(
            f"optimizer.name=rowwise_adam must run on one device, but trainer asks for {trainer.world_size}; set"
            " trainer.devices=1 or optimizer.name=adam"
        )
    if cfg.batch_size < trainer.world_size:
        raise InputError(
            f"batch_size={cfg.batch_size} is shared out among {trainer.world_size} devices; set it to at least"
            f" {trainer.world_size}, or use fewer"
        )
    if cfg.capture:
        _check_capture(trainer)
    _check_nodes(trainer)
    if trainer.world_size > 1:
        _set_num_threads_if_needed(trainer.num_devices)  # fit would do it, but after run.json has recorded the threads
        if not _is_in_thread():
            trainer.callbacks.append(_SafeSignals())  # type: ignore[attr-defined]
    return trainer


def _shows_progress() -> bool:
    """Return whether somebody watches: on a terminal, or in a notebook, which IPython's kernel runs."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")


def _check_capture(trainer: pl.Trainer) -> None:
    """Raise InputError if the Trainer does not run on one GPU."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        raise InputError(f"capture=true needs a CUDA device, but trainer uses {device.type}; set capture=false")
    if trainer.world_size > 1:
        raise InputError(
            f"capture=true must run on one device, but trainer asks for {trainer.world_size}; set trainer.devices=1 or"
            " capture=false"
        )


def _check_nodes(trainer: pl.Trainer) -> None:
    """Raise InputError if no launcher starts the processes of other nodes, for which the first would wait forever."""
    if trainer.num_nodes == 1:
        return
    if _has_launcher(trainer):
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes} needs a process on each node; start the command on each with"
            f" torchrun, or set {', '.join(missing)} there"
        )


def _has_launcher(trainer: pl.Trainer) -> bool:
    """Return whether another program, such as torchrun, starts the processes of the run."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and environment.creates_processes_externally


def _is_in_thread() -> bool:
    """Return whether this thread may not handle signals: only the main one may, and Ray's workers train in another."""
    return threading.current_thread() is not threading.main_thread()


def _callbacks(cfg: TrainConfig, folder: Path, has_progress_bar: bool) -> list[pl.Callback]:
    monitor = cfg.evaluation.monitor if cfg.has_validation else None
    callbacks = checkpoints.callbacks(folder, monitor, cfg.ckpt)
    if monitor and cfg.evaluation.patience:
        # not strict, because an epoch that max_steps ends before min_epochs is not validated
        mode = "min" if is_lower_better(monitor) else "max"
        callbacks.append(EarlyStopping(monitor, mode=mode, patience=cfg.evaluation.patience, strict=False))
    if monitor and cfg.trainer.get("max_steps", -1) != -1:
        callbacks.append(ValidationAtMaxSteps())
    if cfg.optimizer.ema:
        # without buffers, which are tables of positions: an average of equal numbers is off by rounding
        callbacks.append(AveragedWeights(use_buffers=False, decay=cfg.optimizer.ema))
    if has_progress_bar:
        callbacks.append(ProgressBar())
    return callbacks + [_own_callback(part.name) for part in cfg.callbacks.values()]


def _own_callback(part: Foreign) -> pl.Callback:
    """Return a callback of the user's; raise InputError if it is not one of Lightning's."""
    callback = load(part)()
    if not isinstance(callback, pl.Callback):
        raise InputError(f"{part.key}={part.name} must be a class that inherits from pytorch_lightning.Callback")
    return callback


class ValidationAtMaxSteps(pl.Callback):
    """Validates the epoch that `trainer.max_steps` ends early, as Lightning does with `trainer.max_time`."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop training at the last step, which lets Lightning validate."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= trainer.max_steps


class AveragedWeights(EMAWeightAveraging):
    """Averages the weights, and tests the averages, which `best.ckpt` holds and which validation measured.

    In the process that trained, Lightning 2.6 would test the current weights of the checkpoint.
    """

    @property
    def state_key(self) -> str:
        """Return Lightning's name, by which checkpoints know the callback."""
        return EMAWeightAveraging.__qualname__

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both weights to continue training; for a test those of the checkpoint are loaded already."""
        if trainer.state.fn is TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, module, checkpoint)


class ProgressBar(TQDMProgressBar):
    """Counts epochs from 1, as everything else that people read."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Show the number of the epoch."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}")


class _SafeSignals(pl.Callback):
    """Lets signals stop a run on several devices once all processes are connected, and only through the first one.

    Lightning's own SIGTERM handler calls a collective operation while the other processes may be in another one, so
    this program's handler replaces it.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if _has_launcher(trainer):
            raise_interrupt()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.handler)


def check_limits(cfg: TrainConfig, data: SequenceData, processes: int) -> None:
    """Raise InputError if a fraction of the batches is less than one, which Lightning may find after an epoch."""
    for stage in ("train", "val") if cfg.has_validation else ("train",):
        part = cfg.trainer.get(f"limit_{stage}_batches", 1.0)
        if isinstance(part, float) and part < 1:
            batches = data.num_batches(stage, processes)
            if int(part * batches) < 1:
                raise InputError(
                    f"trainer.limit_{stage}_batches={part} is less than one batch (number of batches: {batches:,});"
                    " set it to a number of batches, such as 1"
                )


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Turn Lightning's SystemExit on Ctrl-C back into KeyboardInterrupt, and restore the handler it disabled."""
    if _is_in_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if trainer.world_size > 1 and _has_launcher(trainer):
        use_defaults()  # while it waits for processes that may never come, no handler of Python's would run
    elif trainer.world_size > 1:  # the processes that Lightning starts inherit the block until launch.py ignores them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with logging_redirect_tqdm([_printing_logger()]) if trainer.progress_bar_callback else nullcontext():
            yield
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if trainer.world_size > 1 and _has_launcher(trainer):
            raise_interrupt()


def _printing_logger() -> logging.Logger:
    """Return the logger whose handler prints a run's lines: the root's, or in a notebook the package's own."""
    own = logging.getLogger("sasrec_lab")
    return logging.root if own.propagate else own


def _configure_logging(flags: dict[str, Any]) -> None:
    """Send warnings to train.log, and drop Lightning's messages below warnings that no flag asks for."""
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", r".*sync_dist=True")  # logged values already combine all processes
    warnings.filterwarnings("ignore", r".*could not find the monitored key")  # an epoch without validation has none
    warnings.filterwarnings("ignore", r".*LeafSpec")  # Lightning 2.6 asks torch 2.13 for what will be renamed
    logging.raiseExceptions = False  # on a full disk, lines that do not fit into train.log are lost
    threading.excepthook = _report_thread_failure
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, flag in (("profilers", "profiler"), ("callbacks.model_summary", "enable_model_summary")):
        level = logging.INFO if flags.get(flag) else logging.NOTSET
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(level)


def _report_thread_failure(failure: Any) -> None:
    """Print a thread's exception, except an OSError: TensorBoard's writer raises it again at the next write."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
