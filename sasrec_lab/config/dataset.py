"""Schema of the keys of a data set, and checks across them. The values are in conf/train.yaml and conf/dataset/."""

import re
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import Enum
from math import isfinite, nan
from typing import Optional

from omegaconf import MISSING

from sasrec_lab.config.checks import check_at_least, check_folder_names, check_seed, parse_size
from sasrec_lab.config.sources import SourceConfig, check_sha256
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
Format = Enum("Format", ["table", "lists", "synthetic"])
IdType = Enum("IdType", ["auto", "int", "str"])
Repeats = Enum("Repeats", ["keep", "drop"])
HoldoutMode = Enum("HoldoutMode", ["last", "time", "none"])
Target = Enum("Target", ["first", "last", "all", "successive"])
Windows = Enum("Windows", ["last", "all"])
History = Enum("History", ["cut", "target"])
Cold = Enum("Cold", ["keep", "drop"])
Catalogue = Enum("Catalogue", ["all", "train", "auto"])  # auto becomes one of the others

LEAST_MEMORY = 50 * 10**6  # bytes of dataset.memory_limit

_PLAIN_PATH = re.compile(r"\w[\w.,+=@() -]*(/\w[\w.,+=@() -]*)*")


@dataclass
class TitlesConfig:
    """A file of item titles in the data root or next to the user's data; a public one is fetched with its data set."""

    path: Optional[str] = None
    separator: str = ","
    names: Optional[list[str]] = None  # of its first columns, if it has no header line
    encoding: str = "utf-8"
    item: str = "item_id"
    title: str = "title"


@dataclass
class FeaturesConfig:
    """A file of item features in the data root or next to the user's data, a line or Parquet row for each item.

    It may be the file of titles, which is fetched with a public data set.
    """

    path: Optional[str] = None
    separator: str = ","
    names: Optional[list[str]] = None  # of its first columns, if it has no header line
    encoding: str = "utf-8"
    item: str = "item_id"
    categories: list[str] = field(default_factory=list)
    split: Optional[str] = "|"
    flags: list[str] = field(default_factory=list)
    vectors: Optional[str] = None

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if not self.categories and not self.flags and self.vectors is None:
            raise InputError(
                f"dataset.features.path={self.path} needs the columns to use: dataset.features.categories=[genres], or"
                " dataset.features.vectors=..."
            )
        if self.split == "":
            raise InputError("dataset.features.split must not be empty; set it to null if a cell is one category")


@dataclass
class WeightConfig:
    """Weight of an interaction: `then` if column > above, `otherwise` if not; above=null: the column's value."""

    column: Optional[str] = None
    above: Optional[float] = None
    then: float = 1.0
    otherwise: float = 1.0

    def __post_init__(self) -> None:
        if self.column is None and self.above is not None:
            raise InputError(
                f"dataset.weight.above={self.above} needs a column to compare; set dataset.weight.column=..."
            )
        check_at_least("dataset.weight.then", self.then, 0)
        check_at_least("dataset.weight.otherwise", self.otherwise, 0)
        if self.column is not None and self.above is None:
            for key in (field.name for field in fields(self) if field.default == 1):
                if (value := getattr(self, key)) != 1:
                    raise InputError(
                        f"dataset.weight.{key}={value} needs a number that {self.column!r} is compared with; set"
                        f" dataset.weight.above=..., or remove dataset.weight.{key}"
                    )
        if self.above is not None and not self.then and not self.otherwise:
            raise InputError(
                "dataset.weight gives every interaction the weight 0, so that nothing is learned; set"
                " dataset.weight.then=1"
            )


@dataclass
class SyntheticConfig:
    """Size and seed of generated interactions."""

    users: int = MISSING
    items: int = MISSING
    mean_length: float = MISSING
    seed: int = MISSING

    def __post_init__(self) -> None:
        check_seed("dataset.synthetic.seed", self.seed)
        check_at_least("dataset.synthetic.users", self.users, 1)
        check_at_least("dataset.synthetic.items", self.items, 2)
        check_at_least("dataset.synthetic.mean_length", self.mean_length, 1)


