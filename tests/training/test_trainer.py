"""Flags of the Trainer that end training early, validate seldom or on little, as a user sets them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of, random_users

from sasrec_lab.config.composition import load
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.trainer import AveragedWeights, ProgressBar, build_trainer, check_limits

FILE = [
    *("dataset=synthetic", "dataset.synthetic.users=40", "dataset.synthetic.items=30", "model=tiny"),
    *("trainer.accelerator=cpu", "hydra.run.dir=run", "batch_size=10", "trainer.max_epochs=6"),  # 4 steps an epoch
]


def results(folder: Path) -> dict:
    return json.loads((folder / "run" / "metrics.json").read_text())


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def printed_epochs(output: str) -> list[tuple[int, bool]]:
    """Return the number of each printed epoch, and whether its line has a validation metric."""
    lines = [line for line in output.splitlines() if line.startswith("epoch")]
    return [(int(line.split()[1]), "val/ndcg@10" in line) for line in lines]


def test_lightnings_own_tables_are_printed_if_asked_for(train_here):
    done = train_here(*FILE, "trainer.max_epochs=1", "+trainer.profiler=simple", "trainer.enable_model_summary=true")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Total params" in done.stdout
    assert "Profiler Report" in done.stdout
    assert "Profiler Report" not in train_here(*FILE, "trainer.max_epochs=1", "hydra.run.dir=plain").stdout


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (["trainer.max_steps=3"], [(1, True)]),
        (["trainer.max_steps=6"], [(1, True), (2, True)]),
        (["trainer.max_steps=8"], [(1, True), (2, True)]),
        # Lightning validates if it may stop early
        (["trainer.max_steps=3", "trainer.min_epochs=9", "trainer.max_epochs=9"], [(1, False)]),
        (["trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.num_sanity_val_steps=1"], [(1, True)]),
        (["trainer.max_steps=2", "trainer.accumulate_grad_batches=3"], [(1, True)]),
        (["trainer.max_steps=6", "trainer.check_val_every_n_epoch=2", "optimizer.ema=0.9"], [(1, False), (2, True)]),
        (["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"], [(1, False), (2, True), (3, False)]),
        (["trainer.max_steps=3", "trainer.limit_val_batches=0"], [(1, False)]),
    ],
)
def test_run_that_ends_within_an_epoch_is_tested(words, epochs, tmp_path, train_here):
    done = train_here(*FILE, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed_epochs(done.stdout) == epochs
    written = results(tmp_path)
    assert (written["status"], written["epochs"]) == ("finished", len(epochs))
    is_validated = any(has_metric for _, has_metric in epochs)
    assert (written["best_epoch"] is not None) == ("val/ndcg@10" in written["metrics"]) == is_validated
    assert "test/ndcg@10" in written["metrics"]
    assert last_checkpoint(tmp_path)["epoch"] == len(epochs) - 1
    assert "could not find the monitored key" not in (tmp_path / "run" / "train.log").read_text()


def test_resuming_with_max_steps_equals_an_uninterrupted_run(tmp_path, train_here):
    """The first run ends as if it were interrupted after two epochs."""
    assert train_here(*FILE, "trainer.max_steps=12").returncode == 0
    whole = last_checkpoint(tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    assert train_here(*FILE, "trainer.max_steps=8").returncode == 0
    resumed = train_here(*FILE, "trainer.max_steps=12", "ckpt=last")
    assert resumed.returncode == 0, resumed.stderr
    assert printed_epochs(resumed.stdout) == [(3, True)]
    continued = last_checkpoint(tmp_path)
    assert continued["global_step"] == whole["global_step"] == 12
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in continued["state_dict"].items())


def test_an_epoch_that_max_steps_ends_counts_when_resumed(tmp_path, train_here):
    assert train_here(*FILE, "trainer.max_steps=6").returncode == 0
    resumed = train_here(*FILE, "trainer.max_steps=12", "ckpt=last")
    assert resumed.returncode == 0, resumed.stderr
    assert printed_epochs(resumed.stdout) == [(3, True), (4, True)]
    assert (results(tmp_path)["epochs"], last_checkpoint(tmp_path)["global_step"]) == (4, 12)


def test_no_time_for_a_step_is_one_line(tmp_path, train_here):
    done = train_here(*FILE, "trainer.max_time=00:00:00:00")
    assert (done.returncode, done.stderr) == (
        1,
        "error: no step was trained within trainer.max_epochs=6, trainer.max_steps=-1,"
        " trainer.max_time=00:00:00:00; raise these limits\n",
    )
    assert results(tmp_path)["status"] == "failed"


def test_anomaly_is_one_line(train_here):
    done = train_here(*FILE, "+trainer.detect_anomaly=true", "optimizer.lr=1e30", "batch_size=4")
    assert done.returncode == 1
    assert re.fullmatch(r"error: training diverged: Function '\w+' returned nan values[^\n]+\n", done.stderr)


LIMITS = {
    ("trainer.limit_val_batches=0.0001", 1): "trainer.limit_val_batches=0.0001 is less than one batch (number of"
    " batches: 3); set it to a number of batches, such as 1",
    ("trainer.limit_val_batches=0.5", 3): "trainer.limit_val_batches=0.5 is less than one batch (number of batches: 1)",
    ("trainer.limit_train_batches=0.19", 1): "trainer.limit_train_batches=0.19 is less than one batch (number of"
    " batches: 5)",
    ("trainer.limit_train_batches=0.19", 3): "trainer.limit_train_batches=0.19 is less than one batch (number of"
    " batches: 5)",
}


def limits_of(word: str, *words: str) -> tuple:
    holdout = holdout_of(random_users(0, users=60)[-50:])
    cfg = load(["dataset=csv", "dataset.path=x.csv", "batch_size=10", "evaluation.batch_size=20", word, *words])
    cfg = replace(cfg, batch_size=-(-len(holdout.window_users) // 5))
    cfg = replace(cfg, evaluation=replace(cfg.evaluation, batch_size=-(-len(holdout.test) // 3)))
    return cfg, SequenceData(holdout, cfg)


@pytest.mark.parametrize(("word", "processes"), LIMITS)
def test_part_of_the_batches_below_one_is_rejected(word, processes):
    cfg, data = limits_of(word)
    with pytest.raises(InputError) as caught:
        check_limits(cfg, data, processes)
    assert str(caught.value).startswith(LIMITS[word, processes])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.limit_val_batches=0.34"],
        ["trainer.limit_train_batches=0.2"],
        ["trainer.limit_train_batches=1"],
        ["trainer.limit_val_batches=0"],
        ["trainer.limit_val_batches=0.0001", "dataset.holdout=none"],
    ],
)
def test_part_of_at_least_one_batch_is_accepted(words):
    check_limits(*limits_of(*words), 1)


def test_progress_bar_counts_epochs_from_one():
    bar = ProgressBar()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[bar])
    bar.setup(trainer, pl.LightningModule(), "fit")
    bar.on_train_start()
    bar.on_train_epoch_start(trainer)
    assert bar.train_progress_bar.desc.startswith("Epoch 1")
    bar.train_progress_bar.close()


def test_other_nodes_need_a_launcher(tmp_path, monkeypatch):
    words = ["dataset=csv", "dataset.path=x.csv", "trainer.accelerator=cpu", "+trainer.strategy=ddp"]
    cfg = load([*words, "+trainer.num_nodes=2"])
    with pytest.raises(InputError) as caught:
        build_trainer(cfg, tmp_path)
    assert str(caught.value) == (
        "trainer.num_nodes=2 needs a process on each node; start the command on each with torchrun, or set"
        " MASTER_ADDR, MASTER_PORT, NODE_RANK there"
    )
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert build_trainer(cfg, tmp_path).world_size == 2


def test_each_device_needs_a_window(tmp_path):
    cfg = load(["dataset=csv", "dataset.path=x.csv", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=4"])
    with pytest.raises(InputError) as caught:
        build_trainer(replace(cfg, batch_size=3), tmp_path)
    assert str(caught.value) == "batch_size=3 is shared out among 4 devices; set it to at least 4, or use fewer"


def test_capture_needs_one_gpu(tmp_path, monkeypatch):
    cfg = load(["trainer.accelerator=cpu", "capture=true"])
    with pytest.raises(InputError) as caught:
        build_trainer(cfg, tmp_path)
    assert str(caught.value) == "capture=true needs a CUDA device, but trainer uses cpu; set capture=false"
    monkeypatch.setattr(pl.strategies.DDPStrategy, "root_device", torch.device("cuda"))
    with pytest.raises(InputError) as caught:
        build_trainer(load(["trainer.accelerator=cpu", "capture=true", "trainer.devices=2"]), tmp_path)
    assert str(caught.value) == (
        "capture=true must run on one device, but trainer asks for 2; set trainer.devices=1 or capture=false"
    )


@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
def test_tables_of_positions_are_not_averaged(positions, tmp_path):
    cfg = load([*FILE[:5], "batch_size=10", "trainer.max_epochs=9", f"model.pos_emb={positions}", "optimizer.ema=0.9"])
    holdout = holdout_of(random_users(0, users=40))
    model, trainer = SequentialRecommender(holdout.num_items, cfg), build_trainer(cfg, tmp_path)
    (averages,) = (callback for callback in trainer.callbacks if isinstance(callback, AveragedWeights))
    table = dict(model.named_buffers())
    before = {name: numbers.clone() for name, numbers in table.items()}
    trainer.fit(model, SequenceData(holdout, cfg))
    averaged = dict(averages._average_model.module.named_buffers())
    assert all(torch.equal(averaged[name], numbers) for name, numbers in before.items())
