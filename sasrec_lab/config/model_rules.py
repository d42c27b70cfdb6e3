"""Which keys of an encoder go together, and which a block does not have; those that do not are refused in one line."""

from typing import Any

from sasrec_lab.config.checks import check_above_0, check_at_least, check_rate, typed_form
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.model import (
    POINTWISE,
    Activation,
    BlockName,
    Init,
    ItemVectors,
    ModelConfig,
    Norm,
    PosEmb,
    PositionsFrom,
    TimeBias,
)
from sasrec_lab.errors import InputError

_MOST_HEADS = 1024  # that a message suggests

# Keys that a block does not have, or in one form only, with the value that they must have there
_FIXED: dict[BlockName | Foreign, dict[str, Any]] = {
    BlockName.gru: {
        "heads": 1,
        "norm": Norm.sasrec,
        "norm_eps": 1e-8,
        "residual": True,
        "ff_dim": None,
        "activation": Activation.relu,
        "output_projection": False,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
        "dropout_output": None,
        "dropout_inner": None,
        "dropout_input": None,
    },
    BlockName.hstu: {
        "norm": Norm.pre,
        "residual": True,
        "ff_dim": None,
        "activation": Activation.relu,
        "output_projection": True,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
        "dropout_output": None,
        "dropout_inner": None,
    },
    BlockName.fuxi: {
        "norm": Norm.pre,
        "norm_affine": False,
        "residual": True,
        "activation": Activation.swiglu,
        "output_projection": True,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
        "dropout_output": None,
        "dropout_inner": None,
    },
}
# Keys of these blocks, with the value that they must have for the others
_OF_POINTWISE: dict[str, Any] = {
    "position_bias": False,
    "norm_affine": True,
    "divisor": None,
    "qk_dim": None,
    "v_dim": None,
}


def check_model(model: ModelConfig) -> None:
    """Raise InputError for the first combination of an encoder's keys that makes no sense, with the key to change."""
    _check_pad_keys(model)
    _check_block(model)
    _check_optional_numbers(model)
    _check_dropout(model)
    _check_heads(model)
    _check_positions(model)
    _check_times(model)
    _check_items(model)


def _check_pad_keys(model: ModelConfig) -> None:
    if not model.pad_keys:
        return
    for key, refused in (("block=ligr", model.block is BlockName.ligr), ("causal=false", not model.causal)):
        if refused:
            raise InputError(f"model.pad_keys=true does not go with model.{key}; set model.pad_keys=false")
    if model.block is BlockName.transformer and model.norm is not Norm.sasrec:
        raise InputError(
            f"model.pad_keys=true requires model.norm=sasrec (as in RecTools), not {model.norm.name}; set"
            " model.pad_keys=false"
        )


def _check_block(model: ModelConfig) -> None:
    if model.block is BlockName.ligr and model.norm is not Norm.pre:
        raise InputError(f"model.norm={model.norm.name} must be pre for model.block=ligr; set it to pre")
    if model.block is BlockName.gru and model.blocks < 1:
        raise InputError(f"model.blocks={model.blocks} must be at least 1 for model.block=gru")
    for key, value in _FIXED.get(model.block, {}).items():
        if (given := getattr(model, key)) != value:
            raise InputError(
                f"model.{key}={typed_form(given)} does not apply to model.block={model.block.name}; set it to"
                f" {typed_form(value)}"
            )
    if model.block in POINTWISE or isinstance(model.block, Foreign):  # which of the keys that has is its own matter
        return
    for key, value in _OF_POINTWISE.items():
        if (given := getattr(model, key)) != value:
            raise InputError(
                f"model.{key}={typed_form(given)} only applies to model.block=hstu and fuxi; set it to"
                f" {typed_form(value)}" + (", or use model.pos_emb=relative" if key == "position_bias" else "")
            )
    if model.init is Init.meta:
        raise InputError("model.init=meta only applies to model.block=hstu and fuxi; set it to normal")


def _check_optional_numbers(model: ModelConfig) -> None:
    """Check the numbers that may be null, which the block is known to have."""
    widths = ("ff_dim", "qk_dim", "v_dim") if model.block in POINTWISE else ("ff_dim",)
    for key in widths:
        if (width := getattr(model, key)) is not None:
            check_at_least(f"model.{key}", width, 1)
    if model.block in POINTWISE and model.divisor is not None:
        check_above_0("model.divisor", model.divisor, "model.maxlen")
    for key in ("dropout_attention", "dropout_input", "dropout_output", "dropout_inner"):
        if (rate := getattr(model, key)) is not None:
            check_rate(f"model.{key}", rate)


