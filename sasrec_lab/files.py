"""Atomic writes, names of run folders, paths as shown to the user, and a stdout that may be closed."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from uuid import uuid4

from sasrec_lab.errors import InputError, nearest

_NAME_BYTES = 200  # file systems allow 255
_SMALL_BYTES = 4 << 20


def user_cache() -> Path:
    """Return the package's folder in the user's cache: data sets, compiled kernels, choices made once per machine."""
    import pooch  # here, because the config schema imports this module and must load in an instant

    return Path(pooch.os_cache("sasrec_lab"))


@contextmanager
def atomic_write(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a draft path that replaces `path` on success, so readers see the old or the new file.

    This holds even if the disk fills up or the process is killed. With `locked` no other process writes to the folder,
    so the draft that a killed process left is overwritten; without it every writer has a draft of its own.
    """
    draft = path.with_name(f".draft-{path.name}" if locked else f".draft-{uuid4().hex[:12]}-{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_small_text(path: Path) -> str:
    """Return the text of a regular file of at most 4 MiB, such as a run's records, which may be a stranger's.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is larger, not UTF-8, or a pipe or device, which is not waited for.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > _SMALL_BYTES:
            raise ValueError(f"{found.st_size:,} bytes, more than {_SMALL_BYTES:,}")
        return file.read(_SMALL_BYTES).decode()


def folder_name(text: str) -> str:
    """Return text, such as a job's overrides, as a folder name without separators; a long one ends in a checksum."""
    name = re.sub(r"[^\w.,=+@-]+", "-", text).encode()
    if len(name) <= _NAME_BYTES:
        return name.decode()
    return f"{name[: _NAME_BYTES - 9].decode(errors='ignore')}-{sha1(text.encode()).hexdigest()[:8]}"


def job_folder(sweeper: str, number: int, overrides: str, sweep: str) -> str:
    """Return the name of a job's folder: `<number>-<overrides>`, or only the overrides for a job of a search.

    A search numbers its jobs from 0 in every call, so its folders carry the overrides only; repeated proposals share a
    folder. A grid that is resumed with more values numbers its jobs differently; a job that has a folder keeps it.
    """
    name = folder_name(overrides)
    if not sweeper.endswith(".BasicSweeper"):
        return name
    existing = [folder for folder in job_folders(Path(sweep)) if folder.partition("-")[2] == name]
    return existing[0] if existing else f"{number}-{name}"


def job_folders(sweep: Path) -> list[str]:
    """Return the names of the folders of a grid's jobs, in the order of their numbers."""
    names = [path.name for path in sweep.glob("*-*") if path.is_dir() and path.name.partition("-")[0].isdigit()]
    return sorted(names, key=lambda name: int(name.partition("-")[0]))


def display_path(path: Path) -> str:
    """Return a path as the user would type it in the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def did_you_mean_path(path: Path, *, only_folders: bool = False) -> str:
    """Return the end of a message on a missing path: its nearest neighbor, the folder that is missing, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or not only_folders]
    except (FileNotFoundError, NotADirectoryError):
        return f"; its folder {path.parent} does not exist"
    except OSError:
        return ""
    suggestion = nearest(path.name, names)
    return f"; did you mean {path.parent / suggestion}?" if suggestion else ""


@contextmanager
def tolerate_closed_pipe() -> Iterator[None]:
    """Let the body, which only prints, end early if the reader of stdout has closed it, as `| head` does.

    Raises:
        InputError: stdout accepts no more for another reason, such as a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # receives what Python flushes at exit
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"stdout cannot be written: {error.strerror}; free some space") from error
