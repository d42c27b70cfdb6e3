"""One stage of a large generated data set, in a process of its own: python -m benchmark.scale build 1e8 FOLDER

generate: a folder of Parquet, which is kept. build: the arrays, out of core, from an empty cache. prepare: the holdout
and all that a run counts before it trains. train: steps with shared negatives, then the ranking of some users.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import SyntheticConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run.machine import peak_memory_mb

MEMORY_LIMIT = "2GB"
SETTINGS = (
    "model.dim=64", "model.maxlen=50", "model.blocks=2", "model.heads=1", "batch_size=128", "loss=sampled_softmax",
    "loss.negatives=4096", "optimizer.name=rowwise_adam", "trainer.enable_progress_bar=false",
)  # fmt: skip
USERS_PER_ROW, ITEMS_PER_ROW = 0.1, 0.01
STEPS, RANKED_USERS = 500, 10_000


def main() -> None:
    """Print seconds, processor seconds and peak memory of what the stage did as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("rows", type=float)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ranked-users", type=int, default=RANKED_USERS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        print(json.dumps({"rows": STAGES[args.stage](args)}))
    except InputError as error:
        sys.exit(f"error: {error}")


def measured(args: argparse.Namespace, stage: str, do: Callable[[], Any], of_rows: bool = True) -> dict[str, Any]:
    """Return the seconds by the clock and by the processor (all threads), and the process's peak memory so far."""
    clock, processor = time.perf_counter(), time.process_time()
    do()
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - processor
    row = {"interactions": int(args.rows), "stage": stage, "seconds": seconds, "cpu_seconds": cpu_seconds}
    per_row = {"cpu_us_per_row": 1e6 * cpu_seconds / args.rows} if of_rows else {}
    return row | per_row | {"peak_rss_mb": peak_memory_mb()["rss"]}


def config(args: argparse.Namespace, *more: str) -> TrainConfig:
    """Return the config of a run on the generated folder, whose cache is next to it."""
    own = ["dataset=csv", f"dataset.path={args.folder / 'rows'}", f"data_dir={args.folder}"]
    return load([*own, f"dataset.memory_limit={MEMORY_LIMIT}", *SETTINGS, *more, *args.overrides])


def generate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the folder, unless it is there, which is not measured."""
    from pyarrow import parquet

    from sasrec_lab.data.synthetic import stream_interactions

    rows, folder, draft = int(args.rows), args.folder / "rows", args.folder / "draft"
    if not folder.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        sizes = SyntheticConfig(int(rows * USERS_PER_ROW), int(rows * ITEMS_PER_ROW), 1, 0)
        for number, table in enumerate(stream_interactions(sizes, rows)):
            parquet.write_table(table, draft / f"part-{number:05}.parquet")
        draft.rename(folder)
    return []


def build(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Build the arrays, with their checksum, from an empty cache."""
    from sasrec_lab.data.sequences import load_sequences

    cfg = config(args)
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    return [measured(args, "build", lambda: load_sequences(cfg.dataset, cfg.data_dir))]


def prepare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load the arrays, hold out, and count what a run counts."""
    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.data.leak import leaked_targets
    from sasrec_lab.data.reach import count_unreachable
    from sasrec_lab.evaluation.baselines import markov_table, recent_counts

    cfg = config(args)

    def count() -> None:
        sequences, holdout = load_holdout(cfg)
        data = SequenceData(holdout, cfg)
        data.num_batches("train", 1)
        count_unreachable(holdout, cfg.evaluation.filter_seen)
        leaked_targets(sequences, holdout)
        recent_counts(sequences, holdout, cfg.evaluation.recent_days)
        markov_table(holdout, holdout.training_counts())

    return [measured(args, "prepare", count)]


def load_holdout(cfg: TrainConfig) -> Any:
    """Return the sequences and their holdout."""
    from sasrec_lab.data.holdout import hold_out
    from sasrec_lab.data.sequences import load_sequences

    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    return sequences, hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, then rank the first users among all items."""
    import pytorch_lightning as pl

    from benchmark.training import first_users
    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.ops import backend
    from sasrec_lab.training.lightning_module import SequentialRecommender
    from sasrec_lab.training.trainer import build_trainer

    limits = ["trainer.max_epochs=-1", f"trainer.max_steps={args.steps}", "trainer.limit_val_batches=0"]
    cfg, training_cfg = config(args), config(args, *limits)
    _, holdout = load_holdout(cfg)
    with tempfile.TemporaryDirectory() as folder:
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        trainer = build_trainer(training_cfg, Path(folder))
        model = SequentialRecommender(holdout.num_items, training_cfg)
        backend.choose_matmul(trainer.strategy.root_device)
        backend.keep_freed_memory()
        fit = partial(trainer.fit, model, SequenceData(holdout, training_cfg))
        training = measured(args, f"{args.steps} steps", fit, of_rows=False)
        ranked = SequenceData(first_users(holdout, args.ranked_users), cfg)
        validate = partial(build_trainer(cfg, Path(folder)).validate, model, ranked, verbose=False)
        return [training, measured(args, f"ranks of {len(ranked.holdout.val):,} users", validate, of_rows=False)]


STAGES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "generate": generate,
    "build": build,
    "prepare": prepare,
    "train": train,
}


if __name__ == "__main__":
    main()
