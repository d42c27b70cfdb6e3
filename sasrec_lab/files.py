"""Atomic and durable writes, names of run folders, paths as shown to the user, and a stdout that may be closed."""

import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha1
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import yaml
from platformdirs import user_cache_dir

from sasrec_lab.errors import InputError, nearest

NAME_BYTES = 200  # file systems allow 255
_SMALL_BYTES = 4 << 20
_DRAFT_NAME = re.compile(r"\.draft-[0-9a-f]{12}-")
# what file systems answer that cannot sync a file or a folder, or not one that may not be read
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)
_YAML_DEPTH = 50  # Hydra's own files have less than 10
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def user_cache() -> Path:
    """Return the package's folder in the user's cache: data sets, compiled kernels, choices made once per machine."""
    return Path(user_cache_dir("sasrec_lab"))


@contextmanager
def atomic_write(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a draft path that replaces `path` on success, so readers see the old or the new file.

    This holds even if the disk fills up, the process is killed or the power is cut; once this returns, the new file is
    on the disk. With `locked` no other process writes to the folder, so the draft that a killed process left is
    overwritten; without it every writer has a draft of its own, and removes those of killed ones.
    """
    draft = draft_of(path) if locked else _unique_draft(path)
    with nullcontext() if locked else _own_draft(draft, lambda: open(draft, "xb").close()):
        try:
            yield draft
            sync_file(draft)
            draft.replace(path)
            sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder next to `target`, to be filled and renamed, or removed at the end with all that is in it.

    Folders that killed processes left there are removed first. Call `sync_tree` before renaming it, and `sync_folder`
    on its parent afterwards.
    """
    draft = _unique_draft(target)
    with _own_draft(draft, lambda: draft.mkdir(mode=0o700)):
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def draft_of(path: Path) -> Path:
    """Return the path of the draft of a file whose folder is locked."""
    return path.with_name(f".draft-{path.name}")


def _unique_draft(path: Path) -> Path:
    return path.with_name(f".draft-{uuid4().hex[:12]}-{path.name}")


@contextmanager
def _own_draft(draft: Path, make: Callable[[], None]) -> Iterator[None]:
    """Make a draft and lock it for the body, so that other processes can tell it from one that a killed process left.

    A file system without locks has none of this: there drafts are never removed.
    """
    remove_dead_drafts(draft.parent)
    while True:
        make()
        try:
            descriptor = os.open(draft, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a dead one before it was locked
            continue
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a process that is just removing it
            if draft.exists():
                yield
                return
        finally:
            os.close(descriptor)


def remove_dead_drafts(folder: Path) -> None:
    """Remove the drafts in a folder whose processes have ended without removing them."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _DRAFT_NAME.match(name):
                _remove_if_dead(folder / name)


def _remove_if_dead(draft: Path) -> None:
    with suppress(OSError):  # it lives, it is gone, it is another user's, or there are no locks here
        descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(draft)
            else:
                draft.unlink()
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that none of them is lost if the power is cut."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for above in made or [folder]:  # a folder that Hydra has just made is not new here
        sync_folder(above.parent)


def sync_file(path: Path) -> None:
    """Return when the content of a file is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder, such as one just renamed to, are on the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Return when a file, or everything in a folder with the names of its files and folders, is on the disk."""
    if path.is_file():
        sync_file(path)
    for parent, _, names in os.walk(path):
        for name in names:
            file = Path(parent, name)
            if file.is_file() and not file.is_symlink():
                with suppress(FileNotFoundError):  # deleted in between
                    sync_file(file)
        sync_folder(Path(parent))


def _sync(path: Path, flags: int) -> None:
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def read_small_text(path: Path) -> str:
    """Return the text of a regular file of at most 4 MiB, such as a run's records, which may be a stranger's.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is larger, not UTF-8, or not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _SMALL_BYTES:
            raise ValueError(f"{size:,} bytes, more than {_SMALL_BYTES:,}")
        return file.read(_SMALL_BYTES).decode()


def read_small_yaml(path: Path) -> Any:
    """Return the plain content of a YAML file of at most 4 MiB, which may be a stranger's.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is malformed, not such a file, or has aliases or deep nesting: a few lines of these can fill the
            memory, or end the process in libyaml.
    """
    text, depth = read_small_text(path), 0
    try:
        for event in yaml.parse(text, _YAML_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _YAML_DEPTH:
                raise ValueError("it has aliases, or is nested deeply")
        return yaml.load(text, _YAML_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(f"not YAML: {error}".split())) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a folder, or a pipe, socket or device, none of which is waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return open(descriptor, "rb")


def folder_name(text: str) -> str:
    """Return text, such as a job's overrides, as a folder name without separators; a long one ends in a checksum."""
    name = re.sub(r"[^\w.,=+@-]+", "-", text).encode()
    if len(name) <= NAME_BYTES:
        return name.decode()
    return f"{name[: NAME_BYTES - 9].decode(errors='ignore')}-{sha1(text.encode()).hexdigest()[:8]}"


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
    return f"; did you mean {path.parent / suggestion}?" if suggestion not in (None, path.name) else ""


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
