"""Compare states, scores, losses and lists of both libraries at equal weights."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from parity.peer import FOLDER, PEER, Arrays, defaults, sizes, variants
from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.config.schema import ModelConfig, TrainConfig
from sasrec_lab.data.batches import pack
from sasrec_lab.data.holdout import Holdout, hold_out
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.objectives import NextItem
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.rankers import EncoderRanker
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.training.losses import ItemTable, softmax

WITHIN = 1e-5
WINDOWS = 32  # per batch of the losses, as in peers/rectools_parity.py


def outputs_of_rectools(sequences: Sequences, cfg: TrainConfig, k: int) -> dict[str, Arrays]:
    """Return what RecTools computes, by variant."""
    file, out = FOLDER / "interactions.npz", FOLDER / "rectools.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1], weight=sequences.weights)
    parts = {
        name: {"heads": model.heads, "key_mask": not model.pad_keys} for name, model in variants(cfg.model).items()
    }
    allowed = sequences.item_ids[::3].tolist()
    PEER.run(sizes(cfg) | {"parts": parts, "interactions": str(file), "out": str(out), "allowed": allowed, "k": k})
    found: dict[str, Arrays] = {name: {"allowed": np.array(allowed)} for name in parts}
    with np.load(out) as arrays:
        for key in arrays:
            name, _, rest = key.partition("/")
            found[name][rest] = arrays[key]
    return found


@torch.inference_mode()
def differences(theirs: Arrays, sequences: Sequences, cfg: ModelConfig) -> dict[str, float]:
    """Return the largest absolute difference of each kind of output, or infinity if lists differ in form."""
    holdout = hold_out(sequences, Windows.last, Catalogue.train, cfg.maxlen, HoldoutMode.none)
    encoder = carried_over(theirs, holdout.item_ids, cfg).eval()
    places = Ids(theirs["item_ids"]).indices(holdout.item_ids, "items")  # RecTools' index of each of our items
    histories = Histories.from_sequences(sequences, Ids(holdout.item_ids))
    states = newest_states(encoder, histories, histories.users.indices(theirs["user_ids"], "users"))
    found = {
        "states": largest(states, theirs["states"]),
        "states in training": 0.0,
        "scores": largest(states @ encoder.item_table.T, theirs["scores"][:, places]),
    }
    losses, with_pad, training_states = losses_and_states(encoder, theirs, holdout)
    found["states in training"] = largest(training_states, theirs["training_states"])
    found["softmax loss, the pad a class as in RecTools"] = largest(with_pad, theirs["losses"])
    found["softmax loss, items only"] = largest(losses, theirs["losses_without_pad"])
    recommender = Recommender(
        FOLDER, EncoderRanker(encoder, defaults().objective, cfg), Ids(holdout.item_ids), defaults().dataset
    )
    for name in lists_in(theirs):
        columns = {key: theirs[f"lists/{name}/{key}"] for key in ("item_id", "score", "rank")}
        target = "user_id" if name.startswith("users") else "target_item_id"
        expected = pd.DataFrame({target: theirs[f"lists/{name}/{target}"], **columns})
        found[f"lists of {name}"] = lists_differ(our_lists(recommender, name, theirs, sequences), expected, target)
    return found


def carried_over(theirs: Arrays, item_ids: np.ndarray, cfg: ModelConfig) -> Encoder:
    """Return our encoder with RecTools' weights, which has three projections in one matrix and a padding item."""

    def weights(name: str) -> Tensor:
        return torch.from_numpy(theirs[f"weights/{name}"])

    order = torch.from_numpy(Ids(theirs["item_ids"]).indices(item_ids, "items"))
    state = {"input_items.weight": weights("item_model.item_net_blocks.0.ids_emb.weight")[1:][order]}
    state["output_items.weight"] = state["input_items.weight"]
    state["positions.weight"] = weights("pos_encoding_layer.pos_emb.weight")  # both count from the newest item
    names = {
        "attention_norm": "q_layer_norm",
        "output": "multi_head_attn.out_proj",
        "feed_forward_norm": "ff_layer_norm",
        "feed_forward.inner": "feed_forward.ff_linear_1",
        "feed_forward.outer": "feed_forward.ff_linear_2",
    }
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = weights(f"transformer_layers.last_layernorm.{kind}")
        for block in range(cfg.blocks):
            at = f"transformer_layers.transformer_blocks.{block}."
            for own, name in names.items():
                state[f"blocks.{block}.{own}.{kind}"] = weights(f"{at}{name}.{kind}")
            packed = weights(f"{at}multi_head_attn.in_proj_{kind}").chunk(3)
            for own, part in zip(("query", "key", "value"), packed, strict=True):
                state[f"blocks.{block}.{own}.{kind}"] = part
    encoder = Encoder(len(item_ids), cfg)
    encoder.load_state_dict(state)
    return encoder


