"""The data module: the order of training windows, negatives, resuming, and several processes."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from small_data import holdout_of, next_item, random_users

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import Exclude
from sasrec_lab.data.batches import EvaluationBatch, TrainingBatch
from sasrec_lab.data.datamodule import EvaluationData, SequenceData, ShuffledWindows, batch_boundaries

CONFIG = load(["dataset=csv", "dataset.path=x.csv", "batch_size=7", "evaluation.batch_size=6", "model.maxlen=5"])
BCE = replace(CONFIG, loss=replace(load(["dataset=csv", "dataset.path=x.csv", "loss=bce"]).loss, negatives=2))
HOLDOUT = holdout_of(random_users(0, users=60), maxlen=5)


def data_of(cfg: TrainConfig = CONFIG, process: int = 0, processes: int = 1) -> SequenceData:
    """Return the data as process `process` of several has it."""
    data = SequenceData(HOLDOUT, cfg)
    data._rank_and_world_size = lambda: (process, processes)
    return data


def windows_of(sampler: ShuffledWindows, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [windows.tolist() for windows, _ in sampler]


def content(batch: TrainingBatch) -> list:
    negatives = [] if batch.negatives is None else batch.negatives.items.tolist()
    return [batch.inputs.items.tolist(), batch.labels.targets.tolist(), negatives]


def test_labels_exclude_the_items_of_their_window_if_asked_to():
    batch = data_of().train_dataloader().dataset[np.arange(5), [0, 0, 0, 0]]
    assert batch.labels.excluded is None
    excluding = replace(CONFIG, loss=replace(CONFIG.loss, exclude=Exclude.history))
    excluded = data_of(excluding).train_dataloader().dataset[np.arange(5), [0, 0, 0, 0]].labels.excluded
    spans = zip(HOLDOUT.window_starts[:5], HOLDOUT.window_ends[:5], strict=True)
    windows = [sorted(set(HOLDOUT.items[start:end].tolist())) for start, end in spans]
    longest = max(map(len, windows))
    assert excluded.tolist() == [items + [0] * (longest - len(items)) for items in windows]


# The order of training


@pytest.mark.parametrize(("windows", "batch_size"), [(20, 7), (21, 7), (1, 7), (50, 1), (6, 100)])
def test_every_window_comes_once_an_epoch(windows, batch_size):
    sampler = ShuffledWindows(windows, batch_size, 0, 0, 1)
    for epoch in range(3):
        batches = windows_of(sampler, epoch)
        assert sorted(chain(*batches)) == list(range(windows))
        assert len(batches) == len(sampler)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_seed_and_epoch_decide_the_order():
    order = windows_of(ShuffledWindows(100, 7, 0, 0, 1), epoch=3)
    again = ShuffledWindows(100, 7, 0, 0, 1)
    windows_of(again, epoch=0)
    assert windows_of(again, epoch=3) == order  # whatever came before, so a resumed run continues as it would have
    assert windows_of(again, epoch=4) != order
    assert windows_of(ShuffledWindows(100, 7, 1, 0, 1), epoch=3) != order
    assert order != [list(range(start, min(start + 7, 100))) for start in range(0, 100, 7)]


@pytest.mark.parametrize(
    ("windows", "batch_size", "processes"),
    [(56, 7, 2), (57, 7, 2), (55, 7, 2), (43, 7, 2), (20, 3, 4), (25, 3, 4), (1, 7, 2), (1, 2, 5), (50, 7, 3)],
)
def test_processes_share_the_windows_of_an_epoch(windows, batch_size, processes):
    samplers = [ShuffledWindows(windows, batch_size, 0, process, processes) for process in range(processes)]
    whole = windows_of(ShuffledWindows(windows, batch_size * processes, 0, 0, 1), epoch=2)
    parts = [windows_of(sampler, epoch=2) for sampler in samplers]
    assert (
        {len(part) for part in parts} == {len(samplers[0])} == {len(whole)}
    )  # with fewer batches a process would let the others wait forever
    assert all(part[step] for part in parts for step in range(len(whole)))
    for step, batch in enumerate(whole):
        together = list(chain(*(part[step] for part in parts)))
        if len(batch) >= processes:
            assert sorted(together) == sorted(batch)  # each once
            sizes = [len(part[step]) for part in parts]
            assert max(sizes) <= batch_size
            assert max(sizes) - min(sizes) <= 1
        else:
            assert step == len(whole) - 1
            assert len(together) == processes
            assert set(batch) <= set(together)
    assert {window for part in parts for batch in part for window in batch} == set(range(windows))


def test_training_batches_are_all_the_windows():
    loader = data_of().train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(HOLDOUT.window_users) // 7)
    spans = list(zip(HOLDOUT.window_starts, HOLDOUT.window_ends, strict=True))
    expected = sorted(HOLDOUT.items[start : end - 1].tolist() for start, end in spans)
    found = []
    for batch in batches:
        assert batch.negatives is None
        items, last = batch.inputs.items, batch.inputs.last
        starts = [0, *(last[:-1] + 1).tolist()]
        found += [items[start : end + 1].tolist() for start, end in zip(starts, last.tolist(), strict=True)]
    assert sorted(found) == expected


def test_negatives_follow_seed_epoch_step_and_process():
    def negatives(seed: int = 0, epoch: int = 0, process: int = 0, processes: int = 1) -> list:
        loader = data_of(replace(BCE, seed=seed), process, processes).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [content(batch) for batch in loader]

    assert negatives() == negatives()
    assert negatives() != negatives(epoch=1)
    assert negatives() != negatives(seed=1)
    # a single window, so that only the draw can differ
    data = data_of(BCE).train_dataloader().dataset
    draws = [data[np.array([3]), seed].negatives.items.tolist() for seed in ([0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]
    steps = [seed for _, seed in ShuffledWindows(40, 7, 5, 1, 2)]
    assert steps == [[5, 0, step, 1] for step in range(3)]


class Recorder(pl.LightningModule):
    """A module that trains nothing and records the batches it is given."""

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list]] = []
        self.users: list[int] = []

    def training_step(self, batch: TrainingBatch, _):
        self.seen.append((self.current_epoch, content(batch)))
        return self.parameter * 0

    def validation_step(self, batch: EvaluationBatch, _):
        self.users += batch.users.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(folder: Path, epochs: int, ckpt: Path | None = None) -> Recorder:
    """Train up to `epochs` epochs and return the module with its record; the checkpoint is folder/last.ckpt."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[
            ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    model = Recorder()
    trainer.fit(model, SequenceData(HOLDOUT, BCE), ckpt_path=ckpt, weights_only=True)
    return model


