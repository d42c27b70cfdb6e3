"""Text of any kind as the name of one folder or file."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path

from sasrec_lab.errors import InputError


def folder_name(text: str) -> str:
    """Text such as a job's overrides as the name of one folder: no separators, not too long, another text another."""
    name = re.sub(r"[^\w.,=+@-]+", "-", text).encode()
    if len(name) <= 200:
        return name.decode()
    return f"{name[:191].decode(errors='ignore')}-{sha1(text.encode()).hexdigest()[:8]}"


def job_folder(sweeper: str, number: int, overrides: str, sweep: str) -> str:
    """`<number>-<overrides>`; of a search the overrides alone.

    It counts from 0 each time it is taken up, and what it tries again has been tried already. A job that has its folder
    in the sweep's keeps it, whatever its number is now; a sweep that got more values counts otherwise.
    """
    name = folder_name(overrides)
    if not sweeper.endswith(".BasicSweeper"):
        return name
    there = [folder for folder in job_folders(Path(sweep)) if folder.partition("-")[2] == name]
    return there[0] if there else f"{number}-{name}"


def job_folders(sweep: Path) -> list[str]:
    """Names of the folders of a sweep's jobs, in the order of their numbers."""
    names = [path.name for path in sweep.glob("*-*") if path.is_dir() and path.name.partition("-")[0].isdigit()]
    return sorted(names, key=lambda name: int(name.partition("-")[0]))


def display_path(path: Path) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _near_miss(folder: Path) -> str:
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near_names = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {folder.parent / near_names[0]}?" if near_names else ""


def user_cache() -> Path:
    """Return the package's folder in the user's cache: data sets, compiled kernels, choices made once per machine."""
    import pooch  # here, because the config schema imports this module and must load in an instant

    return Path(pooch.os_cache("sasrec_lab"))


@contextmanager
def atomic_write(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Gives the name of a draft beside `path`, which takes its place at the end: a reader sees the old file or the new.

    Also where the disk fills up, or the process is killed, while the draft is written. Where the folder is claimed no
    other process writes there, and the draft of one that was killed is written over.
    """
    draft = path.with_name(f".draft-{path.name}" if locked else f".draft-{os.getpid()}-{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def tolerate_closed_pipe() -> Iterator[None]:
    """What prints in here and does nothing else may end early: `| head` has read enough.

    Raises:
        InputError: what stdout leads to takes no more.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"nothing more can be printed: {error.strerror}; free some space") from error
