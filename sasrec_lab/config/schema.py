"""Schema of the config keys that no other file here has, such as model.py; the path of conf/.

The values are in conf/, with a comment on the meaning of each key. All of config/ imports neither torch nor Lightning,
so that help, `--cfg job` and every message about a typo appear at once.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sasrec_lab.config import foreign
from sasrec_lab.config.checks import (
    check_at_least,
    check_folder_names,
    check_seed,
    check_trainer_flag,
)
from sasrec_lab.config.closed_form import ClosedFormConfig, EaseConfig, ItemKnnConfig
from sasrec_lab.config.dataset import DatasetConfig, HoldoutMode
from sasrec_lab.config.evaluation import EvaluationConfig
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.hydra_internals import register_resolver
from sasrec_lab.config.job_folders import job_folder
from sasrec_lab.config.list_commands import EvaluateConfig, RecommendConfig
from sasrec_lab.config.logger import LoggerConfig
from sasrec_lab.config.model import (
    AnyModel,
    ItemVectors,
    ModelConfig,
)
from sasrec_lab.config.training import (
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

_PACKAGE = Path(__file__).parent.parent
CONF_DIR = str(_PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf")


@dataclass
class TensorBoardConfig:
    """Keys of `tensorboard`: what is drawn in addition to the scalars."""

    attention_users: int = MISSING
    projector: bool = MISSING

    def __post_init__(self) -> None:
        check_at_least("tensorboard.attention_users", self.attention_users, 0)


@dataclass
class PublishedConfig:
    """A paper's results on one data set: row -> metric -> value. The row of a sweep's job is its override."""

    dataset: str = MISSING
    source: str = MISSING
    cells: dict[str, dict[str, float]] = MISSING


@dataclass
class ClusterConfig:
    """Keys of `cluster`: the workers of a Ray cluster that train a run together."""

    workers: int = MISSING
    cpus: int = MISSING
    restarts: int = MISSING

    def __post_init__(self) -> None:
        check_at_least("cluster.workers", self.workers, 1)
        check_at_least("cluster.cpus", self.cpus, 1)
        check_at_least("cluster.restarts", self.restarts, 0)


@dataclass
class TrainConfig:
    """All keys of conf/train.yaml: the command sasrec_lab.train.

    Rules across sections are in combinations.py; the conversion of a composed config checks them.
    """

    name: str = MISSING
    row: Optional[str] = MISSING
    published: Optional[PublishedConfig] = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    data_dir: Optional[str] = MISSING
    ckpt: Optional[str] = MISSING
    capture: bool = False  # older runs lack it
    dataset: DatasetConfig = MISSING
    objective: ObjectiveConfig = MISSING
    loss: LossConfig = MISSING
    model: AnyModel = MISSING
    optimizer: OptimizerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tensorboard: TensorBoardConfig = MISSING
    logger: LoggerConfig = MISSING
    trainer: dict[str, Any] = MISSING
    init_from: Optional[str] = None  # older runs lack it
    callbacks: dict[str, Any] = field(default_factory=dict)  # of Lightning, as foreign.OwnPart; older runs lack it
    cluster: Optional[ClusterConfig] = None  # older runs lack it

    def __post_init__(self) -> None:
        if getattr(self.model, "items", ItemVectors.ids) is ItemVectors.ids:
            self.dataset.features = None  # nothing reads them
        self.callbacks = foreign.own_parts("callbacks", self.callbacks, foreign.CALLBACK)
        check_at_least("batch_size", self.batch_size, 1)
        check_seed("seed", self.seed)
        check_folder_names("name", self.name, "a folder below outputs/", nested=True)
        for flag, value in self.trainer.items():
            check_trainer_flag(flag, value)

    @property
    def parts(self) -> list[Foreign]:
        """Return the parts of the user's that the run uses: a model without epochs has neither loss nor objective."""
        return list(foreign.parts_in(self.evaluation if isinstance(self.model, ClosedFormConfig) else self))

    def check_parts(self) -> None:
        """Import the parts of the user's; raise InputError if one is missing or has a wrong option."""
        for part in self.parts:
            load(part)
        if not isinstance(self.model, ClosedFormConfig):
            self.loss.check_own_sampler()

    @property
    def has_validation(self) -> bool:
        """Whether validation runs; if it does not, the last checkpoint is tested."""
        return self.dataset.holdout is not HoldoutMode.none and self.trainer.get("limit_val_batches", 1.0) != 0


MODEL_SCHEMAS = {
    "encoder": ModelConfig,
    "ease": EaseConfig,
    "itemknn": ItemKnnConfig,
}  # a file of conf/model/ begins with one: /<name>_schema@_here_

# By the command, and its file in conf/
SCHEMAS = {"train": TrainConfig, "recommend": RecommendConfig, "evaluate": EvaluateConfig}
for _name, _schema in (SCHEMAS | MODEL_SCHEMAS).items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


_started = datetime.now()


def start_now() -> None:
    """Let the folders of the runs that are composed from now on bear the present time.

    It is fixed between two calls, and for a whole command, so that the run folder is known before Hydra makes it.
    """
    global _started
    _started = datetime.now()


# Interpolations of conf/train.yaml
register_resolver("started", lambda: _started.strftime("%Y%m%d-%H%M%S-%f"), use_cache=True)
register_resolver("job_folder", job_folder)
