"""Read and write the fixture of tests/scripts/test_parity.py: weights and outputs of RecTools."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from parity.peer import Arrays, defaults, with_weights
from sasrec_lab.config.schema import ModelConfig
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.files import atomic_write


def write_fixture(path: Path, sequences: Sequences, cfg: ModelConfig, theirs: dict[str, Arrays]) -> None:
    """Write histories, sizes, and RecTools' weights and outputs as JSON."""
    numbers = {
        "cfg": {key: getattr(cfg, key) for key in ("blocks", "dim", "maxlen")},
        "user_ids": sequences.user_ids.tolist(),
        "item_ids": sequences.item_ids.tolist(),
        "histories": [items.tolist() for items in np.split(sequences.items, sequences.offsets[1:-1])],
        "rectools": {name: {key: as_list(x) for key, x in arrays.items()} for name, arrays in theirs.items()},
    }
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


def read_fixture(path: Path) -> tuple[Sequences, ModelConfig, dict[str, Arrays]]:
    """Return histories, model config, and RecTools' weights and outputs by variant."""
    numbers = json.loads(path.read_text())
    items = np.concatenate(numbers["histories"]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, numbers["histories"])])
    ids = np.array(numbers["user_ids"]), np.array(numbers["item_ids"])
    sequences = Sequences(items, offsets, *ids, times=None, weights=None, file="fixture", sha256=None)
    theirs = {name: {key: as_array(x) for key, x in arrays.items()} for name, arrays in numbers["rectools"].items()}
    return with_weights(sequences), replace(defaults().model, **numbers["cfg"]), theirs


def as_list(array: np.ndarray) -> list:
    """Return an array as lists, floats with nine digits, which identify every number of single precision."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [as_list(row) for row in array] if array.ndim > 1 else [float(f"{x:.9g}") for x in array]


def as_array(numbers: list) -> np.ndarray:
    """Return lists as an array, floats in single precision."""
    array = np.array(numbers)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
