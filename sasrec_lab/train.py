"""Train and evaluate one configuration, and record everything needed to trust and reproduce the result.

python -m sasrec_lab.train                                    MovieLens-100K, SASRec, softmax
python -m sasrec_lab.train dataset=sasrec_ml_1m model.dim=50  any key of conf/ on the command line
python -m sasrec_lab.train --help                             what there is to choose
"""

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.model import ClosedFormConfig, ItemVectors
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run import sweep
from sasrec_lab.run.failures import explaining_failures
from sasrec_lab.run.folder import has_checkpoint
from sasrec_lab.run.launch import exit_interrupted, launch
from sasrec_lab.run.provenance import is_first_process
from sasrec_lab.run.record import RunRecord, describe_failure, record_run, write_items, write_ranks
from sasrec_lab.run.signals import interrupts_deferred

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import pytorch_lightning as pl

    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.data.holdout import Holdout
    from sasrec_lab.data.items import ItemFeatures
    from sasrec_lab.data.sequences import Sequences
    from sasrec_lab.training.lightning_module import SequentialRecommender
    from sasrec_lab.training.warm_start import EarlierRun

log = logging.getLogger("sasrec_lab.train")  # this name also when the module runs as __main__
errors = logging.getLogger("sasrec_lab.errors")  # goes into train.log; the screen gets the line as the program ends


def entry() -> None:
    """Run the command line."""
    launch(main, _compare_jobs)


def _compare_jobs(folder: Path) -> str:
    """Return the comparison of a sweep's jobs."""
    from sasrec_lab.report.summary import compare_jobs  # late, as it imports NumPy

    return compare_jobs(folder)


