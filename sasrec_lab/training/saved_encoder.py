"""Load the encoder in a checkpoint, once its weights are known to be those of its own configuration."""

from pathlib import Path

import torch

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.run.checkpoint_file import load
from sasrec_lab.run.folder import ITEMS, RETRAIN_HINT

_MAX_POSITIONS = 2**28  # numbers in a table of positions, 1 GiB


def load_encoder(path: Path, num_items: int) -> tuple[Encoder, ModelConfig]:
    """Return the encoder in a checkpoint, and its config.

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
    model = section_of(saved["hyper_parameters"]["config"], "model", ModelConfig)
    state = saved.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} has no state_dict of named weights; {RETRAIN_HINT}")
    weights = {name[len("encoder.") :]: x for name, x in state.items() if name.startswith("encoder.")}
    try:
        _check_shapes(weights, num_items, model)
        encoder = Encoder(num_items, model)
        encoder.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} does not fit its own configuration: {reason}; {RETRAIN_HINT}") from error
    if not all(weights.isfinite().all() for weights in encoder.parameters()):
        raise InputError(f"{path} contains NaN or infinite weights; retrain with a lower optimizer.lr")
    return encoder, model


def _check_shapes(weights: dict[str, torch.Tensor], num_items: int, model: ModelConfig) -> None:
    """Raise an exception if the weights are not those of the configured encoder, before it takes memory."""
    if model.blocks > len(weights) or model.maxlen * model.dim > _MAX_POSITIONS:
        raise ValueError(f"its weights are not those of {model.blocks:,} blocks and maxlen {model.maxlen:,}")
    with torch.device("meta"):  # tensors with shapes only
        encoder = Encoder(num_items, model)
    encoder.load_state_dict(weights, assign=True)
