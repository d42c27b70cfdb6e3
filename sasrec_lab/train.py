"""Train one configuration and write down everything that a reader of the result must know.

python -m sasrec_lab.train                                    MovieLens-100K, SASRec, softmax
python -m sasrec_lab.train dataset=sasrec_ml_1m model.dim=50  any key of conf/ on the command line
python -m sasrec_lab.train --help                             what there is to choose
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sasrec_lab.config.command_line import Command, Job, check_command_line
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.overrides import argument, prepared
from sasrec_lab.config.printed import printed
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run import sweep
from sasrec_lab.run.lock import claimed
from sasrec_lab.run.provenance import COMMAND, as_typed, is_first_process, near

log = logging.getLogger("sasrec_lab.train")  # also where this module is __main__
errors = logging.getLogger("sasrec_lab.errors")  # into train.log; the screen gets the line as the program ends


def entry() -> None:
    """Refuse a mistaken command line before Hydra makes a folder, in one line; else compose and run."""
    sys.argv[1:] = prepared(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C; Lightning keeps it
    try:
        if not is_first_process():
            logging.disable(logging.WARNING)  # the first one says it
            if os.environ.get("LOCAL_RANK", "0") != "0":  # the process that started this one stops it
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
            main()
        elif (command := check_command_line(sys.argv[1:])) is None:  # help and the like
            with printed():
                main()
        elif command.sweep_folder:
            _run_sweep(command)
        else:
            _run_alone(command.jobs[0])
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run_alone(job: Job) -> None:
    finished = run_folder.check(job.folder, job.cfg)
    if finished:
        from sasrec_lab.run.summary import table

        print(f"finished before, nothing is run again:\n{table(finished, job.cfg, job.folder)}")
    elif job.cfg.ckpt is None and run_folder.has_checkpoint(job.folder):
        raise InputError(
            f"{job.folder} holds this run unfinished; go on with ckpt=last, or choose another hydra.run.dir"
        )
    else:
        with claimed(job.folder):
            main()


def _run_sweep(command: Command) -> None:
    folder, jobs = command.sweep_folder, command.jobs
    sweep.check(command)
    os.environ[COMMAND] = as_typed()
    sweep_dir = argument("hydra.sweep.dir", near(folder))
    sys.argv[1:] = _with(sweep_dir)  # one for all jobs, whatever their names
    stopped = None
    try:
        with claimed(folder, "hydra.sweep.dir"):
            sweep.prepare(command)
            main()
    except KeyboardInterrupt:
        _say_how_to_go_on(folder, sweep_dir)
    except SystemExit as error:  # Ctrl-C in a job; or the launcher broke, and Hydra has said how
        if error.code == 130:
            raise
        stopped = error
    if failed := sweep.failures(folder, jobs):
        early = f"the launcher broke, as said above; {_going_on(sweep_dir)}" if stopped else None
        sys.exit("\n".join([f"error: {len(failed)} of the jobs in {folder} failed:", *failed, *filter(None, [early])]))
    if stopped:
        raise stopped
    print(sweep.summary(folder, jobs))


@hydra.main(config_path=CONF_DIR, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """A run, or a job of a sweep, of which the sweeper gets the monitored validation metric."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            return sweep.run_job(cfg, folder, train)
        train(to_typed(cfg), folder)
    except (InputError, OSError) as error:
        line = run_folder.explain(error, folder)
        errors.error(line)
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        if not is_first_process():
            sys.exit(130)
        errors.error("interrupted")
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _say_how_to_go_on(folder, argument("hydra.sweep.dir", near(folder.parent)))
        ckpt = ["ckpt=last"] if run_folder.has_checkpoint(folder) else []
        _say_how_to_go_on(folder, argument("hydra.run.dir", near(folder)), *ckpt)


