"""Interactions as flat arrays (as a CSR matrix), their last-item holdout, and the cache of the arrays."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.dataset import DatasetConfig, Format
from sasrec_lab.data import source
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.synthetic import make_interactions
from sasrec_lab.errors import InputError
from sasrec_lab.files import user_cache

log = logging.getLogger(__name__)

CACHE_FORMAT = 1  # raise it when what is written below changes its meaning


@dataclass(frozen=True)
class Sequences:
    """Every user's interactions in time order. N interactions; external ids are kept as the file has them.

    `items[offsets[u]:offsets[u + 1]]` are the items (1..num_items) of user u (0..num_users - 1).
    """

    items: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (num_users + 1,) int64
    user_ids: np.ndarray  # (num_users,) int64 or text
    item_ids: np.ndarray  # (num_items,) int64 or text; item i is item_ids[i - 1]
    times: np.ndarray | None  # (N,) int32, or int64 or float64 where that does not hold them
    weights: np.ndarray | None  # (N,) float32
    file: str
    sha256: str | None  # of the unzipped file; None for a generated data set

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)  # (num_users,)


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., end - 1 of each range, one range after the other."""
    lengths = ends - starts
    return np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())


def load_sequences(dataset: DatasetConfig, data_dir: str | None) -> Sequences:
    """The data set's arrays, memory-mapped from the cache, which is built first where it is not there.

    The cache is keyed by the file's checksum and by every key that decides what is read and kept. A file that has not
    changed since its checksum was taken is not read again (0.002 s, not 0.15 s for 200 MB).

    Raises:
        InputError: the file cannot be had, read or cleaned.
    """
    root = source.data_root(data_dir)
    if dataset.format is Format.synthetic:
        path, sha256 = Path("(generated)"), None
        folder = _folder(_cache_folder(root), dataset, sha256)
        if not folder.is_dir():
            _write(to_arrays(clean(make_interactions(dataset.synthetic), dataset)), folder)
    else:
        path = source.find(dataset, root)
        folder, sha256 = _cached(path, _cache_folder(root), dataset)
    return Sequences(**_read(folder), file=path.name.removesuffix(".gz"), sha256=sha256)


def _cached(path: Path, cache: Path, dataset: DatasetConfig) -> tuple[Path, str]:
    """The folder of the file's arrays, built if it is not there, and the file's sha256."""
    seen = source.file_stamp(path)
    known = source.find_checksum(seen, cache)
    sha256 = known or source.digest(path)
    source.check(path, sha256, dataset.sha256)
    folder = _folder(cache, dataset, sha256)
    if not folder.is_dir():
        table = read_file(path, dataset)
        if source.file_stamp(path) != seen:
            raise InputError(f"{path} was changed while it was read; run this again when it is whole")
        _write(to_arrays(clean(table, dataset)), folder)
    if known is None:
        source.save_stamp(seen, sha256, folder)
    return folder, sha256


def to_arrays(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The arrays of `Sequences` from a clean table, which is sorted by user and time."""
    starts = _first_rows(table["user"])
    items, item_ids = _numbered(table["item"])
    arrays = {
        "items": items,
        "offsets": np.append(starts, len(table)).astype(np.int64),
        "user_ids": _ids(table["user"].iloc[starts]),
        "item_ids": _ids(item_ids),
    }
    if "time" in table:
        arrays["times"] = table["time"].to_numpy()
    if "weight" in table:
        arrays["weights"] = table["weight"].to_numpy(np.float32)
    return arrays


def _first_rows(users: pd.Series) -> np.ndarray:
    """The first row of each user."""
    after, before = users.array[1:], users.array[:-1]
    if np.any(after < before):
        raise AssertionError("the table is not sorted by user")
    return np.flatnonzero(np.append(True, after != before))


def _numbered(ids: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """The number of each row's item, from 1 (int32), and the ids of 1, 2, ... in order.

    Where the ids are whole numbers close together, a table of what there is does it: 0.025 s for 5.9 million rows of
    KION's schema, 0.045 s by a hash table.
    """
    low, high = (int(ids.min()), int(ids.max())) if pd.api.types.is_integer_dtype(ids) else (0, 2**64)
    if high - low > len(ids):
        numbers, different = pd.factorize(ids, sort=True)
        return (numbers + 1).astype(np.int32), pd.Index(different)
    places = ids.to_numpy(np.int64) - low
    there = np.zeros(high - low + 1, dtype=bool)
    there[places] = True
    return np.cumsum(there, dtype=np.int32)[places], pd.Index(np.flatnonzero(there) + low)


def _ids(values: pd.Series | pd.Index) -> np.ndarray:
    return values.to_numpy(np.int64 if pd.api.types.is_integer_dtype(values) else str)


def _cache_folder(root: Path) -> Path:
    """`cache/` in the data root; in the user's cache folder where the root is read-only."""
    for folder in (root / "cache", user_cache() / "cache"):
        if _writable(folder):
            return folder
    raise InputError(f"neither {root / 'cache'} nor the user's cache folder can be written; give data_dir=<a folder>")


def _writable(folder: Path) -> bool:
    parent = folder if folder.is_dir() else folder.parent
    if parent.is_dir() and not parent.stat().st_mode & 0o222:  # marked read-only; root could write all the same
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _folder(cache: Path, dataset: DatasetConfig, sha256: str | None) -> Path:
    elsewhere = (
        "name",
        "path",
        "sources",
        "sha256",
        "titles",
        "holdout",
        "windows",
        "catalogue",
    )  # not about the arrays' content
    kept = {key: value for key, value in to_plain(dataset).items() if key not in elsewhere}
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, sha256, kept], sort_keys=True).encode()).hexdigest()
    return cache / f"{dataset.name}-{key[:16]}"


def _write(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Write all or nothing; of two runs that build the same folder the first one's stands."""
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array)
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise InputError(f"{folder}: the cache cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read(folder: Path) -> dict[str, np.ndarray | None]:
    names = ("items", "offsets", "user_ids", "item_ids", "times", "weights")
    there = set(os.listdir(folder))
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") if f"{name}.npy" in there else None for name in names}
