"""Schema of the sections `objective`, `loss` and `optimizer`: what a model is trained for, and how."""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from sasrec_lab.config import foreign
from sasrec_lab.config.checks import check_above_0, check_at_least, check_rate
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import find
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
ObjectiveName = Enum("ObjectiveName", ["next_item", "masked_items"])
Replace = Enum("Replace", ["mask", "mixed"])
LossName = Enum("LossName", ["softmax", "sampled_softmax", "bce", "gbce", "bpr"])
SamplerName = Enum("SamplerName", ["none", "shared", "sequence", "unseen", "uniform", "others"])
Exclude = Enum("Exclude", ["none", "history"])
OptimizerName = Enum("OptimizerName", ["adam", "adamw", "rowwise_adam", "muon"])
Schedule = Enum("Schedule", ["constant", "cosine", "linear", "flat_linear"])


@dataclass
class ObjectiveConfig:
    """Keys of `objective`: what the model is trained to predict."""

    if TYPE_CHECKING:
        name: ObjectiveName | Foreign = MISSING
    else:
        name: Any = MISSING
    # of masked_items; defaults for the other objective, which must not change them
    mask_share: float = 0.0
    last_share: float = 0.0
    replace: Replace = Replace.mask
    options: dict[str, Any] = field(default_factory=dict)  # of an objective of the user's

    def __post_init__(self) -> None:
        self.name = foreign.choose("objective.name", self.name, ObjectiveName, foreign.OBJECTIVE, self.options)
        if isinstance(self.name, Foreign):
            return
        if self.name is ObjectiveName.masked_items:
            if not 0 < self.mask_share < 1:
                raise InputError(f"objective.mask_share={self.mask_share} must be above 0 and below 1")
            if not 0 <= self.last_share <= 1:
                raise InputError(f"objective.last_share={self.last_share} must be from 0 to 1")
            return
        for key, unused in (("mask_share", 0.0), ("last_share", 0.0), ("replace", Replace.mask)):
            if (value := getattr(self, key)) != unused:
                raise InputError(
                    f"objective.{key}={getattr(value, 'name', value)} only applies to objective=masked_items; use"
                    " model=bert4rec, or remove it"
                )


# By loss: the samplers whose negatives it takes. The first is that of records that lack the key.
_SAMPLERS = {
    LossName.softmax: [SamplerName.none],
    LossName.sampled_softmax: [
        SamplerName.shared,
        SamplerName.sequence,
        SamplerName.uniform,
        SamplerName.others,
        SamplerName.unseen,
    ],
    LossName.bce: [SamplerName.unseen, SamplerName.uniform],
    LossName.gbce: [SamplerName.uniform, SamplerName.unseen],
    LossName.bpr: [SamplerName.unseen, SamplerName.uniform],
}
_DRAWN_PER = ("position", "sequence", "batch")  # what a sampler draws negatives for

_DECAY = 0.5  # of loss.decay, if nothing sets it


