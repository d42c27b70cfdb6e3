"""Measure a model of RecTools, or its loading, in its own environment: python rectools_job.py '{"windows": ...}'"""

import json
import sys
import time
import warnings

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.fast_transformers import build_sequences
from rectools.models import SASRecModel
from rectools.models.nn.transformers.base import TransformerModelBase
from rectools_model import make_model
from stopwatch import Stopwatch, peak_rss_mb

WARM_UP = 2  # steps
# set_float32_matmul_precision; "medium" is exact on a CPU without AMX
SETTINGS = {"default": "highest", "fast products": "medium"}


def main() -> None:
    """Print the measured speeds as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    print(json.dumps(load(task) if "csv" in task else train_and_rank(task)))


def train_and_rank(task: dict) -> dict:
    """Return the speed of training in the better setting, of lists, and peak memory."""
    dataset = Dataset.construct(read_windows(task["windows"]))
    speeds, training_peak = {}, 0
    for name, precision in SETTINGS.items():
        torch.set_float32_matmul_precision(precision)
        model = make_model(task)
        speeds[name] = train(model, dataset, task["steps"])
        training_peak = training_peak or peak_rss_mb()  # of one model, before the second is added
    users = dataset.user_id_map.external_ids[: task["ranked_users"]]
    context = {}
    if model.require_recommend_context:  # when each user asks: after all items
        asked = pd.Timestamp(task["maxlen"] + 1, unit="s")
        context = {"context": pd.DataFrame({Columns.User: users, Columns.Datetime: asked})}
    start = time.perf_counter()
    model.recommend(users=users, dataset=dataset, k=10, filter_viewed=True, **context)
    seconds = time.perf_counter() - start
    best = max(speeds, key=speeds.get)
    return {
        "positions_per_s": speeds[best],
        "users_per_s": len(users) / seconds,
        "lists_per_s": len(users) / seconds,  # it ranks by making lists
        "peak_rss_mb": training_peak,
        "ranking_peak_rss_mb": peak_rss_mb(),
        "ranked_users": len(users),
        "items": dataset.item_id_map.size,
        "settings": speeds,
        "note": f"{best}; default {speeds['default']:,.0f}",
    }


def train(model: TransformerModelBase, dataset: Dataset, steps: int) -> float:
    """Return useful positions per second."""
    step_times = StepTimes()
    model._trainer = Trainer(
        max_steps=WARM_UP + steps,
        callbacks=[step_times],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    model.fit(dataset)
    fitted = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, StepTimes))
    return fitted.stopwatch.positions_per_s


def read_windows(file: str) -> pd.DataFrame:
    """Return the training windows as a table of interactions."""
    arrays = np.load(file)
    lengths = np.diff(arrays["offsets"])
    order = np.arange(len(arrays["items"])) - np.repeat(arrays["offsets"][:-1], lengths)
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(lengths)), lengths),
            Columns.Item: arrays["items"],
            Columns.Weight: 1,
            Columns.Datetime: pd.to_datetime(order, unit="s"),
        }
    )


class StepTimes(Callback):
    """Time the training steps."""

    def __init__(self) -> None:
        self.stopwatch = Stopwatch(WARM_UP)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Count a step and its positions."""
        self.stopwatch.step_ended(int((batch["x"] != 0).sum()))


def load(task: dict) -> dict:
    """Time loading a CSV into training batches, by the model's own classes and by the newer tensor functions."""
    start = time.perf_counter()
    table = read_csv(task["csv"])
    read_seconds = time.perf_counter() - start
    dataset = Dataset.construct(table)
    preparator = SASRecModel(session_max_len=task["maxlen"], loss="softmax").data_preparator
    preparator.process_dataset_train(dataset)
    preparator.get_dataloader_train()
    seconds, peak = time.perf_counter() - start, peak_rss_mb()

    start = time.perf_counter()
    columns = (table[name].to_numpy() for name in (Columns.User, Columns.Item))
    times = table[Columns.Datetime].astype("int64").to_numpy()
    build_sequences(*(torch.from_numpy(column) for column in (*columns, times)), max_len=task["maxlen"])
    tensor_seconds = read_seconds + time.perf_counter() - start
    return {
        "rows": len(table),
        "seconds": seconds,
        "peak_rss_mb": peak,
        "tensor_seconds": tensor_seconds,
        "note": f"{tensor_seconds:.2f} s with read_csv and fast_transformers.build_sequences",
    }


def read_csv(file: str) -> pd.DataFrame:
    """Return a CSV with KION's columns as RecTools' interactions."""
    names = {"last_watch_dt": Columns.Datetime}
    table = pd.read_csv(file, parse_dates=["last_watch_dt"]).rename(columns=names)
    table[Columns.Weight] = np.where(table["watched_pct"] > 10, 3, 1)
    return table[[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]]


if __name__ == "__main__":
    main()
