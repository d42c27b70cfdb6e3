"""Files with a line for each item: titles, and the features that item vectors are made of. V items, F categories."""

import io
import json
import re
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig, FeaturesConfig, TitlesConfig
from sasrec_lab.data import source
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.parquet import is_parquet
from sasrec_lab.errors import InputError, counted, shown

_FLAGS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
# of pandas, for a file that is not as described
_ERRORS = (ValueError, OSError, LookupError, TypeError, pd.errors.ParserWarning)


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

    def checksum(self) -> str:
        """Return a checksum of all of it, the order of the items and categories included."""
        digest = sha256(json.dumps([self.num_trained, self.names]).encode())
        for array in (self.offsets, self.categories, self.vectors):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def described(self) -> np.ndarray:
        """Return whether each item has a feature, shape (V,) bool."""
        described = np.diff(self.offsets) > 0
        return described if self.vectors is None else described | self.vectors.any(1)

    def __str__(self) -> str:
        kinds = [f"{len(self.names):,} categories"] if self.names else []
        if self.vectors is not None:
            kinds.append(f"vectors of {counted(self.vectors.shape[1], 'number')}")
        return f"{' and '.join(kinds)}, of {int(self.described.sum()):,} of {counted(len(self.described), 'item')}"


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
    titles[rows >= 0] = _without_nulls(table[config.title])[rows[rows >= 0]]
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
    path = source.find_features(dataset, source.data_root(data_dir))
    has_column = config.vectors is not None and not config.vectors.endswith(".npy")
    columns = [config.item, *config.categories, *config.flags, *([str(config.vectors)] if has_column else [])]
    table = _read_lines(path, config, key, columns)
    rows = _rows_of_items(table, config.item, item_ids, path)  # (V,) -1: no line
    offsets, categories, names = _index_categories(table, config, rows, num_trained, path)
    vectors = None
    if config.vectors is not None:
        given = _column_vectors(table, config, path) if has_column else _npy_vectors(table, config, data_dir, path)
        vectors = np.where(rows[:, None] >= 0, given[rows], np.float32(0))
    features = ItemFeatures(num_trained, offsets, categories, names, vectors)
    if not features.described[:num_trained].any():
        raise InputError(
            f"{path} has no feature of any item in training; check dataset.features.item={config.item}, which must have"
            " the ids of the interactions, and the columns of features"
        )
    return features


def _index_categories(
    table: pd.DataFrame, config: FeaturesConfig, rows: np.ndarray, num_trained: int, path: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return offsets and categories of the items in these rows of the table, and the categories' names."""
    names: dict[str, int] = {}
    columns = {column: _without_nulls(table[column]) for column in (*config.categories, *config.flags)}
    flags = {column: _read_flags(columns.pop(column), column, path) for column in config.flags}
    lists: list[list[int]] = []
    for item, row in enumerate(rows):
        found: dict[str, None] = {}
        if row >= 0:
            for column, cells in columns.items():
                found |= dict.fromkeys(f"{column}={value}" for value in _values(cells[row], config.split))
            found |= dict.fromkeys(column for column, is_set in flags.items() if is_set[row])
        if item < num_trained:
            for name in found:
                names.setdefault(name, len(names))
        lists.append([names[name] for name in found if name in names])
    offsets = np.append(0, np.cumsum([len(each) for each in lists])).astype(np.int64)
    return offsets, np.array([each for found in lists for each in found], dtype=np.int64), list(names)


def _without_nulls(column: pd.Series) -> np.ndarray:
    """Return the values of a column, empty text for a missing one; whole numbers stay whole next to missing ones."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), "").to_numpy()


def _values(cell: Any, split: str | None) -> list[str]:
    """Return the categories in a cell: text, of several if it is split, a number, or a list in a Parquet file."""
    if isinstance(cell, (list, np.ndarray)):
        parts = [str(value) for value in cell if value is not None]
    else:
        parts = str(cell).split(split) if split else [str(cell)]
    return [part.strip() for part in parts if part.strip()]


def _read_flags(cells: np.ndarray, column: str, path: Path) -> np.ndarray:
    """Return whether each cell says that the item has the category."""
    texts = [str(cell).strip().lower() for cell in cells]
    for row, text in enumerate(texts):
        if text not in _FLAGS:
            raise InputError(
                f"{path}, row {row + 1} of the items: column {column} is {shown(text)}, but a flag is 1 or 0, true or"
                " false; name the column in dataset.features.categories"
            )
    return np.array([_FLAGS[text] for text in texts])


def _column_vectors(table: pd.DataFrame, config: FeaturesConfig, path: Path) -> np.ndarray:
    """Return the vectors (rows, n) of a column of lists, zeros for a missing one."""
    column = table[str(config.vectors)]
    width = next((len(cell) for cell in column if isinstance(cell, (list, np.ndarray))), 0)
    vectors = np.zeros((len(column), width), dtype=np.float32)
    for row, cell in enumerate(column):
        is_list = isinstance(cell, (list, np.ndarray))
        if not is_list and pd.isna(cell):
            continue
        try:
            if not is_list or len(cell) != width:
                raise ValueError(f"a list of {len(cell)}, not {width}" if is_list else f"it is {shown(cell)}")
            vectors[row] = np.asarray(cell, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}, row {row + 1}: column {config.vectors} must have lists of numbers of one length ({error})"
            ) from error
    return _checked(vectors, f"{path}, column {config.vectors}")


def _npy_vectors(table: pd.DataFrame, config: FeaturesConfig, data_dir: str | None, path: Path) -> np.ndarray:
    """Return the vectors (rows, n) of a .npy file, whose rows are in the order of the table's lines."""
    file = source.find_vectors(config, source.data_root(data_dir))
    key = f"dataset.features.vectors: {file}"
    try:
        given = np.load(file, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{key} is not a .npy file of numbers ({error}); save a matrix with numpy.save") from error
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "fiu" or given.ndim != 2 or not given.size:
        kind = f"{given.dtype} of shape {given.shape}" if isinstance(given, np.ndarray) else "an archive of arrays"
        raise InputError(f"{key} is not a matrix of real numbers ({kind}); save one with numpy.save")
    if len(given) != len(table):
        raise InputError(
            f"{key} has {len(given):,} rows, but {path} has {len(table):,} items; each row must belong to a line,"
            " in the same order"
        )
    with np.errstate(over="ignore"):
        return _checked(given.astype(np.float32), key)


def _checked(vectors: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise InputError(f"{name}: row {row + 1} has NaN, infinite or too large numbers; replace them")
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
    if table.empty:
        raise InputError(f"{key}.path: {path} has no rows; it must have one for each item")
    return table[list(dict.fromkeys(columns))]


def _read_text(path: Path, config: TitlesConfig | FeaturesConfig) -> pd.DataFrame:
    separator = "\t" if config.separator == r"\t" else config.separator
    # without index_col=False, pandas makes an index of the first column if rows are longer than the header
    options: dict[str, Any] = {"index_col": False}
    if config.names:
        options = {"names": list(config.names), "usecols": range(len(config.names))}
    with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
        return pd.read_csv(
            io.BytesIO(source.content(path)),
            sep=re.escape(separator) if len(separator) > 1 else separator,  # pandas takes two characters for a pattern
            engine="python" if len(separator.encode()) > 1 else "c",
            encoding=config.encoding,
            dtype=str,
            keep_default_na=False,
            **options,
        )
