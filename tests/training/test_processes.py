"""Runs on several processes: the numbers of one, the death of one, and who writes.

The processes are started together with torchrun's variables, as forks of a server that has imported what a run needs.
"""

import json
import logging
import os
import signal
import socket
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sasrec_lab.config.composition import load
from sasrec_lab.training.lightning_module import TRAIN_LOSS

pytestmark = pytest.mark.slow

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["pandas", "torch.utils.tensorboard", "sasrec_lab.training.trainer", "sasrec_lab.train"])
WORDS = [
    *("dataset=synthetic", "dataset.synthetic.users=300", "dataset.synthetic.items=60", "model=tiny", "trainer=ddp"),
    *(
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "evaluation.sampled=5",
        "evaluation.batch_size=50",
    ),
    *("batch_size=37", "optimizer.lr=0.01"),  # the last batch of an epoch has three windows, fewer than processes
]


def start(process: int, processes: int, port: int, folder: Path, words: list[str], tested: Path | None) -> None:
    """Train as one of several processes; then measure the checkpoint of another run."""
    for name in [name for name in os.environ if "XDIST" in name or name == "PYTEST_CURRENT_TEST"]:
        del os.environ[name]
    ranks = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in ranks.items()} | environment(folder))
    os.chdir(folder)
    if process == 0:
        logging.basicConfig(filename=folder / "printed", level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    from sasrec_lab.train import train
    from sasrec_lab.training.trainer import build_trainer

    cfg = load(words)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    train(cfg, run)
    if tested:
        from sasrec_lab.data.datamodule import SequenceData
        from sasrec_lab.data.holdout import hold_out
        from sasrec_lab.data.sequences import load_sequences
        from sasrec_lab.training.lightning_module import SequentialRecommender

        sequences = load_sequences(cfg.dataset, cfg.data_dir)
        holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
        trainer, model = build_trainer(cfg, folder / "again"), SequentialRecommender(holdout.num_items, cfg)
        trainer.test(model, SequenceData(holdout, cfg), ckpt_path=tested, weights_only=True, verbose=False)
        trainer.validate(model, SequenceData(holdout, cfg), ckpt_path=tested, weights_only=True, verbose=False)
        if process == 0:
            ranks = {name: column.tolist() for name, column in model.test_ranks.items()}
            (folder / "again.json").write_text(json.dumps([model.tested, model.validation, ranks]))


def start_processes(
    processes: int, folder: Path, *words: str, devices: int | None = None, tested: Path | None = None
) -> list[BaseProcess]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (*WORDS, f"trainer.devices={devices or processes}", *words)
    started = [
        FORKS.Process(target=start, args=(process, processes, port, folder, list(words), tested))
        for process in range(processes)
    ]
    for process in started:
        process.start()
    return started


def run(processes: int, folder: Path, *words: str, tested: Path | None = None) -> dict:
    """Run to the end and return metrics.json."""
    started = start_processes(processes, folder, *words, tested=tested)
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * processes
    return json.loads((folder / "run" / "metrics.json").read_text())


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder / "run" / "tb")).Reload()
    return [scalar.value for scalar in events.Scalars(TRAIN_LOSS)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_several_processes_have_the_numbers_of_one(tmp_path):
    words = ["model.dropout=0", "trainer.max_epochs=3"]
    single = run(1, tmp_path / "1", *words)
    best, ranks = tmp_path / "1" / "run" / "checkpoints" / "best.ckpt", np.load(tmp_path / "1" / "run" / "ranks.npz")
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        written = run(processes, folder, *words, tested=best)
        assert losses(folder) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        for name, value in weights(folder).items():
            if name != "encoder.blocks.0.key.bias":  # it changes no output: its gradient is rounding
                torch.testing.assert_close(value, weights(tmp_path / "1")[name], rtol=1e-3, atol=1e-4)
        # of the same model they are equal to the last bit
        tested, validation, again = json.loads((folder / "again.json").read_text())
        assert tested | validation == single["metrics"]
        assert again["rank"] == ranks["rank"].tolist()
        assert again["sampled_rank"] == ranks["sampled_rank"].tolist()
        assert written["baselines"] == single["baselines"]
    files = sorted(path.name for path in (tmp_path / "4" / "run").iterdir())
    assert files == ["checkpoints", "items.npz", "metrics.json", "ranks.npz", "run.json", "tb"]


def test_a_run_that_lost_a_process_resumes_bit_equal(tmp_path):
    words = ["trainer.max_epochs=4"]
    run(2, tmp_path / "whole", *words)
    started = start_processes(2, tmp_path / "killed", *words)
    printed = tmp_path / "killed" / "printed"
    while not (printed.exists() and "epoch   2" in printed.read_text()):
        time.sleep(0.01)
        assert started[0].is_alive()
    os.kill(started[1].pid, signal.SIGKILL)
    started[0].join(20)
    assert started[0].exitcode not in (None, 0)
    written = json.loads((tmp_path / "killed" / "run" / "metrics.json").read_text())
    assert written["status"] == "failed"
    assert "process" in written["error"]
    assert "resume it with ckpt=last" in written["error"]
    resumed = run(2, tmp_path / "killed", *words, "ckpt=last")
    assert resumed["metrics"] == json.loads((tmp_path / "whole" / "run" / "metrics.json").read_text())["metrics"]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "killed").items())
