"""Files with a line for each item: titles, and the features that item vectors are made of. V items, F categories."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig, FeaturesConfig, TitlesConfig
from sasrec_lab.data import source
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.parquet import is_parquet
from sasrec_lab.errors import InputError, counted

_ERRORS = (ValueError, OSError, LookupError, TypeError)  # of pandas, for a file that is not as described


@dataclass(frozen=True)
class ItemFeatures:
    """Features of the items of a catalogue: categories, each item's one after the other, and given vectors.

    The first `num_trained` items occur in training; only these have a vector of their id.
    """

    num_trained: int
    offsets: np.ndarray  # (V + 1,) int64: item i + 1 has the categories offsets[i] to offsets[i + 1] - 1
    categories: np.ndarray  # int64 indices of `names`
    names: list[str]  # (F,) column=value, or the column of a flag, in the order of the first item that has it
    vectors: np.ndarray | None  # (V, n) float32, zeros for an item without one

    def __str__(self) -> str:
        described = np.diff(self.offsets) > 0
        kinds = [f"{len(self.names):,} categories"] if self.names else []
        if self.vectors is not None:
            described |= self.vectors.any(1)
            kinds.append(f"vectors of {counted(self.vectors.shape[1], 'number')}")
        return f"{' and '.join(kinds) or 'none'}, of {int(described.sum()):,} of {counted(len(described), 'item')}"


def read_titles(dataset: DatasetConfig, data_dir: str | None, item_ids: np.ndarray) -> np.ndarray | None:
    """Return one title per item id (num_items,), empty if the file has none; None if the data set has no such file.

    Raises:
        InputError: the file is not as the config describes it.
    """
    config, path = dataset.titles, source.find_titles(dataset, source.data_root(data_dir))
    if config is None or path is None:
        return None
    table = _read_lines(path, config, "dataset.titles", [config.item, config.title])
    titles = np.full(len(item_ids), "", dtype=object)
    rows = _rows_of_items(table, config.item, item_ids, path)
    titles[rows >= 0] = table[config.title].to_numpy()[rows[rows >= 0]]
    return titles.astype(str)


def read_features(
    dataset: DatasetConfig, data_dir: str | None, item_ids: np.ndarray, num_trained: int
) -> ItemFeatures | None:
    """Return the features of the items with these raw ids (V,), None if the data set has no file of them.

    A category that no trained item has is omitted, because nothing would be learned of it. An item without a line in
    the file has no features.

    Raises:
        InputError: the file is missing, or not as the config describes it.
    """
    config = dataset.features
    if config is None:
        return None
    key = "dataset.features"
    path = source.find_features(config, source.data_root(data_dir))
    has_column = config.vectors is not None and not config.vectors.endswith(".npy")
    columns = [config.item, *config.categories, *config.flags, *([str(config.vectors)] if has_column else [])]
    table = _read_lines(path, config, key, columns)
    rows = _rows_of_items(table, config.item, item_ids, path)  # (V,) -1: no line
    offsets, categories, names = _index_categories(table, config, rows, num_trained)
    vectors = None
    if config.vectors is not None:
        given = _column_vectors(table, config, path) if has_column else _npy_vectors(table, config, data_dir, path)
        vectors = np.where(rows[:, None] >= 0, given[rows], np.float32(0))
    return ItemFeatures(num_trained, offsets, categories, names, vectors)


def _index_categories(
    table: pd.DataFrame, config: FeaturesConfig, rows: np.ndarray, num_trained: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return offsets and categories of the items in these rows of the table, and the categories' names."""
    names: dict[str, int] = {}
    columns = [table[column].fillna("").to_numpy() for column in (*config.categories, *config.flags)]
    lists: list[list[int]] = []
    for item, row in enumerate(rows):
        found = [] if row < 0 else _names(config, [column[row] for column in columns])
        if item < num_trained:
            for name in found:
                names.setdefault(name, len(names))
        lists.append([names[name] for name in found if name in names])
    offsets = np.append(0, np.cumsum([len(each) for each in lists])).astype(np.int64)
    return offsets, np.array([each for found in lists for each in found], dtype=np.int64), list(names)


