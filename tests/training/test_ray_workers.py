"""A run on the workers of a local Ray cluster, one of which is killed; `make test-cluster` has Ray."""

import json
import os
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import environment

from sasrec_lab.config.composition import load
from sasrec_lab.errors import InputError
from sasrec_lab.training.ray_workers import _check_resources, train_on_workers

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: make test-cluster")
TINY = [
    *(
        "dataset=synthetic",
        "dataset.synthetic.users=300",
        "dataset.synthetic.items=60",
        "model=tiny",
        "optimizer.lr=0.01",
    ),
    *("trainer.accelerator=cpu", "trainer.max_epochs=4"),
]


def results(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def workers_of(folder: Path) -> list[int]:
    """Return the process ids of Ray's workers whose environment names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, environ = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if name.startswith(b"ray::RayTrainWorker") and str(folder).encode() in environ:
            found.append(int(process.name))
    return found


@needs_ray
@pytest.mark.slow
def test_a_run_that_loses_a_worker_ends_as_one_on_two_processes(start_command, train_command, tmp_path):
    """The same numbers as of two processes that Lightning starts and that nothing kills."""
    env = environment(tmp_path) | {"RAY_worker_niceness": "0"}  # by default other work on the machine comes first
    process = start_command([*TINY, "cluster=ray", "hydra.run.dir=ray"], stderr=subprocess.STDOUT, env=env)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("epoch   2"):
            os.kill(workers_of(tmp_path)[-1], signal.SIGKILL)
    assert process.wait(60) == 0, "".join(printed)
    assert sum(line.startswith("model  ") for line in printed) == 2  # it has started twice
    assert [line.split()[1] for line in printed if line.startswith("epoch")][-1] == "4"
    whole = train_command(*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert results(tmp_path / "ray")["metrics"] == results(tmp_path / "whole")["metrics"]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "ray").items())
    record = json.loads((tmp_path / "ray" / "run.json").read_text())
    assert (len(record["earlier"]), results(tmp_path / "ray")["status"]) == (1, "finished")
    again = train_command(*TINY, "cluster=ray", "hydra.run.dir=ray")
    assert "already finished" in again.stdout


def test_missing_ray_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sasrec_lab.training.ray_workers.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        train_on_workers(load([*TINY, "cluster=ray"]), tmp_path, print)
    assert str(caught.value) == "cluster=ray needs Ray; install it with pip install 'sasrec-lab[cluster]'"


@pytest.mark.parametrize(
    ("words", "there", "line"),
    [
        (
            ["cluster.workers=3", "cluster.cpus=2"],
            {"CPU": 4.0},
            "cluster.workers=3 need 6 CPUs, but the Ray cluster has 4;",
        ),
        (["trainer=gpu"], {"CPU": 4.0}, "cluster.workers=2 need 2 GPUs, but the Ray cluster has 0;"),
    ],
)
def test_a_cluster_without_the_workers_is_one_line(words, there, line):
    cfg = load([*TINY[:-2], "cluster=ray", *words])
    with pytest.raises(InputError) as caught:
        _check_resources(cfg, there)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trainer.devices=2"], "trainer.devices=2 and cluster=ray both say where the processes run;"),
        (["+trainer.strategy=ddp"], "trainer.strategy=ddp and cluster=ray both say where the processes run;"),
        (["ckpt=x.ckpt"], "ckpt=x.ckpt: cluster=ray resumes a run in its own folder; set ckpt=last"),
        (["cluster.workers=0"], "cluster.workers=0 must be at least 1"),
        (["model=ease"], "cluster=ray shares out training steps, which model=ease lacks; remove it"),
    ],
)
def test_keys_that_do_not_fit_a_cluster_are_one_line(words, line):
    with pytest.raises(InputError) as caught:
        load(["dataset=synthetic", "cluster=ray", *words])
    assert str(caught.value).startswith(line)
