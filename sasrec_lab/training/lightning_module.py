"""The LightningModule: training, validation and test steps, and the optimiser."""

import logging
from math import isfinite
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.schema import OptimizerName, TrainConfig
from sasrec_lab.data.batches import EvaluationBatch, PackedBatch
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.metrics import HoldoutMetrics, IntegerConcat, MeanLoss
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops.ranking import Scores
from sasrec_lab.training.losses import LOSSES
from sasrec_lab.training.optimizer import RowwiseAdam, learning_rate_factor

log = logging.getLogger(__name__)


class SequentialRecommender(pl.LightningModule):
    """An encoder, a loss, and what is measured.

    A checkpoint holds `num_items` and the config as plain values, so it loads with `weights_only=True`.
    """

    def __init__(self, num_items: int, cfg: TrainConfig):
        super().__init__()
        self.save_hyperparameters({"num_items": num_items, "config": to_plain(cfg)}, logger=False)
        self.cfg, self.loss = cfg, LOSSES[cfg.loss.name]
        if self.loss.check:
            self.loss.check(cfg.loss, num_items)
        self.encoder = Encoder(num_items, cfg.model)
        rowwise = cfg.optimizer.name is OptimizerName.rowwise_adam  # gradients of tables have the batch's rows only
        self.encoder.input_items.sparse = self.encoder.output_items.sparse = rowwise
        self.train_loss = MeanLoss()
        self.validation_metrics = HoldoutMetrics(num_items, cfg.evaluation, only_monitored=True)
        self.test_metrics = HoldoutMetrics(num_items, cfg.evaluation)
        self.validation: dict[str, float] = {}  # the newest validation metrics
        self.tested: dict[str, float] = {}
        self.ranks = nn.ModuleDict({name: IntegerConcat() for name in ("user", "target", "rank", "sampled_rank")})
        self.test_ranks: dict[str, Tensor] = {}  # per tested user, in the order of user numbers

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        loss = self.loss.compute(self.encoder(batch), self.encoder.output_items, batch, self.cfg.loss)
        self.train_loss.update(loss.detach(), (batch.targets > 0).sum())
        return loss

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Dropout follows from seed and epoch alone, so a resumed run goes on as the uninterrupted one would have.

        Not in on_train_epoch_start, which Lightning leaves out for the first epoch of a resumed run.
        """
        if batch_idx == 0:
            words = np.random.SeedSequence([self.cfg.seed, self.current_epoch, self.global_rank]).generate_state(1)
            torch.manual_seed(int(words[0]))

    def on_train_epoch_end(self) -> None:
        loss = float(self.train_loss.compute())
        self.train_loss.reset()
        self._check_numbers(loss)
        self.log("train/loss", loss, prog_bar=True, rank_zero_only=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"], rank_zero_only=True)
        monitor = self.cfg.evaluation.monitor
        measured = self.trainer.callback_metrics.get(monitor)
        if not self.trainer.is_global_zero:
            return
        log.info(
            f"epoch {self.current_epoch:3d}  loss {loss:.4f}"
            + ("" if measured is None else f"  {monitor} {measured:.4f}")
        )

    def _check_numbers(self, loss: float) -> None:
        """Before a checkpoint is written. What the epoch's last step spoils, its loss does not tell."""
        if not isfinite(loss):
            told = f"the loss is {loss}"
        elif not all(isfinite(parameter.sum()) for parameter in self.encoder.parameters()):  # which takes no memory
            told = "parameters are no numbers any more"
        else:
            return
        raise InputError(
            f"training diverged in epoch {self.current_epoch}: {told};"
            f" lower optimizer.lr={self.cfg.optimizer.lr} or set trainer.gradient_clip_val=1"
        )

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self.validation_metrics.update(self.scores(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self.validation = self.validation_metrics.compute_and_reset("val")
        for name, value in self.validation.items():
            self.log(name, value, prog_bar=name == self.cfg.evaluation.monitor, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validation"] = self.validation

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        ranks = self.test_metrics.update(self.scores(batch), batch)
        for name, column in {"user": batch.users, "target": batch.targets, **ranks}.items():
            self.ranks[name].update(column)

    def on_test_epoch_end(self) -> None:
        """Here, not after the test: the processes' ranks are put together while they are still on the device."""
        self.tested = self.test_metrics.compute_and_reset("test")  # TensorBoard gets them once, with the hyper-parameters
        columns = {name: column.compute() for name, column in self.ranks.items() if column.update_called}
        order = columns["user"].argsort()
        self.test_ranks = {name: column[order].cpu() for name, column in columns.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        cfg = self.cfg.optimizer
        kinds = {
            OptimizerName.adam: torch.optim.Adam,
            OptimizerName.adamw: torch.optim.AdamW,
            OptimizerName.rowwise_adam: RowwiseAdam,
        }
        mixed = "mixed" in str(self.cfg.trainer.get("precision"))
        fused = not (mixed and self.cfg.trainer.get("gradient_clip_val"))  # Lightning clips no fused one under autocast
        optimizer = kinds[cfg.name](
            self.encoder.parameters(), lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay, fused=fused
        )
        if not cfg.warmup_steps and not cfg.cosine:
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches if cfg.cosine else None
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, cfg.warmup_steps, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def scores(self, batch: EvaluationBatch) -> Scores:
        """Of all items for each user; a user without a known item has a state of NaN."""
        table = self.encoder.item_table
        if batch.inputs is None:
            return Scores(table.new_full((len(batch.users), table.shape[1]), float("nan")), table)
        states = self.encoder.newest(batch.inputs).to(table.dtype)  # (ranked users, D)
        if len(batch.ranked) < len(batch.users):
            every = states.new_full((len(batch.users), states.shape[1]), float("nan"))
            states = every.index_copy_(0, batch.ranked, states)
        return Scores(states, table)
