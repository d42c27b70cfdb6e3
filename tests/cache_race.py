"""A process that builds the cache at the same time as another one; it imports this module, thus no torch."""

from pathlib import Path

import numpy as np

from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.data import cache
from sasrec_lab.data.sequences import Sequences, load_sequences


def cached(loaded: Sequences) -> Path:
    """Return the folder of the cache that the arrays are read from."""
    assert isinstance(loaded.items, np.memmap)
    return Path(loaded.items.filename).parent


def build_at_once(dataset: DatasetConfig, data_dir: str, barrier, results) -> None:
    """Build the cache and save it when the other process does, and send the arrays and the folder."""
    save = cache._save

    def save_together(*arguments) -> None:
        barrier.wait(300)  # neither has found the other's folder
        save(*arguments)

    cache._save = save_together
    loaded = load_sequences(dataset, data_dir)
    results.put((loaded.items.tolist(), loaded.offsets.tolist(), str(cached(loaded))))
