"""The cache of a data set's arrays: checked against checksums before it is read, and written in one step.

A folder of the cache has one .npy file per array, checksums.json with the size and checksums of each, and stamp.json,
which recognizes the file that the arrays were built from. Files are only written to new folders, so arrays that another
process has mapped never change. A damaged folder counts as missing and is replaced.
"""

import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sasrec_lab.errors import InputError
from sasrec_lab.files import (
    atomic_write,
    draft_folder,
    read_small_text,
    remove_dead_drafts,
    sync_folder,
    sync_tree,
    user_cache,
)

Arrays = dict[str, np.ndarray]
Stamp = dict[str, int]

log = logging.getLogger(__name__)

_CHECKSUMS_NAME = "checksums.json"
_STAMP_NAME = "stamp.json"
_BLOCK_BYTES = 16 << 20
_SETTLED_NANOSECONDS = 2_000_000_000
_KEPT_BOOTS = 16  # machines that share a home folder, or starts of one machine
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def load_or_build(
    root: Path, name: str, build: Callable[[Path], Arrays], may_write_root: bool = True
) -> tuple[Arrays, Path]:
    """Return the arrays of this name, memory-mapped, and their folder; build them if they are missing or damaged.

    Arrays that are built are written below `root` if `may_write_root`, or else to the user's cache folder. `build`
    takes a folder for temporary files, among them those of mapped arrays that it returns; it is removed at the end.

    Raises:
        InputError: no cache folder can be written, or whatever `build` raises.
    """
    folders = [cache / name for cache in cache_folders(root)]
    allowed = folders if may_write_root else folders[-1:]
    inodes = {folder: _inode(folder) for folder in folders}
    for folder in folders:
        if (arrays := _load(folder)) is not None:
            if folder in allowed:
                remove_dead_drafts(folder.parent)  # that of a process killed between its arrays and its end
            return arrays, folder
    writable = [folder for folder in allowed if _is_writable(folder.parent)]
    if not writable:
        raise InputError(
            f"data_dir={root}: neither {folders[0].parent} nor the user's cache folder is writable;"
            " set data_dir to another"
        )
    with draft_folder(writable[0]) as scratch:
        built = build(scratch)
        for folder in writable:
            with suppress(PermissionError):  # a damaged folder that only another user can replace
                _save(built, folder, inodes[folder])
                break
        return _load(folder) or built, folder


def cache_folders(root: Path) -> list[Path]:
    """Return where arrays are looked for: `cache/` in the data root, then the user's cache folder."""
    return list(dict.fromkeys([root / "cache", user_cache() / "cache"]))


def _is_writable(folder: Path) -> bool:
    parent = folder if folder.is_dir() else folder.parent
    if parent.is_dir() and not parent.stat().st_mode & 0o222:  # marked read-only, which root could ignore
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# Write


def _save(arrays: Arrays, folder: Path, damaged: int | None) -> None:
    """Write the folder completely or not at all, in place of the one with the inode `damaged`.

    If two runs build it at once, the first one's stays. atomic_write replaces a file, but a folder with content cannot
    be replaced in one step.
    """
    try:
        with draft_folder(folder) as draft:
            for name, array in arrays.items():
                _write(draft / f"{name}.npy", array)
            files = {path.name: _measure(path) for path in sorted(draft.iterdir())}
            (draft / _CHECKSUMS_NAME).write_text(json.dumps({"folder": folder.name, "files": files}))
            draft.chmod(0o755)
            sync_tree(draft)
            if damaged is not None and _inode(folder) == damaged:
                _remove(folder)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            sync_folder(folder.parent)
    except PermissionError:
        raise
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); set data_dir to another folder"
        ) from error


def _write(path: Path, array: np.ndarray) -> None:
    """Write an array; one that is mapped from a .npy file is linked or copied as a file."""
    if not isinstance(array, np.memmap):
        np.save(path, array, allow_pickle=False)
        return
    try:
        os.link(str(array.filename), path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(str(array.filename), path)


def _remove(folder: Path) -> None:
    """Remove a folder in one step; arrays that are mapped from it stay readable."""
    with draft_folder(folder) as away, suppress(FileNotFoundError):  # another run has just removed it
        folder.rename(away)


def _inode(folder: Path) -> int | None:
    with suppress(OSError):
        return folder.stat().st_ino
    return None


# Read


def _load(folder: Path) -> Arrays | None:
    """Return the folder's arrays, memory-mapped; None if the folder is missing, or damaged, which is logged."""
    if not folder.is_dir():
        return None
    try:
        measured = json.loads(read_small_text(folder / _CHECKSUMS_NAME))
        files = measured["files"]
        if measured["folder"] != folder.name or set(files) != {path.name for path in folder.glob("*.npy")}:
            raise ValueError(f"{_CHECKSUMS_NAME} names other files")
        stamps = {name: file_stamp(folder / name) for name in (_CHECKSUMS_NAME, *files)}
        is_checked = _is_checked(folder, stamps)
        if not is_checked:
            for name, expected in files.items():
                if _measure(folder / name) != expected:
                    raise ValueError(f"{name} has another content than was written")
        arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in files}
        if not is_checked:
            check_arrays(arrays)
            _save_checked(folder, stamps)
    except FileNotFoundError as error:
        log.warning("cache %s has no %s; not using it", folder, Path(error.filename).name)
        return None
    except Exception as error:  # NumPy raises various ones for a header that it did not write
        log.warning("cache %s is damaged (%s); not using it", folder, error)
        return None
    return arrays


