"""Train and rank one configuration as the train command does, and time it: python -m benchmark.training --steps 100 ...

Only the steady state counts: the clock starts after some steps. It includes the time between steps, for the next batch.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from benchmark.roofline import flops_per_position, flops_per_user, matrix_rate, synchronize
from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import Holdout, hold_out
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.ops import backend
from sasrec_lab.run import machine
from sasrec_lab.training.forms import capture_form
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.loggers import make_loggers
from sasrec_lab.training.trainer import build_trainer

WARM_UP = 30  # steps: the matrix library builds a kernel for each new shape


def main() -> None:
    """Print speed, roofline and memory as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ranked-users", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.overrides, args.steps, args.ranked_users, Path(folder))))
    except InputError as error:
        sys.exit(f"error: {error}")


def measure(
    overrides: list[str], steps: int, ranked_users: int, folder: Path, callbacks: Sequence[pl.Callback] = ()
) -> dict[str, Any]:
    """Train, then rank; return speeds, peak memory and the roofline. `callbacks` watch the training."""
    warm_up = min(WARM_UP, steps)
    overrides = [*overrides, "trainer.enable_progress_bar=false"]
    limits = ["trainer.max_epochs=-1", f"trainer.max_steps={warm_up + steps}", "trainer.limit_val_batches=0"]
    cfg, training_cfg = load(overrides), load(overrides + limits)
    holdout = load_holdout(cfg)
    trainer = build_trainer(training_cfg, folder, make_loggers(training_cfg, folder))
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model = SequentialRecommender(holdout.num_items, training_cfg)
    device = trainer.strategy.root_device
    info = machine.describe_machine(device, backend.choose_matmul(device))
    training = TrainingTime(warm_up)
    trainer.callbacks += [training, *callbacks]
    backend.keep_freed_memory()
    trainer.fit(model, SequenceData(holdout, training_cfg))
    training_peak = machine.peak_memory_mb()

    rates = [product_rate(cfg, device, holdout.num_items)]
    ranked = first_users(holdout, ranked_users)
    ranking_seconds = [rank(model, ranked, cfg, folder) for _ in range(2)][1]  # the first one warms up
    ranking_peak = machine.peak_memory_mb()
    rates.append(product_rate(cfg, device, holdout.num_items))  # measured twice, because other work comes and goes

    lengths, known = sequence_lengths(holdout, ranked, cfg)
    compared = model.loss.compared_items(cfg.loss, holdout.num_items)
    flops = cfg.loss.passes * flops_per_position(cfg.model, compared, lengths, training.labels / training.positions)
    positions_per_s = training.positions / training.seconds
    return {
        "positions_per_s": positions_per_s,
        "users_per_s": len(ranked.val) / ranking_seconds,
        "peak_rss_mb": training_peak["rss"],
        "roofline_positions_per_s": max(rates) / flops,
        "fraction_of_roofline": positions_per_s * flops / max(rates),
        "roofline_users_per_s": max(rates) / flops_per_user(cfg.model, holdout.num_items, known),
        "ranking_peak_rss_mb": ranking_peak["rss"],
        "peak_cuda_mb": training_peak.get("cuda"),
        "flops_per_position": flops,
        "matrix_gflops": max(rates) / 1e9,
        "labels_per_position": training.labels / training.positions,
        "epoch_positions": int(lengths.sum()),
        "epoch_seconds": lengths.sum() / positions_per_s,
        "steps": steps,
        "step_ms": 1000 * training.seconds / steps,
        "ranked_users": len(ranked.val),
        "users": len(holdout.starts),
        "items": holdout.num_items,
        "dense_parameters": sum(
            x.numel() for x in model.encoder.parameters() if x.grad is None or not x.grad.is_sparse
        ),
        "device": info["device"],
        "matmul": info["matmul"],
        "kernels": info["kernels"],
        "precision": cfg.trainer["precision"],
        "capture": capture_form(model),
        "torch": torch.__version__,
        "overrides": overrides,
    }


def load_holdout(cfg: TrainConfig) -> Holdout:
    """Return the training windows and the rows to rank, from the cache if the data set was loaded before."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    chosen = cfg.dataset.windows, cfg.dataset.catalogue
    return hold_out(sequences, *chosen, cfg.model.maxlen, query_time=cfg.model.asked_at)


def sequence_lengths(holdout: Holdout, ranked: Holdout, cfg: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each training window (W,), and of each user to rank who has items."""
    objective = build_objective(cfg.objective, cfg.model)
    windows, _ = objective.training(holdout, np.arange(len(holdout.window_starts)), np.random.default_rng(0))
    has_items = ranked.val.ends > ranked.val.starts
    starts, ends = ranked.val.starts[has_items], ranked.val.ends[has_items]
    known = objective.inference(holdout.items, starts, ends, holdout.times)
    return np.diff(windows.offsets), np.diff(known.offsets)


class TrainingTime(pl.Callback):
    """Count seconds, useful positions and labels of the steps after the first `warm_up`."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.positions = 0
        self.labels: int | torch.Tensor = 0
        self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step > self.warm_up:
            self.positions += int(batch.inputs.offsets[-1])
            self.labels += (batch.labels.targets > 0).sum()
        if trainer.global_step == self.warm_up:
            synchronize(module.device)
            self.start = time.perf_counter()
        if trainer.global_step == trainer.max_steps:
            synchronize(module.device)
            self.seconds = time.perf_counter() - self.start
            self.labels = int(self.labels)


class RankingTime(pl.Callback):
    """Time a pass over the users, from the first batch to the metrics."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        synchronize(module.device)
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        synchronize(module.device)
        self.seconds = time.perf_counter() - self.start


def rank(model: SequentialRecommender, holdout: Holdout, cfg: TrainConfig, folder: Path) -> float:
    """Return the seconds to encode the users of the holdout, rank the whole catalogue for each, and compute metrics."""
    trainer = build_trainer(cfg, folder)
    ranking = RankingTime()
    trainer.callbacks.append(ranking)
    trainer.validate(model, SequenceData(holdout, cfg), verbose=False)
    return ranking.seconds


def first_users(holdout: Holdout, count: int) -> Holdout:
    """Return the holdout with its first `count` rows of validation; their histories are as long as those of all."""
    return replace(holdout, val=holdout.val.select(np.arange(min(count, len(holdout.val)))))


def product_rate(cfg: TrainConfig, device: torch.device, items: int) -> float:
    """Return the machine's rate of matrix products in the precision that is trained in."""
    precision = str(cfg.trainer["precision"])
    half = torch.bfloat16 if "bf16" in precision else torch.float16
    return matrix_rate(device, half if "16" in precision else torch.float32, cfg.model.dim, items)


if __name__ == "__main__":
    main()
