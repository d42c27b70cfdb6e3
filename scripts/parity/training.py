"""Train both libraries on the first users of MovieLens-1M and compare them by our metrics."""

import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, variance
from typing import Any

import numpy as np
import torch
from benchmark.results import decimal, mean_and_std

from parity.comparison import FOLDER
from parity.rectools import PEER, SASREC, sizes
from sasrec_lab.config.command_line import load
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
TRAINED = [
    f"dataset.path={FOLDER.resolve()}/ml_1m_first_{FIRST_USERS}.txt",
    "dataset=sasrec_ml_1m",
    "dataset.sha256=null",
    "dataset.sources=[]",
    "dataset.catalogue=train",  # the items that RecTools knows
    "model.maxlen=50",
    "trainer.limit_val_batches=0",  # the last epoch is tested
    "trainer.enable_progress_bar=false",
]


def compare_training(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Return one row per library with its metrics over the seeds, and one with the differences."""
    first_users_file(load(["dataset=sasrec_ml_1m"]))
    found: dict[str, list[dict[str, float]]] = {"sasrec_lab": [], "RecTools": []}
    for seed in range(seeds):
        cfg = load([*SASREC.overrides, *TRAINED, f"trainer.max_epochs={epochs}", f"seed={seed}"])
        for name, run in (("sasrec_lab", ours_trained), ("RecTools", theirs_trained)):
            folder = FOLDER / f"{name}-{epochs}-epochs-seed-{seed}"
            result = folder / "result.json"
            if not result.exists():
                folder.mkdir(parents=True, exist_ok=True)
                metrics = run(cfg, folder)
                with atomic_write(result) as draft:
                    draft.write_text(json.dumps(metrics))
            found[name].append(json.loads(result.read_text()))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    values = {
        name: {short: [x[key] for x in results] for short, key in METRICS.items()} for name, results in found.items()
    }
    rows = [{"by": name} | {short: mean_and_std(x) for short, x in values[name].items()} for name in values]
    ours, theirs = values.values()
    return [*rows, {"by": "difference"} | {short: difference(ours[short], theirs[short]) for short in METRICS}]


def difference(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """Return the difference of the means and its standard error; seeds of the two libraries are unrelated."""
    error = sqrt((variance(ours) + variance(theirs)) / len(ours)) if len(ours) > 1 else None
    return {"mean": mean(ours) - mean(theirs), "standard_error": error}


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
    """Train our model and return its test metrics."""
    return chosen_metrics(train(cfg, folder)["metrics"])


def theirs_trained(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    """Train RecTools on the same windows and return our metrics of its states and item vectors."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    file, out = folder / "interactions.npz", folder / "rectools.npz"
    user, item = rows_of(holdout, holdout.window_users, holdout.window_starts, holdout.window_ends)
    test = holdout.test
    history_user, history_item = rows_of(holdout, test.users, test.starts, test.ends)
    np.savez(file, user=user, item=item, history_user=history_user, history_item=history_item)
    epochs = cfg.trainer["max_epochs"]
    paths = {"interactions": str(file), "out": str(out)}
    PEER.run(sizes(cfg) | paths | {"epochs": epochs, "key_mask": not cfg.model.pad_keys})
    with np.load(out) as arrays:
        vectors = np.zeros_like(arrays["vectors"])
        vectors[arrays["item_ids"] - 1] = arrays["vectors"]
        states = np.full((len(sequences.user_ids), vectors.shape[1]), np.nan, np.float32)
        states[arrays["user_ids"]] = arrays["states"]
    metrics, states, vectors = HoldoutMetrics(len(vectors), cfg.evaluation), *map(torch.from_numpy, (states, vectors))
    for batch in SequenceData(holdout, cfg).test_dataloader():
        metrics.update(Scores(states[batch.users], vectors), batch)
    return chosen_metrics(metrics.compute_and_reset("test"))


def rows_of(holdout: Holdout, users: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return user and item of each interaction in items[start:end]."""
    batch, places = pack(starts[ends > starts], ends[ends > starts], holdout.items)
    return np.repeat(users[ends > starts], np.diff(batch.offsets)), holdout.items[places].astype(np.int64)


def chosen_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the compared metrics."""
    return {name: metrics[name] for name in METRICS.values()}
