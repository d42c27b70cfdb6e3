"""Schemas of the commands that make and measure lists: recommend and evaluate."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from sasrec_lab.config.checks import check_lengths
from sasrec_lab.config.foreign import check_trust
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
Unsupported = Enum("Unsupported", ["raise", "warn", "ignore"])
Split = Enum("Split", ["val", "test"])


@dataclass
class RecommendConfig:
    """All keys of conf/recommend.yaml: the command sasrec_lab.recommend."""

    run: str = MISSING
    users: Any = MISSING
    items: Any = MISSING
    split: Optional[Split] = None
    k: int = MISSING
    interactions: Optional[str] = MISSING
    filter_viewed: bool = MISSING
    items_to_recommend: Any = MISSING
    filter_itself: bool = MISSING
    on_unsupported_targets: Unsupported = MISSING
    query_time: Any = MISSING
    output: Optional[str] = MISSING
    data_dir: Optional[str] = MISSING
    device: str = MISSING
    trust: Any = MISSING  # list[str]; one name becomes a list of it

    def __post_init__(self) -> None:
        self.trust = check_trust(self.trust)
        if sum(given is not None for given in (self.users, self.items, self.split)) != 1:
            raise InputError(
                "give either users=... or items=...: ids in brackets such as [7,12], all, or a file of ids;"
                " or split=test"
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            hint = "; did you mean cuda?" if self.device.startswith("gpu") else ""
            raise InputError(f"device={self.device} is not one of auto, cpu, cuda, cuda:<number>, mps{hint}")
        if self.split is not None:
            self._check_split(self.split.name)
        for key in ("interactions", "query_time"):
            if self.items is not None and (given := getattr(self, key)) is not None:
                raise InputError(f"{key}={given} only applies to users=...; remove it for items=...")
        if self.output is not None and Path(self.output).suffix not in (".csv", ".parquet"):
            raise InputError(f"output={self.output} must end in .csv or .parquet; omit it to print the lists")

    def _check_split(self, name: str) -> None:
        if self.output is None:
            raise InputError(f"split={name} makes a list for each row; give the file to write: output=lists.parquet")
        given = {
            "interactions": self.interactions is not None,
            "query_time": self.query_time is not None,
            "items_to_recommend": self.items_to_recommend is not None,
            "filter_viewed": not self.filter_viewed,
            "on_unsupported_targets": self.on_unsupported_targets is not Unsupported["raise"],
        }
        for key in (key for key, is_given in given.items() if is_given):
            raise InputError(f"{key} has no effect on split={name}, whose lists are those of the run's own; remove it")


@dataclass
class EvaluateConfig:
    """All keys of conf/evaluate.yaml: the command sasrec_lab.evaluate."""

    lists: str = MISSING
    run: Optional[str] = MISSING
    split: Split = MISSING
    k: Any = MISSING  # list[int], or None; one integer becomes a list of it
    output: Optional[str] = MISSING
    data_dir: Optional[str] = MISSING

    def __post_init__(self) -> None:
        if self.k is not None:
            self.k = check_lengths("k", self.k)
        if self.output is not None and Path(self.output).suffix != ".json":
            raise InputError(f"output={self.output} must end in .json; omit it to print the metrics only")
