"""Records of a run folder, read and checked: the folder may be a stranger's, so nothing in it is taken for granted."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sasrec_lab.config.convert import completed, flatten
from sasrec_lab.config.foreign import names_in
from sasrec_lab.errors import InputError
from sasrec_lab.files import read_small_text, read_small_yaml
from sasrec_lab.run.folder import METRICS, RUN, read_json
from sasrec_lab.run.lock import is_locked
from sasrec_lab.run.model_name import model_name

OVERRIDES = Path(".hydra", "overrides.yaml")

_CONFIG = Path(".hydra", "config.yaml")
_PROTOCOL = {"dataset", "held_out_users", "candidates", "sampled_candidates", "seen_items"}  # keys that tables use
_CONFIG_KEYS = ("seed", "dataset.name", "evaluation.k", "evaluation.sampled", "evaluation.monitor")  # that tables use
_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """The records of a run folder; without results only the folder and how the run ended."""

    folder: Path
    status: str  # finished, failed, interrupted, pruned (by a search), unfinished (cut off), running
    error: str | None
    overrides: dict[str, str]  # key -> value, in the order of the command
    config: dict[str, Any]
    model: str  # its name
    protocol: dict[str, Any]
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]]  # popularity and others that need no training
    cold_targets: dict[str, dict[str, float]]  # number and metrics of `cold` test targets and `known` ones, or empty
    epochs: int
    best_epoch: int | None
    seconds: float  # of training, including the earlier parts of a resumed run
    parameters: int
    commit: str | None
    start: str
    item_features: str | None = None  # checksum of the features that item vectors are made of
    own_code: tuple[str, ...] = ()  # parts that are not of this package, with the checksums of their modules

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return int(self.config["seed"])

    @property
    def monitor(self) -> str:
        """Return the validation metric that chose the checkpoint."""
        return str(self.config["evaluation"]["monitor"])


def read_run(folder: Path) -> Run:
    """Read the records of a run folder.

    Raises:
        InputError: the folder is of another program or version, or lacks its configuration.
        ValueError, OSError: a record is malformed, or cannot be read.
    """
    info, results = read_json(folder / RUN), read_json(folder / METRICS)
    if info is None and results is None:
        _check_own_config(folder)
    status = _status(folder, info, results)
    if status == "finished" and info is None:
        raise InputError(f"{RUN} is missing, so its configuration is unknown")
    info, results = info or {}, results or {}
    overrides = parse_overrides(read_overrides(folder))
    if status != "finished":
        return Run(folder, status, results.get("error"), overrides, {}, "", {}, {}, {}, {}, 0, None, 0.0, 0, None, "")
    config, metrics = info["config"], results["metrics"]
    if missing := [key for key in _CONFIG_KEYS if key not in flatten(config, separator=".")]:
        raise ValueError(f"the config in {RUN} has no {missing[0]}")
    return Run(
        folder=folder,
        status=status,
        error=None,
        overrides=overrides,
        config=completed(config),  # so that runs of an older version share a row with the same settings of this one
        model=model_name(config),
        protocol=_read_protocol(results, has_sampled=any("-sampled" in name for name in metrics)),
        metrics=metrics,
        baselines=results["baselines"],
        cold_targets=results.get("cold_targets", {}),  # older runs lack it
        epochs=results["epochs"],
        best_epoch=results["best_epoch"],
        seconds=sum(part["seconds"].get("fit", 0.0) for part in [*info.get("earlier", []), info]),
        parameters=info["parameters"],
        commit=info.get("git", {}).get("commit"),
        start=info.get("start", ""),
        item_features=info.get("item_features"),
        own_code=_own_code(config, info),
    )


def _own_code(config: dict[str, Any], info: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a run's parts that are not of this package, with the begin of their modules' checksums."""
    checksums = info.get("foreign", {}).get("modules", {})
    return tuple(f"{name} ({checksums.get(name.partition(':')[0], 'unknown')[:7]})" for name in names_in(config))


def _status(folder: Path, info: dict[str, Any] | None, results: dict[str, Any] | None) -> str:
    """Return how a run ended, from its run.json and metrics.json."""
    status: str = results["status"] if results else "unfinished"
    if info and "end" not in info:
        status = "unfinished"  # metrics.json is missing, or of an earlier part of a resumed run
    return "running" if status == "unfinished" and is_locked(folder) else status


def _check_own_config(folder: Path) -> None:
    """Raise InputError if the config that Hydra recorded for a run without records is not one of this program."""
    try:
        keys = set(re.findall(r"^(\w+):", read_small_text(folder / _CONFIG), re.M))
    except FileNotFoundError:
        keys = set()
    if not {"dataset", "evaluation", "seed"} <= keys:
        raise InputError("a run of another program")


def read_overrides(folder: Path) -> list[str]:
    """Return the overrides that Hydra recorded for a run, none if it recorded none.

    Raises:
        ValueError, OSError: the file is malformed, or cannot be read.
    """
    try:
        words = read_small_yaml(folder / OVERRIDES) or []
    except FileNotFoundError:
        return []
    return [_typed(word, str, f"each line of {OVERRIDES}") for word in _typed(words, list, str(OVERRIDES))]


def parse_overrides(words: list[str]) -> dict[str, str]:
    """Return overrides by key: `["+a.b=1", "~c"]` gives `{"a.b": "1", "c": ""}`."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in words)}


def _read_protocol(results: dict[str, Any], *, has_sampled: bool) -> dict[str, Any]:
    """Return the protocol in metrics.json; raise ValueError if a key that the report reads is missing."""
    protocol: dict[str, Any] = results["protocol"]
    if lacking := _PROTOCOL - protocol.keys():
        raise InputError(f"written by another version of this program: its protocol lacks {', '.join(sorted(lacking))}")
    if has_sampled and not protocol["sampled_candidates"]:
        raise ValueError("it has metrics of sampled items, but protocol.sampled_candidates is null")
    return protocol


def _typed(value: object, kind: type[_T], name: str) -> _T:
    """Return a value of this type; raise ValueError if it has another type."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    return value
