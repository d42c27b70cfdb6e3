"""Train and evaluate one configuration, and record everything needed to trust and reproduce the result.

python -m sasrec_lab.train                                    MovieLens-100K, SASRec, softmax
python -m sasrec_lab.train dataset=sasrec_ml_1m model.dim=50  any key of conf/ on the command line
python -m sasrec_lab.train --help                             what there is to choose
"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sasrec_lab.config.closed_form import ClosedFormConfig
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.hydra_internals import VERSION_BASE
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.errors import InputError, Pruned
from sasrec_lab.run import sweep
from sasrec_lab.run.failures import explain, explaining_failures
from sasrec_lab.run.folder import has_checkpoint
from sasrec_lab.run.launch import exit_interrupted, launch
from sasrec_lab.run.own_code import report_parts
from sasrec_lab.run.provenance import is_first_process
from sasrec_lab.run.record import RunRecord, describe_failure, record_run, write_items, write_ranks
from sasrec_lab.run.signals import interrupts_deferred

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.data.items import ItemFeatures
    from sasrec_lab.data.sequences import Sequences
    from sasrec_lab.training.lightning_module import SequentialRecommender

log = logging.getLogger("sasrec_lab.train")  # this name also when the module runs as __main__
errors = logging.getLogger("sasrec_lab.errors")  # goes into train.log; the screen gets the line as the program ends


def entry() -> None:
    """Run the command line."""
    launch(main, _compare_jobs)


def _compare_jobs(folder: Path) -> str:
    """Return the comparison of a sweep's jobs."""
    from sasrec_lab.report.summary import compare_jobs  # late, as it imports NumPy

    return compare_jobs(folder)