@dataclass
class LossConfig:
    """Keys of `loss`: the training loss and its negatives."""

    if TYPE_CHECKING:
        name: LossName | Foreign = MISSING
    else:
        name: Any = MISSING
    negatives: int = 0
    calibration: float = 0.0
    if TYPE_CHECKING:
        sampler: SamplerName | Foreign = MISSING
    else:
        sampler: Any = None  # older records lack it; never None once it is checked
    # older records lack these
    exclude: Exclude = Exclude.none
    smoothing: float = 0.0
    horizon: int = 0
    decay: float = _DECAY
    rdrop: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)  # of a loss of the user's
    sampler_options: dict[str, Any] = field(default_factory=dict)  # of a sampler of the user's

    def __post_init__(self) -> None:
        self.name = foreign.choose("loss.name", self.name, LossName, foreign.LOSS, self.options)
        samplers = list(SamplerName) if isinstance(self.name, Foreign) else _SAMPLERS[self.name]
        default = samplers[0] if self.sampler is None else self.sampler
        self.sampler = foreign.choose("loss.sampler", default, SamplerName, foreign.SAMPLER, self.sampler_options)
        is_full = self.name is LossName.softmax
        if self.sampler not in samplers and (is_full or not isinstance(self.sampler, Foreign)):
            names = " or ".join(sampler.name for sampler in samplers)
            raise InputError(f"loss.sampler={self.sampler.name} does not go with loss={self.name.name}; use {names}")
        if self.sampler is not SamplerName.none:
            check_at_least("loss.negatives", self.negatives, 1)
        elif self.negatives != 0:
            full = "loss=softmax, which scores every item" if is_full else "loss.sampler=none, which draws none"
            fix = "use loss=sampled_softmax" if is_full else "choose another loss.sampler"
            raise InputError(f"loss.negatives={self.negatives} must be 0 for {full}; set it to 0, or {fix}")
        if self.exclude is Exclude.history and self.name is not LossName.softmax:
            raise InputError(
                f"loss.exclude=history only applies to loss=softmax; set it to none for loss={self.name.name}"
                + (", whose loss.sampler=sequence excludes the window" if self.name is LossName.sampled_softmax else "")
            )
        if not 0 <= self.calibration <= 1:
            raise InputError(f"loss.calibration={self.calibration} must be from 0 to 1")
        if self.name is not LossName.gbce and self.calibration != 0:
            raise InputError(
                f"loss.calibration={self.calibration} only applies to loss=gbce; set it to 0 for loss={self.name.name}"
            )
        check_at_least("loss.rdrop", self.rdrop, 0)
        self._check_soft_targets()

    @property
    def passes(self) -> int:
        """Return how often a step passes a batch through the encoder."""
        return 2 if self.rdrop else 1

    def _check_soft_targets(self) -> None:
        check_rate("loss.smoothing", self.smoothing)
        check_at_least("loss.horizon", self.horizon, 0)
        if not 0 < self.decay <= 1:
            raise InputError(f"loss.decay={self.decay} must be above 0 and at most 1")
        if self.decay != _DECAY and not self.horizon:
            raise InputError(
                f"loss.decay={self.decay} only applies with loss.horizon; set loss.horizon=1, or remove it"
            )
        for key in ("smoothing", "horizon", "rdrop"):
            if not (value := getattr(self, key)):
                continue
            if self.name is not LossName.softmax:
                raise InputError(
                    f"loss.{key}={value} only applies to loss=softmax, which compares with every item; set it to 0 for"
                    f" loss={self.name.name}"
                )
            if self.exclude is Exclude.history and key != "rdrop":
                raise InputError(
                    f"loss.{key}={value} gives probability to items that loss.exclude=history excludes from the sum;"
                    " set loss.exclude=none"
                )

    def check_own_sampler(self) -> None:
        """Import a sampler of the user's; raise InputError if it draws for other things than the loss expects."""
        if isinstance(self.sampler, Foreign):
            per = find(self.sampler).per
            if per not in _DRAWN_PER:
                raise InputError(
                    f"loss.sampler={self.sampler.name}: its `per` must be one of {', '.join(_DRAWN_PER)}, not {per!r}"
                )
            if per != "position" and not isinstance(self.name, Foreign):
                raise InputError(
                    f"loss.sampler={self.sampler.name} draws for each {per}, but loss={self.name.name} takes negatives"
                    " of each position from a sampler of your own; use a loss of your own with it"
                )


@dataclass
class OptimizerConfig:
    """Keys of `optimizer`: the optimizer, its schedule and weight averaging."""

    name: OptimizerName = MISSING
    lr: float = MISSING
    betas: list[float] = MISSING
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    cosine: bool = False  # the earlier name of schedule=cosine, in older runs
    ema: Optional[float] = MISSING
    # older runs lack these; `schedule` is never None once it is checked
    lr_items: Optional[float] = None
    if TYPE_CHECKING:
        schedule: Schedule = MISSING
    else:
        schedule: Optional[Schedule] = None

    def __post_init__(self) -> None:
        check_above_0("optimizer.lr", self.lr)
        if self.lr_items is not None:
            check_above_0("optimizer.lr_items", self.lr_items, "optimizer.lr")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={list(self.betas)} must be two numbers from 0 to below 1")
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        if self.name is OptimizerName.rowwise_adam and self.weight_decay != 0:
            raise InputError(
                f"optimizer.weight_decay={self.weight_decay} must be 0 for optimizer.name=rowwise_adam, which updates"
                " only the rows of a batch; set it to 0, or use adam"
            )
        check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"optimizer.ema={self.ema} must be above 0 and below 1; use null for no averaging")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Set both names of the cosine, so that the records of either are equal."""
        if self.cosine and self.schedule not in (None, Schedule.cosine):
            raise InputError(
                f"optimizer.cosine=true is the earlier name of optimizer.schedule=cosine, but"
                f" optimizer.schedule={self.schedule.name}; set optimizer.cosine=false"
            )
        self.schedule = self.schedule or (Schedule.cosine if self.cosine else Schedule.constant)
        self.cosine = self.schedule is Schedule.cosine
