"""Search for runs in folders: runs, jobs of a sweep without a folder, and folders that are not runs."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from sasrec_lab.config.command_line import grid_jobs
from sasrec_lab.errors import InputError, first_few, printable
from sasrec_lab.files import did_you_mean_path, read_small_yaml
from sasrec_lab.report.records import Run, parse_overrides, read_overrides, read_run
from sasrec_lab.report.searches import SearchRecord, read_search
from sasrec_lab.run.folder import SEARCH

_DEPTH = 5  # outputs/<name>/<name>/<sweep>/<job>
_MAX_OTHER_FOLDERS = 10_000  # searched for runs; a home folder has more
_RUN_FILES = {".hydra", "run.json", "metrics.json"}
_MAX_COMMAND_LENGTH = 50_000  # characters; Hydra's grammar is slow


@dataclass
class RunSearch:
    """Everything found in the folders that were searched."""

    folders: list[Path]
    runs: list[Run] = field(default_factory=list)
    jobs: list[dict[str, str]] = field(default_factory=list)  # overrides of all jobs of the sweeps
    missing: list[str] = field(default_factory=list)  # jobs of the sweeps without a folder
    skipped: list[str] = field(default_factory=list)  # folders that are not runs, and why
    searches: list[SearchRecord] = field(default_factory=list)

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
    found = RunSearch(folders)
    seen: dict[Path, bool] = {}
    for folder in folders:
        if not folder.is_dir():
            if folder.is_file():
                raise InputError(f"{folder} is a file; give its folder, {folder.parent}")
            hint = did_you_mean_path(folder, only_folders=True) or "; check the path"
            raise InputError(f"{folder} is not a folder{hint}")
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
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        found.skipped.append(f"{folder}: cannot be read ({error.strerror})")
        return False
    if not _RUN_FILES.isdisjoint(names):
        _add_run(folder, found)
        return True
    if len(seen) - len(found.runs) > _MAX_OTHER_FOLDERS:
        raise InputError(
            f"{found.folders[0]} and what is below it have more than {_MAX_OTHER_FOLDERS:,} folders that are not runs;"
            " give the folder of a sweep, or one nearer to the runs"
        )
    children = [folder / name for name, is_folder in names.items() if is_folder and name[0] != "."] if depth else []
    empty = [child for child in sorted(children, key=_natural_order) if not _search(child, found, seen, depth - 1)]
    is_sweep = "multirun.yaml" in names
    if SEARCH in names:
        _add_search(folder, found)
    if is_sweep:
        found.missing += _missing_jobs(folder, found.jobs)
    if is_sweep or len(empty) < len(children):
        found.skipped += [f"{child}: contains no run" for child in empty]
        return True
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _add_run(folder: Path, found: RunSearch) -> None:
    """Read a run folder and add the run, or a line with the reason why it cannot be read."""
    try:
        found.runs.append(read_run(folder))
    except InputError as error:
        is_named = f"{error}".startswith(printable(f"{folder}"))
        found.skipped.append(f"{error}" if is_named else f"{folder}: {error}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        found.skipped.append(f"{folder}: malformed run folder ({type(error).__name__}: {error})")


def _add_search(folder: Path, found: RunSearch) -> None:
    """Read the record of a search, or add a line with the reason why it cannot be read."""
    try:
        found.searches.append(read_search(folder))
    except InputError as error:
        found.skipped.append(f"{error}")


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts 2-... before 10-..."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _missing_jobs(sweep: Path, known: list[dict[str, str]]) -> list[str]:
    """Return a line for each job in the sweep's command that has no folder, and add all its jobs to `known`."""
    try:
        hydra = read_small_yaml(sweep / "multirun.yaml")["hydra"]
        if not hydra["sweeper"]["_target_"].endswith(".BasicSweeper"):
            return []  # of an older version's search: only its sweeper knew the jobs
        words, params = hydra["overrides"]["task"], hydra["sweeper"].get("params")
        if len(f"{words}{params}") > _MAX_COMMAND_LENGTH:
            raise ValueError(f"its command has more than {_MAX_COMMAND_LENGTH:,} characters")
        jobs = grid_jobs(words, params)
        present = [parse_overrides(read_overrides(path)) for path in sweep.glob("[0-9]*-*")]
    except Exception as error:  # a multirun.yaml that is malformed, or not a grid of this version
        return [f"{sweep}: which jobs are missing is unknown ({str(error).partition(chr(10))[0]})"]
    missing = [number for number, job in enumerate(jobs) if parse_overrides(job) not in present]
    if any(present) and len(missing) == len(jobs):
        return [f"{sweep}: which jobs are missing is unknown (no folder has a job that multirun.yaml names)"]
    known += map(parse_overrides, jobs)
    common = set(jobs[0]).intersection(*jobs) if len(jobs) > 1 else set()
    return [
        f"{sweep}: job {number}, {' '.join(word for word in jobs[number] if word not in common)}" for number in missing
    ]
