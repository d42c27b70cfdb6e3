"""The LightningDataModule: batches come whole from flat arrays, without Python per user."""

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler

from sasrec_lab.config.schema import LossConfig, LossName, TrainConfig
from sasrec_lab.data.batches import EvaluationBatch, PackedBatch, evaluation_batch, training_batch
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.negatives import draw_candidates, draw_excluding, draw_shared, training_counts, training_items

# States (T, D) of users who are ranked at once, 16 MiB: on MovieLens-1M a seventh faster than 4 MiB, with kernels and
# without; more leaves the cache where torch's functions are at work.
MAX_STATE_ELEMENTS = 2**22


class SequenceData(pl.LightningDataModule):
    """Training windows shuffled anew each epoch; held-out users once, in batches of like lengths."""

    def __init__(self, holdout: Holdout, cfg: TrainConfig):
        super().__init__()
        self.holdout = holdout
        self.cfg = cfg
        self.candidates: dict[str, np.ndarray] = {}
        if cfg.evaluation.sampled and len(holdout.users):
            for stage in ("val", "test"):
                self.candidates[stage] = draw_candidates(
                    holdout, cfg.evaluation.draw, cfg.evaluation.sampled, cfg.evaluation.seed, stage
                )

    def train_dataloader(self) -> DataLoader:
        sampler = ShuffledWindows(len(self.holdout.window_users), self.cfg.batch_size, self.cfg.seed, *self._place())
        if self.trainer:  # a resumed run takes its first batch before Lightning tells the sampler the epoch
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return DataLoader(TrainingData(self.holdout, self.cfg.loss), batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_dataloader("test")

    def evaluation_dataloader(self, stage: str) -> DataLoader:
        data = EvaluationData(self.holdout, stage, self.cfg.model.maxlen, self.candidates.get(stage))
        users, tokens = self.cfg.evaluation.batch_size, MAX_STATE_ELEMENTS // self.cfg.model.dim
        return DataLoader(data, batch_size=None, sampler=data.rows_by_length(users, tokens, *self._place()))

    def _place(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class ShuffledWindows(Sampler):
    """Window numbers of one batch after the other, in an order that the seed and the epoch decide.

    Of several processes each takes every so-manieth window of a batch `processes` times as large; where the last such
    batch has fewer windows than there are processes, it is filled up from the epoch's beginning.
    """

    def __init__(self, windows: int, batch_size: int, seed: int, process: int, processes: int):
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.windows // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.windows)
        size = self.batch_size * self.processes
        for step in range(len(self)):
            batch = order[step * size : (step + 1) * size]
            if len(batch) < self.processes:
                batch = np.concatenate([batch, np.resize(order, self.processes - len(batch))])
            yield batch[self.process :: self.processes], [self.seed, self.epoch, step, self.process]


class TrainingData(Dataset):
    """Windows -> packed batch, with negatives where the loss wants them."""

    def __init__(self, holdout: Holdout, loss: LossConfig):
        self.holdout, self.loss = holdout, loss
        if loss.name is LossName.bce:
            self.had = training_items(holdout)
        elif loss.name is LossName.sampled_softmax:
            # By popularity: ndcg@10 after 14 epochs on ML-1M, 1,024 negatives, .129; uniform .118, full softmax .145.
            # One count more than there is, so that every item can be drawn.
            self.cumulative = np.cumsum(training_counts(holdout) + 1)

    def __getitem__(self, step: tuple[np.ndarray, list[int]]) -> PackedBatch:
        windows, seed = step
        rng, count = np.random.default_rng(seed), self.loss.negatives
        if self.loss.name is LossName.softmax:
            return training_batch(self.holdout, windows)
        if self.loss.name is LossName.sampled_softmax:
            return training_batch(self.holdout, windows, *draw_shared(self.cumulative, count, rng))
        labels = self.holdout.window_ends[windows] - self.holdout.window_starts[windows] - 1
        if self.loss.name is LossName.gbce:
            negatives = rng.integers(1, self.holdout.num_items + 1, size=(labels.sum(), count))  # (tokens, N)
        else:
            users = np.repeat(np.repeat(self.holdout.window_users[windows], labels), count)
            negatives = draw_excluding(users, self.had, rng).reshape(-1, count)
        return training_batch(self.holdout, windows, negatives)


class EvaluationData(Dataset):
    """Numbers of held-out users -> a batch to rank."""

    def __init__(self, holdout: Holdout, stage: str, maxlen: int, candidates: np.ndarray | None):
        self.holdout, self.stage, self.maxlen, self.candidates = holdout, stage, maxlen, candidates

    def __getitem__(self, rows: np.ndarray) -> EvaluationBatch:
        candidates = None if self.candidates is None else self.candidates[rows]
        return evaluation_batch(self.holdout, rows, self.stage, self.maxlen, candidates)

    def rows_by_length(self, users: int, tokens: int, process: int, processes: int) -> list[np.ndarray]:
        """Users of like history lengths together, which packs them best; each process takes its own."""
        lengths = (self.holdout.train_ends - self.holdout.starts)[self.holdout.users]
        order = np.argsort(lengths, kind="stable")[process::processes]
        known = np.minimum(lengths[order], self.maxlen)
        return np.split(order, batch_boundaries(known, users, tokens))


def batch_boundaries(tokens: np.ndarray, most: int, most_tokens: int) -> list[int]:
    """Where to cut users of so many tokens each into batches of at most `most` users and `most_tokens` tokens."""
    ends, at = np.cumsum(tokens), []
    begin = 0
    while begin < len(tokens):
        before = ends[begin - 1] if begin else 0
        begin = max(begin + 1, min(begin + most, int(np.searchsorted(ends, before + most_tokens, side="right"))))
        at.append(begin)
    return at[:-1]
