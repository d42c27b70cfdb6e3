"""Schema of the section `evaluation`: the metrics, by what names, their candidates and early stopping."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from sasrec_lab.config import foreign
from sasrec_lab.config.checks import check_at_least, check_lengths, check_seed
from sasrec_lab.config.dataset import Target
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
Draw = Enum("Draw", ["paper", "unseen", "popularity"])

LOSS = "loss"  # the only metric of which less is better
_ONE_TARGET = ("ndcg", "recall", "mrr")  # with one target, precision is recall / k, MAP is MRR, and hit rate recall
_SEVERAL_TARGETS = (*_ONE_TARGET, "hit_rate", "precision", "map")
BY_USER = "-by-user"  # ends the name of a metric that is averaged over the rows of each user first


@dataclass
class EvaluationConfig:
    """Keys of `evaluation`: the metrics, their candidates and early stopping."""

    k: Any = MISSING  # list[int]; one integer becomes a list of it
    filter_seen: bool = MISSING
    sampled: int = MISSING
    draw: Draw = MISSING
    seed: int = MISSING
    batch_size: int = MISSING
    monitor: str = MISSING
    patience: Optional[int] = MISSING
    recent_days: Optional[int] = None  # older runs lack it
    lists: int = 0  # older runs lack it
    test: bool = True  # older runs lack it
    metrics: dict[str, Any] = field(default_factory=dict)  # of the user's, as foreign.OwnPart; older runs lack it

    def __post_init__(self) -> None:
        self.metrics = foreign.own_parts("evaluation.metrics", self.metrics, foreign.METRIC)
        if taken := [name for name in self.metrics if name in _SEVERAL_TARGETS]:
            raise InputError(f"evaluation.metrics.{taken[0]} has the name of a built-in metric; choose another one")
        self.k = check_lengths("evaluation.k", self.k)
        check_seed("evaluation.seed", self.seed)
        check_at_least("evaluation.sampled", self.sampled, 0)
        check_at_least("evaluation.lists", self.lists, 0)
        check_at_least("evaluation.batch_size", self.batch_size, 1)
        if self.patience is not None:
            check_at_least("evaluation.patience", self.patience, 1)
        if self.recent_days is not None:
            check_at_least("evaluation.recent_days", self.recent_days, 1)

    @property
    def final_stage(self) -> str:
        """Return the stage that the chosen checkpoint is measured on: "test", or "val" if no test may be seen."""
        return self.stages[-1]

    @property
    def stages(self) -> list[str]:
        """Return the stages that anything may be measured on."""
        return ["val", "test"] if self.test else ["val"]

    @property
    def has_loss(self) -> bool:
        """Return whether validation computes its loss, slower than its ranks: to choose by it, or in a search."""
        return is_lower_better(self.monitor) or not self.test


def is_lower_better(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return metric == f"val/{LOSS}"


def metric_names(k: list[int], sampled: int, target: Target = Target.last, own: Iterable[str] = ()) -> list[str]:
    """Return the metrics of one evaluation, without `val/` or `test/`; those on sampled items end in `-sampledN`.

    `own` are the names of those of the user's.
    """
    metrics = (*(_SEVERAL_TARGETS if target is Target.all else _ONE_TARGET), *own)
    names = ["mrr"] + [f"{metric}@{cut}" for cut in k for metric in metrics]
    if target is Target.successive:
        names += [f"{name}{BY_USER}" for name in names]
    return names + [f"{name}-sampled{sampled}" for name in names if sampled]
