"""Compare EASE and item-kNN with RecTools', which takes the latter from the library implicit."""

from dataclasses import replace

import numpy as np
import torch
from benchmark.peer import PEERS

from parity.comparison import FOLDER, Arrays, Comparison
from sasrec_lab.config.closed_form import ClosedFormConfig, EaseConfig, ItemKnnConfig, Weighting
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.closed_form import ItemWeights, fit

PEER = replace(PEERS["rectools"], script="rectools_closed_form.py")
REGULARIZATION = 10.0
ALL = 2**16  # neighbors; with fewer, the libraries keep different ones of equally similar items


def configs(_: ModelConfig) -> dict[str, ClosedFormConfig]:
    """Return the models by RecTools' names."""
    kinds = {"cosine": Weighting.none, "tfidf": Weighting.tfidf, "bm25": Weighting.bm25}
    knn = {name: ItemKnnConfig(name="itemknn", neighbors=ALL, shrink=0, weighting=kind) for name, kind in kinds.items()}
    return {"ease": EaseConfig(name="ease", regularization=REGULARIZATION)} | knn


def outputs(sequences: Sequences, cfg: TrainConfig, variants: dict[str, ClosedFormConfig], k: int) -> dict[str, Arrays]:
    """Return the weights between items and the lists that RecTools makes, by model."""
    file, out = FOLDER / "interactions.npz", FOLDER / "closed_form.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1])
    task = {"interactions": str(file), "out": str(out), "k": k}
    task |= {"neighbors": len(sequences.item_ids), "regularization": REGULARIZATION}
    PEER.run(task)
    with np.load(out) as arrays:
        return {
            name: {"item_ids": arrays["item_ids"]}
            | {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
            for name in variants
        }


def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest difference of weights, over the largest weight, and of the lists' scores."""
    users = np.repeat(np.arange(len(sequences.lengths)), sequences.lengths)
    weights = fit(cfg.model, users, sequences.items, len(sequences.item_ids))
    matrix = weights.matrix if isinstance(weights.matrix, np.ndarray) else weights.matrix.toarray()
    order = Ids(theirs["item_ids"]).indices(sequences.item_ids, "items")
    expected = theirs["matrix"][np.ix_(order, order)]
    np.fill_diagonal(expected, 0)
    if isinstance(cfg.model, EaseConfig):  # RecTools multiplies by the transpose, other than Steck 2019 and here
        weights = ItemWeights(np.ascontiguousarray(matrix.T))
    return {
        "weights between items, relative to the largest": float(
            np.abs(matrix - expected).max() / np.abs(expected).max()
        ),
        "lists of users": lists_differ(theirs, unseen_scores(weights, users, sequences), sequences),
    }


def unseen_scores(weights: ItemWeights, users: np.ndarray, sequences: Sequences) -> np.ndarray:
    """Return the scores (U, V), -inf for an item that the user has seen or that is like none of the seen."""
    count = weights.num_items
    seen_users, seen_items = np.divmod(np.unique(users * count + sequences.items - 1), count)
    pairs = torch.from_numpy(seen_users), torch.from_numpy(seen_items + 1)
    scores = weights.block(len(sequences.lengths), *pairs).numpy()
    scores[seen_users, seen_items] = -np.inf
    return scores


def lists_differ(theirs: Arrays, scores: np.ndarray, sequences: Sequences) -> float:
    """Return the largest difference at one place of one list, of the item's score and of the place's, over the largest.

    Items with equal scores may come in either order. The difference is infinite if lists differ in length.
    """
    users = Ids(sequences.user_ids).indices(theirs["user_id"], "users")
    items = Ids(sequences.item_ids).indices(theirs["item_id"], "items")
    ranks = theirs["rank"] - 1
    lengths = np.bincount(users, minlength=len(scores))
    if not np.array_equal(lengths, np.minimum((scores > -np.inf).sum(1), ranks.max() + 1)):
        return float("inf")
    at_place = -np.sort(-scores, axis=1)[users, ranks]
    differences = np.abs(np.stack([scores[users, items], at_place]) - theirs["score"])
    return float(differences.max() / np.abs(theirs["score"]).max())


CLOSED_FORM = Comparison(
    name="closed_form",
    by="EASE and item-kNN, RecTools",
    overrides=("model=sasrec",),
    variants=configs,
    outputs=outputs,
    differences=differences,
    at_most=1e-4,
)