@dataclass
class TimeSplitConfig:
    """Cuts of `holdout=time`, and the histories and targets after them.

    The defaults are those of conf/train.yaml: another value without `holdout=time` is a mistake.
    """

    val: str = "0.8"
    test: str = "0.9"
    target: Target = Target.last
    history: Optional[History] = None
    cold_users: Cold = Cold.drop
    cold_items: Cold = Cold.drop

    def __post_init__(self) -> None:
        val, test = (check_cut(f"dataset.time_split.{key}", getattr(self, key)) for key in ("val", "test"))
        if val is not None and test is not None and val >= test:
            raise InputError(
                f"dataset.time_split.val={self.val} must be before dataset.time_split.test={self.test}: training ends"
                " at val, validation at test"
            )
        if self.target is Target.all and self.history is History.target:
            raise InputError(
                "dataset.time_split.history=target has no meaning for dataset.time_split.target=all, which looks for"
                " all targets in one list; use history=cut or null"
            )

    @property
    def reads_to_target(self) -> bool:
        """Return whether a history ends before its target, rather than at the cut."""
        if self.history is None:
            return self.target in (Target.last, Target.successive)
        return self.history is History.target


def check_cut(key: str, text: str) -> Optional[float]:
    """Return the quantile that a cut is, or None for a time; raise InputError if it is neither."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not isfinite(number):
        try:
            datetime.fromisoformat(text)
        except ValueError as error:
            raise InputError(
                f"{key}={text} must be a quantile of the times between 0 and 1, such as 0.9, or a time: an ISO date"
                " like 2021-05-11, or a number as in the file"
            ) from error
        return None
    return number if 0 < number < 1 else None


@dataclass
class DatasetConfig:
    """Keys of `dataset`: the file, its columns, how it is cleaned, and what is held out."""

    name: str = MISSING
    path: Optional[str] = MISSING
    sha256: Optional[str] = MISSING
    sources: list[SourceConfig] = MISSING
    format: Format = MISSING
    separator: str = MISSING
    names: Optional[list[str]] = MISSING
    user: str = MISSING
    item: str = MISSING
    time: Optional[str] = MISSING
    rating: Optional[str] = MISSING
    weight: Optional[WeightConfig] = MISSING
    user_type: IdType = MISSING
    item_type: IdType = MISSING
    check_ids: bool = True  # a default for the records of older runs, which lack it
    memory_limit: Optional[str] = None  # older runs lack it
    min_rating: Optional[float] = MISSING
    since: Optional[str] = MISSING
    until: Optional[str] = MISSING
    repeats: Repeats = MISSING
    min_user: int = MISSING
    min_item: int = MISSING
    until_stable: bool = MISSING
    titles: Optional[TitlesConfig] = MISSING
    features: Optional[FeaturesConfig] = None  # older runs lack it
    holdout: HoldoutMode = MISSING
    val_users: Optional[int] = None  # older runs lack it
    time_split: Optional[TimeSplitConfig] = None
    windows: Windows = MISSING
    overlap: int = 0  # older runs lack it
    catalogue: Catalogue = MISSING
    synthetic: Optional[SyntheticConfig] = MISSING

    def __post_init__(self) -> None:
        self._normalize()
        check_folder_names("dataset.name", self.name, "the folder and cache of the data set")
        check_sha256("dataset.sha256", self.sha256)
        check_at_least("dataset.min_user", self.min_user, 0)
        check_at_least("dataset.min_item", self.min_item, 0)
        check_at_least("dataset.overlap", self.overlap, 0)
        if self.overlap and self.windows is not Windows.all:
            raise InputError(
                f"dataset.overlap={self.overlap} is of windows over the whole history; set dataset.windows=all, or"
                " dataset.overlap=0"
            )
        if self.memory_limit is not None:
            self.memory_limit = str(self.memory_limit)
            parse_size("dataset.memory_limit", self.memory_limit, LEAST_MEMORY)
        if self.format is Format.synthetic and self.synthetic is None:
            raise InputError("dataset.format=synthetic needs users, items, mean_length and seed in dataset.synthetic")
        if self.format is not Format.synthetic and self.path is None:
            raise InputError("dataset.path=null must name the file to read; set dataset.path=my/interactions.csv")
        if self.format is Format.table and (not self.separator or re.search('["\r\n]', self.separator)):
            raise InputError(
                f"dataset.separator={self.separator!r} must be text without quotes and line ends; set the text between"
                " columns, such as ',' or '\\t'"
            )
        if self.sources:
            self._check_stored_paths()
        self._check_columns()
        self._check_holdout()

    @property
    def target(self) -> Target:
        """Return which items of a user a row has as its targets."""
        return self.time_split.target if self.time_split else Target.last

    def _check_holdout(self) -> None:
        if self.val_users is not None:
            check_at_least("dataset.val_users", self.val_users, 1)
            if self.holdout is not HoldoutMode.last:
                raise InputError(
                    f"dataset.val_users={self.val_users} is of dataset.holdout=last, not {self.holdout.name}; set it to"
                    " null"
                )
        if self.holdout is not HoldoutMode.time:
            if self.time_split is not None:
                changed = next(
                    f"{key.name}={value.name if isinstance(value, Enum) else value}"
                    for key in fields(TimeSplitConfig)
                    if (value := getattr(self.time_split, key.name)) != key.default
                )
                raise InputError(f"dataset.time_split.{changed} needs dataset.holdout=time")
            return
        self.time_split = self.time_split or TimeSplitConfig()
        if self.time is None:
            raise InputError("dataset.holdout=time needs the timestamps' column; set dataset.time=..., or holdout=last")

    def _check_stored_paths(self) -> None:
        """Raise InputError if a published file would be stored in another place than below the data root."""
        paths = {"dataset.path": self.path} | ({"dataset.titles.path": self.titles.path} if self.titles else {})
        for key, path in paths.items():
            if path is None or not _PLAIN_PATH.fullmatch(path) or path.partition("/")[0].lower() == "cache":
                raise InputError(
                    f"{key}={path} must be a plain path below the data root, such as ml-1m/ratings.dat, because"
                    " dataset.sources are stored there; for your own file write dataset=csv dataset.path=..."
                )
        if len(set(paths.values())) < len(paths):
            raise InputError(f"dataset.path and dataset.titles.path must be different files, but both are {self.path}")

    def _normalize(self) -> None:
        """Read the two typed characters \\t as a tab, and drop sections that do not apply."""
        if self.separator == r"\t":
            self.separator = "\t"
        if self.weight is not None and self.weight.column is None:
            self.weight = None
        if self.titles is not None and self.titles.path is None:
            self.titles = None
        if self.features is not None and self.features.path is None:
            self.features = None
        if self.format is not Format.synthetic:
            self.synthetic = None
        if self.holdout is not HoldoutMode.time and self.time_split in (None, TimeSplitConfig()):
            self.time_split = None
        if self.catalogue is Catalogue.auto:
            self.catalogue = Catalogue.train if self.holdout is HoldoutMode.time else Catalogue.all

    def _check_columns(self) -> None:
        for one, other in (("user", "item"), ("user", "time"), ("item", "time")):
            if (column := getattr(self, one)) == getattr(self, other):
                raise InputError(
                    f"dataset.{one} and dataset.{other} must be different columns, but both are {column!r}"
                )
        weight = self.weight.column if self.weight else None
        for key, column in (("rating", self.rating), ("weight.column", weight)):
            if self.format is Format.synthetic and column is not None:
                raise InputError(f"dataset.{key}={column}: generated interactions have no such column; set it to null")
        if self.min_rating is not None and self.rating is None:
            raise InputError(f"dataset.min_rating={self.min_rating} needs the ratings' column; set dataset.rating=...")
        if self.time is None and (self.since is not None or self.until is not None):
            raise InputError("dataset.since and dataset.until need the timestamps' column; set dataset.time=...")
