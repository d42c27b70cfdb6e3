"""Train one configuration and write down everything that a reader of the result must know.

python -m sasrec_lab.train                                    MovieLens-100K, SASRec, softmax
python -m sasrec_lab.train dataset=sasrec_ml_1m model.dim=50  any key of conf/ on the command line
python -m sasrec_lab.train --help                             what there is to choose
"""

import logging
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sasrec_lab import run_folder
from sasrec_lab.command_line import check_command_line
from sasrec_lab.config import CONF_DIR, InputError, TrainConfig, flat, plain, to_typed

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger("sasrec_lab.train")  # also where this module is __main__
errors = logging.getLogger("sasrec_lab.errors")  # into train.log; the screen gets the line as the program ends


def entry() -> None:
    """Refuse a mistaken command line before Hydra makes a folder, in one line; else compose and run."""
    try:
        composed = check_command_line(sys.argv[1:])
        if composed is not None:
            cfg, folder = composed
            finished = run_folder.check(folder, cfg)
            if finished is not None:
                from sasrec_lab.summary import table

                print(f"finished before, nothing is run again:\n{table(finished, cfg, folder)}")
                return
    except InputError as error:
        sys.exit(f"error: {error}")
    main()


@hydra.main(config_path=CONF_DIR, config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Gives the monitored validation metric, for sweepers."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C; Lightning keeps it
    try:
        typed = to_typed(cfg)
        return train(typed, folder)["metrics"].get(typed.evaluation.monitor)
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = f"{error.filename or folder}: {error.strerror or error}; what was finished is in {folder}"
        errors.error(error)
        if HydraConfig.get().mode is not RunMode.RUN:
            raise  # the sweep goes on with its other jobs
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        errors.error("interrupted")
        print(f"interrupted; everything so far is in {folder}\ngo on with: {_resume_command(folder)}", file=sys.stderr)
        sys.exit(130)


def train(cfg: TrainConfig, folder: Path) -> dict[str, Any]:
    """Build, fit, test, write. Gives the content of metrics.json."""
    # imported here, because help, --cfg and messages about mistakes need not wait for torch
    import pytorch_lightning as pl

    from sasrec_lab import machine, summary
    from sasrec_lab.data.datamodule import SequenceData
    from sasrec_lab.data.sequences import hold_out, load_sequences
    from sasrec_lab.lightning_module import SequentialRecommender
    from sasrec_lab.popularity import popularity_metrics

    _quiet()
    with run_folder.recorded(folder, cfg) as run:
        trainer = build_trainer(cfg, folder)
        resumed = _checkpoint_to_resume(cfg, folder)
        with run.phase("data"):
            sequences = load_sequences(cfg.dataset, cfg.data_dir)
            holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
            data = SequenceData(holdout, cfg)
        run.results["protocol"] = summary.protocol(cfg, sequences, holdout)
        log.info(summary.data_line(sequences, holdout))

        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        model = SequentialRecommender(holdout.num_items, cfg)
        run.facts |= machine.facts(trainer.strategy.root_device)
        run.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        log.info(summary.model_line(cfg, run.facts))

        with run.phase("popularity"):
            run.results["baselines"] = {"popularity": popularity_metrics(data, cfg.evaluation)}
        try:
            with run.phase("fit"):
                fit(trainer, model, data, resumed)
        finally:
            run.facts["peak_memory_mb"] = machine.peak_memory_mb()
            run.results |= training_results(trainer, folder)
        with run.phase("test"):
            tested = trainer.test(model, data, ckpt_path=checkpoint(folder), weights_only=True, verbose=False)[0]
        run.results["metrics"] |= tested
        ranks = model.test_ranks()  # of all processes, so all have to ask
        if trainer.is_global_zero:
            run_folder.write_ranks(folder, ranks, sequences.user_ids, holdout.item_ids)
        shown = tested | {f"best/{cfg.evaluation.monitor}": run.results["metrics"].get(cfg.evaluation.monitor, 0.0)}
        trainer.logger.log_hyperparams(flat(plain(cfg)), shown, step=trainer.global_step)
    log.info(summary.table(run.results, cfg, folder))
    return run.results


def build_trainer(cfg: TrainConfig, folder: Path) -> "pl.Trainer":
    """Lightning's Trainer with its own callbacks, as the config says.

    Raises:
        InputError: a flag that the Trainer refuses.
    """
    import pytorch_lightning as pl
    import torch
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
    from pytorch_lightning.loggers import TensorBoardLogger

    torch.utils.deterministic.fill_uninitialized_memory = False  # trainer.deterministic would fill what is overwritten
    flags = dict(cfg.trainer)
    flags["enable_progress_bar"] = bool(flags.get("enable_progress_bar", True)) and sys.stderr.isatty()
    monitor = cfg.evaluation.monitor if flags.get("limit_val_batches", 1.0) != 0 else None
    callbacks: list[pl.Callback] = [
        ModelCheckpoint(
            folder / "checkpoints",
            filename="best" if monitor else "last",
            monitor=monitor,
            mode="max",
            save_last=monitor is not None,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
    ]
    if monitor and cfg.evaluation.patience:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=cfg.evaluation.patience))
    if cfg.optimizer.ema:
        callbacks.append(EMAWeightAveraging(decay=cfg.optimizer.ema))
    if flags["enable_progress_bar"]:
        callbacks.append(TQDMProgressBar())
    try:
        return pl.Trainer(
            **flags,
            logger=TensorBoardLogger(folder, name="tb", version="", default_hp_metric=False),
            callbacks=callbacks,
            default_root_dir=folder,
            use_distributed_sampler=False,  # ours gives each process its own windows and users
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from error


def fit(trainer: "pl.Trainer", model: "pl.LightningModule", data: "pl.LightningDataModule", ckpt: Path | None) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    handler = signal.getsignal(signal.SIGINT)
    try:
        with logging_redirect_tqdm() if trainer.progress_bar_callback else nullcontext():
            trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C, after it has told the system to ignore the next ones
        signal.signal(signal.SIGINT, handler)
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def checkpoint(folder: Path) -> Path:
    """The best on validation, or the last where nothing was validated."""
    best = folder / "checkpoints" / "best.ckpt"
    return best if best.is_file() else folder / "checkpoints" / "last.ckpt"


def training_results(trainer: "pl.Trainer", folder: Path) -> dict[str, Any]:
    """Epochs finished, and epoch and validation metrics of the best checkpoint so far."""
    import torch

    path = checkpoint(folder)
    if not path.is_file():
        return {"epochs": trainer.current_epoch}
    saved = torch.load(path, weights_only=True, map_location="cpu")
    best_epoch = saved["epoch"] if path.stem == "best" else None
    return {"epochs": trainer.current_epoch, "best_epoch": best_epoch, "metrics": dict(saved["validation"])}


def _checkpoint_to_resume(cfg: TrainConfig, folder: Path) -> Path | None:
    import torch

    if cfg.ckpt is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if cfg.ckpt == "last" else Path(cfg.ckpt)
    try:
        torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    except Exception as error:  # a missing, truncated or foreign file, or one that holds code: torch's errors vary
        reason = str(error).split("\n")[0]
        raise InputError(f"ckpt={cfg.ckpt}: {path} is not a checkpoint of this project ({reason})") from error
    return path


def _resume_command(folder: Path) -> str:
    last = folder / "checkpoints" / "last.ckpt"
    words = [word for word in sys.argv[1:] if not word.startswith(("ckpt=", "hydra.run.dir="))]
    resume = ["ckpt=last"] if last.is_file() else []
    return shlex.join(["python", "-m", "sasrec_lab.train", *words, f"hydra.run.dir={folder}", *resume])


def _quiet() -> None:
    """Warnings go into train.log; of Lightning's messages only warnings are heard."""
    logging.captureWarnings(True)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    entry()
