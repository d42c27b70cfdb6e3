"""Schema of the config keys that no other file here has, such as model.py, and checks across them; the path of conf/.

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
from sasrec_lab.config.dataset import DatasetConfig, HoldoutMode, Target
from sasrec_lab.config.evaluation import LOSS, EvaluationConfig, metric_names
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.hydra_internals import register_resolver
from sasrec_lab.config.job_folders import job_folder
from sasrec_lab.config.list_commands import EvaluateConfig, RecommendConfig
from sasrec_lab.config.logger import LoggerConfig
from sasrec_lab.config.model import (
    AnyModel,
    BlockName,
    ItemVectors,
    ModelConfig,
    PosEmb,
    Similarity,
)
from sasrec_lab.config.training import (
    Exclude,
    LossConfig,
    LossName,
    ObjectiveConfig,
    ObjectiveName,
    OptimizerConfig,
    OptimizerName,
    SamplerName,
    Schedule,
)
from sasrec_lab.errors import InputError, nearest

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
    """All keys of conf/train.yaml: the command sasrec_lab.train."""

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
        schedule = self.optimizer.schedule
        if schedule is not Schedule.constant and self.trainer.get("max_epochs") in (None, -1):
            raise InputError(f"optimizer.schedule={schedule.name} needs the length of training; set trainer.max_epochs")
        if self.cluster is not None:
            self._check_cluster()
        self._check_metrics()
        self._check_objective()
        if self.model.reads_times and self.dataset.time is None:
            raise InputError(
                f"model.time_bias={self.model.time_bias.name} reads times, but dataset={self.dataset.name} has none;"
                " set dataset.time to the timestamps' column, or model.time_bias=none"
            )
        if isinstance(self.model, ClosedFormConfig):
            self._check_closed_form(self.model.name)
        else:
            self._check_encoder()

    def _check_encoder(self) -> None:
        self._check_tensorboard()
        if self.init_from is not None and self.ckpt not in (None, "last"):
            raise InputError(
                f"init_from={self.init_from} and ckpt={self.ckpt} both give the weights to start with; remove one"
            )
        if self.model.items is not ItemVectors.ids and self.dataset.features is None:
            raise InputError(
                f"model.items={self.model.items.name} needs a file of item features; set dataset.features.path=...,"
                " or model.items=ids"
            )
        if self.optimizer.name is OptimizerName.rowwise_adam:
            self._check_rowwise_adam()
        if self.optimizer.name is OptimizerName.muon and (self.model.block is BlockName.gru or not self.model.blocks):
            key = "block=gru" if self.model.blocks else "blocks=0"
            raise InputError(
                f"optimizer.name=muon is for the matrices of blocks, which model.{key} does not have; use adamw"
            )
        if self.capture:
            self._check_capture()

    def _check_tensorboard(self) -> None:
        users, logger = self.tensorboard.attention_users, self.logger
        if (users or self.tensorboard.projector) and logger.tensorboard is None:
            key = f"attention_users={users}" if users else "projector=true"
            names = ",".join(["tensorboard", *logger.chosen])
            raise InputError(f"tensorboard.{key} needs TensorBoard among the trackers; set logger=[{names}]")
        if users and not self.model.has_softmax:
            drawn = "attention" if self.model.block is BlockName.gru else "the softmax of attention"
            raise InputError(
                f"tensorboard.attention_users={users} draws {drawn}, which"
                f" model.block={self.model.block.name} does not have; set it to 0"
            )

    def _check_closed_form(self, name: str) -> None:
        if self.ckpt not in (None, "last"):
            raise InputError(f"ckpt={self.ckpt}: model={name} has no epochs to continue from; remove ckpt")
        if self.init_from is not None:
            raise InputError(f"init_from={self.init_from}: model={name} has no initial weights; remove init_from")
        if self.callbacks:
            raise InputError(
                f"callbacks.{next(iter(self.callbacks))} is for models trained in steps, which model={name} is not;"
                " remove it"
            )
        if self.capture:
            raise InputError(f"capture=true is for models trained in steps, which model={name} is not; remove it")
        part = self.trainer.get("limit_val_batches", 1.0)
        if part not in (0, 1.0) or (part == 1 and isinstance(part, int)):
            raise InputError(
                f"trainer.limit_val_batches={part} must be 1.0 (all users), or 0 (none), for model={name}, whose"
                " validation takes one pass"
            )

    def _check_metrics(self) -> None:
        evaluation = self.evaluation
        if self.dataset.target is Target.all and evaluation.sampled:
            raise InputError(
                f"evaluation.sampled={evaluation.sampled} ranks one target at a time, but dataset.time_split.target=all"
                " has several in one list; set evaluation.sampled=0"
            )
        names = metric_names(evaluation.k, evaluation.sampled, self.dataset.target, evaluation.metrics)
        measured, monitor = [f"val/{name}" for name in names], evaluation.monitor
        if not isinstance(self.model, ClosedFormConfig):
            measured.append(f"val/{LOSS}")
        if monitor in measured:
            return
        if monitor.startswith("test/"):
            raise InputError(
                f"evaluation.monitor={monitor} would choose by the test, which must choose nothing; set"
                f" evaluation.monitor=val/{monitor.removeprefix('test/')}"
            )
        similar = next((name for name in measured if monitor in name), measured[0])
        raise InputError(
            f"evaluation.monitor={monitor} is not measured at evaluation.k={list(evaluation.k)} and"
            f" evaluation.sampled={evaluation.sampled}; set evaluation.monitor={nearest(monitor, measured) or similar},"
            " for example"
        )

    def _check_objective(self) -> None:
        if isinstance(self.objective.name, Foreign):
            return  # what it asks of a model is its own matter
        predicts_masks = self.objective.name is ObjectiveName.masked_items
        is_causal = getattr(self.model, "causal", True)
        if is_causal and predicts_masks:
            blocks = (BlockName.transformer, BlockName.ligr)
            has_key = isinstance(self.model, ModelConfig) and self.model.block in blocks
            raise InputError(
                "objective=masked_items needs a model that also attends to later items"
                f"{': model.causal=false' if has_key else ''}; use model=bert4rec, or objective=next_item"
            )
        if self.dataset.overlap >= self.model.maxlen:
            raise InputError(
                f"dataset.overlap={self.dataset.overlap} must be below model.maxlen={self.model.maxlen}, which includes"
                " it; lower it"
            )
        if predicts_masks and self.dataset.overlap:
            raise InputError(
                f"dataset.overlap={self.dataset.overlap} is for objective=next_item, whose first labels see few items;"
                " set it to 0 for objective=masked_items"
            )
        if predicts_masks and self.loss.horizon:
            raise InputError(
                f"loss.horizon={self.loss.horizon} is for items that follow each other, which the labels of"
                " objective=masked_items do not; set it to 0"
            )
        if not is_causal and not predicts_masks:
            raise InputError(
                f"objective={self.objective.name.name} would be given away by model.causal=false, which attends to"
                " later items; use objective=masked_items, or model.causal=true"
            )
        if predicts_masks and self.model.maxlen < 2:
            raise InputError(
                f"model.maxlen={self.model.maxlen} must be at least 2 for objective=masked_items: an item, and the mask"
                " behind it"
            )

    def _check_rowwise_adam(self) -> None:
        if self.loss.name is LossName.softmax:
            raise InputError(
                "optimizer.name=rowwise_adam is for losses that touch few rows of the item table, not for loss=softmax;"
                " use adam, or loss=sampled_softmax"
            )
        for part in (self.loss.name, self.model.head):
            if isinstance(part, Foreign):
                raise InputError(
                    f"optimizer.name=rowwise_adam updates only the rows of a batch, and {part.key}={part.name} may"
                    " touch others; use adam"
                )
        dense = {
            "output_bias=true": self.model.output_bias,
            "similarity=cosine": self.model.similarity is Similarity.cosine,
            f"items={self.model.items.name}": self.model.items is not ItemVectors.ids,
        }
        if key := next((key for key, is_set in dense.items() if is_set), None):
            raise InputError(
                f"model.{key} changes every item vector in each step, but optimizer.name=rowwise_adam updates only the"
                " rows of a batch; use adam"
            )
        if self.trainer.get("gradient_clip_val") is not None:
            raise InputError(
                f"trainer.gradient_clip_val={self.trainer['gradient_clip_val']} must be null for"
                " optimizer.name=rowwise_adam, whose row gradients are not clipped; set it to null, or use adam"
            )

    def _check_cluster(self) -> None:
        if isinstance(self.model, ClosedFormConfig):
            raise InputError(f"cluster=ray shares out training steps, which model={self.model.name} lacks; remove it")
        if self.ckpt not in (None, "last"):
            raise InputError(f"ckpt={self.ckpt}: cluster=ray resumes a run in its own folder; set ckpt=last")
        for flag, default in {"devices": 1, "num_nodes": 1, "strategy": "auto"}.items():
            if (value := self.trainer.get(flag, default)) != default:
                raise InputError(
                    f"trainer.{flag}={value} and cluster=ray both say where the processes run; set cluster.workers and"
                    f" remove trainer.{flag}"
                )

    def _check_capture(self) -> None:
        model, loss = self.model, self.loss
        for part in (self.objective.name, loss.name, model.block, model.head):
            if isinstance(part, Foreign):
                raise InputError(
                    f"capture=true repeats a step for other batches of the same size, and the operations of"
                    f" {part.key}={part.name} may depend on a batch; set capture=false"
                )
        reasons = {
            f"model.block={model.block.name}": not model.has_softmax,
            "model.pos_emb=relative": model.pos_emb is PosEmb.relative,
            "model.time_bias=decay": model.reads_times,
            "model.pad_keys=true": model.pad_keys,
            "loss.sampler=sequence": loss.sampler is SamplerName.sequence,
            "loss.exclude=history": loss.exclude is Exclude.history,
            f"loss.horizon={loss.horizon}": loss.horizon > 0,
            "optimizer.name=rowwise_adam": self.optimizer.name is OptimizerName.rowwise_adam,
        }
        for key in (key for key, applies in reasons.items() if applies):
            raise InputError(
                f"capture=true repeats a step for other batches of the same size, but with {key} its operations depend"
                " on the lengths or the items of a batch; set capture=false"
            )

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
