"""Records of a run folder, read and checked: the folder may be a stranger's, so nothing in it is taken for granted."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import InputError
from sasrec_lab.files import read_small_text, read_small_yaml
from sasrec_lab.run.folder import METRICS, RUN, read_json
from sasrec_lab.run.lock import is_locked

OVERRIDES = Path(".hydra", "overrides.yaml")

_CONFIG = Path(".hydra", "config.yaml")
_PROTOCOL = {"dataset", "held_out_users", "candidates", "sampled_candidates", "seen_items"}  # keys that tables use
_LARGEST = 1e30  # of a metric or a time; sums and squares of larger numbers overflow
_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """The records of a run folder; without results only the folder and how the run ended."""

    folder: Path
    status: str  # finished, failed, interrupted, unfinished (cut off), running
    error: str | None
    overrides: dict[str, str]  # key -> value, in the order of the command
    config: dict[str, Any]
    protocol: dict[str, Any]
    metrics: dict[str, float]
    popularity: dict[str, float]
    epochs: int
    best_epoch: int | None
    seconds: float  # of training, including the earlier parts of a resumed run
    parameters: int
    commit: str | None
    start: str

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
        error = None if (error := results.get("error")) is None else str(error)
        return Run(folder, status, error, overrides, {}, {}, {}, {}, 0, None, 0.0, 0, None, "")
    best_epoch, metrics = results.get("best_epoch"), _numbers(results.get("metrics"), "metrics")
    return Run(
        folder=folder,
        status=status,
        error=None,
        overrides=overrides,
        config=_read_config(info),
        protocol=_read_protocol(results, has_sampled=any("-sampled" in name for name in metrics)),
        metrics=metrics,
        popularity=_numbers(results.get("baselines", {}).get("popularity", {}), "baselines.popularity"),
        epochs=_typed(results.get("epochs", 0), int, "epochs"),
        best_epoch=None if best_epoch is None else _typed(best_epoch, int, "best_epoch"),
        seconds=sum(_number(part["seconds"].get("fit", 0.0), "seconds") for part in [*info.get("earlier", []), info]),
        parameters=_typed(info.get("parameters"), int, "parameters"),
        commit=_text_or_none(info.get("git", {}).get("commit"), "git.commit"),
        start=_typed(info.get("start", ""), str, "start"),
    )


def _status(folder: Path, info: dict[str, Any] | None, results: dict[str, Any] | None) -> str:
    """Return how a run ended, from its run.json and metrics.json."""
    status = _typed(results.get("status"), str, "status") if results else "unfinished"
    if status not in ("finished", "failed", "interrupted", "unfinished"):
        raise InputError(f"the status in {METRICS} is {status[:40]!r}, which no version of this program writes")
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


def _read_config(info: dict[str, Any]) -> dict[str, Any]:
    """Return the config in run.json; raise ValueError if a key that the report reads is malformed."""
    config = _typed(info.get("config"), dict, "config")
    flatten(config)  # raises RecursionError if the nesting is too deep for what reads it later
    _typed(config.get("seed"), int, "config.seed")
    _text_or_none(config.get("row"), "config.row")
    _typed(config["dataset"]["name"], str, "config.dataset.name")
    evaluation = config["evaluation"]
    _typed(evaluation["monitor"], str, "config.evaluation.monitor")
    _typed(evaluation["sampled"], int, "config.evaluation.sampled")
    for cutoff in _typed(evaluation["k"], list, "config.evaluation.k"):
        _typed(cutoff, int, "config.evaluation.k")
    if published := config.get("published"):
        _text_or_none(published.get("source"), "config.published.source")
        for row, cells in published.get("cells", {}).items():
            _numbers(cells, f"config.published.cells.{row}")
    return config


def _read_protocol(results: dict[str, Any], *, has_sampled: bool) -> dict[str, Any]:
    """Return the protocol in metrics.json; raise ValueError if a key that the report reads is missing or malformed."""
    protocol = _typed(results.get("protocol"), dict, "protocol")
    if lacking := _PROTOCOL - protocol.keys():
        raise InputError(f"written by another version of this program: its protocol lacks {', '.join(sorted(lacking))}")
    flatten(protocol)  # as for the config
    _typed(protocol["dataset"], str, "protocol.dataset")
    _typed(protocol["held_out_users"], int, "protocol.held_out_users")
    _typed(protocol["candidates"]["full"], int, "protocol.candidates.full")
    if has_sampled:
        _typed(protocol["sampled_candidates"]["draw"], str, "protocol.sampled_candidates.draw")
    return protocol


def _numbers(values: object, name: str) -> dict[str, float]:
    """Return a dict of numbers; raise ValueError if it is something else."""
    return {key: _number(value, f"{name}.{key}") for key, value in _typed(values, dict, name).items()}


def _number(value: object, name: str) -> float:
    """Return a number, possibly NaN; raise ValueError if it is not a number, or so large that sums overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        raise ValueError(f"{name} must be a number, and at most {_LARGEST:g}")
    return float(value)


def _text_or_none(value: object, name: str) -> str | None:
    """Return a text or None; raise ValueError if it is something else."""
    return None if value is None else _typed(value, str, name)


def _typed(value: object, kind: type[_T], name: str) -> _T:
    """Return a value of this type; raise ValueError if it has another type."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    return value
