"""The LightningModule: training, validation and test steps of an encoder with a loss."""

from math import isfinite
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import OptimizerName, Schedule
from sasrec_lab.data.batches import EvaluationBatch, TrainingBatch
from sasrec_lab.data.items import ItemFeatures
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.metrics import HoldoutMetrics, IntegerConcat, MeanLoss
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops.ranking import Scores
from sasrec_lab.training.captured_steps import CapturedSteps, GraphRecorder
from sasrec_lab.training.loggers import log_epoch
from sasrec_lab.training.losses import ItemTable, find_loss
from sasrec_lab.training.optimizer import build_optimizer, build_schedule

# TensorBoard sorts by name and opens two groups; the tilde keeps these behind `test` and `val`
TRAIN_LOSS, TRAIN_LR = "~train/loss", "~train/lr"


class SequentialRecommender(pl.LightningModule):
    """An encoder, its loss, and its metrics.

    `features` are those that item vectors are made of, if they are. A checkpoint contains `num_items` and the config as
    plain values, so it loads with `weights_only=True`.
    """

    def __init__(self, num_items: int, cfg: TrainConfig, features: ItemFeatures | None = None):
        super().__init__()
        self.save_hyperparameters({"num_items": num_items, "config": to_plain(cfg)}, logger=False)
        self.cfg, self.loss = cfg, find_loss(cfg.loss)
        self.num_compared = features.num_trained if features else num_items  # the first items, which training has
        if self.loss.check:
            self.loss.check(cfg.loss, self.num_compared)
        self.encoder = Encoder(num_items, cfg.model, features)
        self.is_sparse = cfg.optimizer.name is OptimizerName.rowwise_adam  # it needs gradients of just a batch's rows
        if self.is_sparse:
            self.encoder.input_items.sparse = True
        self.captured: CapturedSteps | None = None  # during training with capture=true
        self.capture_fault: str | None = None  # why there are none in spite of it
        self.train_loss = MeanLoss()
        target, has_loss = cfg.dataset.target, cfg.evaluation.has_loss
        self.validation_metrics = HoldoutMetrics(
            num_items, cfg.evaluation, target, only_monitored=True, has_loss=has_loss
        )
        self.test_metrics = HoldoutMetrics(num_items, cfg.evaluation, target, has_loss=not cfg.evaluation.test)
        self.validation: dict[str, float] = {}  # of this epoch, empty without a validation in it
        self.tested: dict[str, float] = {}  # metrics of the chosen checkpoint, on `evaluation.final_stage`
        self.epoch_line = ""  # what the checkpoints' callback prints once the epoch is saved
        self.ranks = nn.ModuleDict({name: IntegerConcat() for name in ("row", "user", "rank", "sampled_rank")})
        self.test_ranks: dict[str, Tensor] = {}  # per target, in the order of the stage's rows

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, times this process's share if there are several.

        Gradients are averaged over the processes, whose batches have different numbers of targets. With the shares the
        average is that of one process with all windows of the step.
        """
        loss_of = self.batch_loss if self.captured is None else self.captured.loss
        loss, targets = loss_of(batch), (batch.labels.targets > 0).sum()
        self.train_loss.update(loss.detach(), targets)
        if self.trainer.world_size == 1:
            return loss
        mean_targets = self.trainer.strategy.reduce(targets.float(), reduce_op="mean")
        return loss * (targets / mean_targets.clamp(min=1 / self.trainer.world_size))

    def batch_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the loss of a batch, without counting it."""
        labels = batch.labels
        states, vectors = self.encoder.states_and_table(batch.inputs, labels.rows, self.cfg.loss.passes)
        if self.num_compared < len(vectors):
            vectors = vectors[: self.num_compared]
        table = ItemTable(vectors, self.is_sparse)
        return self.loss.compute(states, table, labels, batch.negatives, self.cfg.loss)

    def on_train_start(self) -> None:
        """Prepare for captured steps, once the callbacks that copy the module have done so."""
        if self.cfg.capture and self.capture_fault is None:
            self.captured = self.captured_steps()

    def on_train_end(self) -> None:
        """Free the memory of captured steps."""
        if self.captured is not None:
            self.capture_fault = self.captured.fault
            self.captured = None

    def captured_steps(self) -> CapturedSteps:
        """Return an empty store of training steps on the module's GPU."""
        trained = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        return CapturedSteps(self.batch_loss, trained, GraphRecorder())

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Seed dropout by seed and epoch, so that a resumed run equals an uninterrupted one.

        This is not in on_train_epoch_start, which Lightning skips for the first epoch of a resumed run.
        """
        if batch_idx == 0:
            words = np.random.SeedSequence([self.cfg.seed, self.current_epoch, self.global_rank]).generate_state(1)
            torch.manual_seed(int(words[0]))

    def on_train_epoch_start(self) -> None:
        """Forget the metrics of the epoch before, in case this one is not validated."""
        self.validation = {}

    def on_train_epoch_end(self) -> None:
        """Log loss and learning rate, prepare the line that reports the epoch, and stop if training has diverged."""
        loss = float(self.train_loss.compute())
        self.train_loss.reset()
        self._check_finite(loss)
        self.log("train/loss", loss, prog_bar=True, logger=False, rank_zero_only=True)
        self._write_scalars({TRAIN_LOSS: loss, TRAIN_LR: self.trainer.optimizers[0].param_groups[0]["lr"]})
        monitor = self.cfg.evaluation.monitor
        measured = self.validation.get(monitor)
        metric = "" if measured is None else f"  {monitor} {measured:.4f}"
        self.epoch_line = f"epoch {self.current_epoch + 1:3d}  loss {loss:.4f}{metric}"

    def _check_finite(self, loss: float) -> None:
        """Fail before saving if the loss or the parameters are not finite.

        The last step can break parameters after its loss was computed.
        """
        if not isfinite(loss):
            reason = f"the loss is {loss}"
        elif not all(isfinite(x.detach().sum()) for x in self.encoder.parameters()):  # a sum needs no memory
            reason = "parameters are NaN or infinite"
        else:
            return
        raise InputError(
            f"training diverged in epoch {self.current_epoch + 1}: {reason};"
            f" lower optimizer.lr={self.cfg.optimizer.lr} or set trainer.gradient_clip_val=1"
        )

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Rank the targets of a batch of held-out users."""
        self.validation_metrics.update(self.scores(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self.validation = self.validation_metrics.compute_and_reset("val")
        for name, value in self.validation.items():
            self.log(name, value, prog_bar=name == self.cfg.evaluation.monitor, logger=False, rank_zero_only=True)
        self._write_scalars(self.validation)

    def _write_scalars(self, scalars: dict[str, float]) -> None:
        """Write to the trackers."""
        if not self.trainer.sanity_checking:
            log_epoch(self.loggers, scalars, self.current_epoch + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's validation metrics to the checkpoint."""
        checkpoint["validation"] = self.validation

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Rank the targets of a batch of held-out users, and keep the ranks."""
        ranks = self.test_metrics.update(self.scores(batch), batch)
        rows = batch.target_rows
        for name, column in {"row": batch.rows[rows], "user": batch.users[rows], **ranks}.items():
            cast(IntegerConcat, self.ranks[name]).update(column)

    def on_test_epoch_end(self) -> None:
        """Combine the ranks of all processes, while they are still on the device."""
        # train.py writes these to TensorBoard
        self.tested = self.test_metrics.compute_and_reset(self.cfg.evaluation.final_stage)
        ranks = cast(dict[str, IntegerConcat], self.ranks)
        # torchmetrics makes a scalar of a column with a single user
        columns = {name: column.compute().reshape(-1) for name, column in ranks.items() if column.update_called}
        order = columns["row"].argsort(stable=True)
        self.test_ranks = {name: column[order].cpu() for name, column in columns.items()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if the config asks for one, its learning-rate schedule."""
        cfg = self.cfg.optimizer
        optimizer = build_optimizer(self.encoder, cfg, self.cfg.trainer)
        if not cfg.warmup_steps and cfg.schedule is Schedule.constant:
            return {"optimizer": optimizer}
        total_steps = None if cfg.schedule is Schedule.constant else self.trainer.estimated_stepping_batches
        schedule = build_schedule(optimizer, cfg, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def scores(self, batch: EvaluationBatch) -> Scores:
        """Return the scores of all items for each row."""
        return self.encoder.scores(batch)
