"""Run folders as the report reads them, written without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PROTOCOL = {
    "dataset": "small",
    "filters": {"min_user": 0},
    "held_out_users": 4,
    "candidates": {"full": 9},
    "sampled_candidates": {"sampled": 3, "draw": "paper", "seed": 0},
    "seen_items": "left out, a target among them is a miss",
    "selected_by": "val/ndcg@10",
}
PUBLISHED = {
    "dataset": "small",
    "source": "Somebody 2018, Table IV",
    "cells": {"default": {"test/ndcg@10": 0.5}, "model.dim=8": {"test/ndcg@10": 0.25}},
}


def write_run(
    folder: Path,
    *overrides: str,
    seed: int = 0,
    ndcg: float = 0.4,
    ranks: list[int] | None = None,
    users: list[Any] | None = None,
    protocol: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **info: Any,
) -> Path:
    """Write what the report reads of a run with four test users."""
    model = dict(word.removeprefix("model.").split("=") for word in overrides if word.startswith("model."))
    defaults = {
        "seed": seed,
        "row": None,
        "published": None,
        "dataset": {"name": "small"},
        "model": {"dim": 4, "maxlen": 5} | {key: int(value) for key, value in model.items()},
        "evaluation": {"k": [10], "sampled": 3, "monitor": "val/ndcg@10"},
    }
    run = {"config": defaults | (config or {}), "seconds": {"fit": 60.0}, "parameters": 100, "git": {"commit": "abc"}}
    metrics = {"test/ndcg@10": ndcg, "test/ndcg@10-sampled3": ndcg + 0.1}
    results = {
        "status": "finished",
        "error": None,
        "protocol": PROTOCOL | (protocol or {}),
        "metrics": metrics,
        "baselines": {"popularity": {"test/ndcg@10": 0.1}},
        "best_epoch": 1,
        "epochs": 3,
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.dump([*overrides, f"seed={seed}"]))
    (folder / "run.json").write_text(json.dumps(run | {"start": f"2026-01-01T00:00:{seed:02}", "end": "later"} | info))
    (folder / "metrics.json").write_text(json.dumps(results))
    ranks = ranks or [1, 2, 3, 0]
    columns = {"user": users or [7, 8, 9, 11], "rank": ranks, "sampled_rank": [1] * len(ranks)}
    columns["target"] = [user * 10 for user in columns["user"]]  # of integers or text
    np.savez(folder / "ranks.npz", **columns)
    return folder
