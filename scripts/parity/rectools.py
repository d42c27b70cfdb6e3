"""Compare states, scores, losses, gradients and lists with RecTools' transformers at equal weights."""

from bisect import bisect_left
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark.peer import PEERS
from torch import Tensor

from parity.comparison import AT_MOST, FOLDER, GRADIENTS, Arrays, Comparison, largest
from parity.lists import lists_differences
from parity.weights import from_rectools, relative_difference, scales_of
from sasrec_lab.config.dataset import Catalogue, HoldoutMode, Windows
from sasrec_lab.config.model import ModelConfig, TimeBias
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import LossName, ObjectiveName, SamplerName
from sasrec_lab.data.batches import Labels, Negatives, PackedBatch, as_tensor, pack
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops.time_buckets import time_buckets
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.training.losses import ItemTable, sampled_softmax, softmax

PEER = replace(PEERS["rectools"], script="rectools_parity.py")
WINDOWS = 32  # per batch of the losses, as in peers/rectools_parity.py
MASK_SHARE = 0.2
NEGATIVES = 3
UNIFORM = {"name": LossName.sampled_softmax, "sampler": SamplerName.uniform, "negatives": NEGATIVES}
DEEP = "2 heads, both biases, 8 layers"  # states are sums over the layers, and so are the errors of rounding
USERS_LISTS = ["users, seen excluded"]
ALL_LISTS = [
    f"{targets} {seen}{allowed}"
    for targets, kinds in {"users, seen": ("excluded", "kept"), "items, itself": ("excluded", "kept")}.items()
    for seen in kinds
    for allowed in ("", ", some items allowed")
]


def sasrec_variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one head and several, with and without RecTools' use_key_padding_mask."""
    return {
        f"{heads_name(n)}, {'no ' if pad_keys else ''}key mask": replace(cfg, heads=n, pad_keys=pad_keys)
        for n in (1, 4)
        for pad_keys in (True, False)
    }


def ligr_variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one head and two, one with a wide feed-forward network and one with a narrow."""
    return {
        f"{heads_name(n)}, inner width {multiple} dim": replace(cfg, heads=n, ff_dim=multiple * cfg.dim)
        for n, multiple in ((1, 4), (2, 1))
    }


def bert4rec_variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one head and several."""
    return {heads_name(n): replace(cfg, heads=n) for n in (1, 4)}


def hstu_variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return variants with one head and two, with each bias and without, and one with 8 layers.

    At the default temperature some losses are 0 in single precision, and RecTools divides by the number of the others.
    """
    cfg = replace(cfg, temperature=0.2)
    variants = {
        f"{heads_name(n)}, {name}": replace(cfg, heads=n, time_bias=TimeBias[time], position_bias=position)
        for n, time, position, name in (
            (1, "buckets", True, "both biases"),
            (2, "buckets", False, "time bias"),
            (2, "none", True, "position bias"),
            (1, "none", False, "no bias"),
        )
    }
    return variants | {DEEP: replace(cfg, heads=2, blocks=8)}


def heads_name(heads: int) -> str:
    """Return `1 head` or `4 heads`."""
    return f"{heads} head{'s' if heads > 1 else ''}"


def outputs(
    sequences: Sequences, cfg: TrainConfig, variants: dict[str, ModelConfig], k: int, model: str, lists: list[str]
) -> dict[str, Arrays]:
    """Return what one of RecTools' models computes, by variant."""
    file, out = FOLDER / "interactions.npz", FOLDER / "rectools.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    given = timed(sequences) if cfg.model.reads_times else {}
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1], weight=sequences.weights, **given)
    allowed = sequences.item_ids[::3].tolist()
    parts = {name: part_of(variant) for name, variant in variants.items()}
    task = {"model": model, "parts": parts, "interactions": str(file), "out": str(out), "lists": lists, "k": k}
    task |= {"allowed": allowed, "mask_share": MASK_SHARE, "negatives": NEGATIVES}
    PEER.run(sizes(cfg) | task)
    shared = {"allowed": np.array(allowed)} | given
    return {name: shared | arrays for name, arrays in read_parts(out).items()}


def timed(sequences: Sequences) -> Arrays:
    """Return a time for each interaction and each user's question, whose gaps are at the edges of HSTU's buckets.

    `differences` are also compared apart: both sides of each edge, up to 68 years.
    """
    seconds = range(2**31)
    buckets = range(1, int(time_buckets(torch.tensor(seconds[-1]))) + 1)
    edges = [bisect_left(seconds, bucket, key=lambda x: int(time_buckets(torch.tensor(x)))) for bucket in buckets]
    differences = np.unique(np.add.outer(edges, [-1, 0, 1]))
    gaps = differences[differences <= 400 * 86_400]
    chosen = np.random.default_rng(0).choice(gaps, len(sequences.items) + len(sequences.user_ids))
    chosen[::5] = 0
    of_users, asking = chosen[: len(sequences.items)], chosen[len(sequences.items) :]
    passed = np.cumsum(of_users)
    first = sequences.offsets[:-1]
    times = 900_000_000 + passed - np.repeat(passed[first], sequences.lengths)
    return {"time": times, "asked": times[sequences.offsets[1:] - 1] + asking, "differences": differences}