def expected_batches(epochs: range) -> list[tuple[int, list]]:
    expected = []
    loader = data_of(BCE).train_dataloader()
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        expected += [(epoch, content(batch)) for batch in loader]
    return expected


def test_the_trainer_shuffles_in_each_epoch(tmp_path):
    model = record(tmp_path, epochs=2)
    assert model.seen == expected_batches(range(2))
    assert sorted(model.users) == sorted(2 * HOLDOUT.test.users.tolist())


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path):
    record(tmp_path, epochs=2)
    resumed = record(tmp_path, epochs=4, ckpt=tmp_path / "last.ckpt")
    assert resumed.seen == expected_batches(range(2, 4))


# Evaluation


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_held_out_users(stage, processes):
    users, targets = [], {}
    for process in range(processes):
        for batch in data_of(CONFIG, process, processes).evaluation_dataloader(stage):
            assert 1 <= len(batch.users) <= 6
            users += batch.users.tolist()
            targets |= zip(batch.users.tolist(), batch.targets.tolist(), strict=True)
    assert sorted(users) == HOLDOUT.test.users.tolist()  # each once
    expected = HOLDOUT.rows(stage).targets
    assert [targets[user] for user in HOLDOUT.test.users.tolist()] == expected.tolist()


@pytest.mark.parametrize("processes", [2, 5, 16])
def test_every_process_has_users_to_rank(processes):
    """Lightning rejects a loader without batches, so even a few users are split."""
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, batch_size=1000))
    assert len(HOLDOUT.test.users) >= processes
    assert all(len(data_of(cfg, process, processes).val_dataloader()) >= 1 for process in range(processes))


def test_users_of_similar_history_lengths_share_a_batch():
    data = EvaluationData(HOLDOUT, "val", next_item(5), None)
    rows = data.rows_by_length(6, 1000, 0, 1)
    lengths = HOLDOUT.val.ends - HOLDOUT.val.starts
    assert lengths[np.concatenate(rows)].tolist() == sorted(lengths)


def test_batches_are_limited_in_users_and_tokens_but_not_empty():
    assert batch_boundaries(np.array([1, 1, 2, 3, 3, 9, 20]), 3, 8) == [3, 5, 6]
    assert batch_boundaries(np.array([9]), 3, 8) == []


def test_candidates_stay_with_their_users():
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, sampled=9))
    data = data_of(cfg)
    for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        row_of = {user: row for row, user in enumerate(HOLDOUT.test.users.tolist())}
        for batch in loader:
            rows = [row_of[user] for user in batch.users.tolist()]
            assert batch.candidates.tolist() == data.candidates[stage][rows].tolist()
    assert SequenceData(HOLDOUT, replace(cfg, seed=9)).candidates["val"].tolist() == data.candidates["val"].tolist()
    assert all(batch.candidates is None for batch in data_of().val_dataloader())


def test_training_batches_are_pinned_for_a_gpu_only():
    data = data_of()
    assert not data.train_dataloader().pin_memory
    for device, is_pinned in (("cpu", False), ("cuda", True)):
        data.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(device)),
            fit_loop=SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0))),
        )
        assert data.train_dataloader().pin_memory == is_pinned


def test_batches_are_in_segments_only_if_steps_are_captured():
    for capture in (False, True):
        batch = next(iter(data_of(replace(CONFIG, capture=capture)).train_dataloader()))
        assert (batch.inputs.segments is not None) == capture
