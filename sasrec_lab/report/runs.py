"""Folders -> runs: what each says of itself, which jobs of a sweep have no folder, which folders are foreign."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sasrec_lab.errors import InputError, did_you_mean
from sasrec_lab.run.lock import is_locked

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PROTOCOL = {"dataset", "held_out_users", "candidates", "sampled_candidates", "seen_items"}  # what tables tell
_DEPTH = 5  # outputs/<name>/<name>/<sweep>/<job>


@dataclass(frozen=True)
class Run:
    """One run folder; without results, only where it lies and how it ended."""

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
    seconds: float  # in training, those of earlier parts of a run that went on included
    parameters: int
    commit: str | None
    start: str

    @property
    def seed(self) -> int:
        return self.config["seed"]


@dataclass
class RunSearch:
    folders: list[Path]
    runs: list[Run] = field(default_factory=list)
    jobs: list[dict[str, str]] = field(default_factory=list)  # overrides of all that a sweep's command names
    missing: list[str] = field(default_factory=list)  # those of them that no folder holds
    skipped: list[str] = field(default_factory=list)  # what is no run, and why

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    @property
    def others(self) -> list[Run]:
        return [run for run in self.runs if run.status != "finished"]


def find(folders: list[Path]) -> RunSearch:
    """All runs in and below the folders, sweeps among them, in the order of the folders and of the jobs' numbers.

    Raises:
        InputError: a folder does not exist, or there is no run in any.
    """
    found, seen = RunSearch(folders), {}
    for folder in folders:
        if not folder.is_dir():
            if folder.is_file():
                raise InputError(f"{folder} is a file; give its folder, {folder.parent}")
            near = did_you_mean(folder.name, [path.name for path in folder.parent.glob("*") if path.is_dir()])
            raise InputError(f"{folder} is not a folder{near}")
        if not _search(folder, found, seen, _DEPTH):
            found.skipped.append(f"{folder}: no run in it")
    if not found.runs:
        why = few(found.skipped) or f"no run in {', '.join(map(str, folders))}"  # as of a sweep that never began
        raise InputError(f"{why}; give the folder of a run or of a sweep, such as outputs/<name>/<time>")
    return found


def few(told: list[str]) -> str:
    """The first three and how many there are beside them, in one line."""
    return "; ".join([*told[:3], *([f"and {len(told) - 3} more"] if len(told) > 3 else [])])


def _search(folder: Path, found: RunSearch, seen: dict[Path, bool], depth: int) -> bool:
    """Whether there is a run in the folder or below; one that was seen before is not read again."""
    place = folder.resolve()
    if place not in seen:
        seen[place] = False
        seen[place] = _search_new(folder, found, seen, depth)
    return seen[place]


def _search_new(folder: Path, found: RunSearch, seen: dict[Path, bool], depth: int) -> bool:
    if any((folder / name).exists() for name in (".hydra", "run.json", "metrics.json")):
        try:
            found.runs.append(_read_run(folder))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
            why = error if isinstance(error, InputError) else f"not what a run writes ({type(error).__name__}: {error})"
            found.skipped.append(f"{folder}: {why}")
        return True
    children = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")] if depth else []
    empty = [child for child in sorted(children, key=_by_number) if not _search(child, found, seen, depth - 1)]
    is_sweep = (folder / "multirun.yaml").is_file()
    if is_sweep:
        found.missing += _missing(folder, found.jobs)
    if is_sweep or len(empty) < len(children):
        found.skipped += [f"{child}: no run in it" for child in empty]
        return True
    return False


def _by_number(path: Path) -> list[tuple[int, str]]:
    """2-... before 10-..."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(folder: Path) -> Run:
    facts, results = _json(folder / "run.json"), _json(folder / "metrics.json")
    if facts is None and results is None:
        config = yaml.load((folder / ".hydra/config.yaml").read_text(), Loader) or {}
        if not {"dataset", "evaluation", "seed"} <= config.keys():
            raise InputError("a run of another program")
    status = results["status"] if results else "unfinished"
    if facts and "end" not in facts:
        status = "unfinished"  # metrics.json is of an earlier part, or there is none
    if status == "finished" and facts is None:
        raise InputError("it has no run.json, so nobody knows what was run")
    if status == "unfinished" and is_locked(folder):
        status = "running"
    facts, results = facts or {}, results or {}
    finished = status == "finished"
    if finished and (lacking := _PROTOCOL - results["protocol"].keys()):
        raise InputError(f"of another version of this program: its protocol does not tell {', '.join(sorted(lacking))}")
    return Run(
        folder=folder,
        status=status,
        error=results.get("error"),
        overrides=_overrides(folder),
        config=facts["config"] if finished else facts.get("config", {}),
        protocol=results["protocol"] if finished else {},
        metrics=dict(results["metrics"]) if finished else {},
        popularity=results.get("baselines", {}).get("popularity", {}),
        epochs=results.get("epochs", 0),
        best_epoch=results.get("best_epoch"),
        seconds=sum(part["seconds"].get("fit", 0.0) for part in [*facts.get("earlier", []), facts]) if finished else 0,
        parameters=facts["parameters"] if finished else 0,
        commit=facts.get("git", {}).get("commit"),
        start=facts.get("start", ""),
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON ({error})") from error


def _overrides(folder: Path) -> dict[str, str]:
    path = folder / ".hydra" / "overrides.yaml"
    return as_overrides(yaml.load(path.read_text(), Loader) or []) if path.is_file() else {}


def as_overrides(words: list[str]) -> dict[str, str]:
    """`["+a.b=1", "~c"]` -> `{"a.b": "1", "c": ""}`."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in words)}


def _missing(sweep: Path, known: list[dict[str, str]]) -> list[str]:
    """Jobs that the sweep's command names and no folder holds, and all of them into `known`; Hydra's own sweeper says
    which number is which."""
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sasrec_lab.config.schema import CONF_DIR

    try:
        hydra = yaml.load((sweep / "multirun.yaml").read_text(), Loader)["hydra"]
        if not hydra["sweeper"]["_target_"].endswith(".BasicSweeper"):
            return []  # only that sweeper knows its jobs
        words = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            parsed = parser.parse_overrides(words + hydra["overrides"]["task"])
            (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except Exception as error:  # Hydra's exceptions share no base class
        return [f"{sweep}: which jobs are missing cannot be told ({str(error).splitlines()[0]})"]
    there = [_overrides(path) for path in sweep.glob("[0-9]*-*")]
    missing = [number for number, job in enumerate(jobs) if as_overrides(job) not in there]
    if any(there) and len(missing) == len(jobs):
        return [f"{sweep}: which jobs are missing cannot be told (no folder has a job that multirun.yaml names)"]
    known += map(as_overrides, jobs)
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [
        f"{sweep}: job {number}, {' '.join(word for word in jobs[number] if word not in common)}" for number in missing
    ]