def newest_states(encoder: Encoder, histories: Histories, users: np.ndarray) -> Tensor:
    """Return each user's state after the newest item."""
    ends = histories.offsets[users + 1]
    batch, _ = pack(ends - np.minimum(histories.lengths[users], encoder.maxlen), ends, histories.items)
    return encoder.newest(batch)  # (len(users), D)


def losses_and_states(encoder: Encoder, theirs: Arrays, holdout: Holdout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss per batch of windows, the same with the pad as an additional item, and the first batch's states.

    RecTools' softmax includes the pad as a class, although it is never a target: one more term in every denominator.
    """
    pad = torch.from_numpy(theirs["weights/item_model.item_net_blocks.0.ids_emb.weight"][:1])
    tables = ItemTable(encoder.item_table), ItemTable(torch.cat([encoder.item_table, pad]))
    objective, rng = NextItem(defaults().objective, defaults().model), np.random.default_rng(0)
    losses, with_pad, states = [], [], []
    for start in range(0, len(holdout.window_starts), WINDOWS):
        windows = np.arange(start, min(start + WINDOWS, len(holdout.window_starts)))
        inputs, labels = objective.training(holdout, windows, rng)
        states.append(encoder(inputs))  # (T, D)
        for table, found in zip(tables, (losses, with_pad), strict=True):
            found.append(softmax(states[-1], table, labels, None, defaults().loss))
        if start == 0:
            first = states[0][labels.targets > 0]
    return torch.stack(losses), torch.stack(with_pad), first


def lists_in(theirs: Arrays) -> list[str]:
    """Return the names of the lists that RecTools made."""
    return list(dict.fromkeys(key.split("/")[1] for key in theirs if key.startswith("lists/")))


def our_lists(recommender: Recommender, name: str, theirs: Arrays, sequences: Sequences) -> pd.DataFrame:
    """Return our lists for the name of lists that RecTools made."""
    allowed = theirs["allowed"] if name.endswith("some items allowed") else None
    if allowed is not None:  # unknown items would only cause a warning
        allowed = allowed[np.isin(allowed, theirs["item_ids"])]
    k = int(theirs[f"lists/{name}/rank"].max())
    if name.startswith("items"):
        return recommender.recommend_to_items(theirs["item_ids"], k, allowed, filter_itself="excluded" in name)
    users, items = np.repeat(sequences.user_ids, sequences.lengths), sequences.item_ids[sequences.items - 1]
    histories = pd.DataFrame({"user_id": users, "item_id": items, "datetime": np.arange(len(items))})
    return recommender.recommend(theirs["user_ids"], k, histories, "excluded" in name, allowed)


def lists_differ(ours: pd.DataFrame, theirs: pd.DataFrame, target: str) -> float:
    """Return the largest difference of the scores at one rank of one list.

    It is infinite if lists differ in length, or in the item at a rank; two items of a list whose scores are within
    1e-5 of each other may come in either order.
    """
    keys = [target, "rank"]
    both = ours.merge(theirs, on=keys, how="outer", suffixes=("", "_theirs"))
    if both.isna().any(axis=None):
        return float("inf")
    others = both[both["item_id"] != both["item_id_theirs"]]
    if len(others):
        score = ours.set_index([target, "item_id"])["score"]
        swapped = pd.MultiIndex.from_frame(others[[target, "item_id_theirs"]])
        if (np.abs(score.reindex(swapped).to_numpy() - others["score"].to_numpy()) <= WITHIN).sum() < len(others):
            return float("inf")
    return float(np.abs(both["score"] - both["score_theirs"]).max())


def largest(ours: Tensor, theirs: np.ndarray) -> float:
    """Return the largest absolute difference, or infinity if the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - torch.from_numpy(theirs)).abs().max())


def rows_of(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return one row per kind of output, with the difference of each variant."""
    names = next(iter(found.values()))
    return [{"difference": name} | {variant: part[name] for variant, part in found.items()} for name in names]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    heading = "| largest difference | " + " | ".join(list(rows[0])[1:]) + " |"
    lines = [f"| {name} | " + " | ".join(f"{x:.1e}" for x in values) + " |" for name, *values in map(dict.values, rows)]
    return "\n".join([heading, "|---|" + "---|" * (len(rows[0]) - 1), *lines])
