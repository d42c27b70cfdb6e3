"""Search for runs in folders: their records, jobs of a sweep without a folder, and folders that are not runs."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sasrec_lab.config.command_line import grid_jobs
from sasrec_lab.errors import InputError, first_few
from sasrec_lab.files import did_you_mean_path
from sasrec_lab.run.lock import is_locked

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PROTOCOL = {"dataset", "held_out_users", "candidates", "sampled_candidates", "seen_items"}  # keys that tables use
_DEPTH = 5  # outputs/<name>/<name>/<sweep>/<job>


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
        return self.config["seed"]


@dataclass
class RunSearch:
    """Everything found in the folders that were searched."""

    folders: list[Path]
    runs: list[Run] = field(default_factory=list)
    jobs: list[dict[str, str]] = field(default_factory=list)  # overrides of all jobs of the sweeps
    missing: list[str] = field(default_factory=list)  # jobs of the sweeps without a folder
    skipped: list[str] = field(default_factory=list)  # folders that are not runs, and why

    @property
    def finished(self) -> list[Run]:
        """Return the runs with results."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def others(self) -> list[Run]:
        """Return the runs without results."""
        return [run for run in self.runs if run.status != "finished"]


def find_runs(folders: list[Path]) -> RunSearch:
    """Return all runs in and below the folders, in the order of the folders and of the jobs' numbers.

    Raises:
        InputError: a folder does not exist, or none contains a run.
    """
    found, seen = RunSearch(folders), {}
    for folder in folders:
        if not folder.is_dir():
            if folder.is_file():
                raise InputError(f"{folder} is a file; give its folder, {folder.parent}")
            raise InputError(f"{folder} is not a folder{did_you_mean_path(folder, only_folders=True)}")
        if not _search(folder, found, seen, _DEPTH):
            found.skipped.append(f"{folder}: contains no run")
    if not found.runs:
        # nothing was skipped if no job of a sweep has started
        why = first_few(found.skipped, 3, "; ") or f"no run in {', '.join(map(str, folders))}"
        raise InputError(f"{why}; give the folder of a run or a sweep, such as outputs/<name>/<time>")
    return found


def _search(folder: Path, found: RunSearch, seen: dict[Path, bool], depth: int) -> bool:
    """Return whether a folder contains runs, and add them to `found`, unless it was searched before."""
    path = folder.resolve()
    if path not in seen:
        seen[path] = False  # in case a link leads back here
        seen[path] = _search_new(folder, found, seen, depth)
    return seen[path]


def _search_new(folder: Path, found: RunSearch, seen: dict[Path, bool], depth: int) -> bool:
    """Read a folder as a run if it has a run's files, and search the folders in it if not."""
    if any((folder / name).exists() for name in (".hydra", "run.json", "metrics.json")):
        try:
            found.runs.append(_read_run(folder))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
            why = error if isinstance(error, InputError) else f"malformed run folder ({type(error).__name__}: {error})"
            found.skipped.append(f"{folder}: {why}")
        return True
    children = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")] if depth else []
    empty = [child for child in sorted(children, key=_natural_order) if not _search(child, found, seen, depth - 1)]
    is_sweep = (folder / "multirun.yaml").is_file()
    if is_sweep:
        found.missing += _missing_jobs(folder, found.jobs)
    if is_sweep or len(empty) < len(children):
        found.skipped += [f"{child}: contains no run" for child in empty]
        return True
    return False


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts 2-... before 10-..."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(folder: Path) -> Run:
    """Read the records of a run folder.

    Raises:
        InputError: the folder is of another program or version, or lacks its configuration.
    """
    info, results = _read_json(folder / "run.json"), _read_json(folder / "metrics.json")
    if info is None and results is None:
        config = yaml.load((folder / ".hydra/config.yaml").read_text(), _LOADER) or {}
        if not {"dataset", "evaluation", "seed"} <= config.keys():
            raise InputError("a run of another program")
    status = results["status"] if results else "unfinished"
    if info and "end" not in info:
        status = "unfinished"  # metrics.json is missing, or of an earlier part of a resumed run
    if status == "finished" and info is None:
        raise InputError("run.json is missing, so its configuration is unknown")
    if status == "unfinished" and is_locked(folder):
        status = "running"
    info, results = info or {}, results or {}
    finished = status == "finished"
    if finished and (lacking := _PROTOCOL - results["protocol"].keys()):
        raise InputError(f"written by another version of this program: its protocol lacks {', '.join(sorted(lacking))}")
    return Run(
        folder=folder,
        status=status,
        error=results.get("error"),
        overrides=_overrides(folder),
        config=info["config"] if finished else info.get("config", {}),
        protocol=results["protocol"] if finished else {},
        metrics=dict(results["metrics"]) if finished else {},
        popularity=results.get("baselines", {}).get("popularity", {}),
        epochs=results.get("epochs", 0),
        best_epoch=results.get("best_epoch"),
        seconds=sum(part["seconds"].get("fit", 0.0) for part in [*info.get("earlier", []), info]) if finished else 0,
        parameters=info["parameters"] if finished else 0,
        commit=info.get("git", {}).get("commit"),
        start=info.get("start", ""),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, None if it does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON ({error})") from error


def _overrides(folder: Path) -> dict[str, str]:
    """Return the overrides that Hydra recorded for a run."""
    path = folder / ".hydra" / "overrides.yaml"
    return _parse_overrides(yaml.load(path.read_text(), _LOADER) or []) if path.is_file() else {}


def _parse_overrides(words: list[str]) -> dict[str, str]:
    """Return overrides by key: `["+a.b=1", "~c"]` gives `{"a.b": "1", "c": ""}`."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in words)}


def _missing_jobs(sweep: Path, known: list[dict[str, str]]) -> list[str]:
    """Return a line for each job in the sweep's command that has no folder, and add all its jobs to `known`."""
    try:
        hydra = yaml.load((sweep / "multirun.yaml").read_text(), _LOADER)["hydra"]
        if not hydra["sweeper"]["_target_"].endswith(".BasicSweeper"):
            return []  # the jobs of a search are known to its sweeper only
        jobs = grid_jobs(hydra["overrides"]["task"], hydra["sweeper"].get("params"))
    except Exception as error:  # a multirun.yaml that is malformed, or not a grid of this version
        return [f"{sweep}: which jobs are missing is unknown ({str(error).splitlines()[0]})"]
    present = [_overrides(path) for path in sweep.glob("[0-9]*-*")]
    missing = [number for number, job in enumerate(jobs) if _parse_overrides(job) not in present]
    if any(present) and len(missing) == len(jobs):
        return [f"{sweep}: which jobs are missing is unknown (no folder has a job that multirun.yaml names)"]
    known += map(_parse_overrides, jobs)
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [
        f"{sweep}: job {number}, {' '.join(word for word in jobs[number] if word not in common)}" for number in missing
    ]
