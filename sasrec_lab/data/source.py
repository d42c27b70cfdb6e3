"""Find the file of a data set and read it; data/fetch.py fetches it."""

import gzip
import hashlib
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from sasrec_lab.config.dataset import DatasetConfig, FeaturesConfig, Format
from sasrec_lab.config.overrides import format_override
from sasrec_lab.config.schema import CONF_DIR
from sasrec_lab.errors import InputError
from sasrec_lab.files import did_you_mean_path, user_cache
from sasrec_lab.ops import memory

_MAX_LINE_BYTES = 16 << 20  # of what follows a block
_BLOCK_BYTES = 4 << 20  # 2 to 8 MiB are equally fast; larger blocks only need more memory


# Find


def data_root(data_dir: str | None) -> Path:
    """Return the folder of the data sets: `data_dir`, or the user's cache folder if it is null."""
    return Path(os.path.expanduser(data_dir)) if data_dir else user_cache()


def find(dataset: DatasetConfig, root: Path) -> Path:
    """Return the data set's file, plain or .gz; nothing is fetched.

    A data set with sources is stored below `root`. One without is the user's own file, or folder of Parquet files:
    `dataset.path` as the shell understands it, or below `root`.

    Raises:
        InputError: the file is missing.
    """
    if not dataset.sources:
        return _find_folder(str(dataset.path), root) or _find_user_file(str(dataset.path), root, "dataset.path")
    found = plain_or_gz(root / str(dataset.path))
    if found is None:
        raise InputError(
            f"data_dir={root} has no {dataset.path}, and only training fetches it; set data_dir to the folder that has"
            f" it, pass the histories as interactions, or {_how_to_fetch(dataset, root)}"
        )
    return found


def _how_to_fetch(dataset: DatasetConfig, root: Path) -> str:
    """Return how the file comes to its place: by training on the package's data set of this name, if there is one."""
    ours = Path(CONF_DIR, "dataset", f"{dataset.name}.yaml")
    if ours.is_file() and "\nsources:" in ours.read_text():
        words = [format_override("dataset", dataset.name), format_override("data_dir", str(root))]
        return f"run python -m sasrec_lab.train {shlex.join(words)}"
    return f"put the file at {root / str(dataset.path)}"


def find_titles(dataset: DatasetConfig, root: Path) -> Path | None:
    """Return the file of item titles; None if the data set has none, or if its published file came without one.

    Raises:
        InputError: the file is missing, and no source has it: it is the user's own.
    """
    if dataset.titles is None:
        return None
    path = str(dataset.titles.path)
    if any(source.titles for source in dataset.sources):
        return plain_or_gz(root / path)
    return _find_user_file(path, root, "dataset.titles.path")


def find_features(dataset: DatasetConfig, root: Path) -> Path:
    """Return the file of item features; raise InputError if it is missing."""
    assert dataset.features is not None
    path = str(dataset.features.path)
    found = plain_or_gz(root / path) if dataset.sources else None
    if dataset.sources and found is None and plain_or_gz(Path(os.path.expanduser(path))) is None:
        urls = [source.url for source in dataset.sources if source.url and source.titles]
        hint = f"; {urls[0]} has it" if urls else ""
        raise InputError(
            f"dataset.features.path={path} is missing; put the file at {root / path}{hint}, or set model.items=ids"
        )
    return found or _find_user_file(path, root, "dataset.features.path")


def find_vectors(features: FeaturesConfig, root: Path) -> Path:
    """Return the .npy file of item vectors; raise InputError if it is missing."""
    return _find_user_file(str(features.vectors), root, "dataset.features.vectors")


def check_user_files(dataset: DatasetConfig, data_dir: str | None) -> None:
    """Raise InputError if the user's own file, or one of its items, is missing; published ones are fetched later."""
    if dataset.format is not Format.synthetic and not dataset.sources:
        root = data_root(data_dir)
        find(dataset, root)
        find_titles(dataset, root)
        if dataset.features is not None:
            find_features(dataset, root)
            if str(dataset.features.vectors).endswith(".npy"):
                find_vectors(dataset.features, root)


def _find_folder(path: str, root: Path) -> Path | None:
    """Return the user's folder of Parquet files; None if the path is empty or not a folder.

    Raises:
        InputError: the folder has no such file.
    """
    folders = (Path(os.path.expanduser(path)), root / path) if path else ()
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is not None and not files_of(folder):
        raise InputError(
            f"dataset.path={path} is a folder without Parquet files; name a file in it, of text (plain or .gz), or a"
            " folder of .parquet files"
        )
    return folder


