"""Item titles, for data sets that have a file of them."""

import io
import re

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.data import source
from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import InputError


def read_titles(dataset: DatasetConfig, data_dir: str | None, item_ids: np.ndarray) -> np.ndarray | None:
    """Return one title per item id (num_items,), empty if the file has none; None if the data set has no such file.

    Raises:
        InputError: the file is not as the config describes it.
    """
    config, path = dataset.titles, source.find_titles(dataset, source.data_root(data_dir))
    if config is None or path is None:
        return None
    columns = [config.item, config.title]
    separator = "\t" if config.separator == r"\t" else config.separator
    try:
        table = pd.read_csv(
            io.BytesIO(source.content(path)),
            sep=re.escape(separator) if len(separator) > 1 else separator,  # pandas takes two characters for a pattern
            engine="python" if len(separator.encode()) > 1 else "c",
            names=config.names and list(config.names),
            usecols=range(len(config.names)) if config.names else None,
            encoding=config.encoding,
            dtype=str,
            keep_default_na=False,
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"dataset.titles.path: {path} is not {config.encoding} text ({error.reason}); set dataset.titles.encoding"
            " to the file's, such as latin-1"
        ) from error
    except (ValueError, OSError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"dataset.titles.path: {path} cannot be read ({reason}); check the file, and its separator, names and"
            " encoding in dataset.titles"
        ) from error
    if missing := [name for name in columns if name not in table]:
        raise InputError(
            f"{path}: no column {missing[0]!r}; it has {', '.join(map(str, table.columns))};"
            " name the two columns: dataset.titles.item=..., dataset.titles.title=..."
        )
    table = table.drop_duplicates(config.item)
    indices = Ids(item_ids).indices(table[config.item], f"{path}, column {config.item}")
    titles = np.full(len(item_ids), "", dtype=object)
    titles[indices[indices >= 0]] = table[config.title][indices >= 0]
    return titles.astype(str)