def part_of(cfg: ModelConfig) -> dict[str, Any]:
    """Return what RecTools gets of a variant."""
    part = {"heads": cfg.heads, "key_mask": not cfg.pad_keys, "ff_dim": cfg.feed_forward_width, "blocks": cfg.blocks}
    biases = {"time_bias": cfg.reads_times, "position_bias": cfg.position_bias}
    return part | biases | {"temperature": cfg.temperature}


def sizes(cfg: TrainConfig) -> dict[str, Any]:
    """Return the sizes and settings that both libraries get."""
    model = {key: getattr(cfg.model, key) for key in ("blocks", "heads", "dim", "maxlen", "dropout")}
    return model | {"batch_size": cfg.batch_size, "lr": cfg.optimizer.lr, "seed": cfg.seed}


def read_parts(file: Path) -> dict[str, Arrays]:
    """Return arrays named `variant/name` by variant."""
    found: dict[str, Arrays] = {}
    with np.load(file) as arrays:
        for key in arrays:
            variant, _, name = key.partition("/")
            found.setdefault(variant, {})[name] = arrays[key]
    return found


def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest absolute difference of each kind of output, or infinity if lists differ in form."""
    item_ids = sequences.item_ids[np.isin(sequences.item_ids, theirs["item_ids"])]  # those that RecTools knows
    order = Ids(theirs["item_ids"]).indices(item_ids, "items")  # RecTools' index of each of our items
    encoder = Encoder(len(item_ids), replace(cfg.model, dropout=0.0, dropout_output=None))
    encoder.load_state_dict(from_rectools(theirs, "weights", order))
    items_of = np.zeros(len(order) + 1, np.int64)  # our item of each of theirs; 0 stays
    items_of[order + 1] = np.arange(1, len(order) + 1)
    sequences = replace(sequences, times=theirs.get("time"))
    newest = newest_states(encoder, theirs, sequences, item_ids, cfg)
    found = {}
    if "buckets" in theirs:
        buckets = time_buckets(torch.from_numpy(theirs["differences"]))
        found["buckets of differences in time"] = largest(buckets, theirs["buckets"])
    found |= {
        "states of the newest items": largest(newest, encoder.head(torch.from_numpy(theirs["states"])).numpy()),
        "scores": largest(newest @ encoder.item_table.detach().T, theirs["scores"][:, order]),
    }
    batches = training_batches(theirs, items_of, sequences, cfg)[: len(theirs["losses"])]
    found |= training_differences(theirs, encoder, batches, items_of, order, cfg)
    return found | lists_differences(theirs, encoder, item_ids, sequences, cfg)


@torch.inference_mode()
def newest_states(
    encoder: Encoder, theirs: Arrays, sequences: Sequences, item_ids: np.ndarray, cfg: TrainConfig
) -> Tensor:
    """Return the state of each user that predicts the next item (U, D), for the users in RecTools' order."""
    histories = Histories.from_sequences(sequences, Ids(item_ids), cfg.model.reads_times)
    users = histories.users.indices(theirs["user_ids"], "users")
    starts, ends = histories.offsets[users], histories.offsets[users + 1]
    objective = build_objective(cfg.objective, cfg.model)
    asked = theirs["asked"][users] if cfg.model.reads_times else None
    return encoder.eval().newest(objective.inference(histories.items, starts, ends, histories.times, asked))


def training_batches(
    theirs: Arrays, items_of: np.ndarray, sequences: Sequences, cfg: TrainConfig
) -> list[tuple[PackedBatch, Labels]]:
    """Return our training batches, which RecTools' equal, or with random masks RecTools' own."""
    if cfg.objective.name is ObjectiveName.next_item:
        kept, asked = (Windows.last, Catalogue.train), cfg.model.asked_at
        holdout = hold_out(sequences, *kept, cfg.model.maxlen, HoldoutMode.none, query_time=asked)
        windows = np.split(np.arange(len(holdout.window_starts)), range(WINDOWS, len(holdout.window_starts), WINDOWS))
        objective, rng = build_objective(cfg.objective, cfg.model), np.random.default_rng(0)
        return [objective.training(holdout, chosen, rng) for chosen in windows]
    items, targets = items_of[theirs["training/items"]], items_of[theirs["training/targets"]]
    ends = np.cumsum(theirs["training/lengths"])
    starts, batches = np.append(0, ends[:-1]), []
    for first in range(0, len(ends), WINDOWS):
        inputs, places = pack(starts[first : first + WINDOWS], ends[first : first + WINDOWS], items)
        rows = np.flatnonzero(targets[places])
        weights = torch.from_numpy(theirs["training/weights"][places][rows].astype(np.float32))
        counts = np.diff(np.searchsorted(rows, inputs.offsets))
        batches.append((inputs, Labels(as_tensor(targets[places][rows]), counts, as_tensor(rows), weights)))
    return batches


