"""Compare metrics of random lists beyond accuracy with RecTools'; it has no Gini index."""

from dataclasses import replace

import numpy as np
from benchmark.peer import PEERS

from parity.comparison import Arrays, Comparison
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.evaluation.list_metrics import ItemCategories, TopLists, TrainingCounts, list_metrics

USERS, ITEMS, LONGEST, CATEGORIES, INTERACTIONS = 40, 60, 20, 6, 300
KS = [1, 2, 5, 10, 20]
METRICS = ("coverage", "novelty", "popularity", "diversity")


def libraries(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return the library; no model matters here."""
    return {"RecTools": cfg}


def outputs(sequences: Sequences, cfg: TrainConfig, variants: dict[str, ModelConfig], k: int) -> dict[str, Arrays]:
    """Return random lists, training interactions with repeats, categories, and RecTools' value of each metric and k."""
    rng = np.random.default_rng(cfg.seed)
    lists = [(1 + rng.permutation(ITEMS)[: 1 + user % LONGEST]).tolist() for user in range(USERS)]
    training = [[int(rng.integers(USERS)), 1 + int(rng.zipf(1.4) % ITEMS)] for _ in range(INTERACTIONS)]
    categories = [np.flatnonzero(rng.random(CATEGORIES) < 0.3).tolist() for _ in range(ITEMS)]
    peer = replace(PEERS["rectools"], script="rectools_list_metrics.py")
    task = {"lists": lists, "training": training, "catalogue": ITEMS, "categories": categories, "ks": KS}
    values = peer.run(task)
    given = {
        "items": np.concatenate(lists),
        "lengths": np.array([*map(len, lists)]),
        "training": np.array(training),
        "categories": np.array([category for own in categories for category in own]),
        "counts": np.array([*map(len, categories)]),
    }
    return {name: given | {f"values/{metric}": np.array(x) for metric, x in values.items()} for name in variants}


def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest difference of each metric over k."""
    lengths, (users, items) = theirs["lengths"], theirs["training"].T
    ranks = np.concatenate([np.arange(1, length + 1) for length in lengths])
    lists = TopLists(np.repeat(np.arange(len(lengths)), lengths), theirs["items"], ranks)
    interactions = np.bincount(items, minlength=ITEMS + 1)[1:]
    takers = np.bincount(np.unique(theirs["training"], axis=0)[:, 1], minlength=ITEMS + 1)[1:]
    counts = TrainingCounts(interactions, takers, len(np.unique(users)))
    categories = ItemCategories(np.append(0, np.cumsum(theirs["counts"])), theirs["categories"])
    ours = list_metrics(lists, counts, categories, KS)
    return {
        f"{name}@k, k from {KS[0]} to {KS[-1]}": max(
            abs(ours[f"{name}@{k}"] - float(theirs[f"values/{name}@{k}"])) for k in KS
        )
        for name in METRICS
    }


BEYOND_ACCURACY = Comparison(
    name="list_metrics",
    by="metrics beyond accuracy, RecTools",
    overrides=("model=sasrec",),
    variants=libraries,
    outputs=outputs,
    differences=differences,
    at_most=1e-10,
)
