"""Time the ten best unseen items of each user, by an untrained model: python -m benchmark.recommending --users 99 ...

It runs in a process of its own, so that the memory of training does not count.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sasrec_lab.config.composition import load
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.rankers import EncoderRanker
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run import machine


def main() -> None:
    """Print lists per second and peak memory as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    try:
        recommender = untrained(args.overrides)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(measure(recommender, args.users)))


def measure(recommender: Recommender, count: int) -> dict[str, Any]:
    """Return lists per second of the first `count` users, and peak memory."""
    users = recommender.histories.users.ids[:count]
    recommender.recommend(users[:4_000], k=10, on_unsupported_targets="ignore")  # warms up
    start = time.perf_counter()
    lists = recommender.lists_of_users(users, k=10, on_unsupported_targets="ignore")
    rows = sum(len(table) for table in lists)
    seconds = time.perf_counter() - start
    memory = machine.peak_memory_mb()["rss"]
    measured = {"lists_per_s": len(lists.targets) / seconds, "lists_peak_rss_mb": memory}
    return measured | {"lists": len(lists.targets), "listed_items": rows}


def untrained(overrides: list[str], device: str = "cpu") -> Recommender:
    """Return a recommender like one from a run, with the initial weights of training."""
    cfg = load(overrides)
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    items = Ids(holdout.item_ids)
    torch.manual_seed(cfg.seed)
    ranker = EncoderRanker(Encoder(len(items), cfg.model).to(device), cfg.objective, cfg.model)
    recommender = Recommender(Path("untrained"), ranker, items, cfg.dataset)
    recommender.histories = Histories.from_sequences(sequences, items, cfg.model.reads_times)
    return recommender


if __name__ == "__main__":
    main()
