"""Measure RePlay's newer SASRec on one job, in the fastest of its settings: python replay_job.py '{"windows": ...}'"""

import copy
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import LengthBucketedQueryEncoder, SasRec
from replay.nn.transform import AdaptiveTrimTransform, TargetAwareAdaptiveTrimTransform
from replay.nn.transform.template import make_default_sasrec_transforms
from stopwatch import Stopwatch, peak_rss_mb

WARM_UP = 3  # steps
BUCKET = 32  # users: a quarter of a batch
SETTINGS = {"plain": (False, False), "trimmed batches": (True, False), "trimmed, length buckets": (True, True)}


def main() -> None:
    """Print the measured speeds as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("medium")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train_and_rank(task, Path(folder))))


def train_and_rank(task: dict, folder: Path) -> dict:
    """Return the speed of training in the best setting, of lists, and peak memory."""
    schema = make_schema(task)
    data = {trim: make_data(task, schema, folder, trim) for trim in (False, True)}
    speeds = {}
    for name, (trim, buckets) in SETTINGS.items():
        module = make_module(task, schema, buckets)
        speeds[name] = train(module, data[trim], task["steps"])
    training_peak = peak_rss_mb()
    best = max(speeds, key=speeds.get)
    users, seconds = rank(module, data[True], task)
    return {
        "positions_per_s": speeds[best],
        "users_per_s": users / seconds,
        "lists_per_s": users / seconds,  # it ranks by making lists
        "peak_rss_mb": training_peak,
        "ranking_peak_rss_mb": peak_rss_mb(),
        "ranked_users": users,
        "items": task["num_items"],
        "settings": speeds,
        "note": best,
    }


def make_schema(task: dict) -> TensorSchema:
    """Describe item ids, the only feature."""
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=task["dim"],
        padding_value=task["num_items"],
        cardinality=task["num_items"],
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    return TensorSchema([item])


def make_data(task: dict, schema: TensorSchema, folder: Path, trim: bool) -> ParquetModule:
    """Return batches for training and ranking, if trimmed cut to the longest history of each batch."""
    train, predict = write_sequences(task, folder)
    transforms = make_default_sasrec_transforms(schema)
    transforms["predict"].insert(1, AdaptiveTrimTransform("item_id"))  # before tensors are grouped
    if trim:
        transforms["train"].insert(2, TargetAwareAdaptiveTrimTransform(["item_id", "positive_labels"]))
    padded = {"padding": task["num_items"]}
    metadata = {
        "train": {"item_id": {"shape": task["maxlen"] + 1, **padded}},
        "predict": {
            "query_id": {},
            "item_id": {"shape": task["maxlen"], **padded},
            "seen_ids": {"shape": task["maxlen"] + 1, **padded},
        },
    }
    return ParquetModule(task["batch_size"], metadata, transforms, train_path=str(train), predict_path=str(predict))


def write_sequences(task: dict, folder: Path) -> tuple[Path, Path]:
    """Write the windows as Parquet files for training and ranking."""
    arrays = np.load(task["windows"])
    items = pa.ListArray.from_arrays(pa.array(arrays["offsets"].astype(np.int32)), pa.array(arrays["items"] - 1))
    train, predict = folder / "train.parquet", folder / "predict.parquet"
    pq.write_table(pa.table({"item_id": items}), train)
    some = items[: task["ranked_users"]]
    pq.write_table(pa.table({"query_id": np.arange(len(some)), "item_id": some, "seen_ids": some}), predict)
    return train, predict


def make_module(task: dict, schema: TensorSchema, buckets: bool) -> LightningModule:
    """Return an untrained model, with length buckets if asked."""
    model = SasRec.from_params(
        schema,
        embedding_dim=task["dim"],
        num_heads=task["heads"],
        num_blocks=task["blocks"],
        max_sequence_length=task["maxlen"],
        dropout=task["dropout"],
    )
    if buckets:
        model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, BUCKET)
    return LightningModule(model, OptimizerFactory(learning_rate=task["lr"]))


def train(module: LightningModule, data: ParquetModule, steps: int) -> float:
    """Return useful positions per second."""
    step_times = StepTimes()
    trainer(step_times, WARM_UP + steps).fit(module, copy.copy(data))
    return step_times.stopwatch.positions_per_s


def rank(module: LightningModule, data: ParquetModule, task: dict) -> tuple[int, float]:
    """Return the number of users, and the seconds to make a table of the ten best unseen items of each."""
    seen = SeenItemsFilter(task["num_items"], "seen_ids")
    top = PandasTopItemsCallback(10, "query_id", "item_id", postprocessors=[seen])
    start = time.perf_counter()
    trainer(top, -1).predict(module, data, return_predictions=False)
    table = top.get_result()
    return len(table) // 10, time.perf_counter() - start


def trainer(callback: lightning.Callback, max_steps: int) -> lightning.Trainer:
    """Return a quiet Trainer."""
    return lightning.Trainer(
        max_steps=max_steps,
        callbacks=[callback],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


class StepTimes(lightning.Callback):
    """Time the training steps."""

    def __init__(self) -> None:
        self.stopwatch = Stopwatch(WARM_UP)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Count a step and its positions, without the first item behind padding, which RePlay also trains on."""
        self.stopwatch.step_ended(int((batch["target_padding_mask"].squeeze(-1) & batch["padding_mask"]).sum()))


if __name__ == "__main__":
    main()
