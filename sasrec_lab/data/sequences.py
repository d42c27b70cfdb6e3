"""Interactions as flat arrays, one sequence of items per user (as a CSR matrix), and the cache of these arrays."""

import hashlib
import json
import logging
import os
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
from sasrec_lab.files import draft_folder, sync_folder, sync_tree, user_cache

log = logging.getLogger(__name__)

CACHE_FORMAT = 1  # increase it when the meaning of the arrays changes


@dataclass(frozen=True)
class Sequences:
    """Every user's interactions in time order, with the raw ids as they are in the file. N interactions.

    `items[offsets[u]:offsets[u + 1]]` are the items (1..num_items) of user u (0..num_users - 1).
    """

    items: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (num_users + 1,) int64
    user_ids: np.ndarray  # (num_users,) int64 or text
    item_ids: np.ndarray  # (num_items,) int64 or text; item i is item_ids[i - 1]
    times: np.ndarray | None  # (N,) int32, or int64 or float64 if that is too narrow
    weights: np.ndarray | None  # (N,) float32
    file: str
    sha256: str | None  # of the unzipped file; None for a generated data set

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of interactions of each user, shape (num_users,)."""
        return np.diff(self.offsets)


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., end - 1 of each range, one range after the other."""
    lengths = ends - starts
    return np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())


def load_sequences(dataset: DatasetConfig, data_dir: str | None) -> Sequences:
    """Load the data set's arrays, memory-mapped from the cache; build the cache first if needed.

    The cache is keyed by the file's checksum and by every key that decides what is read and kept. A file that has not
    changed since its checksum was taken is not read again.

    Raises:
        InputError: the file cannot be found, fetched, read or cleaned.
    """
    root = source.data_root(data_dir)
    if dataset.format is Format.synthetic:
        path, sha256 = Path("(generated)"), None
        folder = _array_folder(_cache_folder(root), dataset, sha256)
        if not folder.is_dir():
            _write(to_arrays(clean(make_interactions(dataset.synthetic), dataset)), folder)
    else:
        path = source.find(dataset, root)
        folder, sha256 = _build_if_missing(path, _cache_folder(root), dataset)
    return Sequences(**_read(folder), file=path.name.removesuffix(".gz"), sha256=sha256)


def _build_if_missing(path: Path, cache: Path, dataset: DatasetConfig) -> tuple[Path, str]:
    """Return the folder of the file's arrays, built if it is missing, and the file's sha256."""
    stamp = source.file_stamp(path)
    known = source.find_checksum(stamp, cache)
    sha256 = known or source.digest(path)
    source.check(path, sha256, dataset.sha256)
    folder = _array_folder(cache, dataset, sha256)
    if not folder.is_dir():
        table = read_file(path, dataset)
        if source.file_stamp(path) != stamp:
            raise InputError(f"{path} changed while it was read; run this again when it is complete")
        _write(to_arrays(clean(table, dataset)), folder)
    if known is None:
        source.save_stamp(stamp, sha256, folder)
    return folder, sha256


def to_arrays(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the arrays of `Sequences` from a clean table, which is sorted by user and time."""
    starts = _first_rows(table["user"])
    items, item_ids = _index_items(table["item"])
    arrays = {
        "items": items,
        "offsets": np.append(starts, len(table)).astype(np.int64),
        "user_ids": _id_array(table["user"].iloc[starts]),
        "item_ids": _id_array(item_ids),
    }
    if "time" in table:
        arrays["times"] = table["time"].to_numpy()
    if "weight" in table:
        arrays["weights"] = table["weight"].to_numpy(np.float32)
    return arrays


def _first_rows(users: pd.Series) -> np.ndarray:
    """Return the first row of each user."""
    after, before = users.array[1:], users.array[:-1]
    if np.any(after < before):
        raise AssertionError("the table is not sorted by user")
    return np.flatnonzero(np.append(True, after != before))


def _index_items(ids: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """Return the index of each row's item, from 1 (int32), and the ids of items 1, 2, ... in ascending order.

    If the ids are integers close together, a lookup table does this in half the time of a hash table.
    """
    low, high = (int(ids.min()), int(ids.max())) if pd.api.types.is_integer_dtype(ids) else (0, 2**64)
    if high - low > len(ids):
        codes, distinct = pd.factorize(ids, sort=True)
        return (codes + 1).astype(np.int32), pd.Index(distinct)
    places = ids.to_numpy(np.int64) - low
    is_present = np.zeros(high - low + 1, dtype=bool)
    is_present[places] = True
    return np.cumsum(is_present, dtype=np.int32)[places], pd.Index(np.flatnonzero(is_present) + low)


def _id_array(values: pd.Series | pd.Index) -> np.ndarray:
    return values.to_numpy(np.int64 if pd.api.types.is_integer_dtype(values) else str)


# The cache


def _cache_folder(root: Path) -> Path:
    """Return `cache/` in the data root, or in the user's cache folder if the root is read-only."""
    for folder in (root / "cache", user_cache() / "cache"):
        if _is_writable(folder):
            return folder
    raise InputError(
        f"data_dir={root}: neither {root / 'cache'} nor the user's cache folder is writable; set data_dir to another"
    )


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


_NOT_IN_CACHE_KEY = ("name", "path", "sources", "sha256", "titles", "holdout", "windows", "catalogue")


def _array_folder(cache: Path, dataset: DatasetConfig, sha256: str | None) -> Path:
    """Return the folder of the arrays, named by all that decides their content."""
    kept = {key: value for key, value in to_plain(dataset).items() if key not in _NOT_IN_CACHE_KEY}
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, sha256, kept], sort_keys=True).encode()).hexdigest()
    return cache / f"{dataset.name}-{key[:16]}"


def _write(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Write the folder completely or not at all; if two runs build it at once, the first one's stays.

    atomic_write replaces a file, but a folder with content cannot be replaced in one step.
    """
    try:
        with draft_folder(folder) as draft:
            for name, array in arrays.items():
                np.save(draft / f"{name}.npy", array)
            draft.chmod(0o755)
            sync_tree(draft)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            sync_folder(folder.parent)
    except OSError as error:
        raise InputError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); set data_dir to another folder"
        ) from error


def _read(folder: Path) -> dict[str, np.ndarray | None]:
    names = ("items", "offsets", "user_ids", "item_ids", "times", "weights")
    files = set(os.listdir(folder))
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") if f"{name}.npy" in files else None for name in names}
