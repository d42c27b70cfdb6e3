"""A lock on the run folder, so that only one process writes to it (if the file system supports locks)."""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sasrec_lab.errors import FolderInUse, InputError
from sasrec_lab.files import make_folder

_MIN_RUN_BYTES = 2**16  # a run writes at least this much
_WAIT_SECONDS = 0.2  # longer than `is_locked` holds its shared lock


@contextmanager
def lock_folder(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other processes from running in the folder. The system ends the lock however this process ends.

    Raises:
        FolderInUse: another process holds the lock.
        InputError: the folder cannot be created.
    """
    try:
        make_folder(folder)
        lock = _lock(folder, key)
    except OSError as error:
        raise _unwritable_error(folder, error, key) from error
    with lock:
        yield


@contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Keep other processes that lock the file from the body, and wait for one that is in it.

    The system ends the lock however this process ends. Without locks of the file system the body runs at once.
    """
    with open(file, "wb") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a process runs in the folder. Nothing is changed; the lock is shared for a moment."""
    try:
        # without O_NONBLOCK a pipe of this name would be waited for
        with open(os.open(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or the file system has none
        pass
    return False


def check_unlocked(folder: Path, key: str) -> None:
    """Raise FolderInUse if another process runs in the folder."""
    if is_locked(folder):
        raise _folder_in_use(folder, key)


def check_writable(folder: Path, key: str = "hydra.run.dir") -> None:
    """Raise InputError if nothing can be written below the folder, which need not exist yet."""
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(_MIN_RUN_BYTES))
            file.flush()
    except OSError as error:
        raise _unwritable_error(folder, error, key) from error


def _unwritable_error(folder: Path, error: OSError, key: str) -> InputError:
    fix = f"free some space, or choose another {key}" if is_full(error) else f"choose another {key}"
    return InputError(f"{folder}: the run folder cannot be written: {error.strerror}; {fix}")


def is_full(error: OSError) -> bool:
    """Return whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _lock(folder: Path, key: str) -> IO[bytes]:
    file = open(folder / ".lock", "wb")  # noqa: SIM115  the lock lasts as long as the file is open
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < deadline:  # `is_locked` of another process may hold it for a moment
                time.sleep(_WAIT_SECONDS / 20)
                continue
            file.close()
            raise _folder_in_use(folder, key) from error
        except OSError:  # the file system has no locks
            pass
        return file


def _folder_in_use(folder: Path, key: str) -> FolderInUse:
    return FolderInUse(f"another process is running in {folder}; wait for it, or choose another {key}")
