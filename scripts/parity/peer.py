"""RecTools in its own environment, the variants of its model, and the input of both libraries."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from benchmark.peer import PEERS

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import ModelConfig, TrainConfig
from sasrec_lab.data.sequences import Sequences

FOLDER = Path("outputs/parity")
PEER = replace(PEERS["rectools"], script="rectools_parity.py")
MODEL = ["model=sasrec_rectools", "loss=softmax"]

Arrays = dict[str, np.ndarray]


@cache
def defaults() -> TrainConfig:
    """Return the config of the RecTools preset, for interactions that are given as a table."""
    return load([*MODEL, "dataset=csv", "dataset.path=-"])


def variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one head and several, with and without RecTools' use_key_padding_mask."""
    heads = next(n for n in (4, 3, 2, 1) if cfg.dim % n == 0)
    return {
        f"{n} head{'s' if n > 1 else ''}, {'no ' if pad_keys else ''}key mask": replace(cfg, heads=n, pad_keys=pad_keys)
        for n in sorted({1, heads})
        for pad_keys in (True, False)
    }


def sizes(cfg: TrainConfig) -> dict[str, Any]:
    """Return the sizes and settings that both libraries get."""
    model = {key: getattr(cfg.model, key) for key in ("blocks", "heads", "dim", "maxlen", "dropout")}
    return model | {"batch_size": cfg.batch_size, "lr": cfg.optimizer.lr, "seed": cfg.seed}


def with_weights(sequences: Sequences) -> Sequences:
    """Return the sequences with weights from 1 to 3, so that the loss must use them."""
    return replace(sequences, weights=(1 + np.arange(len(sequences.items)) % 3).astype(np.float32))