@hydra.main(config_path=CONF_DIR, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Run the composed configuration; for a job of a sweep return the monitored validation metric to the sweeper."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_job = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        if is_job:
            return sweep.run_job(cfg, folder, train)
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
    return None


def train(cfg: TrainConfig, folder: Path) -> dict[str, Any]:
    """Build, fit, test and record one run; return the content of metrics.json."""
    with record_run(folder, cfg) as run, explaining_failures():
        _import_libraries()
        if isinstance(cfg.model, ClosedFormConfig):
            fit_closed_form(run, cfg)
            return run.results
        # Imports that load torch and Lightning are inside functions: help, --cfg and user errors do not wait for them.
        from pytorch_lightning.loggers import TensorBoardLogger

        from sasrec_lab.evaluation.cold_targets import cold_and_known
        from sasrec_lab.ops import backend
        from sasrec_lab.training import checkpoints, tensorboard, warm_start
        from sasrec_lab.training.memory_needs import check_run_fits
        from sasrec_lab.training.processes import watch_processes
        from sasrec_lab.training.trainer import build_trainer, check_limits

        trainer = build_trainer(cfg, folder)
        watch_processes(lambda line: not trainer.interrupted and run.end_failed(line))
        resumed = checkpoints.checkpoint_to_resume(cfg, folder)
        earlier = warm_start.load_earlier(cfg, run.previous)

        device, processes = trainer.strategy.root_device, trainer.world_size
        sequences, data, titles = load_data(run, cfg, lambda holdout: check_run_fits(cfg, holdout, device, processes))
        features = read_item_features(run, cfg, data.holdout)
        holdout, has_test = data.holdout, len(data.holdout.test) > 0
        checkpoints.check_items(resumed, holdout.num_items)
        check_limits(cfg, data, processes)
        if trainer.is_global_zero:
            write_items(folder, holdout.item_ids, titles, features.names if features else None)

        model = build_model(cfg, holdout.num_items, features)
        report_model(run, trainer, model, data)
        start_warm(run, model, earlier, holdout)

        if has_test:
            measure_baselines(run, data, sequences)
        backend.keep_freed_memory()
        fit(run, trainer, model, data, resumed)
        if has_test:
            test(run, trainer, model, data)
        if trainer.is_global_zero:
            if has_test:
                write_ranks(folder, model.test_ranks, holdout.test, sequences)
                run.results["cold_targets"] = cold_and_known(holdout, model.test_ranks["rank"], cfg.evaluation.k)
            assert isinstance(trainer.logger, TensorBoardLogger)
            writer = trainer.logger.experiment
            best, epochs = run.results["best_epoch"], run.results["epochs"]
            tested = epochs if best is None else best + 1
            tensorboard.write_hyperparameters(writer, cfg, run.results["metrics"], tested)
            tensorboard.write_extras(writer, model.encoder, holdout, sequences.user_ids, titles, cfg)
            writer.close()
    return run.results


def _import_libraries() -> None:
    """Import what takes seconds; a signal waits for it, because an import may turn its exception into another one."""
    with interrupts_deferred():
        import sasrec_lab.data.sequences
        import sasrec_lab.training.trainer  # noqa: F401


def fit_closed_form(run: RunRecord, cfg: TrainConfig) -> None:
    """Fit, measure and record a model without epochs, in the process that records."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from sasrec_lab.evaluation.cold_targets import cold_and_known
    from sasrec_lab.run import summary
    from sasrec_lab.run.machine import describe_machine, peak_memory_mb
    from sasrec_lab.training import closed_form, tensorboard

    model = cfg.model
    assert isinstance(model, ClosedFormConfig)
    if not is_first_process():
        return
    sequences, data, titles = load_data(run, cfg, lambda holdout: closed_form.check_fits(cfg, holdout))
    write_items(run.folder, data.holdout.item_ids, titles)
    run.info |= describe_machine(torch.device("cpu"), matmul=None)
    with run.phase("fit"):
        weights = closed_form.fit(model, data.holdout)
    run.info["parameters"] = weights.size
    log.info(summary.closed_form_line(cfg, run.info))
    closed_form.write_weights(run.folder, weights)
    if len(data.holdout.test):
        measure_baselines(run, data, sequences)
        with run.phase("test"):
            run.results["metrics"], ranks = closed_form.measure(weights, data)
        write_ranks(run.folder, ranks, data.holdout.test, sequences)
        run.results["cold_targets"] = cold_and_known(data.holdout, ranks["rank"], cfg.evaluation.k)
    run.info["peak_memory_mb"] = peak_memory_mb()
    with SummaryWriter(str(run.folder / "tb")) as writer:
        tensorboard.write_hyperparameters(writer, cfg, run.results["metrics"], epoch=0)


def load_data(
    run: RunRecord, cfg: TrainConfig, check_fits: "Callable[[Holdout], None]"
) -> "tuple[Sequences, SequenceData, np.ndarray | None]":
    """Return the data set's sequences, the batches of its holdout, and the titles of the items, if it has any.

    `check_fits` raises InputError if the model does not fit in memory. Protocol and counts are recorded and logged.
    """
    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.data.fetch import fetch_missing
    from sasrec_lab.data.holdout import hold_out
    from sasrec_lab.data.items import read_titles
    from sasrec_lab.data.sequences import load_sequences
    from sasrec_lab.run.protocol import protocol
    from sasrec_lab.run.summary import data_line

    dataset = cfg.dataset
    with run.phase("data"):
        fetch_missing(dataset, cfg.data_dir)
        sequences = load_sequences(dataset, cfg.data_dir)
        holdout = hold_out(
            sequences,
            dataset.windows,
            dataset.catalogue,
            cfg.model.maxlen,
            dataset.holdout,
            dataset.time_split,
            cold_last=getattr(cfg.model, "items", ItemVectors.ids) is not ItemVectors.ids,
            query_time=cfg.model.asked_at,
        )
        check_fits(holdout)
        titles = read_titles(dataset, cfg.data_dir, holdout.item_ids)
        data = SequenceData(holdout, cfg)
    run.results["protocol"] = protocol(cfg, sequences, holdout)
    log.info(data_line(sequences, holdout))
    report_unreachable(run, holdout, cfg)
    return sequences, data, titles


def read_item_features(run: RunRecord, cfg: TrainConfig, holdout: "Holdout") -> "ItemFeatures | None":
    """Return the features that the model makes item vectors of, None if it does not.

    Raises:
        InputError: their file is missing or wrong, or has changed since the run that resumes began.
    """
    from sasrec_lab.data.items import read_features

    features = read_features(cfg.dataset, cfg.data_dir, holdout.item_ids, holdout.num_compared)
    if features is None or cfg.dataset.features is None:
        return None
    checksum = features.checksum()
    if run.info.setdefault("item_features", checksum) != checksum:
        raise InputError(
            f"dataset.features.path={cfg.dataset.features.path} has other features than when this run began; restore"
            " the file, or start over in another folder"
        )
    log.info(f"       item features: {features}")
    return features


def report_unreachable(run: RunRecord, holdout: "Holdout", cfg: TrainConfig) -> None:
    """Record and log how many targets no model can rank; raise InputError if these are all."""
    from sasrec_lab.data.reach import count_unreachable, describe_unreachable

    run.results["unreachable_targets"] = unreachable = count_unreachable(holdout, cfg.evaluation.filter_seen)
    targets = {stage: len(holdout.rows(stage).targets) for stage in unreachable}
    if line := describe_unreachable(unreachable, targets, cfg):
        log.warning(f"       {line}")


def build_model(cfg: TrainConfig, num_items: int, features: "ItemFeatures | None") -> "SequentialRecommender":
    """Return the model with the initial weights that the seed determines."""
    import pytorch_lightning as pl

    from sasrec_lab.training.lightning_module import SequentialRecommender

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return SequentialRecommender(num_items, cfg, features)


def start_warm(
    run: RunRecord, model: "SequentialRecommender", earlier: "EarlierRun | None", holdout: "Holdout"
) -> None:
    """Copy the initial weights of an earlier run, and record where they come from."""
    from sasrec_lab.training import warm_start

    if earlier:
        taken = warm_start.start_from(earlier, model.encoder, holdout.item_ids)
        other = warm_start.other_data(earlier.protocol, run.results["protocol"])
        run.info["init_from"] = asdict(taken) | {"other_data": other}
        log.info(f"start  {taken}")
        if other:
            log.warning(f"       it was trained on other data ({other}), which may include items held out here")
    if other := run.info.get("init_from", {}).get("other_data"):
        run.results["protocol"]["initial_weights"] = f"of a run on other data ({other})"


def report_model(run: RunRecord, trainer: "pl.Trainer", model: "SequentialRecommender", data: "SequenceData") -> None:
    """Record and log the model's size, the machine, and the forms in which both compute."""
    from sasrec_lab.ops.backend import choose_matmul
    from sasrec_lab.run import summary
    from sasrec_lab.run.machine import describe_machine
    from sasrec_lab.training.forms import describe_forms

    device, cfg = trainer.strategy.root_device, model.cfg
    matmul = choose_matmul(device, run.previous.get("matmul"))
    run.info |= describe_machine(device, matmul) | describe_forms(trainer, model, data)
    run.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    log.info(summary.model_line(cfg, model.loss.describe(cfg.loss), run.info))
    if warning := summary.kernel_change_warning(run.previous, run.info):
        log.warning(warning)


def measure_baselines(run: RunRecord, data: "SequenceData", sequences: "Sequences") -> None:
    """Measure popularity and a Markov chain on the held-out users."""
    from sasrec_lab.evaluation.baselines import baseline_metrics

    with run.phase("baselines"):
        run.results["baselines"] = baseline_metrics(data, sequences)


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
    except (InputError, OSError):
        raise
    except Exception as error:
        if resumed is None or "train/loss" in trainer.callback_metrics:  # an epoch has been trained since
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
    """Measure the best checkpoint, or the last one without validation, on the held-out users."""
    from sasrec_lab.training.checkpoints import checkpoint_to_test
    from sasrec_lab.training.trainer import interruptible

    with run.phase("test"), interruptible(trainer):
        tested = checkpoint_to_test(trainer, run.folder, run.results["best_epoch"])
        trainer.test(model, data, ckpt_path=tested, weights_only=True, verbose=False)
    run.results["metrics"] |= model.tested


if __name__ == "__main__":
    entry()
