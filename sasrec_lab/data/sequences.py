"""Interactions as flat arrays, one sequence of items per user (as a CSR matrix)."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.dataset import DatasetConfig, SyntheticConfig
from sasrec_lab.data import cache, source
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.ids import check_item_count
from sasrec_lab.data.interactions import read_file
from sasrec_lab.data.out_of_core import build_arrays, memory_limit
from sasrec_lab.data.parquet import is_parquet
from sasrec_lab.data.synthetic import make_interactions
from sasrec_lab.errors import InputError, explain_out_of_memory

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


def load_sequences(dataset: DatasetConfig, data_dir: str | None, *, may_write_root: bool = True) -> Sequences:
    """Load the data set's arrays, memory-mapped from the cache; build the cache first if needed.

    The cache is keyed by the file's checksum and by every key that decides what is read and kept. A file that has not
    changed since its checksum was taken is not read again. Without `may_write_root`, if `data_dir` is not the user's
    choice, nothing is written there.

    Raises:
        InputError: the file cannot be found, read or cleaned.
    """
    root = source.data_root(data_dir)
    if (synthetic := dataset.synthetic) is not None:
        file, sha256 = "(generated)", None
        build = partial(_generate, synthetic, dataset)
        arrays, _ = cache.load_or_build(root, _folder_name(dataset, None), build, may_write_root)
    else:
        path = source.find(dataset, root)
        file = path.name.removesuffix(".gz")
        with explain_out_of_memory(f"{path} is too large for this machine; use a part of it, or more memory"):
            arrays, sha256 = _load_file(path, root, dataset, may_write_root)
    return Sequences(
        items=arrays["items"],
        offsets=arrays["offsets"],
        user_ids=arrays["user_ids"],
        item_ids=arrays["item_ids"],
        times=arrays.get("times"),
        weights=arrays.get("weights"),
        file=file,
        sha256=sha256,
    )


def _generate(synthetic: SyntheticConfig, dataset: DatasetConfig, scratch: Path) -> cache.Arrays:
    return to_arrays(clean(make_interactions(synthetic), dataset))


def _load_file(path: Path, root: Path, dataset: DatasetConfig, may_write_root: bool) -> tuple[cache.Arrays, str]:
    """Return the arrays of the file, from the cache if it has them, and the file's sha256."""
    files = source.files_of(path)
    stamp = cache.stamp_of(files)
    sha256 = cache.find_sha256(stamp, root) or source.digest(path, is_text=not is_parquet(path))
    source.check(path, sha256, dataset.sha256, is_published=bool(dataset.sources))

    def build(scratch: Path) -> cache.Arrays:
        limit = memory_limit(path, dataset)
        arrays = None if limit is None else build_arrays(path, dataset, limit, scratch)
        table = read_file(path, dataset) if arrays is None else pd.DataFrame()
        if cache.stamp_of(source.files_of(path)) != stamp:
            raise InputError(f"{path} changed while it was read; run this again when it is complete")
        return to_arrays(clean(table, dataset)) if arrays is None else arrays

    arrays, folder = cache.load_or_build(root, _folder_name(dataset, sha256), build, may_write_root)
    cache.save_sha256(stamp, sha256, folder)
    return arrays, sha256


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
        arrays["times"] = _narrow(table["time"].to_numpy())
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
        check_item_count(len(distinct))
        return (codes + 1).astype(np.int32), pd.Index(distinct)
    places = ids.to_numpy(np.int64) - low
    is_present = np.zeros(high - low + 1, dtype=bool)
    is_present[places] = True
    check_item_count(int(np.count_nonzero(is_present)))
    return np.cumsum(is_present, dtype=np.int32)[places], pd.Index(np.flatnonzero(is_present) + low)


def _narrow(times: np.ndarray) -> np.ndarray:
    """Return integers as int32 if every one fits."""
    if times.dtype.kind != "i" or np.iinfo(np.int32).min > times.min() or times.max() > np.iinfo(np.int32).max:
        return times
    return times.astype(np.int32, copy=False)


def _id_array(values: pd.Series | pd.Index) -> np.ndarray:
    return values.to_numpy(np.int64 if pd.api.types.is_integer_dtype(values) else str)


_NOT_IN_CACHE_KEY = (
    "name",
    "path",
    "memory_limit",
    "sources",
    "sha256",
    "titles",
    "features",
    "holdout",
    "val_users",
    "time_split",
    "windows",
    "overlap",
    "catalogue",
)


def _folder_name(dataset: DatasetConfig, sha256: str | None) -> str:
    """Return the name of the arrays' folder in the cache, which depends on all that decides their content."""
    kept = {key: value for key, value in to_plain(dataset).items() if key not in _NOT_IN_CACHE_KEY}
    if dataset.check_ids:  # only ids that it refuses make other arrays
        kept.pop("check_ids")
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, sha256, kept], sort_keys=True).encode()).hexdigest()
    return f"{dataset.name}-{key[:16]}"
