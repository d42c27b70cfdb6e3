"""Trackers of a run: Lightning's loggers, what they are given, and how they are closed however the run ends."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard import SummaryWriter

from sasrec_lab.config.logger import check_installed
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, Pruned
from sasrec_lab.files import make_folder
from sasrec_lab.run.folder import TRACKERS, read_intact_json, sweep_of, write_json
from sasrec_lab.run.lock import waiting_lock
from sasrec_lab.run.provenance import is_first_process
from sasrec_lab.training.tensorboard import hyperparameters, shown_metrics

_SQLITE = "sqlite:///"


def make_loggers(cfg: TrainConfig, folder: Path) -> list[Logger]:
    """Return a logger of each tracker that the config chooses, for the run in this folder; nothing is written yet.

    Raises:
        InputError: a tracker needs a package that is not installed, or refuses its keys.
    """
    check_installed(cfg.logger)
    loggers = []
    for name in cfg.logger.chosen:
        with _explained(name):
            loggers.append(LOGGERS[name](cfg, folder))
    return loggers


@contextmanager
def opened_loggers(cfg: TrainConfig, folder: Path) -> Iterator[list[Logger]]:
    """Start the run in each tracker and give it the configuration; close it after the body, however that ends.

    A run that resumes with ckpt=last continues the tracker's own run.

    Raises:
        InputError: a tracker cannot be started.
    """
    loggers = make_loggers(cfg, folder)
    if not is_first_process():
        yield loggers
        return
    status = "failed"
    try:
        for logger in loggers:
            _start(logger, cfg, folder)
        yield loggers
        status = "success"
    except (KeyboardInterrupt, Pruned):
        status = "killed"
        raise
    finally:
        for logger in loggers:
            _close(logger, status)


def log_epoch(loggers: Iterable[Any], scalars: dict[str, float], epoch: int) -> None:
    """Log scalars by the number of epochs; Lightning would count steps, and add a chart of epochs."""
    for logger in loggers:
        logger.log_metrics(_renamed(logger, scalars), step=epoch)
        logger.save()


def log_results(loggers: Sequence[Logger], cfg: TrainConfig, metrics: dict[str, float], epoch: int) -> None:
    """Log the test metrics and the validation metric that chose the checkpoint, which has this number of epochs.

    TensorBoard gets them with its hyperparameters (training/tensorboard.py).
    """
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(_renamed(logger, shown_metrics(cfg, metrics)), step=epoch)
            logger.save()


def tensorboard_writer(loggers: Sequence[Logger]) -> SummaryWriter | None:
    """Return TensorBoard's writer, None if TensorBoard is not among the trackers."""
    return next((logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)), None)


def _renamed(logger: Logger, scalars: dict[str, float]) -> dict[str, float]:
    """Return scalars by names without TensorBoard's tildes, which only sort; MLflow allows no `@` in a name."""
    if isinstance(logger, TensorBoardLogger):
        return scalars
    names = {name: name.replace("~", "") for name in scalars}
    if isinstance(logger, MLFlowLogger):
        names = {name: plain.replace("@", "_at_") for name, plain in names.items()}
    return {names[name]: value for name, value in scalars.items()}


def _tensorboard(cfg: TrainConfig, folder: Path) -> Logger:
    logger = TensorBoardLogger(folder, name="tb", version="", default_hp_metric=False)
    logger.hparams.update(hyperparameters(cfg))  # for tb/hparams.yaml
    return logger


def _csv(_: TrainConfig, folder: Path) -> Logger:
    return CSVLogger(folder, name="csv")


def _wandb(cfg: TrainConfig, folder: Path) -> Logger:
    keys, sweep = cfg.logger.wandb, sweep_of(folder)
    assert keys is not None
    import wandb

    return WandbLogger(
        name=folder.name,
        save_dir=folder,
        project=keys.project,
        entity=keys.entity,
        offline=keys.offline,
        group=sweep.name if sweep else None,
        id=_earlier_id(cfg, folder, "wandb") or uuid4().hex[:12],
        resume=None if keys.offline else "allow",
        settings=wandb.Settings(silent=True, console="off"),
    )


def _mlflow(cfg: TrainConfig, folder: Path) -> Logger:
    keys, sweep = cfg.logger.mlflow, sweep_of(folder)
    assert keys is not None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.loggers.mlflow").setLevel(logging.ERROR)  # of experiments that it creates
    if database := _sqlite_file(keys.tracking_uri):
        make_folder(database.parent)
    with _one_process_at_a_time(keys.tracking_uri):
        return MLFlowLogger(
            experiment_name=keys.experiment,
            run_name=folder.name,
            tracking_uri=keys.tracking_uri,
            tags={"sweep": sweep.name} if sweep else None,
            run_id=_earlier_id(cfg, folder, "mlflow"),
        )


LOGGERS: dict[str, Callable[[TrainConfig, Path], Logger]] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _start(logger: Any, cfg: TrainConfig, folder: Path) -> None:
    """Start the run in a tracker, note its id for a run that resumes, and log the configuration."""
    if isinstance(logger, TensorBoardLogger):  # it starts with the first scalar, and its hyperparameters come last
        return
    name = next(name for name, kind in _KINDS.items() if isinstance(logger, kind))
    is_continued = _earlier_id(cfg, folder, name) is not None
    uri = cfg.logger.mlflow.tracking_uri if cfg.logger.mlflow else ""
    with _explained(name), _one_process_at_a_time(uri) if name == "mlflow" else nullcontext():
        started = logger.experiment
    if name != "csv":
        ids = read_intact_json(folder / TRACKERS) | {name: started.id if name == "wandb" else logger.version}
        write_json(folder / TRACKERS, ids)
    if name != "mlflow" or not is_continued:  # MLflow refuses to change parameters, such as max_epochs
        parameters = {key: value if value is not None else "null" for key, value in hyperparameters(cfg).items()}
        logger.log_hyperparams(parameters)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what a tracker raises as it starts into an InputError."""
    try:
        yield
    except Exception as error:  # those of trackers share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"logger={name} cannot start: {reason}; correct the keys of logger.{name}") from error


_KINDS = {"csv": CSVLogger, "wandb": WandbLogger, "mlflow": MLFlowLogger}


def _earlier_id(cfg: TrainConfig, folder: Path, name: str) -> str | None:
    """Return the id of the run in a tracker if this run resumes it."""
    found = read_intact_json(folder / TRACKERS).get(name) if cfg.ckpt == "last" else None
    return found if isinstance(found, str) else None


def _close(logger: Logger, status: str) -> None:
    """Close the run in a tracker as success, failed or killed."""
    if isinstance(logger, WandbLogger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=1 if status == "failed" else 0)
    elif isinstance(logger, MLFlowLogger):
        logger.finalize("KILLED" if status == "killed" else status)
    elif isinstance(logger, CSVLogger):
        logger.finalize(status)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


@contextmanager
def _one_process_at_a_time(uri: str) -> Iterator[None]:
    """Let only one process make the tables or an experiment of a SQLite store at a time."""
    database = _sqlite_file(uri)
    with waiting_lock(database.with_name(f".{database.name}.lock")) if database else nullcontext():
        yield
