"""Load the encoder in a checkpoint, once its weights are known to be those of its own configuration."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.model import ItemVectors, ModelConfig
from sasrec_lab.data.items import ItemFeatures
from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.run.checkpoint_file import load
from sasrec_lab.run.folder import BEST_CHECKPOINT, ITEMS, LAST_CHECKPOINT, RETRAIN_HINT

_MAX_POSITIONS = 2**28  # numbers in a table of positions, 1 GiB


def tested_checkpoint(folder: Path, results: dict[str, Any]) -> Path:
    """Return the path of the checkpoint that a finished run's metrics.json measured.

    Raises:
        InputError: the file is gone.
    """
    if results["best_epoch"] is None:
        return folder / LAST_CHECKPOINT
    path = folder / BEST_CHECKPOINT
    if not path.is_file():
        raise InputError(f"{path}, which the run was tested with, is missing; {RETRAIN_HINT}")
    return path


def load_encoder(
    path: Path, num_items: int, *, frozen: bool = True, trust: Iterable[str] = ()
) -> tuple[Encoder, ModelConfig]:
    """Return the encoder in a checkpoint, and its config; if `frozen`, with a table of vectors that features made.

    Its block and head may be code of the modules in `trust`, and of no others.

    Raises:
        InputError: the checkpoint is broken, its weights are not finite, or it has another number of items than the
            run folder.
    """
    saved = load(path, RETRAIN_HINT)
    if saved["hyper_parameters"]["num_items"] != num_items:
        raise InputError(
            f"{path} was trained on {saved['hyper_parameters']['num_items']:,} items, but {path.parent.parent / ITEMS}"
            f" lists {num_items:,}; the files belong to different runs, so put the right ones together"
        )
    model = section_of(saved["hyper_parameters"]["config"], "model", ModelConfig, trust)
    state = saved.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} has no state_dict of named weights; {RETRAIN_HINT}")
    weights = {name[len("encoder.") :]: x for name, x in state.items() if name.startswith("encoder.")}
    try:
        features = _saved_features(weights, num_items) if model.items is not ItemVectors.ids else None
        _check_shapes(weights, num_items, model, features)
        encoder = Encoder(num_items, model, features)
        encoder.load_state_dict(weights)
        if frozen:
            encoder.freeze_vectors()
    except InputError:  # of code that is not trusted or not there
        raise
    except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} does not fit its own configuration: {reason}; {RETRAIN_HINT}") from error
    if not all(weights.isfinite().all() for weights in encoder.parameters()):
        raise InputError(f"{path} contains NaN or infinite weights; retrain with a lower optimizer.lr")
    return encoder, model


def _saved_features(weights: dict[str, torch.Tensor], num_items: int) -> ItemFeatures:
    """Return the features in a checkpoint; raise KeyError or ValueError if they are not those of this many items."""
    offsets, categories, given = (weights[f"input_items.{name}"] for name in ("offsets", "categories", "given"))
    tables = {name: weights.get(f"input_items.{name}.weight") for name in ("ids", "by_category")}
    count = 0 if tables["by_category"] is None else len(tables["by_category"])
    if any(x.dtype != torch.int64 or x.ndim != 1 for x in (offsets, categories)):
        raise ValueError("its features are not lists of integers")
    if len(offsets) != num_items + 1 or given.ndim != 2 or len(given) != num_items:
        raise ValueError(f"its features are not those of {num_items:,} items")
    steps = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != len(categories) or (steps < 0).any():
        raise ValueError("its features have no valid offsets")
    if len(categories) and not 0 <= int(categories.min()) <= int(categories.max()) < count:
        raise ValueError("its features have categories without a vector")
    trained = num_items if tables["ids"] is None else len(tables["ids"])
    if not 0 < trained <= num_items:
        raise ValueError(f"it has vectors of {trained:,} ids for {num_items:,} items")
    names = [""] * count
    return ItemFeatures(trained, offsets.numpy(), categories.numpy(), names, given.numpy() if given.shape[1] else None)


def _check_shapes(
    weights: dict[str, torch.Tensor], num_items: int, model: ModelConfig, features: ItemFeatures | None
) -> None:
    """Raise an exception if the weights are not those of the configured encoder, before it takes memory."""
    if model.blocks > len(weights) or model.maxlen * model.dim > _MAX_POSITIONS:
        raise ValueError(f"its weights are not those of {model.blocks:,} blocks and maxlen {model.maxlen:,}")
    with torch.device("meta"):  # tensors with shapes only
        encoder = Encoder(num_items, model, features)
    encoder.load_state_dict(weights, assign=True)
