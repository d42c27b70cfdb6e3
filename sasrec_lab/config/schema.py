"""Names and types of every key but the data set's (data/schema.py), checks across keys, and where conf/ lies.

The values stand in conf/; here is what they may be. This module imports neither torch nor Lightning, so that help,
`--cfg job` and every message about a typo come at once.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from sasrec_lab.config.checks import check_at_least, check_finite, check_folder_names, check_seed, check_trainer_flag
from sasrec_lab.config.dataset import DatasetConfig, HoldoutMode
from sasrec_lab.errors import InputError, did_you_mean
from sasrec_lab.files import job_folder

_PACKAGE = Path(__file__).parent.parent
CONF_DIR = str(_PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf")


# Choices. A member's name is what the user writes.
PosEmb = Enum("PosEmb", ["learned", "sinusoidal", "none"])
Norm = Enum("Norm", ["sasrec", "pre", "post"])
Activation = Enum("Activation", ["relu", "gelu"])
Init = Enum("Init", ["xavier_normal", "xavier_uniform", "xavier_packed", "normal"])
LossName = Enum("LossName", ["softmax", "sampled_softmax", "bce", "gbce", "bpr"])
OptimizerName = Enum("OptimizerName", ["adam", "adamw", "rowwise_adam"])
Draw = Enum("Draw", ["paper", "unseen", "popularity"])
Unsupported = Enum("Unsupported", ["raise", "warn", "ignore"])


@dataclass
class ModelConfig:
    blocks: int = MISSING
    heads: int = MISSING
    dim: int = MISSING
    maxlen: int = MISSING
    dropout: float = MISSING
    pos_emb: PosEmb = MISSING
    norm: Norm = MISSING
    norm_eps: float = MISSING
    final_norm: bool = MISSING
    final_norm_eps: float = MISSING
    residual: bool = MISSING
    ff_dim: Optional[int] = MISSING
    activation: Activation = MISSING
    output_projection: bool = MISSING
    scale_embeddings: bool = MISSING
    pad_keys: bool = MISSING
    share_items: bool = MISSING
    init: Init = MISSING

    def __post_init__(self) -> None:
        check_at_least("model.blocks", self.blocks, 0)
        check_at_least("model.heads", self.heads, 1)
        check_at_least("model.dim", self.dim, 1)
        check_at_least("model.maxlen", self.maxlen, 1)
        for key, eps in (("norm_eps", self.norm_eps), ("final_norm_eps", self.final_norm_eps)):
            if not eps > 0:
                raise InputError(f"model.{key}={eps} must be above 0")
        if self.pad_keys and self.norm is not Norm.sasrec:
            raise InputError(f"model.pad_keys=true is RecTools' way, whose norm is sasrec, not {self.norm.name}")
        if self.ff_dim is not None:
            check_at_least("model.ff_dim", self.ff_dim, 1)
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout={self.dropout} is not a probability from 0 to below 1")
        if self.dim % self.heads:
            fits = [str(h) for h in range(1, self.dim + 1) if self.dim % h == 0]
            raise InputError(
                f"model.dim={self.dim} is not a multiple of model.heads={self.heads}; use heads {', '.join(fits)}"
            )


@dataclass
class LossConfig:
    name: LossName = MISSING
    negatives: int = MISSING
    calibration: float = MISSING

    def __post_init__(self) -> None:
        if self.name is not LossName.softmax:
            check_at_least("loss.negatives", self.negatives, 1)
        elif self.negatives != 0:
            raise InputError(
                f"loss.negatives={self.negatives}: loss=softmax ranks every item and draws none; use 0,"
                " or loss=sampled_softmax"
            )
        if not 0 <= self.calibration <= 1:
            raise InputError(f"loss.calibration={self.calibration} is not a share from 0 to 1")
        if self.name is not LossName.gbce and self.calibration != 0:
            raise InputError(
                f"loss.calibration={self.calibration} is t of loss=gbce; loss={self.name.name} has none: use 0"
            )


@dataclass
class OptimizerConfig:
    name: OptimizerName = MISSING
    lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    cosine: bool = MISSING
    ema: Optional[float] = MISSING

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise InputError(f"optimizer.lr={self.lr} must be above 0")
        check_finite("optimizer.lr", self.lr)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={list(self.betas)} must be two numbers from 0 to below 1")
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.name is OptimizerName.rowwise_adam and self.weight_decay != 0:
            raise InputError(
                f"optimizer.weight_decay={self.weight_decay}: optimizer.name=rowwise_adam sees no rows to decay but the"
                " batch's; use 0, or adam"
            )
        check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"optimizer.ema={self.ema} is not a decay between 0 and 1; null switches averaging off")


@dataclass
class EvaluationConfig:
    k: list[int] = MISSING
    filter_seen: bool = MISSING
    sampled: int = MISSING
    draw: Draw = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    monitor: str = MISSING
    patience: Optional[int] = MISSING

    def __post_init__(self) -> None:
        if not self.k:
            raise InputError("evaluation.k is empty; give the list lengths to measure at, such as [10]")
        for k in self.k:
            check_at_least("evaluation.k", k, 1)
        if len(set(self.k)) < len(self.k):
            raise InputError(f"evaluation.k={list(self.k)} has a length twice; give each once")
        check_seed("evaluation.seed", self.seed)
        check_at_least("evaluation.sampled", self.sampled, 0)
        check_at_least("evaluation.batch_size", self.batch_size, 1)
        if self.patience is not None:
            check_at_least("evaluation.patience", self.patience, 1)
        measured = [f"val/{name}" for name in metric_names(self.k, self.sampled)]
        if self.monitor not in measured:
            raise InputError(
                f"evaluation.monitor={self.monitor} is not measured{did_you_mean(self.monitor, measured)}"
                f" (the validation metrics at evaluation.k={list(self.k)})"
            )


@dataclass
class TensorBoardConfig:
    attention_users: int = MISSING
    projector: bool = MISSING

    def __post_init__(self) -> None:
        check_at_least("tensorboard.attention_users", self.attention_users, 0)


@dataclass
class PublishedConfig:
    """What a paper's table says of one data set: row -> metric -> value. A sweep's row is its override."""

    dataset: str = MISSING
    source: str = MISSING
    cells: dict[str, dict[str, float]] = MISSING


@dataclass
class TrainConfig:
    name: str = MISSING
    row: Optional[str] = MISSING
    published: Optional[PublishedConfig] = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    data_dir: Optional[str] = MISSING
    ckpt: Optional[str] = MISSING
    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    loss: LossConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tensorboard: TensorBoardConfig = MISSING
    trainer: dict[str, Any] = MISSING

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_seed("seed", self.seed)
        check_folder_names("name", self.name, "a folder below outputs/", nested=True)
        for flag, value in self.trainer.items():
            check_trainer_flag(flag, value)
        if self.optimizer.cosine and self.trainer.get("max_epochs") in (None, -1):
            raise InputError("optimizer.cosine=true needs the end of training: set trainer.max_epochs")
        if self.optimizer.name is OptimizerName.rowwise_adam:
            self._check_rowwise()

    def _check_rowwise(self) -> None:
        if self.loss.name is LossName.softmax:
            raise InputError(
                "optimizer.name=rowwise_adam updates the rows that a batch touches, and loss=softmax touches them all;"
                " use adam, or loss=sampled_softmax"
            )
        if self.trainer.get("gradient_clip_val") is not None:
            raise InputError(
                f"trainer.gradient_clip_val={self.trainer['gradient_clip_val']} cannot clip the rows of"
                " optimizer.name=rowwise_adam; leave it out, or use adam"
            )

    @property
    def validates(self) -> bool:
        """Whether anything is held out and looked at; else there is no best checkpoint but the last."""
        return self.dataset.holdout is not HoldoutMode.none and self.trainer.get("limit_val_batches", 1.0) != 0


@dataclass
class RecommendConfig:
    run: str = MISSING
    users: Any = MISSING
    items: Any = MISSING
    k: int = MISSING
    interactions: Optional[str] = MISSING
    filter_viewed: bool = MISSING
    items_to_recommend: Any = MISSING
    filter_itself: bool = MISSING
    on_unsupported_targets: Unsupported = MISSING
    output: Optional[str] = MISSING
    data_dir: Optional[str] = MISSING
    device: str = MISSING

    def __post_init__(self) -> None:
        if (self.users is None) == (self.items is None):
            raise InputError(
                "give either users=... or items=...: ids in brackets such as [7,12], all, or a file of ids"
            )
        if self.items is not None and self.interactions is not None:
            raise InputError(f"interactions={self.interactions} are histories of users; items=... needs none")
        if self.output is not None and Path(self.output).suffix not in (".csv", ".parquet"):
            raise InputError(f"output={self.output} must end in .csv or .parquet; without it lists are printed")


SCHEMAS = {"train": TrainConfig, "recommend": RecommendConfig}  # of the commands, by the file in conf/
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


# Interpolations of conf/train.yaml. One process has one start, so that its folder is known before Hydra makes it.
_STARTED = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
OmegaConf.register_new_resolver("started", lambda: _STARTED, use_cache=True, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def metric_names(k: list[int], sampled: int) -> list[str]:
    """Names of all metrics of one evaluation, without `val/` or `test/`; sampled ones bear it in their name."""
    names = ["mrr"] + [f"{metric}@{cut}" for cut in k for metric in ("ndcg", "recall", "mrr")]
    return names + [f"{name}-sampled{sampled}" for name in names if sampled]