def training_differences(
    theirs: Arrays,
    encoder: Encoder,
    batches: list[tuple[PackedBatch, Labels]],
    items_of: np.ndarray,
    order: np.ndarray,
    cfg: TrainConfig,
) -> dict[str, float]:
    """Return the differences of states, losses and gradients.

    RecTools' softmax includes the padding and the mask as classes, although they are never targets: more terms in
    every denominator.
    """
    table = torch.from_numpy(theirs["weights/item_model.item_net_blocks.0.ids_emb.weight"]).float()
    extra_tokens = table[: len(table) - len(order)]
    own, without = [], []
    with torch.no_grad():
        with_extra = torch.cat([encoder.item_table, encoder.head.item_vectors(extra_tokens)])
        tables = [ItemTable(with_extra), ItemTable(encoder.item_table)]
        for inputs, labels in batches:
            states = encoder.head(labeled(encoder.eval()(inputs), labels))
            for item_table, found in zip(tables, (own, without), strict=True):
                found.append(softmax(states, item_table, labels, None, cfg.loss))
    inputs, labels = batches[0]
    states = encoder.train()(inputs)
    labeled_states, vectors = encoder.head(labeled(states, labels)), ItemTable(encoder.item_table)
    sampled = sampled_softmax(
        labeled_states, vectors, labels, negatives_of(theirs, items_of, labels), replace(cfg.loss, **UNIFORM)
    )
    (softmax(labeled_states, vectors, labels, None, cfg.loss) + sampled).backward()
    gradients, scales = (
        from_rectools(arrays, "gradients", order) for arrays in (theirs, scales_of(theirs, "gradients"))
    )
    return {
        "states of all tokens in training": largest(states[: inputs.offsets[-1]].detach(), theirs["training/states"]),
        "softmax loss, padding a class as in RecTools": largest(torch.stack(own), theirs["losses"]),
        "softmax loss, items only": largest(torch.stack(without), theirs["losses_without_extra_tokens"]),
        "sampled softmax, with the same negatives": largest(sampled.detach(), theirs["sampled_softmax"]),
        GRADIENTS: relative_difference(encoder, gradients, scales),
    }


def negatives_of(theirs: Arrays, items_of: np.ndarray, labels: Labels) -> Negatives:
    """Return RecTools' negatives, which all tokens have, of the labels (R, N)."""
    items = items_of[theirs["negatives"]]  # (T, N)
    if labels.rows is not None:
        return Negatives(as_tensor(items[labels.rows.numpy()]))
    missing = len(labels.targets) - len(items)  # of dummy tokens
    return Negatives(as_tensor(np.pad(items, ((0, missing), (0, 0)), mode="edge")))


def labeled(states: Tensor, labels: Labels) -> Tensor:
    """Return the states that have a label."""
    return states if labels.rows is None else states[labels.rows]


SASREC = Comparison(
    name="sasrec",
    by="SASRec, RecTools",
    overrides=("model=sasrec_rectools", "loss=softmax"),
    variants=sasrec_variants,
    outputs=partial(outputs, model="sasrec", lists=ALL_LISTS),
    differences=differences,
)
LIGR = Comparison(
    name="ligr",
    by="LiGR, RecTools",
    overrides=("model=ligr", "loss=softmax"),
    variants=ligr_variants,
    outputs=partial(outputs, model="ligr", lists=USERS_LISTS),
    differences=differences,
)
HSTU = Comparison(
    name="hstu",
    by="HSTU, RecTools",
    overrides=("model=hstu", "loss=softmax"),
    variants=hstu_variants,
    outputs=partial(outputs, model="hstu", lists=USERS_LISTS),
    differences=differences,
    at_most_of={DEEP: 5 * AT_MOST},
)
BERT4REC = Comparison(
    name="bert4rec",
    by="BERT4Rec, RecTools",
    overrides=("model=bert4rec", "loss=softmax"),
    variants=bert4rec_variants,
    outputs=partial(outputs, model="bert4rec", lists=USERS_LISTS),
    differences=differences,
)
