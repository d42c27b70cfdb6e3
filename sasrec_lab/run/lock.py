"""Who may write in a run's folder: the process that holds its .lock, where the disk lets it."""

import errno
import fcntl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sasrec_lab.errors import FolderInUse, InputError

_SMALLEST = 2**16  # bytes that a run writes at the very least
_LOOK = 0.2  # seconds: longer than `is_taken` holds a lock


@contextmanager
def lock_folder(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """No other process runs in the folder meanwhile; the system ends the claim however this process ends.

    Raises:
        Taken: another one does.
        InputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, key)
    except OSError as error:
        raise _unwritable(folder, error, key) from error
    with lock:
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process runs in the folder. Nothing is changed; the lock is shared for a moment."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without locks
        pass
    return False


def check_unlocked(folder: Path) -> None:
    """Raises Taken where another process runs in the folder."""
    if is_locked(folder):
        raise _folder_in_use(folder, "hydra.run.dir")


def check_writable(folder: Path, key: str = "hydra.run.dir") -> None:
    """Raises InputError where nothing can be written below the folder, which need not be there yet."""
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_SMALLEST))
            file.flush()
    except OSError as error:
        raise _unwritable(folder, error, key) from error


def _unwritable(folder: Path, error: OSError, key: str = "hydra.run.dir") -> InputError:
    fix = f"free some space, or choose another {key}" if is_full(error) else f"choose another {key}"
    return InputError(f"{folder}: the run folder cannot be written: {error.strerror}; {fix}")


def is_full(error: OSError) -> bool:
    """The disk, or the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _lock(folder: Path, key: str) -> IO[bytes]:
    file = open(folder / ".lock", "wb")  # noqa: SIM115  the claim lasts as long as the file is open
    given_up = time.monotonic() + _LOOK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < given_up:  # it may only be looked at
                time.sleep(_LOOK / 20)
                continue
            file.close()
            raise _folder_in_use(folder, key) from error
        except OSError:  # a file system without locks
            pass
        return file


def _folder_in_use(folder: Path, key: str) -> FolderInUse:
    return FolderInUse(f"another process is running in {folder}; wait for it, or choose another {key}")