def _names(config: FeaturesConfig, cells: list[Any]) -> list[str]:
    """Return an item's distinct categories: column=value for the values of its cells, and the columns with a 1.

    A Parquet cell may be a list.
    """
    found: dict[str, None] = {}
    for column, cell in zip(config.categories, cells, strict=False):
        if isinstance(cell, (list, np.ndarray)):
            values = [str(value) for value in cell]
        else:
            values = str(cell).split(config.split) if config.split else [str(cell)]
        found |= dict.fromkeys(f"{column}={value.strip()}" for value in values if value.strip())
    flags = zip(config.flags, cells[len(config.categories) :], strict=True)
    return [*found, *(column for column, cell in flags if str(cell) in ("1", "True"))]


def _column_vectors(table: pd.DataFrame, config: FeaturesConfig, path: Path) -> np.ndarray:
    """Return the vectors (rows, n) of a column of lists."""
    column = table[str(config.vectors)]
    try:
        return _checked(np.stack([np.asarray(value, dtype=np.float32) for value in column]))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: column {config.vectors} must have a list of numbers in each row, all of one length ({error});"
            " name such a Parquet column, or a .npy file"
        ) from error


def _npy_vectors(table: pd.DataFrame, config: FeaturesConfig, data_dir: str | None, path: Path) -> np.ndarray:
    """Return the vectors (rows, n) of a .npy file, whose rows are in the order of the table's lines."""
    file = source.find_vectors(config, source.data_root(data_dir))
    try:
        vectors = _checked(np.load(file, allow_pickle=False, mmap_mode="r").astype(np.float32))
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"dataset.features.vectors: {file} is not a .npy matrix of numbers ({error})") from error
    if len(vectors) != len(table):
        raise InputError(
            f"dataset.features.vectors: {file} has {len(vectors):,} rows, but {path} has {len(table):,} items; each row"
            " must belong to a line, in the same order"
        )
    return vectors


def _checked(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"its shape is {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("it has NaN or infinite numbers")
    return vectors


def _rows_of_items(table: pd.DataFrame, column: str, item_ids: np.ndarray, path: Path) -> np.ndarray:
    """Return the first line of each item id (V,), -1 if it has none."""
    indices = Ids(item_ids).indices(table[column], f"{path}, column {column}")
    rows = np.full(len(item_ids), -1)
    lines = np.flatnonzero(indices >= 0)[::-1]  # the first line of an item is written last
    rows[indices[lines]] = lines
    return rows


def _read_lines(path: Path, config: TitlesConfig | FeaturesConfig, key: str, columns: list[str]) -> pd.DataFrame:
    """Return the named columns of a text file, as text, or of a Parquet file.

    Raises:
        InputError: the file is not as the section `key` of the config describes it.
    """
    try:
        table = pd.read_parquet(path) if is_parquet(path) else _read_text(path, config)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{key}.path: {path} is not {config.encoding} text ({error.reason}); set {key}.encoding to the file's, such"
            " as latin-1"
        ) from error
    except _ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{key}.path: {path} cannot be read ({reason}); check the file, and its separator, names and encoding in"
            f" {key}"
        ) from error
    if missing := [name for name in columns if name not in table]:
        keys = f"{key}.item=..., {key}.{'title=...' if isinstance(config, TitlesConfig) else 'categories=[...]'}"
        raise InputError(
            f"{path}: no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}; name the two columns:"
            f" {keys}"
        )
    return table[list(dict.fromkeys(columns))]


def _read_text(path: Path, config: TitlesConfig | FeaturesConfig) -> pd.DataFrame:
    separator = "\t" if config.separator == r"\t" else config.separator
    options: dict[str, Any] = {"names": list(config.names), "usecols": range(len(config.names))} if config.names else {}
    return pd.read_csv(
        io.BytesIO(source.content(path)),
        sep=re.escape(separator) if len(separator) > 1 else separator,  # pandas takes two characters for a pattern
        engine="python" if len(separator.encode()) > 1 else "c",
        encoding=config.encoding,
        dtype=str,
        keep_default_na=False,
        **options,
    )
