"""Train the plain form of SASRec beside the fast one, and see whether they come to the same NDCG.

python scripts/compare_reference.py --seeds 3 --epochs 25 dataset=sasrec_ml_1m model.maxlen=50

The plain form is tests/padded_twin.py: left-padded rows, masks, attention by einsum, torch's dropout, all logits and
torch's cross-entropy and Adam. Both start from the same parameters and see the same batches in the same order; dropout
draws differ. Each seed's result is written to --out as it comes, and one that is there is not computed again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytorch_lightning as pl
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops.ranking import Scores
from sasrec_lab.train import train
from tests.padded_twin import PaddedSASRec, padded_twin

METRICS = ("test/ndcg@10", "test/recall@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="keys of the run, as for sasrec_lab.train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("outputs/plain_twin"))
    args = parser.parse_args()
    found = {"fast": [], "plain": []}
    for seed in range(args.seeds):
        cfg = load(
            [*args.overrides, f"seed={seed}", f"trainer.max_epochs={args.epochs}", "trainer.limit_val_batches=0"]
        )
        for form, run in (("fast", fast), ("plain", plain)):
            folder = args.out / f"{form}-{seed}"
            result = folder / "result.json"
            if not result.exists():
                folder.mkdir(parents=True, exist_ok=True)
                start = time.perf_counter()
                metrics = run(cfg, folder)
                result.write_text(json.dumps({**metrics, "seconds": time.perf_counter() - start}))
            found[form].append(json.loads(result.read_text()))
            print(form, seed, found[form][-1], flush=True)
    for form, results in found.items():
        for name in (*METRICS, "seconds"):
            values = [result[name] for result in results]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            print(f"{form:6} {name:15} {mean(values):.4f}{spread}  (n={len(values)})")


def fast(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    metrics = train(cfg, folder)["metrics"]
    return {name: metrics[name] for name in METRICS}


def plain(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    data = SequenceData(holdout, cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    twin = padded_twin(
        Encoder(holdout.num_items, cfg.model), cfg.model
    )  # the parameters that the fast form starts from
    optimizer = torch.optim.Adam(twin.parameters(), lr=cfg.optimizer.lr, betas=tuple(cfg.optimizer.betas))
    loader = data.train_dataloader()
    _set_dropout(twin, cfg.model.dropout)
    for epoch in range(cfg.trainer["max_epochs"]):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            rows, targets = padded(batch, batch.items, cfg.model.maxlen), padded(batch, batch.targets, cfg.model.maxlen)
            logits = twin.scores(twin(rows))  # (B, L, V)
            loss = F.cross_entropy(logits.flatten(0, 1), (targets - 1).flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"plain, seed {cfg.seed}, epoch {epoch}: loss {float(loss):.4f}", flush=True)
    return tested(twin, data, cfg, holdout.num_items)


@torch.no_grad()
def tested(twin: PaddedSASRec, data: SequenceData, cfg: TrainConfig, num_items: int) -> dict[str, float]:
    _set_dropout(twin, 0.0)
    metrics = HoldoutMetrics(num_items, cfg.evaluation)
    for batch in data.test_dataloader():
        states = twin(padded(batch.inputs, batch.inputs.items, cfg.model.maxlen))[:, -1]
        metrics.update(Scores(states, twin.input_items.weight[1:]), batch)
    taken = metrics.take("test")
    return {name: taken[name] for name in METRICS}


def padded(batch: PackedBatch, tokens: torch.Tensor, maxlen: int) -> torch.Tensor:
    """Each sequence's tokens at the right of a row, zeros in front."""  # (B, L)
    rows = torch.zeros(len(batch.offsets) - 1, maxlen, dtype=torch.int64)
    for row, (start, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        rows[row, maxlen - (end - start) :] = tokens[start:end]
    return rows


def _set_dropout(twin: PaddedSASRec, rate: float) -> None:
    for part in (twin, *twin.blocks):
        part.dropout = lambda x: F.dropout(x, rate)


if __name__ == "__main__":
    main()
