"""User input of a recommendation: ids and tables from files, and checks of every argument."""

import csv
import gzip
import os
import shlex
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.list_commands import Unsupported
from sasrec_lab.data.columns import check_utf8
from sasrec_lab.data.id_checks import doubtful_ids
from sasrec_lab.data.ids import Ids, as_id_array, to_int_if_all_integers
from sasrec_lab.errors import InputError, did_you_mean, first_few, nearest, shown, warn


def expand_home(path: str | Path) -> Path:
    """Return the path with a leading `~` replaced by the home folder; an unknown user's `~name` stays."""
    return Path(os.path.expanduser(path))


def read_ids(given: Any, key: str, columns: tuple[str, ...]) -> Any:
    """Return the ids that a key names.

    A list, None and `all` are returned unchanged. Of a file the ids are the lines (.txt), or the values in the first of
    `columns` that it has (.csv, .parquet).

    Raises:
        InputError: `given` is not a list or a file of ids.
    """
    if given is None or isinstance(given, list) or (given == "all" and key != "items_to_recommend"):
        return given
    if isinstance(given, dict):
        raise InputError(f"{key}={given} is not a list of ids; write {key}=[...]")
    path = expand_home(str(given))
    if path.suffix not in (".txt", ".csv", ".parquet"):
        text = str(given).strip(" '\"[]")
        if text == "all":
            fix = "omit it for all" if key == "items_to_recommend" else f"write {key}=all"
        elif key != "items_to_recommend" and nearest(text, ["all"]):
            fix = f"did you mean {key}=all?"
        else:
            fix = f"write ids in brackets: {shlex.quote(f'{key}=[{text}]') if ' ' in text else f'{key}=[{text}]'}"
        raise InputError(f"{key}={given} is not a .txt, .csv or .parquet file; {fix}")
    if path.suffix == ".txt":
        with _explain_read_errors(path, key), path.open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    table = read_table(path, key, columns)
    column = next((name for name in columns if name in table), None)
    if column is None:
        wanted = " or ".join(dict.fromkeys(columns))
        raise InputError(
            f"{key}={given} must have a column {wanted}; its columns are {', '.join(table.columns)}; rename one"
        )
    return table[column]


def read_table(path: Path, key: str, id_columns: tuple[str, ...]) -> pd.DataFrame:
    """Return the table in a .csv, .csv.gz or .parquet file.

    An id column of a .csv becomes integers only if all its values are integers, so that 007 stays text.

    Raises:
        InputError: the file cannot be read, or a row is longer or shorter than the header.
    """
    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise InputError(f"{key}={path} must be a .csv, .csv.gz or .parquet file; convert it")
    with _explain_read_errors(path, key):
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        text = dict.fromkeys(id_columns, str)
        try:
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
                # without index_col=False, pandas makes an index of the first columns if rows are longer than the header
                table = pd.read_csv(path, index_col=False, dtype=text, keep_default_na=False, na_values=[""])
        except (pd.errors.ParserError, pd.errors.ParserWarning):
            _check_row_lengths(path)
            raise
        if table.iloc[:, -1].isna().any():  # pandas fills short rows with missing values
            _check_row_lengths(path)
    return table.assign(**{name: to_int_if_all_integers(table[name]) for name in set(id_columns) & set(table)})


def read_interactions(path: Path, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the table of histories in a file.

    Raises:
        InputError: the file cannot be read, lacks a column of ids, or has an id that `dataset.check_ids` refuses.
    """
    roles = [tuple(dict.fromkeys(names)) for names in ((dataset.user, "user_id"), (dataset.item, "item_id"))]
    table = read_table(path, "interactions", (*roles[0], *roles[1]))
    for names in roles:
        column = next((name for name in names if name in table), None)
        if column is None:
            raise InputError(
                f"interactions={path} must have a column {' or '.join(names)}; its columns are"
                f" {', '.join(map(str, table.columns))}; rename one of them"
            )
        if dataset.check_ids and pd.api.types.is_string_dtype(table[column]):
            _check_ids(table[column], f"interactions={path}: column {column}")
    return table


def _check_ids(column: pd.Series, what: str) -> None:
    """Raise InputError for an id that training refuses, too; an empty one is reported later."""
    for wrong, rule in doubtful_ids(pa.array(column.fillna(""), pa.string())):
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(f"{what}, row {row + 1} is {shown(column.iloc[row])}, {rule}; correct or remove the row")


def _check_row_lengths(path: Path) -> None:
    """Raise InputError if a row is longer or shorter than the header."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows, header, line = csv.reader(file), None, 1  # a quoted value may span several lines
        for row in rows:
            if any(value.strip() for value in row) or len(row) > 1:
                header = header or row
                if len(row) != len(header):
                    count = f"{len(row)} column{'s' if len(row) > 1 else ''}, but the header has {len(header)}"
                    raise InputError(f"{path}, line {line}: {count}; correct or remove the line")
            line = rows.line_num + 1


@contextmanager
def _explain_read_errors(path: Path, key: str) -> Iterator[None]:
    """Turn errors of reading a file into InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{key}={path}: no such file; check the path") from error
    except InputError:
        raise
    except UnicodeDecodeError as error:
        if path.suffix != ".parquet":
            check_utf8((gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()), path)
        raise InputError(f"{key}={path} is not UTF-8 text ({error.reason}); convert it") from error
    except (
        OSError,
        ValueError,
        EOFError,
        csv.Error,
        zlib.error,
        pa.ArrowException,
    ) as error:  # pandas' are ValueErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{key}={path} cannot be read ({reason}); check the file") from error


def check_flag(name: str, value: Any) -> None:
    """Raise InputError unless the value is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}={value!r} must be True or False")