@hydra.main(config_path=CONF_DIR, config_name="train", **VERSION_BASE)
def main(cfg: DictConfig) -> None:
    """Run the composed configuration, as a run or as a job of a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_job = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        if is_job:
            sweep.run_job(cfg, folder, train)
            return
        typed = to_typed(cfg)
        results = train(typed, folder)
        from sasrec_lab.run.summary import results_table  # late, as it imports pandas

        log.info(results_table(results, typed, folder))
    except (InputError, OSError) as error:
        line = describe_failure(error, folder)
        errors.error(line)
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        if is_first_process():
            errors.error("interrupted")
        exit_interrupted(folder, is_job)


def train(cfg: TrainConfig, folder: Path, callbacks: "Sequence[pl.Callback]" = ()) -> dict[str, Any]:
    """Build, fit, test and record one run, here or on a cluster's workers; return the content of metrics.json.

    Lightning calls `callbacks` in addition to this package's own; a model without epochs calls none.
    """
    if cfg.cluster is None:
        return train_here(cfg, folder, callbacks)
    if callbacks:
        raise InputError("cluster=ray has no way to call the callbacks of this process in its workers; remove cluster")
    from sasrec_lab.training.ray_workers import train_on_workers

    return train_on_workers(cfg, folder, train_here)


def train_here(cfg: TrainConfig, folder: Path, callbacks: "Sequence[pl.Callback]" = ()) -> dict[str, Any]:
    """Build, fit, test and record one run in this process; return the content of metrics.json."""
    with record_run(folder, cfg) as run, explaining_failures():
        _import_libraries()
        report_parts(run, cfg)
        from sasrec_lab.training.closed_form import fit_and_measure
        from sasrec_lab.training.loggers import opened_loggers

        with opened_loggers(cfg, folder) as loggers:
            if isinstance(cfg.model, ClosedFormConfig):
                fit_and_measure(run, cfg, loggers)
            else:
                train_epochs(run, cfg, loggers, callbacks)
    return run.results


def _import_libraries() -> None:
    """Import what takes seconds; a signal waits for it, because an import may turn its exception into another one."""
    with interrupts_deferred():
        import sasrec_lab.data.sequences
        import sasrec_lab.training.trainer  # noqa: F401


def train_epochs(
    run: RunRecord, cfg: TrainConfig, loggers: "Sequence[Logger]", callbacks: "Sequence[pl.Callback]"
) -> None:
    """Build a model, fit it epoch by epoch, and test and record its best checkpoint."""
    # Imports that load torch and Lightning are inside functions: help, --cfg and user errors do not wait for them.
    from sasrec_lab.evaluation.baselines import baseline_metrics
    from sasrec_lab.ops import backend
    from sasrec_lab.run.loading import load_data, read_item_features
    from sasrec_lab.training import checkpoints, warm_start
    from sasrec_lab.training.forms import report_model
    from sasrec_lab.training.memory_needs import check_run_fits
    from sasrec_lab.training.processes import first_process_first, watch_processes
    from sasrec_lab.training.trainer import build_trainer, check_limits

    trainer = build_trainer(cfg, run.folder, loggers, callbacks)
    watch_processes(lambda line: not trainer.interrupted and run.end_failed(line))
    resumed = checkpoints.checkpoint_to_resume(cfg, run.folder)
    earlier = warm_start.load_earlier(cfg, run.previous)

    device, processes = trainer.strategy.root_device, trainer.world_size
    with first_process_first(trainer):
        sequences, data, titles = load_data(run, cfg, lambda holdout: check_run_fits(cfg, holdout, device, processes))
    features = read_item_features(run, cfg, data.holdout)
    item_ids, is_measured = data.holdout.item_ids, len(data.final_rows) > 0
    checkpoints.check_items(resumed, data.holdout.num_items)
    check_limits(cfg, data, processes)
    if trainer.is_global_zero:
        write_items(run.folder, item_ids, titles, features.names if features else None)

    model = build_model(cfg, data.holdout.num_items, features)
    report_model(run, trainer, model, data)
    warm_start.start_warm(run, earlier, model.encoder, item_ids)

    if is_measured and trainer.is_global_zero:
        with run.phase("baselines"):
            run.results["baselines"] = baseline_metrics(data, sequences)
    backend.keep_freed_memory()
    fit(run, trainer, model, data, resumed)
    if is_measured:
        test(run, trainer, model, data)
        if cfg.evaluation.lists and trainer.is_global_zero:
            measure_own_lists(run, trainer, model, data, features)
    if trainer.is_global_zero:
        if is_measured:
            record_ranks(run, model, data, sequences)
        record_in_trackers(run, loggers, model, data, sequences, titles)


def build_model(cfg: TrainConfig, num_items: int, features: "ItemFeatures | None") -> "SequentialRecommender":
    """Return the model with the initial weights that the seed determines."""
    import pytorch_lightning as pl

    from sasrec_lab.training.lightning_module import SequentialRecommender

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return SequentialRecommender(num_items, cfg, features)


def fit(
    run: RunRecord, trainer: "pl.Trainer", model: "SequentialRecommender", data: "SequenceData", resumed: Path | None
) -> None:
    """Train, from the checkpoint to resume if there is one, and record epochs and validation even if interrupted."""
    from sasrec_lab.run.machine import peak_memory_mb
    from sasrec_lab.run.protocol import LAST_EPOCH
    from sasrec_lab.training.checkpoints import results
    from sasrec_lab.training.forms import capture_form
    from sasrec_lab.training.trainer import interruptible

    try:
        with run.phase("fit"), interruptible(trainer):
            trainer.fit(model, data, ckpt_path=resumed, weights_only=True)
    except (InputError, OSError, Pruned):
        raise
    except Exception as error:
        if resumed is None or explain(error) or "train/loss" in trainer.callback_metrics:  # trained an epoch since
            raise
        errors.error("the checkpoint cannot be resumed", exc_info=True)
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(f"ckpt: {resumed} cannot be resumed ({reason}); choose another checkpoint") from error
    finally:
        run.info["peak_memory_mb"] = peak_memory_mb()
        if form := capture_form(model):
            run.info["capture"] = form
        run.results |= results(trainer)
    if not has_checkpoint(run.folder):
        flags = [f"trainer.{flag}={model.cfg.trainer.get(flag)}" for flag in ("max_epochs", "max_steps", "max_time")]
        raise InputError(f"no step was trained within {', '.join(flags)}; raise these limits")
    if run.results["best_epoch"] is None:
        run.results["protocol"]["selected_by"] = LAST_EPOCH


def test(run: RunRecord, trainer: "pl.Trainer", model: "SequentialRecommender", data: "SequenceData") -> None:
    """Measure the best checkpoint, or the last one without validation, on the held-out users.

    If the test may not be seen, that is on all users of validation, of whom training may have measured a part.
    """
    from sasrec_lab.training.checkpoints import checkpoint_to_test
    from sasrec_lab.training.trainer import interruptible

    with run.phase(model.cfg.evaluation.final_stage), interruptible(trainer):
        tested = checkpoint_to_test(trainer, run.folder, run.results["best_epoch"])
        trainer.test(model, data, ckpt_path=tested, weights_only=True, verbose=False)
    run.results["metrics"] |= model.tested


def measure_own_lists(
    run: RunRecord,
    trainer: "pl.Trainer",
    model: "SequentialRecommender",
    data: "SequenceData",
    features: "ItemFeatures | None",
) -> None:
    """Measure the lists of the tested checkpoint beyond accuracy, on the device that it was trained on."""
    from sasrec_lab.training.list_measures import measure_lists

    device = trainer.strategy.root_device
    with run.phase("lists"):
        run.results["metrics"] |= measure_lists(model.encoder.to(device).eval(), data, device, features)


def record_ranks(run: RunRecord, model: "SequentialRecommender", data: "SequenceData", sequences: "Sequences") -> None:
    """Write the rank of each target that was measured, and record the metrics of cold and known test targets."""
    from sasrec_lab.evaluation.cold_targets import cold_and_known

    evaluation = model.cfg.evaluation
    write_ranks(run.folder, model.test_ranks, data.final_rows, sequences, evaluation.final_stage)
    if evaluation.test:
        run.results["cold_targets"] = cold_and_known(data.holdout, model.test_ranks["rank"], evaluation.k)


def record_in_trackers(
    run: RunRecord,
    loggers: "Sequence[Logger]",
    model: "SequentialRecommender",
    data: "SequenceData",
    sequences: "Sequences",
    titles: "np.ndarray | None",
) -> None:
    """Write the metrics to the trackers and, to TensorBoard, hyperparameters and what else the config asks for."""
    from sasrec_lab.training import tensorboard
    from sasrec_lab.training.loggers import log_results, tensorboard_writer

    best, epochs = run.results["best_epoch"], run.results["epochs"]
    tested = epochs if best is None else best + 1
    log_results(loggers, model.cfg, run.results["metrics"], tested)
    if writer := tensorboard_writer(loggers):
        tensorboard.write_hyperparameters(writer, model.cfg, run.results["metrics"], tested)
        tensorboard.write_extras(writer, model.encoder, data.holdout, sequences.user_ids, titles, model.cfg)
        writer.close()


if __name__ == "__main__":
    entry()
