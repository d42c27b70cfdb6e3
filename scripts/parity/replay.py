"""Compare states and logits with RePlay's Bert4Rec at equal weights."""

from dataclasses import replace

import numpy as np
import torch
from benchmark.peer import PEERS

from parity.comparison import FOLDER, Arrays, Comparison, largest
from parity.rectools import MASK_SHARE, read_parts, sizes
from parity.weights import from_replay
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import pack
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder

PEER = replace(PEERS["replay"], script="replay_parity.py")


def variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one item table and with two, each with a bias per item."""
    return {
        f"{name} tables": replace(cfg, heads=4, share_items=shared, output_bias=True)
        for name, shared in {"shared": True, "separate": False}.items()
    }


def outputs(sequences: Sequences, cfg: TrainConfig, variants: dict[str, ModelConfig], k: int) -> dict[str, Arrays]:
    """Return what RePlay computes, by variant."""
    file, out = FOLDER / "interactions.npz", FOLDER / "replay.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1])
    parts = {name: {"heads": variant.heads, "tied": variant.share_items} for name, variant in variants.items()}
    task = {"parts": parts, "interactions": str(file), "out": str(out), "mask_share": MASK_SHARE}
    PEER.run(sizes(cfg) | task)
    return read_parts(out)


@torch.no_grad()
def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest absolute difference of each kind of output."""
    order = Ids(theirs["item_ids"]).indices(sequences.item_ids, "items")  # RePlay's index of each of our items
    encoder = Encoder(len(order), replace(cfg.model, dropout=0.0, dropout_output=None)).eval()
    encoder.load_state_dict(from_replay(theirs, "weights", order))
    items_of = np.zeros(len(order) + 1, np.int64)  # our item of each of theirs; the mask stays 0
    items_of[order + 1] = np.arange(1, len(order) + 1)
    items = items_of[theirs["training/items"]]
    ends = np.cumsum(theirs["training/lengths"])
    states = encoder(pack(np.append(0, ends[:-1]), ends, items)[0])[: len(items)]
    users = slice(len(ends))
    objective = build_objective(cfg.objective, cfg.model)
    inputs = objective.inference(sequences.items, sequences.offsets[:-1][users], sequences.offsets[1:][users])
    at_mask, newest = states[torch.from_numpy(items == 0)], encoder.newest(inputs)
    return {
        "states of all tokens in training": largest(states, theirs["training/states"]),
        "logits of masked tokens": largest(encoder.head(at_mask) @ encoder.item_table.T, theirs["logits"][:, order]),
        "scores": largest(newest @ encoder.item_table.T, theirs["scores"][:, order]),
    }


BERT4REC = Comparison(
    name="replay",
    by="BERT4Rec, RePlay",
    overrides=("model=bert4rec", "loss=softmax"),
    variants=variants,
    outputs=outputs,
    differences=differences,
)
