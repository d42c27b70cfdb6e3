"""Schema of the section `model` for models without training epochs, which are computed in closed form."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from sasrec_lab.config.checks import check_above_0, check_at_least, check_finite
from sasrec_lab.config.model import ModelSection
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
Weighting = Enum("Weighting", ["none", "tfidf", "bm25"])


@dataclass
class ClosedFormConfig(ModelSection):
    """Keys of `model` for models without training epochs: weights between items, computed at once."""

    maxlen, dim = 2**31 - 1, 1  # not keys: these models read whole histories, and have no states ...
    reads_times, asked_at = False, None  # ... and no times

    name: str = MISSING

    def _check_name(self, name: str) -> None:
        if self.name != name:
            raise InputError(f"model.name={self.name} must be {name}; to choose another model, write model=<name>")


@dataclass
class EaseConfig(ClosedFormConfig):
    """Keys of `model` for EASE."""

    regularization: float = MISSING

    def __post_init__(self) -> None:
        self._check_name("ease")
        check_above_0("model.regularization", self.regularization)


@dataclass
class ItemKnnConfig(ClosedFormConfig):
    """Keys of `model` for item-kNN."""

    neighbors: int = MISSING
    shrink: float = MISSING
    weighting: Weighting = MISSING

    def __post_init__(self) -> None:
        self._check_name("itemknn")
        check_at_least("model.neighbors", self.neighbors, 1)
        check_at_least("model.shrink", self.shrink, 0)
        check_finite("model.shrink", self.shrink)
        if self.weighting is Weighting.bm25 and self.shrink:
            raise InputError(
                f"model.shrink={self.shrink} must be 0 for model.weighting=bm25, whose similarities are not normalized"
            )
