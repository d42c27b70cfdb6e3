"""Read and write the fixtures of tests/scripts/test_parity.py: weights and outputs of other libraries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from parity.comparison import Arrays
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.files import atomic_write


def write_fixture(path: Path, sequences: Sequences, cfg: ModelConfig, theirs: dict[str, Arrays]) -> None:
    """Write histories, sizes, and another library's weights and outputs as JSON."""
    numbers = {
        "cfg": {key: getattr(cfg, key) for key in ("blocks", "dim", "maxlen")},
        "user_ids": sequences.user_ids.tolist(),
        "item_ids": sequences.item_ids.tolist(),
        "histories": [items.tolist() for items in np.split(sequences.items, sequences.offsets[1:-1])],
        "theirs": {name: {key: as_list(x) for key, x in arrays.items()} for name, arrays in theirs.items()},
    }
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


def read_fixture(path: Path, cfg: ModelConfig) -> tuple[Sequences, ModelConfig, dict[str, Arrays]]:
    """Return histories, the model config with the fixture's sizes, and the weights and outputs by variant."""
    numbers = json.loads(path.read_text())
    items = np.concatenate(numbers["histories"]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, numbers["histories"])])
    ids = np.array(numbers["user_ids"]), np.array(numbers["item_ids"])
    sequences = Sequences(items, offsets, *ids, times=None, weights=None, file="fixture", sha256=None)
    theirs = {name: {key: np.array(x) for key, x in arrays.items()} for name, arrays in numbers["theirs"].items()}
    return with_weights(sequences), replace(cfg, **numbers["cfg"]), theirs


def with_weights(sequences: Sequences) -> Sequences:
    """Return the sequences with weights from 1 to 3, so that the loss must use them."""
    return replace(sequences, weights=(1 + np.arange(len(sequences.items)) % 3).astype(np.float32))


def as_list(array: np.ndarray) -> list | float:
    """Return an array as lists, single precision with nine digits, which identify every such number."""
    if array.dtype != np.float32:
        return array.tolist()
    return [as_list(row) for row in array] if array.ndim else float(f"{array:.9g}")
