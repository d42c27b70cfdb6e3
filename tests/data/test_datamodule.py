"""The data module: the order of training windows, negatives, resuming, and several processes."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of, next_item, random_users
from small_trainer import small_trainer

from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import Exclude
from sasrec_lab.data.batches import EvaluationBatch, TrainingBatch
from sasrec_lab.data.datamodule import SequenceData, ShuffledWindows, share_by_length
from sasrec_lab.data.evaluation_data import EvaluationData, batch_boundaries

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
    batch = data_of().train_dataloader().dataset[np.arange(5), [0, 0, 0]]
    assert batch.labels.excluded is None
    excluding = replace(CONFIG, loss=replace(CONFIG.loss, exclude=Exclude.history))
    excluded = data_of(excluding).train_dataloader().dataset[np.arange(5), [0, 0, 0]].labels.excluded
    spans = zip(HOLDOUT.window_starts[:5], HOLDOUT.window_ends[:5], strict=True)
    windows = [sorted(set(HOLDOUT.items[start:end].tolist())) for start, end in spans]
    longest = max(map(len, windows))
    assert excluded.tolist() == [items + [0] * (longest - len(items)) for items in windows]


# The order of training


@pytest.mark.parametrize(("windows", "batch_size"), [(20, 7), (21, 7), (1, 7), (50, 1), (6, 100)])
def test_every_window_comes_once_an_epoch(windows, batch_size):
    sampler = ShuffledWindows(windows, batch_size, 0)
    for epoch in range(3):
        batches = windows_of(sampler, epoch)
        assert sorted(chain(*batches)) == list(range(windows))
        assert len(batches) == len(sampler)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_seed_and_epoch_decide_the_order():
    order = windows_of(ShuffledWindows(100, 7, 0), epoch=3)
    again = ShuffledWindows(100, 7, 0)
    windows_of(again, epoch=0)
    assert windows_of(again, epoch=3) == order  # whatever came before, so a resumed run continues as it would have
    assert windows_of(again, epoch=4) != order
    assert windows_of(ShuffledWindows(100, 7, 1), epoch=3) != order
    assert order != [list(range(start, min(start + 7, 100))) for start in range(0, 100, 7)]


def sequences_in(batch: TrainingBatch) -> list[list[int]]:
    starts = [0, *(batch.inputs.last[:-1] + 1).tolist()]
    spans = zip(starts, batch.inputs.last.tolist(), strict=True)
    return [batch.inputs.items[start : end + 1].tolist() for start, end in spans]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_out_the_batches_of_one(processes):
    """The last batch has 4 windows or fewer."""
    cfg = replace(CONFIG, batch_size=next(size for size in range(9, 60) if 0 < len(HOLDOUT.window_users) % size < 4))
    parts = [data_of(cfg, process, processes).train_dataloader() for process in range(processes)]
    for whole, *shares in zip(data_of(cfg).train_dataloader(), *parts, strict=True):
        used = [share for share in shares if share.labels.targets.any()]
        assert all(
            share.inputs.items.numel() for share in shares
        )  # each one calls the operations that the others wait for
        assert sorted(chain(*map(sequences_in, used))) == sorted(sequences_in(whole))
        targets = [share.labels.targets[share.labels.targets > 0].tolist() for share in shares]
        assert sorted(chain(*targets)) == sorted(whole.labels.targets[whole.labels.targets > 0].tolist())


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_are_balanced_in_windows_and_tokens(processes):
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 50, 51, 300):
        lengths = rng.integers(1, 200, size=count) if count % 2 else np.minimum(200, rng.zipf(1.5, size=count))
        shares = [share_by_length(lengths, process, processes) for process in range(processes)]
        assert sorted(chain(*shares)) == list(range(count))
        assert all(share.tolist() == sorted(share) for share in shares)  # so one process has the order of the batch
        sizes, tokens = [len(share) for share in shares], [lengths[share].sum() for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert max(tokens) - min(tokens) <= max(lengths)


def test_processes_share_negatives_of_a_batch_only():
    def draws(cfg: TrainConfig, process: int, processes: int) -> list:
        batches = list(data_of(cfg, process, processes).train_dataloader())
        return [batch.negatives.items.tolist() for batch in batches]

    shared = replace(CONFIG, loss=load(["dataset=csv", "dataset.path=x.csv", "loss=sampled_softmax"]).loss)
    single = draws(shared, 0, 1)
    assert draws(shared, 0, 2) == draws(shared, 1, 2) == single
    masked = replace(load(["dataset=csv", "dataset.path=x.csv", "model=bert4rec"]), loss=shared.loss, batch_size=7)
    assert draws(masked, 0, 2) == draws(masked, 1, 2)
    uniform = replace(BCE, batch_size=2)  # one window each
    of_one, of_other = draws(uniform, 0, 2), draws(uniform, 1, 2)
    assert all(len(first) == 0 or first[0] != second[0] for first, second in zip(of_one[:3], of_other[:3], strict=True))


def test_training_batches_are_all_the_windows():
    loader = data_of().train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(HOLDOUT.window_users) // 7)
    spans = list(zip(HOLDOUT.window_starts, HOLDOUT.window_ends, strict=True))
    expected = sorted(HOLDOUT.items[start : end - 1].tolist() for start, end in spans)
    found = []
    for batch in batches:
        assert batch.negatives is None
        found += sequences_in(batch)
    assert sorted(found) == expected


def test_negatives_follow_seed_epoch_and_step():
    def negatives(seed: int = 0, epoch: int = 0) -> list:
        loader = data_of(replace(BCE, seed=seed)).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [content(batch) for batch in loader]

    assert negatives() == negatives()
    assert negatives() != negatives(epoch=1)
    assert negatives() != negatives(seed=1)
    # a single window, so that only the draw can differ
    data = data_of(BCE).train_dataloader().dataset
    draws = [data[np.array([3]), seed].negatives.items.tolist() for seed in ([0, 0, 0], [0, 0, 1])]
    assert draws[0] != draws[1]
    assert [seed for _, seed in ShuffledWindows(20, 7, 5)] == [[5, 0, step] for step in range(3)]


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
    trainer = small_trainer(folder, epochs)
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
def test_processes_share_the_batches_of_held_out_users(stage, processes):
    batches, targets = [], {}
    for process in range(processes):
        for batch in data_of(CONFIG, process, processes).evaluation_dataloader(stage):
            assert 1 <= len(batch.users) <= 6
            batches.append(batch.users.tolist())
            targets |= zip(batch.users.tolist(), batch.targets.tolist(), strict=True)
    whole = [batch.users.tolist() for batch in data_of().evaluation_dataloader(stage)]
    assert sorted(batches) == sorted(whole)  # the same batches, as their shapes decide how scores round
    assert sorted(chain(*batches)) == HOLDOUT.test.users.tolist()  # each user once
    expected = HOLDOUT.rows(stage).targets
    assert [targets[user] for user in HOLDOUT.test.users.tolist()] == expected.tolist()


@pytest.mark.parametrize("processes", [2, 5, 16])
def test_every_process_has_a_batch_to_rank(processes):
    """Lightning rejects a loader without batches, so that of a process without users is empty."""
    cfg = replace(CONFIG, evaluation=replace(CONFIG.evaluation, batch_size=1000, sampled=3))
    for process in range(processes):
        batches = list(data_of(cfg, process, processes).val_dataloader())
        assert [len(batch.users) for batch in batches] == [len(HOLDOUT.val.users) if process == 0 else 0]


def test_users_of_similar_history_lengths_share_a_batch():
    data = EvaluationData(HOLDOUT, "val", next_item(5), None)
    rows = data.rows_by_length(6, 1000)
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
