"""The LightningDataModule: whole batches cut from flat arrays, without a Python loop over users."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import Exclude
from sasrec_lab.data.batches import Objective, TrainingBatch, as_tensor, in_segments
from sasrec_lab.data.evaluation_data import MAX_STATE_ELEMENTS, EvaluationData
from sasrec_lab.data.evaluation_rows import EvaluationRows
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.negatives import NegativeSampler, build_sampler, draw_candidates, window_items
from sasrec_lab.data.objectives import build_objective


class SequenceData(pl.LightningDataModule):
    """Training windows in a new order each epoch, and rows to rank once, in batches of similar history lengths."""

    def __init__(self, holdout: Holdout, cfg: TrainConfig):
        super().__init__()
        self.holdout, self.cfg = holdout, cfg
        self.objective = build_objective(cfg.objective, cfg.model)
        self.candidates: dict[str, np.ndarray] = {}
        if cfg.evaluation.sampled and len(holdout.test):
            for stage in cfg.evaluation.stages:
                self.candidates[stage] = draw_candidates(
                    holdout, cfg.evaluation.draw, cfg.evaluation.sampled, cfg.evaluation.seed, stage
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training batches."""
        order = self._order()
        if self.trainer:  # a resumed run takes its first batch before Lightning sets the epoch
            order.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        excludes_windows = self.cfg.loss.exclude is Exclude.history
        data = TrainingData(
            self.holdout,
            self.objective,
            build_sampler(self.holdout, self.cfg.loss),
            excludes_windows,
            self.cfg.model.maxlen if self.cfg.capture else None,
            *self._rank_and_world_size(),
        )
        return DataLoader(data, batch_size=None, sampler=order, pin_memory=self._is_for_gpu())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on the device; the program continues while a GPU copies it."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of validation batches."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of what the chosen checkpoint is measured on: of the test, if that may be seen."""
        return self.evaluation_dataloader(self.cfg.evaluation.final_stage)

    @property
    def final_rows(self) -> EvaluationRows:
        """Return the rows that the chosen checkpoint is measured on."""
        return self.holdout.rows(self.cfg.evaluation.final_stage)

    def evaluation_dataloader(self, stage: str) -> DataLoader[Any]:
        """Return the loader of the rows to rank for "val" or "test"."""
        data = self._held_out(stage)
        return DataLoader(data, batch_size=None, sampler=self._rows(data, *self._rank_and_world_size()))

    def _held_out(self, stage: str) -> EvaluationData:
        return EvaluationData(self.holdout, stage, self.objective, self.candidates.get(stage))

    def _order(self) -> "ShuffledWindows":
        return ShuffledWindows(len(self.holdout.window_users), self.cfg.batch_size, self.cfg.seed)

    def _rows(self, data: EvaluationData, process: int, processes: int) -> list[np.ndarray]:
        """Return this process's batches of row indices.

        A batch has the same rows for any number of processes: its shape decides how scores round, and so the ranks of
        targets whose scores nearly tie. Lightning rejects a loader without batches, so a process that gets none has an
        empty one.
        """
        users, tokens = self.cfg.evaluation.batch_size, MAX_STATE_ELEMENTS // self.cfg.model.dim
        return data.rows_by_length(users, tokens)[process::processes] or [np.empty(0, dtype=np.int64)]

    def num_batches(self, stage: str, processes: int) -> int:
        """Return the number of batches of "train" or "val" in one epoch, of the process that has the fewest."""
        if stage == "train":
            return len(self._order())
        return len(self._rows(self._held_out(stage), processes - 1, processes))

    def _is_for_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Return this process's index and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class ShuffledWindows(Sampler[Any]):
    """Yield one batch of window indices, and its seed, at a time, in an order set by seed and epoch."""

    def __init__(self, windows: int, batch_size: int, seed: int):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Yield the batches of the current epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.windows)
        for step in range(len(self)):
            start = step * self.batch_size
            yield order[start : start + self.batch_size], [self.seed, self.epoch, step]


class TrainingData(Dataset[TrainingBatch]):
    """Map window indices and a seed to a packed batch, with negatives if there is a sampler.

    With `excludes_windows` the labels exclude the items of their own window. With `segment_length`, the longest window,
    batches have segments for captured steps. Of several processes each packs its share of the windows. Negatives that
    a batch shares are the same in all of them; what is drawn for a window or a label differs.
    """

    def __init__(
        self,
        holdout: Holdout,
        objective: Objective,
        sampler: NegativeSampler | None = None,
        excludes_windows: bool = False,
        segment_length: int | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self.holdout, self.objective, self.sampler = holdout, objective, sampler
        self.excludes_windows, self.segment_length = excludes_windows, segment_length
        self.process, self.processes = process, processes

    def __getitem__(self, step: tuple[np.ndarray, list[int]]) -> TrainingBatch:
        """Return the batch of (windows, seed)."""
        all_windows, seed = step
        windows, common = self._share(all_windows), np.random.default_rng([*seed, 0])
        own = common if self.processes == 1 else np.random.default_rng([*seed, 1 + self.process])
        inputs, labels = self.objective.training(self.holdout, windows, own)
        if len(all_windows) <= self.process:
            labels = replace(labels, targets=torch.zeros_like(labels.targets))
        if self.segment_length is not None:
            inputs, labels = in_segments(inputs, labels, self.segment_length)
        if self.excludes_windows:
            labels = replace(labels, excluded=as_tensor(window_items(self.holdout, windows).as_rows(len(windows))))
        if self.sampler is None:
            return TrainingBatch(inputs, labels)
        rng = common if self.sampler.per == "batch" else own
        return TrainingBatch(inputs, labels, self.sampler.draw(windows, labels, rng))

    def _share(self, windows: np.ndarray) -> np.ndarray:
        """Return this process's windows of a batch; one of another process if it has fewer than there are processes."""
        if len(windows) <= self.process:
            return windows[:1]
        lengths = self.holdout.window_ends[windows] - self.holdout.window_starts[windows]
        return windows[share_by_length(lengths, self.process, self.processes)]


def share_by_length(lengths: np.ndarray, process: int, processes: int) -> np.ndarray:
    """Return the indices of this process's sequences, ascending, each sequence in the share of one process.

    The longest are dealt out first, to the processes 0, 1, 2, 2, 1, 0, 0, ...: two shares differ by at most one
    sequence, and by at most as many tokens as the longest one has.
    """
    turns, places = np.divmod(np.arange(len(lengths)), processes)
    owners = np.where(turns % 2 == 0, places, processes - 1 - places)
    longest_first = np.argsort(-lengths, kind="stable")
    return np.sort(longest_first[owners == process])
