"""Folders of a sweep's jobs, named after the overrides that differ between the jobs."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from sasrec_lab.files import folder_name, read_small_yaml

UNNAMED_KEYS = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's key for what a folder's name omits
# not in a name either: they differ between machines, or may change when a job is resumed
_NEVER_NAMED = ("data_dir", "tensorboard.attention_users", "tensorboard.projector", "logger")


def job_folder(number: int, overrides: Sequence[str], unnamed: Sequence[str], sweep: str) -> str:
    """Return the name of a job's folder: `<number>-<overrides>`.

    The overrides of keys in `unnamed` are omitted: all jobs share them.

    A job that has a folder keeps it: a sweep that is resumed with more values numbers its jobs differently, and more
    keys may differ between them; version 0.1.0 named a folder after all overrides.
    """
    words = _named_words(overrides)
    every, name = (folder_name(",".join(sorted(each))) for each in (words, _without(words, unnamed) or words))
    existing = job_folders(Path(sweep))
    for folder in existing:
        if words == _recorded_words(Path(sweep, folder)):
            return folder
    same_name = [folder for folder in existing if folder.partition("-")[2] in (name, every)]
    return same_name[0] if same_name else f"{number}-{name}"


def job_folders(sweep: Path) -> list[str]:
    """Return the names of the folders of a grid's jobs, in the order of their numbers."""
    names = sorted(path.name for path in sweep.glob("*") if path.is_dir())
    numbered = [name for name in names if "-" in name and name.partition("-")[0].isdigit()]
    return sorted(numbered, key=lambda name: int(name.partition("-")[0]))


def common_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys that have the same value in all jobs, given the overrides of each."""
    common = set(jobs[0]).intersection(*jobs)
    return [_key(word) for word in jobs[0] if word in common]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _named_words(overrides: Iterable[str]) -> frozenset[str]:
    return _without(frozenset(overrides), _NEVER_NAMED)


def _without(words: frozenset[str], keys: Sequence[str]) -> frozenset[str]:
    return frozenset(word for word in words if _key(word) not in keys)


def _recorded_words(folder: Path) -> frozenset[str] | None:
    """Return the overrides that Hydra recorded when the job started, or None if it has not."""
    try:
        return _read_words(folder / ".hydra" / "overrides.yaml")
    except (OSError, ValueError):
        return None


@cache  # the folders of a sweep are compared with every job, and a record does not change
def _read_words(path: Path) -> frozenset[str]:
    words = read_small_yaml(path)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} has no list of overrides")
    return _named_words(words)
