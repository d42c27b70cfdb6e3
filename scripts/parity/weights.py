"""Carry weights, or gradients, of other libraries over to the names and shapes of our encoder."""

import numpy as np
import torch
from torch import Tensor, nn

from parity.comparison import Arrays

# Part of a parameter's name there, and here.
RECTOOLS = {
    "transformer_layers.transformer_blocks": "blocks",
    "transformer_layers.last_layernorm": "final_norm",
    "item_model.item_net_blocks.0.ids_emb": "input_items",
    "pos_encoding_layer.pos_emb": "positions",  # both count from the newest item
    "multi_head_attn.": "",
    "out_proj": "output",
    "q_layer_norm": "attention_norm",
    "ff_layer_norm": "feed_forward_norm",
    "layer_norm_1": "attention_norm",
    "layer_norm_2": "feed_forward_norm",
    "gating_linear_1": "attention_gate",
    "gating_linear_2": "feed_forward_gate",
    "ff_linear_1": "inner",
    "ff_linear_2": "outer",
    "transformer_layers.stu_blocks": "blocks",
    "rel_attn.time_weights": "time_bias",
    "rel_attn.pos_weights": "position_bias",
    "uvqk_proj": "projection.weight",
    "output_mlp": "output",
    "norm_input": "input_norm",
    "norm_attn_output": "output_norm",
}
SWIGLU = {"ff_linear_1": "gate", "ff_linear_3": "inner"}
REPLAY = {
    "item_embedder.cat_embeddings.item_id": "input_items",
    "item_embedder.position.pe": "positions",
    "item_embedder.mask_embedding.weight": "mask",
    "transformer_blocks": "blocks",
    "attention.": "",
    "out_proj": "output",
    "pff_norm": "feed_forward_norm",
    "pff.w_1": "feed_forward.inner",
    "pff.w_2": "feed_forward.outer",
    "_head.linear.weight": "output_items.weight",
    "_head.linear.bias": "head.bias",
    "_head.out_bias": "head.bias",
}

HUGGING_FACE = {
    "bert.embeddings.position_embeddings": "positions",  # both count from the oldest item
    "bert.embeddings.LayerNorm": "embedding_norm",
    "bert.encoder.layer": "blocks",
    "attention.self.": "",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.inner",
    "output.dense": "feed_forward.outer",
    "output.LayerNorm": "feed_forward_norm",
}


def from_rectools(arrays: Arrays, part: str, order: np.ndarray) -> dict[str, Tensor]:
    """Return our parameters from `part/...`; `order` (V,) has RecTools' index of each of our items.

    RecTools' item table begins with the padding and, in BERT4Rec, the mask.
    """
    is_swiglu = any("ff_linear_3" in name for name in arrays)
    found = renamed(arrays, part, RECTOOLS | SWIGLU if is_swiglu else RECTOOLS)
    for name, x in found.items():
        if name.endswith("projection.weight"):
            u, v, q, k = x.T.chunk(4)
            found[name] = torch.cat([u, q, v, k])
        if name.endswith("position_bias"):  # those of the past; there the nearest is the last of them
            found[name] = x[: len(x) // 2 + 1].flip(0)
    table = found["input_items.weight"]
    extra = len(table) - len(order)
    if extra == 2:
        found["mask"] = table[1:2]
    found["input_items.weight"] = found["output_items.weight"] = table[extra:][torch.from_numpy(order)]
    return found


def from_replay(arrays: Arrays, part: str, order: np.ndarray) -> dict[str, Tensor]:
    """Return our parameters from `part/...`; RePlay counts positions from the oldest cell of a padded row."""
    own = {name: x for name, x in arrays.items() if "_head._item_embedder" not in name}  # the tied table again
    found = renamed(own, part, REPLAY)
    places = torch.from_numpy(order)
    for name in ("input_items.weight", "output_items.weight", "head.bias"):
        if name in found:
            found[name] = found[name][places]
    found.setdefault("output_items.weight", found["input_items.weight"])
    found["positions.weight"] = found["positions.weight"].flip(0)
    return found


def from_hugging_face(arrays: Arrays, part: str, order: np.ndarray) -> dict[str, Tensor]:
    """Return our parameters from `part/...`; the table begins with padding and the mask."""
    found = renamed(arrays, part, HUGGING_FACE)
    table = found.pop("table.weight")
    found["mask"] = table[1:2]
    found["input_items.weight"] = found["output_items.weight"] = table[2:][torch.from_numpy(order)]
    return found


def renamed(arrays: Arrays, part: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Return the arrays below `part/` with our names, and queries, keys and values, which they have in one, apart."""
    found = {}
    for key, x in arrays.items():
        if not key.startswith(f"{part}/"):
            continue
        name = key.removeprefix(f"{part}/")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        values = torch.from_numpy(x).float()
        if "in_proj_" in name:
            for own, chunk in zip(("query.", "key.", "value."), values.chunk(3), strict=True):
                found[name.replace("in_proj_", own)] = chunk
        else:
            found[name] = values
    return found


def relative_difference(module: nn.Module, theirs: dict[str, Tensor], scales: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient over its scale, which is the largest gradient of its parameter."""
    found = []
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found.append(((parameter.grad - theirs[name]).abs() / scales[name]).max().item())
    return max(found)


def scales_of(arrays: Arrays, part: str) -> Arrays:
    """Return arrays like those below `part/`, filled with the largest absolute value of each."""
    return {key: np.full_like(x, np.abs(x).max()) for key, x in arrays.items() if key.startswith(f"{part}/")}
