"""Item titles, for data sets that have a file of them."""

import zlib

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
    try:
        table = pd.read_csv(
            path,
            sep=config.separator,
            names=config.names and list(config.names),
            usecols=range(len(config.names)) if config.names else None,
            encoding=config.encoding,
            compression="gzip" if path.suffix == ".gz" else None,
            dtype=str,
            keep_default_na=False,
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"dataset.titles.path: {path} is not {config.encoding} text ({error.reason}); set dataset.titles.encoding"
            " to the file's, such as latin-1"
        ) from error
    except (ValueError, OSError, LookupError, EOFError, zlib.error, TypeError) as error:
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