def train(cfg: TrainConfig, folder: Path) -> dict[str, Any]:
    """Build, fit, test, write. Gives the content of metrics.json."""
    with run_folder.recorded(folder, cfg) as run:
        # imported here, because help, --cfg and messages about mistakes need not wait for torch
        import pytorch_lightning as pl

        from sasrec_lab.data.datamodule import SequenceData
        from sasrec_lab.data.items import read_titles
        from sasrec_lab.data.sequences import hold_out, load_sequences
        from sasrec_lab.evaluation.baselines import popularity_metrics
        from sasrec_lab.ops import backend as machine
        from sasrec_lab.run import summary
        from sasrec_lab.training import checkpoints, tensorboard
        from sasrec_lab.training.lightning_module import SequentialRecommender
        from sasrec_lab.training.trainer import build_trainer, interruptible

        trainer = build_trainer(cfg, folder)
        trainer.logger.hparams.update(summary.hyperparameters(cfg))  # for tb/hparams.yaml
        resumed = checkpoints.to_resume(cfg, folder)
        with run.phase("data"):
            sequences = load_sequences(cfg.dataset, cfg.data_dir)
            dataset = cfg.dataset
            holdout = hold_out(sequences, dataset.windows, dataset.catalogue, cfg.model.maxlen, dataset.holdout)
            titles = read_titles(dataset, cfg.data_dir, holdout.item_ids)
            data = SequenceData(holdout, cfg)
        run.results["protocol"] = summary.protocol(cfg, sequences, holdout)
        log.info(summary.data_line(sequences, holdout))
        checkpoints.check_items(resumed, holdout.num_items)
        if trainer.is_global_zero:
            run_folder.write_items(folder, holdout.item_ids, titles)

        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        model = SequentialRecommender(holdout.num_items, cfg)
        run.facts |= machine.facts(trainer.strategy.root_device, run.before.get("matmul"))
        run.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        log.info(summary.model_line(cfg, run.facts))
        if told := summary.other_kernels(run.before, run.facts):
            log.warning(told)

        measured = len(holdout.users) > 0
        if measured:
            with run.phase("popularity"):
                run.results["baselines"] = {"popularity": popularity_metrics(data, cfg.evaluation)}
        machine.keep_freed_memory()
        try:
            with run.phase("fit"), interruptible(trainer):
                trainer.fit(model, data, ckpt_path=resumed, weights_only=True)
        finally:
            run.facts["peak_memory_mb"] = machine.peak_memory_mb()
            run.results |= checkpoints.results(trainer, folder)
        best = checkpoints.chosen(folder)
        if best.stem == "last":
            run.results["protocol"]["selected_by"] = "last epoch"
        if measured:
            with run.phase("test"), interruptible(trainer):
                trainer.test(model, data, ckpt_path=best, weights_only=True, verbose=False)
            run.results["metrics"] |= model.tested
            if trainer.is_global_zero:
                run_folder.write_ranks(folder, model.test_ranks, sequences)
        if trainer.is_global_zero:
            writer, metrics = trainer.logger.experiment, summary.hparams(run.results, cfg)
            tensorboard.write_hyperparameters(writer, summary.hyperparameters(cfg), metrics, trainer.global_step)
            tensorboard.draw(writer, model.encoder, holdout, sequences.user_ids, titles, cfg)
            writer.close()
    log.info(summary.table(run.results, cfg, folder))
    return run.results


def _say_how_to_go_on(folder: Path, *words: str) -> NoReturn:
    print(f"interrupted; everything so far is in {near(folder)}\n{_going_on(*words)}", file=sys.stderr)
    sys.exit(130)


def _going_on(*words: str) -> str:
    """The command that goes on with the run, or with the sweep, is this one with the words."""
    return f"go on with: {as_typed(_with(*words))}"


def _with(*words: str) -> list[str]:
    """The command's words and these, which take the place of what is given for their keys."""
    replaced = tuple(f"{word.partition('=')[0]}=" for word in words)
    return [*(word for word in sys.argv[1:] if not word.startswith(replaced)), *words]


if __name__ == "__main__":
    entry()
