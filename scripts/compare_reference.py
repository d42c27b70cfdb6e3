"""Train the reference implementation of SASRec and the fast one, and compare their metrics.

python scripts/compare_reference.py --seeds 3 --epochs 25 dataset=sasrec_ml_1m model.maxlen=50

The reference is tests/reference_model.py: left-padded rows, masks, attention by einsum, torch's dropout, all logits
and torch's cross-entropy and Adam. Both start from the same parameters and see the same batches in the same order, but
draw different dropout. The result of each seed is kept in --out and not computed again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from bench import OVERRIDES_HELP
from benchmark.results import decimal, mean_and_std, write_results
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops.ranking import Scores
from sasrec_lab.train import train
from tests.reference_model import PaddedSASRec, reference_of

METRICS = {"ndcg": "test/ndcg@10", "recall": "test/recall@10"}


def main() -> None:
    """Train both over the seeds and print their metrics."""
    args = parse_args()
    fixed = [f"trainer.max_epochs={args.epochs}", "trainer.limit_val_batches=0"]
    rows = []
    for name, run in (("fast", train_fast), ("reference", train_reference)):
        results = []
        for seed in range(args.seeds):
            cfg = load([*args.overrides, f"seed={seed}", *fixed])
            check_dropout(cfg.model)
            results.append(keep_result(cfg, run, args.out / f"{name}-{seed}"))
            print(name, seed, results[-1], flush=True)
        measured = {key: mean_and_std([result[metric] for result in results]) for key, metric in METRICS.items()}
        rows.append({"implementation": name, **measured, "seconds": mean_and_std([x["seconds"] for x in results])})
    for row in rows:
        shown = f"NDCG@10 {decimal(row['ndcg'])}, recall@10 {decimal(row['recall'])}"
        print(f"{row['implementation']:<10} {shown}, {row['seconds']['mean']:.0f} s per seed")
    if args.json:
        write_results(args.json, rows)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--epochs", type=int, default=25, help="epochs per run; the last one is tested (default: 25)")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare_reference"), help="folder of the results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    return parser.parse_intermixed_args()


def keep_result(cfg: TrainConfig, run: Any, folder: Path) -> dict[str, float]:
    """Return the metrics and seconds of a run from its folder, or run it and write them there."""
    file = folder / "result.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        metrics = run(cfg, folder)
        file.write_text(json.dumps({**metrics, "seconds": time.perf_counter() - start}))
    return json.loads(file.read_text())


def train_fast(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    """Train as the train command does and return the test metrics."""
    metrics = train(cfg, folder)["metrics"]
    return {name: metrics[name] for name in METRICS.values()}


def train_reference(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    """Train the reference implementation from the same parameters and return its test metrics."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    data = SequenceData(holdout, cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model = reference_of(Encoder(holdout.num_items, cfg.model), cfg.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.optimizer.lr, betas=tuple(cfg.optimizer.betas))
    loader = data.train_dataloader()
    set_dropout(model, cfg.model.dropout)
    for epoch in range(cfg.trainer["max_epochs"]):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            inputs, maxlen = batch.inputs, cfg.model.maxlen
            rows, targets = padded(inputs, inputs.items, maxlen), padded(inputs, batch.labels.targets, maxlen)
            logits = model.scores(model(rows))  # (B, L, V)
            loss = F.cross_entropy(logits.flatten(0, 1), (targets - 1).flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"reference, seed {cfg.seed}, epoch {epoch}: loss {float(loss):.4f}", flush=True)
    return test(model, data, cfg, holdout.num_items)


@torch.no_grad()
def test(model: PaddedSASRec, data: SequenceData, cfg: TrainConfig, num_items: int) -> dict[str, float]:
    """Return the test metrics of the reference implementation."""
    set_dropout(model, 0.0)
    metrics = HoldoutMetrics(num_items, cfg.evaluation)
    for batch in data.test_dataloader():
        states = model(padded(batch.inputs, batch.inputs.items, cfg.model.maxlen))[:, -1]
        metrics.update(Scores(states, model.input_items.weight[1:]), batch)
    taken = metrics.compute_and_reset("test")
    return {name: taken[name] for name in METRICS.values()}


def padded(batch: PackedBatch, tokens: torch.Tensor, maxlen: int) -> torch.Tensor:
    """Return each sequence's tokens at the right end of a row, after zeros, as (B, L)."""
    rows = torch.zeros(len(batch.offsets) - 1, maxlen, dtype=torch.int64)
    for row, (start, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        rows[row, maxlen - (end - start) :] = tokens[start:end]
    return rows


def check_dropout(model: ModelConfig) -> None:
    """End the program if the config has rates of dropout by place, which the reference has not."""
    if {model.rate_attention, model.rate_input, model.rate_inner, model.dropout_output or model.dropout} != {
        model.dropout
    }:
        sys.exit("error: the reference has one rate of dropout; leave model.dropout_attention and the like as they are")


def set_dropout(model: PaddedSASRec, rate: float) -> None:
    """Use torch's dropout at this rate in the whole model."""
    for part in (model, *model.blocks):
        part.dropout = lambda x: F.dropout(x, rate)


if __name__ == "__main__":
    main()
