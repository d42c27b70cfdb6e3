"""Fit, measure, save and load a model without epochs (model/closed_form.py), for train.py and the recommender."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.loggers import Logger
from scipy.sparse import csr_array
from torch import Tensor

from sasrec_lab.config.closed_form import ClosedFormConfig, EaseConfig, ItemKnnConfig
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import concatenate_ranges
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.baselines import baseline_metrics
from sasrec_lab.evaluation.cold_targets import cold_and_known
from sasrec_lab.evaluation.metrics import HoldoutMetrics
from sasrec_lab.files import atomic_write
from sasrec_lab.model import closed_form
from sasrec_lab.model.closed_form import ItemWeights
from sasrec_lab.ops.memory import Need, check_memory, format_bytes
from sasrec_lab.run.folder import ITEMS, MAX_ARRAY_BYTES, RETRAIN_HINT, WEIGHTS, read_arrays
from sasrec_lab.run.loading import load_data
from sasrec_lab.run.machine import describe_machine, peak_memory_mb
from sasrec_lab.run.provenance import is_first_process
from sasrec_lab.run.record import RunRecord, write_items, write_ranks
from sasrec_lab.run.summary import closed_form_line
from sasrec_lab.training.list_measures import measure_lists
from sasrec_lab.training.loggers import log_results, tensorboard_writer
from sasrec_lab.training.tensorboard import write_hyperparameters

log = logging.getLogger(__name__)

_DOUBLE, _FLOAT, _INT = 8, 4, 4  # bytes


def fit_and_measure(run: RunRecord, cfg: TrainConfig, loggers: Sequence[Logger]) -> None:
    """Fit, measure and record a model without epochs, in the process that records."""
    model = cfg.model
    assert isinstance(model, ClosedFormConfig)
    if not is_first_process():
        return
    sequences, data, titles = load_data(run, cfg, lambda holdout: check_fits(cfg, holdout))
    holdout, stage = data.holdout, cfg.evaluation.final_stage
    write_items(run.folder, holdout.item_ids, titles)
    run.info |= describe_machine(torch.device("cpu"), matmul=None)
    with run.phase("fit"):
        weights = fit(model, holdout)
    run.info["parameters"] = weights.size
    log.info(closed_form_line(cfg, run.info))
    write_weights(run.folder, weights)
    if len(data.final_rows):
        with run.phase("baselines"):
            run.results["baselines"] = baseline_metrics(data, sequences)
        with run.phase(stage):
            run.results["metrics"], ranks = measure(weights, data)
        if cfg.evaluation.lists:
            with run.phase("lists"):
                run.results["metrics"] |= measure_lists(weights, data, torch.device("cpu"))
        write_ranks(run.folder, ranks, data.final_rows, sequences, stage)
        if cfg.evaluation.test:
            run.results["cold_targets"] = cold_and_known(holdout, ranks["rank"], cfg.evaluation.k)
    run.info["peak_memory_mb"] = peak_memory_mb()
    if writer := tensorboard_writer(loggers):
        write_hyperparameters(writer, cfg, run.results["metrics"], epoch=0)
        writer.close()
    log_results(loggers, cfg, run.results["metrics"], epoch=0)


def check_fits(cfg: TrainConfig, holdout: Holdout) -> None:
    """Raise InputError unless the weights between all items fit in memory and in the run folder."""
    model, items = cfg.model, holdout.num_items
    if isinstance(model, EaseConfig):
        size, keys = (_DOUBLE + _FLOAT) * items**2, ("model=ease",)
        written = _FLOAT * items**2
        fix = "use model=itemknn, or fewer items with a higher dataset.min_item"
    else:
        assert isinstance(model, ItemKnnConfig)
        size, keys = (_FLOAT + _INT) * items * min(model.neighbors, items), (f"model.neighbors={model.neighbors}",)
        written, fix = size, "lower it"
    if written > MAX_ARRAY_BYTES:
        raise InputError(
            f"{keys[0]}: the weights between {items:,} items would take {format_bytes(written)} in the run folder, and"
            f" no command reads more than {format_bytes(MAX_ARRAY_BYTES)}; {fix}"
        )
    check_memory([Need(f"the weights between {items:,} items", keys, size)], "cpu", fix)


def fit(cfg: ClosedFormConfig, holdout: Holdout) -> ItemWeights:
    """Return the weights of a model from all training interactions, whatever the windows."""
    starts, ends = holdout.starts, holdout.train_ends
    users = np.repeat(np.arange(len(starts)), ends - starts)
    return closed_form.fit(cfg, users, holdout.items[concatenate_ranges(starts, ends)], holdout.num_items)


def measure(weights: ItemWeights, data: SequenceData) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics of validation, unless it is off, and of the test, and ranks of the last one for `write_ranks`.

    If the test may not be seen, only validation is measured.
    """
    metrics = HoldoutMetrics(weights.num_items, data.cfg.evaluation, data.cfg.dataset.target)
    values: dict[str, float] = {}
    batches: list[dict[str, Tensor]] = []
    stages = data.cfg.evaluation.stages
    for stage in stages if data.cfg.has_validation else stages[-1:]:
        batches.clear()
        for batch in data.evaluation_dataloader(stage):
            ranks = metrics.update(weights.scores(len(batch.rows), batch.seen_rows, batch.seen_items), batch)
            rows = batch.target_rows
            batches.append({"row": batch.rows[rows], "user": batch.users[rows], **ranks})
        values |= metrics.compute_and_reset(stage)
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = columns["row"].argsort(stable=True)
    return values, {name: column[order] for name, column in columns.items()}