def files_of(path: Path) -> list[Path]:
    """Return the Parquet files in a folder and those below it, in the order of their paths; a file is the only one.

    As other engines do, it ignores names that begin with `_` or `.`, such as Spark's `_SUCCESS`.
    """
    if not path.is_dir():
        return [path]
    found = (file.relative_to(path) for file in path.rglob("*.parquet") if file.is_file())
    return [path / file for file in sorted(found) if not any(part[0] in "_." for part in file.parts)]


def _find_user_file(path: str, root: Path, key: str) -> Path:
    """Return a file of the user's: the path as the shell understands it, or below `root`."""
    if not path:
        raise InputError(f"{key} must not be empty; set it to a file")
    user_file = Path(os.path.expanduser(path))
    found = plain_or_gz(user_file) or plain_or_gz(root / path)
    if found is None and user_file.is_dir():
        raise InputError(f"{key}={path} is a folder; name a file in it, of text (plain or .gz) or Parquet")
    if found is None:
        raise InputError(f"{key}={path}: no such file{did_you_mean_path(user_file)} (nor is it in {root})")
    return found


def plain_or_gz(path: Path) -> Path | None:
    """Return the path, or that with .gz, if it is a file."""
    for candidate in (path, Path(f"{path}.gz")):
        try:
            if candidate.is_file():
                return candidate
        except OSError as error:
            raise InputError(f"{path} cannot be looked for ({error.strerror}); check the path") from error
    return None


# Read


def digest(path: Path, is_text: bool) -> str:
    """Return the sha256 of the content, unzipped if it is a .gz; of a folder, that of its files' sha256 in order.

    Raises:
        InputError: unreadable, a broken gzip, or text with a line as `blocks` refuses it, before the rest is read.
    """
    if path.is_dir():
        parts = [digest(file, is_text=False) for file in files_of(path)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    with _opened(path) as file:
        if not is_text:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256()
        for block, line_end in _parts(file, path):
            found.update(block)
            found.update(line_end)
        return found.hexdigest()


def check(path: Path, found: str, expected: str | None, *, is_published: bool) -> None:
    """Raise InputError if the file is empty or not the expected one; `found` is its sha256."""
    if found == hashlib.sha256(b"").hexdigest():
        raise InputError(f"{path} is empty; dataset.path must name a file with interactions")
    if expected is not None and found != expected:
        fix = "restore that version"
        if is_published:
            fix = "delete it, so that training fetches the published one (for your own file write dataset=csv)"
        raise InputError(
            f"{path} has sha256 {found}, expected {expected}; {fix}, or set dataset.sha256=null to use this version"
        )


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the content, unzipped if it is a .gz, in blocks of a few million bytes that end with a line.

    Raises:
        InputError: unreadable, a broken gzip, or a line of many million bytes, such as a file of holes or zeros.
    """
    with _opened(path) as file:
        for block, line_end in _parts(file, path):
            yield block + line_end


def _parts(file: gzip.GzipFile | BufferedReader, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield each block, and what ends its last line."""
    while block := file.read(_BLOCK_BYTES):
        line_end = file.readline(_MAX_LINE_BYTES)
        if len(line_end) == _MAX_LINE_BYTES:
            raise InputError(
                f"{path} has a line of over {_MAX_LINE_BYTES:,} bytes; name a text file with shorter lines, each ended"
                " by a line feed"
            )
        yield block, line_end


def content(path: Path) -> bytes:
    """Return the content of a text file, unzipped if it is a .gz, which may be a thousand times as large as its file.

    Raises:
        InputError: as `blocks`, or it does not fit in memory.
    """
    limit = most_bytes()
    if path.suffix != ".gz":
        with _opened(path) as file:
            check_size(os.fstat(file.fileno()).st_size, limit, path)
            return file.read()
    size, parts = 0, []
    for part in blocks(path):
        size += len(part)
        check_size(2 * size, limit, path)  # the parts, and the whole
        parts.append(part)
    return b"".join(parts)


def check_size(size: int, limit: int | None, path: Path) -> None:
    """Raise InputError if what is read of a file, unzipped or parsed, takes more memory than there is."""
    if limit is not None and size > limit:
        raise InputError(f"{path} is too large for this machine; use a part of it, or more memory")


def most_bytes() -> int | None:
    """Return how much memory this process could have, None if that is not known."""
    return memory.available_bytes("cpu")


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a broken gzip file ({error}); replace it with a complete one") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a file that you may read") from error
