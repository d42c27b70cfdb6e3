"""Train and evaluate one configuration, and record everything needed to trust and reproduce the result.

python -m sasrec_lab.train                                    MovieLens-100K, SASRec, softmax
python -m sasrec_lab.train dataset=sasrec_ml_1m model.dim=50  any key of conf/ on the command line
python -m sasrec_lab.train --help                             what there is to choose
"""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run import sweep
from sasrec_lab.run.launch import exit_interrupted, launch
from sasrec_lab.run.provenance import is_first_process

log = logging.getLogger("sasrec_lab.train")  # also where this module is __main__
errors = logging.getLogger("sasrec_lab.errors")  # into train.log; the screen gets the line as the program ends


def entry() -> None:
    """Run the command line."""
    launch(main)


@hydra.main(config_path=CONF_DIR, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Run the composed configuration; of a job of a sweep return the monitored validation metric, for the sweeper."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_job = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        if is_job:
            return sweep.run_job(cfg, folder, train)
        train(to_typed(cfg), folder)
    except (InputError, OSError) as error:
        line = run_folder.describe_failure(error, folder)
        errors.error(line)
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        if is_first_process():
            errors.error("interrupted")
        exit_interrupted(folder, is_job)


def train(cfg: TrainConfig, folder: Path) -> dict[str, Any]:
    """Build, fit, test and record one run; return the content of metrics.json."""
    with run_folder.record_run(folder, cfg) as run:
        # imported here, because help, --cfg and messages about mistakes need not wait for torch
        import pytorch_lightning as pl

        from sasrec_lab.data.datamodule import SequenceData
        from sasrec_lab.data.holdout import hold_out
        from sasrec_lab.data.items import read_titles
        from sasrec_lab.data.sequences import load_sequences
        from sasrec_lab.evaluation.baselines import popularity_metrics
        from sasrec_lab.ops import backend
        from sasrec_lab.run import machine, summary
        from sasrec_lab.run.protocol import protocol
        from sasrec_lab.training import checkpoints, tensorboard
        from sasrec_lab.training.lightning_module import SequentialRecommender
        from sasrec_lab.training.losses import LOSSES
        from sasrec_lab.training.trainer import build_trainer, interruptible

        trainer = build_trainer(cfg, folder)
        trainer.logger.hparams.update(tensorboard.hyperparameters(cfg))  # for tb/hparams.yaml
        resumed = checkpoints.checkpoint_to_resume(cfg, folder)
        with run.phase("data"):
            sequences = load_sequences(cfg.dataset, cfg.data_dir)
            dataset = cfg.dataset
            holdout = hold_out(sequences, dataset.windows, dataset.catalogue, cfg.model.maxlen, dataset.holdout)
            titles = read_titles(dataset, cfg.data_dir, holdout.item_ids)
            data = SequenceData(holdout, cfg, LOSSES[cfg.loss.name].sampler)
        run.results["protocol"] = protocol(cfg, sequences, holdout)
        log.info(summary.data_line(sequences, holdout))
        checkpoints.check_items(resumed, holdout.num_items)
        if trainer.is_global_zero:
            run_folder.write_items(folder, holdout.item_ids, titles)

        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        model = SequentialRecommender(holdout.num_items, cfg)
        device = trainer.strategy.root_device
        matmul = backend.choose_matmul(device, run.before.get("matmul"))
        run.info |= machine.describe_machine(device, matmul)
        run.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        log.info(summary.model_line(cfg, LOSSES[cfg.loss.name].describe(cfg.loss), run.info))
        if told := summary.kernel_change_warning(run.before, run.info):
            log.warning(told)

        measured = len(holdout.users) > 0
        if measured:
            with run.phase("popularity"):
                run.results["baselines"] = {"popularity": popularity_metrics(data, cfg.evaluation)}
        backend.keep_freed_memory()
        try:
            with run.phase("fit"), interruptible(trainer):
                trainer.fit(model, data, ckpt_path=resumed, weights_only=True)
        finally:
            run.info["peak_memory_mb"] = machine.peak_memory_mb()
            run.results |= checkpoints.results(trainer, folder)
        best = checkpoints.best_or_last(folder)
        if best.stem == "last":
            run.results["protocol"]["selected_by"] = "last epoch"
        if measured:
            with run.phase("test"), interruptible(trainer):
                trainer.test(model, data, ckpt_path=best, weights_only=True, verbose=False)
            run.results["metrics"] |= model.tested
            if trainer.is_global_zero:
                run_folder.write_ranks(folder, model.test_ranks, sequences)
        if trainer.is_global_zero:
            writer, metrics = trainer.logger.experiment, tensorboard.hparam_metrics(run.results, cfg)
            tensorboard.write_hyperparameters(writer, tensorboard.hyperparameters(cfg), metrics, trainer.global_step)
            tensorboard.write_extras(writer, model.encoder, holdout, sequences.user_ids, titles, cfg)
            writer.close()
    log.info(summary.results_table(run.results, cfg, folder))
    return run.results


if __name__ == "__main__":
    entry()
