"""TODO."""

import csv
import gzip
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.config.schema import Unsupported
from sasrec_lab.data.ids import Ids, as_id_array, some
from sasrec_lab.errors import InputError, InputWarning, did_you_mean


def _ids(given: Any, key: str, columns: tuple[str, ...]) -> Any:
    """A list as it stands, `all`, or the ids in a file: a line each in .txt, else a column of one of these names."""
    if given is None or isinstance(given, list) or (given == "all" and key != "items_to_recommend"):
        return given
    if isinstance(given, dict):
        raise InputError(f"{key}={given} is no list of ids; write {key}=[...]")
    path = _path(str(given))
    if path.suffix not in (".txt", ".csv", ".parquet"):
        raise InputError(f"{key}={given} is no .txt, .csv or .parquet file; ids stand in brackets: {key}=[{given}]")
    if path.suffix == ".txt":
        with _readable(path, key), path.open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    table = _table(path, key, columns)
    column = next((name for name in columns if name in table), None)
    if column is None:
        wanted = " or ".join(dict.fromkeys(columns))
        raise InputError(f"{key}={given} has no column {wanted}; it has {', '.join(table.columns)}")
    return table[column]


def _path(given: str) -> Path:
    """`~` is the home folder; a user's whom nobody knows stands as it is."""
    return Path(os.path.expanduser(given))


def _table(path: Path, key: str, ids: tuple[str, ...]) -> "pd.DataFrame":
    """A .csv, plain or .gz, or a .parquet. Ids become numbers where all are, so that 007 stays what it is."""
    import pandas as pd

    from sasrec_lab.data.ids import to_int_if_all_integers

    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise InputError(f"{key}={path} is no .csv or .parquet file")
    with _readable(path, key):
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        text = dict.fromkeys(ids, str)
        try:
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
                # index_col=False: else of rows that are longer than the header the first columns become an index
                table = pd.read_csv(path, index_col=False, dtype=text, keep_default_na=False, na_values=[""])
        except (pd.errors.ParserError, pd.errors.ParserWarning):
            _check_rows(path)
            raise
        if table.iloc[:, -1].isna().any():  # as in a short row, which pandas fills up
            _check_rows(path)
    return table.assign(**{name: to_int_if_all_integers(table[name]) for name in set(ids) & set(table)})


def _check_rows(path: Path) -> None:
    """Raises InputError where a row is longer or shorter than the header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows, header, line = csv.reader(file), None, 1  # a value in quotes may go over several lines
        for row in rows:
            if any(value.strip() for value in row) or len(row) > 1:
                header = header or row
                if len(row) != len(header):
                    count = f"{len(row)} column{'s' if len(row) > 1 else ''}, not {len(header)}"
                    raise InputError(f"{path}, line {line}: {count} as in the header; correct the line or leave it out")
            line = rows.line_num + 1


@contextmanager
def _readable(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{key}={path}: there is no such file") from error
    except InputError:
        raise
    except (OSError, ValueError, EOFError, csv.Error) as error:  # pandas' and pyarrow's own are ValueErrors
        raise InputError(f"{key}={path} cannot be read: {str(error).splitlines()[0]}") from error


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name}={value!r} is neither True nor False")


def _supported(
    rows: np.ndarray, given: np.ndarray, has_items: np.ndarray, on_unsupported: str, what: str
) -> np.ndarray:
    """The numbers of the targets that a list can be made for; the others follow the rule."""
    if on_unsupported not in Unsupported.__members__:
        options = list(Unsupported.__members__)
        hint = did_you_mean(str(on_unsupported), options)
        raise InputError(f"on_unsupported_targets={on_unsupported!r} is none of {', '.join(options)}{hint}")
    unknown = rows < 0
    without = ~unknown & ~has_items[np.where(unknown, 0, rows)]
    unsupported = unknown | without
    if unsupported.any() and on_unsupported != "ignore":
        kinds = {"unknown": given[unknown], "without an item that the model knows": given[without]}
        which = "; ".join(f"{kind}: {some(ids)}" for kind, ids in kinds.items() if len(ids))
        line = f"{what}: {int(unsupported.sum()):,} of {len(rows):,} get no list ({which})"
        if on_unsupported == "raise":
            raise InputError(f"{line}; leave them out, or set on_unsupported_targets=warn")
        warnings.warn(line, InputWarning, stacklevel=4)
    return rows[~unsupported]


def _targets(ids: Ids, given: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, -1 for an unknown one, and external ids of targets: at least one, and each once."""
    if isinstance(given, str) and given == "all":
        return np.arange(len(ids)), ids.ids
    targets = as_id_array(given, what)
    if not len(targets):
        raise InputError(f"{what} is empty; name at least one")
    repeated = pd.Series(targets).duplicated().to_numpy()
    if repeated.any():
        names = pd.unique(targets[repeated])
        line = f"{what}: one list each for those that stand there more than once: {some(names)}"
        warnings.warn(line, InputWarning, stacklevel=4)
    return ids.numbers(targets[~repeated], what), targets[~repeated]


def _tell_empty(ids: np.ndarray, total: int, what: str, option: str) -> None:
    if len(ids):
        line = f"{what}: {len(ids):,} of {total:,} get no list, as nothing is left to recommend ({some(ids)})"
        warnings.warn(f"{line}; {option}=false leaves nothing out", InputWarning, stacklevel=4)