def _check_dropout(model: ModelConfig) -> None:
    if model.dropout_items and not model.share_items:
        raise InputError(
            f"model.dropout_items={model.dropout_items} is one mask for inputs and outputs, but"
            " model.share_items=false has two tables; set it to 0, or model.share_items=true"
        )
    if model.token_dropout and not model.causal:
        raise InputError(
            f"model.token_dropout={model.token_dropout} would hide items next to those that objective=masked_items"
            " hides; set it to 0 for model.causal=false, or raise objective.mask_share"
        )


def _check_heads(model: ModelConfig) -> None:
    if model.dim % model.heads and None in (model.qk_dim, model.v_dim):
        fits = [str(heads) for heads in range(1, min(model.dim, _MOST_HEADS) + 1) if model.dim % heads == 0]
        widths = " or set model.qk_dim and model.v_dim" if model.block in POINTWISE else ""
        heads = f"model.heads={model.heads}; use heads {', '.join(fits)}{widths}"
        raise InputError(f"model.dim={model.dim} is not a multiple of {heads}")


def _check_positions(model: ModelConfig) -> None:
    if model.pos_emb in (PosEmb.rope, PosEmb.relative):
        if model.block is BlockName.gru:
            raise InputError(
                f"model.pos_emb={model.pos_emb.name} is a part of attention, which model.block=gru does not have;"
                " set it to none"
            )
        if model.block in POINTWISE:
            raise InputError(
                f"model.pos_emb={model.pos_emb.name} does not go with model.block={model.block.name}; set it to"
                " learned, sinusoidal or none: the bias by distance is model.position_bias=true there"
            )
        if model.pad_keys:
            raise InputError(
                f"model.pos_emb={model.pos_emb.name} does not go with model.pad_keys=true; set model.pad_keys=false,"
                " or model.pos_emb=learned"
            )
    if model.pos_emb is PosEmb.rope and model.dim // model.heads % 2:
        sizes = f"model.dim={model.dim} / model.heads={model.heads}"
        raise InputError(f"model.pos_emb=rope rotates pairs of columns, so {sizes} must be even")
    if model.positions_from is PositionsFrom.oldest:
        if model.pos_emb not in (PosEmb.learned, PosEmb.sinusoidal):
            raise InputError(
                "model.positions_from=oldest only applies to pos_emb=learned and sinusoidal; set it to newest for"
                f" pos_emb={model.pos_emb.name}"
            )
        if model.pad_keys:
            raise InputError("model.positions_from=oldest requires model.pad_keys=false")


def _check_times(model: ModelConfig) -> None:
    bias, block = model.time_bias, model.block.name
    if bias is TimeBias.none:
        return  # query_time is of no account, so that a sweep may have models without times
    blocks = {
        TimeBias.decay: (BlockName.transformer, BlockName.ligr),
        TimeBias.buckets: POINTWISE,
    }[bias]
    if model.block not in blocks and not isinstance(model.block, Foreign):
        others: dict[BlockName, str] = {BlockName.gru: "none"} | dict.fromkeys(POINTWISE, "buckets or none")
        fitting = others.get(model.block, "decay or none")
        raise InputError(f"model.time_bias={bias.name} does not go with model.block={block}; use {fitting}")
    for key, value in (("causal", True), ("pad_keys", False)):
        if getattr(model, key) is not value:
            raise InputError(
                f"model.time_bias={bias.name} requires model.{key}={typed_form(value)}; set that, or"
                " model.time_bias=none"
            )


def _check_items(model: ModelConfig) -> None:
    if model.items is not ItemVectors.ids and not model.share_items:
        raise InputError(
            f"model.share_items=false does not go with model.items={model.items.name}, whose vectors are both input"
            " and output; set model.share_items=true"
        )
    if model.id_dropout and model.items is not ItemVectors.both:
        raise InputError(
            f"model.id_dropout={model.id_dropout} only applies to model.items=both, where features remain without"
            f" the id; set it to 0 for model.items={model.items.name}"
        )
