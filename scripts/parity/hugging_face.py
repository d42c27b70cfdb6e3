"""Compare states, scores, losses and gradients with Hugging Face's BertModel, the BERT4Rec of Turning Dross."""

from dataclasses import replace

import numpy as np
import torch
from benchmark.peer import Peer
from torch import Tensor

from parity.comparison import FOLDER, GRADIENTS, Arrays, Comparison, largest
from parity.rectools import MASK_SHARE, bert4rec_variants, labeled, read_parts, sizes
from parity.weights import from_hugging_face, relative_difference, scales_of
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import Labels, PackedBatch, as_tensor, pack
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.training.losses import ItemTable, softmax

PINS = ("transformers==4.57.3", "torch==2.13.0", "numpy==2.3.5")
PEER = Peer("hugging-face", "hugging_face_parity.py", PINS, (), "hugging_face")


def outputs(sequences: Sequences, cfg: TrainConfig, variants: dict[str, ModelConfig], k: int) -> dict[str, Arrays]:
    """Return what the model computes, by variant."""
    file, out = FOLDER / "interactions.npz", FOLDER / "hugging_face.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1])
    parts = {name: {"heads": variant.heads} for name, variant in variants.items()}
    PEER.run(sizes(cfg) | {"parts": parts, "interactions": str(file), "out": str(out), "mask_share": MASK_SHARE})
    return read_parts(out)


def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest absolute difference of each kind of output.

    The authors' softmax includes the padding and the mask as classes, although they are never targets.
    """
    order = Ids(theirs["item_ids"]).indices(sequences.item_ids, "items")  # their index of each of our items
    encoder = Encoder(len(order), replace(cfg.model, dropout=0.0, dropout_output=None))
    encoder.load_state_dict(from_hugging_face(theirs, "weights", order))
    newest = newest_states(encoder, sequences, cfg, len(theirs["states"]))
    inputs, labels = training_batch(theirs, order)
    states = encoder.train()(inputs)
    extra_tokens = torch.from_numpy(theirs["weights/table.weight"]).float()[: -len(order)]
    tables = (torch.cat([encoder.item_table, extra_tokens]), encoder.item_table)
    with_extra, without = (
        softmax(labeled(states, labels), ItemTable(table), labels, None, cfg.loss) for table in tables
    )
    without.backward()
    gradients, scales = (
        from_hugging_face(arrays, "gradients", order) for arrays in (theirs, scales_of(theirs, "gradients"))
    )
    for name in scales:  # a bias of keys moves all scores of a query alike: its gradient is zero but for rounding
        scales[name] = scales[name.replace("key.bias", "query.bias")]
    return {
        "states of the newest items": largest(newest, theirs["states"]),
        "scores": largest(newest @ encoder.item_table.detach().T, theirs["scores"][:, order]),
        "states of all tokens in training": largest(states[: inputs.offsets[-1]].detach(), theirs["training/states"]),
        "softmax loss, padding and mask classes": largest(with_extra.detach(), theirs["loss"]),
        "softmax loss, items only": largest(without.detach(), theirs["loss_without_extra_tokens"]),
        GRADIENTS: relative_difference(encoder, gradients, scales),
    }


@torch.inference_mode()
def newest_states(encoder: Encoder, sequences: Sequences, cfg: TrainConfig, users: int) -> Tensor:
    """Return the state of the mask behind the history of each of the first users (U, D)."""
    starts, ends = sequences.offsets[:users], sequences.offsets[1 : users + 1]
    return encoder.eval().newest(build_objective(cfg.objective, cfg.model).inference(sequences.items, starts, ends))


def training_batch(theirs: Arrays, order: np.ndarray) -> tuple[PackedBatch, Labels]:
    """Return their masked histories, and the items that were masked, as a batch of ours."""
    items_of = np.zeros(len(order) + 1, np.int64)  # our item of each of theirs; the mask stays 0
    items_of[order + 1] = np.arange(1, len(order) + 1)
    ends = np.cumsum(theirs["training/lengths"])
    inputs, places = pack(np.append(0, ends[:-1]), ends, items_of[theirs["training/items"]])
    targets = items_of[theirs["training/targets"]][places]
    rows = np.flatnonzero(targets)
    counts = np.diff(np.searchsorted(rows, inputs.offsets))
    return inputs, Labels(as_tensor(targets[rows]), counts, as_tensor(rows))


BERT4REC = Comparison(
    name="hugging_face",
    by="BERT4Rec, Hugging Face",
    overrides=("dross=bert4rec",),
    variants=bert4rec_variants,
    outputs=outputs,
    differences=differences,
)
