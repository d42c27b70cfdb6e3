"""A comparison with another library: its variants, rows and table, and how much numbers may differ."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.sequences import Sequences

FOLDER = Path("outputs/parity")
AT_MOST = 1e-5  # of numbers in single precision
GRADIENTS = "gradients, relative to the largest of a parameter"

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A model of ours that equals one of another library at equal weights.

    `outputs` runs the library on sequences, for variants of a model and lists of k items, and returns its weights and
    outputs by variant; `differences` returns the largest difference of each kind of output from ours.
    """

    name: str
    by: str
    overrides: tuple[str, ...]
    variants: Callable[[ModelConfig], dict[str, ModelConfig]]
    outputs: Callable[[Sequences, TrainConfig, dict[str, ModelConfig], int], dict[str, Arrays]]
    differences: Callable[[Arrays, Sequences, TrainConfig], dict[str, float]]
    at_most: float = AT_MOST  # gradients: ten times as much
    at_most_of: dict[str, float] = field(default_factory=dict)  # the same of some variants

    @cached_property
    def defaults(self) -> TrainConfig:
        """Return the config of our model, for interactions that are given as a table."""
        return load([*self.overrides, "dataset=csv", "dataset.path=-", "dataset.time=datetime"])

    def rows(self, theirs: dict[str, Arrays], sequences: Sequences, model: ModelConfig) -> list[Row]:
        """Return one row per kind of output, of the variant whose difference is largest for what is allowed."""
        found = {
            name: self.differences(theirs[name], sequences, replace(self.defaults, model=variant))
            for name, variant in self.variants(model).items()
        }
        rows = []
        for kind in next(iter(found.values())):
            factor = 10 if kind == GRADIENTS else 1
            allowed = {name: factor * self.at_most_of.get(name, self.at_most) for name in found}
            share = {name: value[kind] / allowed[name] for name, value in found.items()}
            worst = max(found, key=lambda name: (isnan(share[name]), share[name]))
            row = {"by": self.by, "difference": kind, "largest": found[worst][kind], "of": worst}
            rows.append(row | {"at_most": allowed[worst]})
        return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        f"| {row['by']} | {row['difference']} | {row['largest']:.1e} | {row['of']} | {row['at_most']:g} |"
        for row in rows
    ]
    return "\n".join(["| | compared | largest difference | in | allowed |", "|---|---|---|---|---|", *lines])


def too_large(rows: list[Row]) -> list[Row]:
    """Return the rows whose difference is larger than allowed, or not a number."""
    return [row for row in rows if not row["largest"] <= row["at_most"]]


def largest(ours: Tensor, theirs: np.ndarray) -> float:
    """Return the largest absolute difference, or infinity if the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - torch.from_numpy(theirs)).abs().max())