def write_weights(folder: Path, weights: ItemWeights) -> None:
    """Write weights.npz: `weights` (V, V), or `values`, `items` and `offsets` of a sparse matrix (CSR)."""
    matrix = weights.matrix
    if isinstance(matrix, np.ndarray):
        arrays = {"weights": matrix}
    else:
        arrays = {"values": matrix.data, "items": matrix.indices, "offsets": matrix.indptr}
    with atomic_write(folder / WEIGHTS, locked=True) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # no array is called allow_pickle


def load_weights(folder: Path, num_items: int) -> ItemWeights:
    """Return the weights of a run.

    Raises:
        InputError: the file is missing or broken, of another number of items, or its weights are not finite.
    """
    path = folder / WEIGHTS
    try:
        arrays: dict[str, Any] = read_arrays(path, kinds="iuf")
        matrix = _dense(arrays) if "weights" in arrays else _sparse(arrays)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {RETRAIN_HINT}") from error
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a file that a run writes ({error}); {RETRAIN_HINT}") from error
    if matrix.shape != (num_items, num_items):
        raise InputError(
            f"{path} has weights of {matrix.shape[0]:,} items, but {folder / ITEMS} lists {num_items:,}; the files"
            " belong to different runs, so put the right ones together"
        )
    return ItemWeights(matrix)


def _dense(arrays: dict[str, Any]) -> np.ndarray:
    weights: np.ndarray = arrays["weights"]
    if weights.ndim != 2 or weights.dtype != np.float32 or not np.isfinite(weights).all():
        raise ValueError("it has no finite float32 matrix `weights`")
    return weights


def _sparse(arrays: dict[str, Any]) -> csr_array:
    values, items, offsets = (arrays[name] for name in ("values", "items", "offsets"))
    if values.dtype != np.float32 or items.dtype.kind != "i" or offsets.dtype.kind != "i":
        raise ValueError("its arrays are of other types")
    if not np.isfinite(values).all():
        raise ValueError("its weights are not finite")
    size = len(offsets) - 1
    matrix = csr_array((values, items, offsets), shape=(size, size))
    matrix.check_format(full_check=True)  # places outside the matrix
    return matrix
