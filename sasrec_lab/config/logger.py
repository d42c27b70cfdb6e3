"""Keys of `logger`: a section for each tracker that a run writes to, and the extras that trackers need."""

import re
from dataclasses import dataclass, fields
from typing import Optional

from omegaconf import MISSING

from sasrec_lab.errors import InputError

_EXTRAS = {"wandb": ("wandb",), "mlflow": ("mlflow", "mlflow-skinny")}  # extra -> distributions, of which one is enough


@dataclass
class TensorBoardLoggerConfig:
    """The section of TensorBoard, which has no keys."""


@dataclass
class CsvLoggerConfig:
    """The section of a CSV file, which has no keys."""


@dataclass
class WandbLoggerConfig:
    """Keys of Weights & Biases."""

    project: str = MISSING
    entity: Optional[str] = MISSING
    offline: bool = MISSING


@dataclass
class MlflowLoggerConfig:
    """Keys of MLflow."""

    tracking_uri: str = MISSING
    experiment: str = MISSING

    def __post_init__(self) -> None:
        if re.match(r"[\w.+-]+://[^/@]*:[^/]+@", self.tracking_uri):
            raise InputError(
                "logger.mlflow.tracking_uri has a password, which the run folder would record; remove it, and set"
                " MLFLOW_TRACKING_PASSWORD, or the variable that the database's driver reads, such as PGPASSWORD"
            )


@dataclass
class LoggerConfig:
    """The sections of the trackers that are chosen; older runs lack them and had TensorBoard."""

    tensorboard: Optional[TensorBoardLoggerConfig] = None
    csv: Optional[CsvLoggerConfig] = None
    wandb: Optional[WandbLoggerConfig] = None
    mlflow: Optional[MlflowLoggerConfig] = None

    @property
    def chosen(self) -> list[str]:
        """Return the names of the trackers that are chosen."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


def check_installed(cfg: LoggerConfig) -> None:
    """Raise InputError if a tracker that is chosen needs an extra that is not installed."""
    for name in cfg.chosen:
        if name in _EXTRAS and not any(map(_is_installed, _EXTRAS[name])):
            raise InputError(f"logger={name} needs a package that is not installed; pip install 'sasrec-lab[{name}]'")


def _is_installed(distribution: str) -> bool:
    from importlib import metadata  # late: with it a command would need 0.03 s more to start (Xeon, 2026-11)

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