def check_k(k: Any, num_items: int) -> int:
    """Return the length of a list as an int; raise InputError unless it is an integer from 1 to `num_items`."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
        raise InputError(f"k={k!r} must be an integer")
    if not 1 <= k <= num_items:
        raise InputError(f"k={k} must be from 1 to {num_items}, the number of items that the model knows")
    return int(k)


def find_candidates(items: Ids, allowed: Any) -> np.ndarray | None:
    """Return the indices (from 1, ascending) of the items that may be recommended, None for all; warn of unknown ids.

    Raises:
        InputError: none of the allowed items is known to the model.
    """
    if allowed is None:
        return None
    indices = items.indices(allowed, "items_to_recommend")
    unknown = as_id_array(allowed, "items_to_recommend")[indices < 0]
    if not len(indices):
        raise InputError("items_to_recommend is empty; give at least one item id, or omit it to allow all items")
    if len(unknown) == len(indices):
        raise InputError(
            f"items_to_recommend must contain an item known to the model, not only {first_few(unknown)};"
            " add one, or omit it to allow all items"
        )
    if len(unknown):
        line = (
            f"items_to_recommend: {len(unknown)} of {len(indices)} ignored (unknown to the model: {first_few(unknown)})"
        )
        warn(line)
    return np.unique(indices[indices >= 0]) + 1


def find_targets(ids: Ids, given: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return indices (-1 for an unknown id) and raw ids of the targets, each once; warn of duplicates."""
    if isinstance(given, str) and given == "all":
        return np.arange(len(ids)), ids.ids
    targets = as_id_array(given, what)
    if not len(targets):
        raise InputError(f"{what} is empty; give at least one id")
    repeated = pd.Series(targets).duplicated().to_numpy()
    if repeated.any():
        line = f"{what}: duplicates ignored: {first_few(pd.unique(targets[repeated]))}"
        warn(line)
    return ids.indices(targets[~repeated], what), targets[~repeated]


def drop_unsupported(
    indices: np.ndarray, raw_ids: np.ndarray, has_items: np.ndarray, on_unsupported: str, what: str
) -> np.ndarray:
    """Return the indices of the targets that are known and have known items; treat the others as `on_unsupported` says.

    Raises:
        InputError: some targets are unsupported and `on_unsupported` is "raise", or it is not a valid choice.
    """
    if on_unsupported not in Unsupported.__members__:
        options = list(Unsupported.__members__)
        hint = did_you_mean(str(on_unsupported), options)
        raise InputError(f"on_unsupported_targets={on_unsupported!r} must be one of {', '.join(options)}{hint}")
    unknown = indices < 0
    without_items = ~unknown & ~has_items[np.where(unknown, 0, indices)]
    unsupported = unknown | without_items
    if unsupported.any() and on_unsupported != "ignore":
        reasons = {"unknown": raw_ids[unknown], "no item known to the model": raw_ids[without_items]}
        which = "; ".join(f"{reason}: {first_few(ids)}" for reason, ids in reasons.items() if len(ids))
        line = f"{what}: no list for {int(unsupported.sum()):,} of {len(indices):,} ({which})"
        if on_unsupported == "raise":
            raise InputError(f"{line}; remove them, or set on_unsupported_targets=warn")
        warn(line)
    return indices[~unsupported]


def warn_empty_lists(raw_ids: np.ndarray, total: int, what: str, hint: str) -> None:
    """Warn of targets whose lists are empty because a filter excludes every candidate."""
    if len(raw_ids):
        line = f"{what}: no list for {len(raw_ids):,} of {total:,}: no candidate is left ({first_few(raw_ids)}); {hint}"
        warn(line)
