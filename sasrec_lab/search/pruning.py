"""A callback that stops the run of a trial which earlier trials make unlikely to become the best."""

from typing import Any

import pytorch_lightning as pl
from optuna.trial import Trial

from sasrec_lab.errors import Pruned


class CurvePruning(pl.Callback):
    """Reports the monitored validation metric of each epoch to the study, which decides whether the run continues."""

    def __init__(self, trial: Trial, monitor: str, pruner: str):
        self.trial, self.monitor, self.pruner = trial, monitor, pruner
        (recorded,) = (each for each in trial.study.get_trials(deepcopy=False) if each.number == trial.number)
        self.reported = set(recorded.intermediate_values)  # before the run was cut off
        self.end: Pruned | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let training stop if the study says so; Lightning saves the epoch first."""
        value, epoch = pl_module.validation.get(self.monitor), trainer.current_epoch + 1
        if value is None:  # validation is not after every epoch
            return
        if epoch not in self.reported:
            self.trial.report(value, epoch)
        if epoch != trainer.max_epochs and self.trial.should_prune():
            self.end = Pruned(f"stopped after epoch {epoch} with {self.monitor} {value:.4f}, by pruner={self.pruner}")
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the run, if trainer.min_epochs let training continue."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the run as pruned, so that it is not tested."""
        if self.end:
            raise self.end
