"""Train a model in both libraries, on the same windows with the same settings, and compare them by our metrics."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark.results import decimal, difference, mean_and_std

from parity.comparison import FOLDER, Arrays, Comparison
from parity.rectools import HSTU, PEER, SASREC, part_of, sizes
from sasrec_lab.config.composition import load
from sasrec_lab.config.model import Similarity
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import pack
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import Holdout, hold_out
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.files import atomic_write
from sasrec_lab.ops.ranking import Scores
from sasrec_lab.train import train

FIRST_USERS = 2000
METRICS = {"ndcg": "test/ndcg@10", "recall": "test/recall@10"}
SHARED = [
    "dataset.catalogue=train",  # the items that RecTools knows
    "trainer.limit_val_batches=0",  # the last epoch is tested
    "trainer.enable_progress_bar=false",
]
FIRST_USERS_FILE = [
    f"dataset.path={FOLDER.resolve()}/ml_1m_first_{FIRST_USERS}.txt",
    "dataset=sasrec_ml_1m",
    "dataset.sha256=null",
    "dataset.sources=[]",
    "model.maxlen=50",
]
DEFAULT = SASREC
TRAINED = {SASREC.name: [*SASREC.overrides, *FIRST_USERS_FILE], HSTU.name: ["experiment=hstu/ml_latest_small"]}


def compare_training(model: Comparison, overrides: list[str], seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Return one row per library with its metrics over the seeds, and one with the differences."""
    words = [*TRAINED[model.name], *SHARED, f"trainer.max_epochs={epochs}", *overrides]
    cfg = load(words)
    if model is SASREC:
        first_users_file(load(["dataset=sasrec_ml_1m"]))
    folder = FOLDER / f"trained-{model.name}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    theirs = theirs_trained(cfg, model.name, seeds, folder)
    ours = [ours_trained(replace(cfg, seed=seed), folder / f"sasrec_lab-seed-{seed}") for seed in range(seeds)]
    found = {"sasrec_lab": ours, "RecTools": theirs}
    values = {
        name: {short: [x[key] for x in results] for short, key in METRICS.items()} for name, results in found.items()
    }
    data = {"data": cfg.dataset.name}
    rows = [data | {"by": name} | {short: mean_and_std(x) for short, x in values[name].items()} for name in values]
    one, other = values.values()
    return [*rows, data | {"by": "difference"} | {short: difference(one[short], other[short]) for short in METRICS}]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| | NDCG@10 | recall@10 |", "|---|---|---|"]
    lines += [f"| {row['by']} | {decimal(row['ndcg'])} | {decimal(row['recall'])} |" for row in rows]
    return "\n".join(lines)


def first_users_file(cfg: TrainConfig) -> None:
    """Write the interactions of the first users, who are numbered in the order of their ids, as in the file."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    rows = sequences.offsets[FIRST_USERS]
    users = np.repeat(sequences.user_ids, sequences.lengths)[:rows]
    lines = [
        f"{user} {item}\n" for user, item in zip(users, sequences.item_ids[sequences.items[:rows] - 1], strict=True)
    ]
    with atomic_write(FOLDER / f"ml_1m_first_{FIRST_USERS}.txt") as draft:
        draft.write_text("".join(lines))


def ours_trained(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    """Train our model, unless an earlier call did, and return its test metrics."""
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        metrics = chosen_metrics(train(cfg, folder)["metrics"])
        with atomic_write(result) as draft:
            draft.write_text(json.dumps(metrics))
    return reported(result)


def theirs_trained(cfg: TrainConfig, model: str, seeds: int, folder: Path) -> list[dict[str, float]]:
    """Train RecTools with the seeds that earlier calls have not, and return our metrics of its states by seed."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    kept = cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen
    holdout = hold_out(sequences, *kept, query_time=cfg.model.asked_at)
    file = folder / "interactions.npz"
    np.savez(file, **interactions_of(holdout))
    outs = {seed: folder / f"rectools-seed-{seed}.npz" for seed in range(seeds)}
    missing = {seed: str(out) for seed, out in outs.items() if not out.exists()}
    if missing:
        task = {"model": model, "interactions": str(file), "outs": missing, "epochs": cfg.trainer["max_epochs"]}
        loss = {"loss": cfg.loss.name.name, "negatives": cfg.loss.negatives}
        PEER.run(sizes(cfg) | part_of(cfg.model) | loss | task)
    return [theirs_measured(cfg, holdout, out) for out in outs.values()]


def interactions_of(holdout: Holdout) -> Arrays:
    """Return the training windows and the histories of the test, with their times if the model reads them."""
    test, times = holdout.test, holdout.times
    found = {}
    for prefix, users, starts, ends in (
        ("", holdout.window_users, holdout.window_starts, holdout.window_ends),
        ("history_", test.users, test.starts, test.ends),
    ):
        lasting = ends > starts
        batch, places = pack(starts[lasting], ends[lasting], holdout.items)
        found[f"{prefix}user"] = np.repeat(users[lasting], np.diff(batch.offsets))
        found[f"{prefix}item"] = holdout.items[places].astype(np.int64)
        if times is not None:
            found[f"{prefix}time"] = times[places]
    if times is not None:
        newest = times[test.ends - 1]
        found |= {"asked_user": test.users, "asked": newest if test.query_times is None else test.query_times}
    return found


def theirs_measured(cfg: TrainConfig, holdout: Holdout, out: Path) -> dict[str, float]:
    """Return our metrics of RecTools' states and item vectors."""
    with np.load(out) as arrays:
        vectors = np.zeros((holdout.num_items, arrays["vectors"].shape[1]), np.float32)
        vectors[arrays["item_ids"] - 1] = arrays["vectors"]
        states = np.full((len(holdout.starts), vectors.shape[1]), np.nan, np.float32)
        states[arrays["user_ids"]] = arrays["states"]
    if cfg.model.similarity is Similarity.cosine:
        states, vectors = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (states, vectors))
    metrics = HoldoutMetrics(len(vectors), cfg.evaluation)
    states, vectors = map(torch.from_numpy, (states, vectors))
    for batch in SequenceData(holdout, cfg).test_dataloader():
        metrics.update(Scores(states[batch.users], vectors), batch)
    result = out.with_suffix(".json")
    result.write_text(json.dumps(chosen_metrics(metrics.compute_and_reset("test"))))
    return reported(result)


def reported(result: Path) -> dict[str, float]:
    """Return the metrics in a file, and print them."""
    metrics = json.loads(result.read_text())
    print(f"{result}: {metrics}", file=sys.stderr, flush=True)
    return metrics


def chosen_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the compared metrics."""
    return {name: metrics[name] for name in METRICS.values()}
