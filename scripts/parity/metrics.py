"""Compare metrics of random lists, with several targets per user, with RecTools' and RePlay's."""

from dataclasses import replace

import numpy as np
from benchmark.peer import PEERS

from parity.comparison import Arrays, Comparison
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.evaluation.row_metrics import RankedRows

LIBRARIES = {"RecTools": "rectools", "RePlay": "replay"}
USERS, ITEMS, LENGTH, MOST_TARGETS = 40, 60, 20, 30
KS = [1, 2, 3, 5, 10, 20]
METRICS = {
    "ndcg": "NDCG",
    "recall": "recall",
    "precision": "precision",
    "map": "MAP",
    "mrr": "MRR",
    "hit_rate": "hit rate",
}


def libraries(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """Return the libraries; no model matters here."""
    return dict.fromkeys(LIBRARIES, cfg)


def outputs(sequences: Sequences, cfg: TrainConfig, variants: dict[str, ModelConfig], k: int) -> dict[str, Arrays]:
    """Return random lists and targets, and each library's value per user for each metric and k, by library."""
    rng = np.random.default_rng(cfg.seed)
    lists = [rng.permutation(ITEMS)[:LENGTH].tolist() for _ in range(USERS)]
    targets = [rng.permutation(ITEMS)[: 1 + user % MOST_TARGETS].tolist() for user in range(USERS)]
    given = {"lists": np.array(lists), "targets": np.concatenate(targets), "counts": np.array([*map(len, targets)])}
    found = {}
    for name in variants:
        peer = replace(PEERS[LIBRARIES[name]], script=f"{LIBRARIES[name]}_metrics.py")
        values = peer.run({"lists": lists, "targets": targets, "ks": KS})
        found[name] = given | {f"values/{metric}": np.array(x) for metric, x in values.items()}
    for k in KS:  # RecTools divides MAP by the number of targets, even if a list of k cannot have as many
        found["RecTools"][f"values/map@{k}"] *= given["counts"] / np.minimum(given["counts"], k)
    return found


def differences(theirs: Arrays, sequences: Sequences, cfg: TrainConfig) -> dict[str, float]:
    """Return the largest difference of each metric over users and k."""
    users = np.repeat(np.arange(len(theirs["counts"])), theirs["counts"])
    is_at = theirs["lists"][users] == theirs["targets"][:, None]  # (G, LENGTH)
    ours = RankedRows(users, np.where(is_at.any(1), is_at.argmax(1) + 1, 0))
    return {
        f"{shown}@k, k from {KS[0]} to {KS[-1]}": max(
            float(np.abs(ours.values(f"{name}@{k}") - theirs[f"values/{name}@{k}"]).max()) for k in KS
        )
        for name, shown in METRICS.items()
    }


METRICS_OF_LISTS = Comparison(
    name="metrics",
    by="metrics, RecTools and RePlay",
    overrides=("model=sasrec",),
    variants=libraries,
    outputs=outputs,
    differences=differences,
    at_most=1e-12,
)