def check_arrays(arrays: Arrays) -> None:
    """Raise ValueError unless the arrays are those of `Sequences`, so that no index is outside its array."""
    kinds = {"items": "i", "offsets": "i", "user_ids": "iU", "item_ids": "iU", "times": "iuf", "weights": "f"}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in kinds[name]:
            raise ValueError(f"{name} has type {array.dtype} and {array.ndim} dimensions")
    items, offsets = arrays["items"], arrays["offsets"]
    if offsets[0] != 0 or offsets[-1] != len(items) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets do not divide the items among users")
    if len(items) and not 1 <= items.min() <= items.max() <= len(arrays["item_ids"]):
        raise ValueError("items has an index outside the catalogue")
    lengths = {"user_ids": len(offsets) - 1, "times": len(items), "weights": len(items)}
    for name, length in lengths.items():
        if name in arrays and len(arrays[name]) != length:
            raise ValueError(f"{name} has {len(arrays[name])} values instead of {length}")


def _measure(path: Path) -> dict[str, Any]:
    """Return the size of a file and the CRC-32 of each of its blocks, computed by several threads."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor() as threads:
        crcs = threads.map(
            lambda begin: zlib.crc32(os.pread(file.fileno(), _BLOCK_BYTES, begin)), range(0, size, _BLOCK_BYTES)
        )
        return {"size": size, "crc32": list(crcs)}


# A folder that was checked is not checked again until a file of it changes or the machine starts again.


def _checked_file(folder: Path) -> Path:
    """Return the user's own record on a folder, which may be another user's and read-only."""
    return user_cache() / "checked" / f"{folder.name}-{sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}.json"


def _is_checked(folder: Path, stamps: dict[str, Stamp]) -> bool:
    with suppress(*_MALFORMED):
        saved = json.loads(read_small_text(_checked_file(folder)))
        return saved["files"] == stamps and _BOOT_ID.read_text() in saved["boots"]
    return False


def _save_checked(folder: Path, stamps: dict[str, Stamp]) -> None:
    """Record the check, for all starts of machines that found the files as they are now."""
    if not all(is_settled(stamp) for stamp in stamps.values()):
        return
    path, boots = _checked_file(folder), list[str]()
    with suppress(*_MALFORMED):
        saved = json.loads(read_small_text(path))
        boots = saved["boots"] if saved["files"] == stamps else []
    with suppress(OSError):  # no boot id on this system, or no writable cache: the next run checks again
        boots = [*boots, _BOOT_ID.read_text()][-_KEPT_BOOTS:]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            draft.write_text(json.dumps({"boots": boots, "files": stamps}))


# Recognize: a file with the same size, inode and times has not changed, so its checksum is not computed again.


def stamp_of(files: list[Path]) -> Stamp:
    """Return the stamp of a file, or one of several: their total size, their newest times, a checksum of the rest."""
    stamps = {str(file): file_stamp(file) for file in files}
    if len(stamps) == 1:
        return stamps[str(files[0])]
    newest = {key: max(stamp[key] for stamp in stamps.values()) for key in ("mtime_ns", "ctime_ns")}
    total = sum(stamp["size"] for stamp in stamps.values())
    return {"size": total, **newest, "inode": zlib.crc32(json.dumps(stamps).encode())}


def file_stamp(path: Path) -> Stamp:
    """Return the size, inode and times of a file."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


def is_settled(stamp: Stamp) -> bool:
    """Return whether the file's last change is seconds old: a further one within a tick of its clock would show."""
    return time.time_ns() - max(stamp["mtime_ns"], stamp["ctime_ns"]) >= _SETTLED_NANOSECONDS


def find_sha256(stamp: Stamp, root: Path) -> str | None:
    """Return the sha256 that a folder of the caches has for the file with this stamp, or None."""
    found = (
        _read_sha256(path, stamp) for cache in cache_folders(root) for path in sorted(cache.glob(f"*/{_STAMP_NAME}"))
    )
    return next((checksum for checksum in found if checksum), None)


def save_sha256(stamp: Stamp, checksum: str, folder: Path) -> None:
    """Save the stamp and sha256 of the file that the folder was built from, unless the file was changed just now.

    Of two processes either one's may stay, because both are true.
    """
    path = folder / _STAMP_NAME
    if not is_settled(stamp) or _read_sha256(path, stamp):
        return
    with suppress(OSError), atomic_write(path) as draft:  # another user's cache may be read-only
        draft.write_text(json.dumps({"file": stamp, "sha256": checksum, "crc32": _crc32(stamp, checksum)}))
        draft.chmod(0o644)  # so that other users who read the arrays need not compute the checksum again


def _read_sha256(path: Path, stamp: Stamp) -> str | None:
    with suppress(*_MALFORMED):  # the folder was just deleted, or the file is damaged
        saved = json.loads(read_small_text(path))
        checksum: str = saved["sha256"]
        if saved["file"] == stamp and saved["crc32"] == _crc32(stamp, checksum):
            return checksum
    return None


def _crc32(stamp: Stamp, checksum: str) -> int:
    return zlib.crc32(json.dumps([stamp, checksum], sort_keys=True).encode())
