"""scripts/bench.py as a user runs it, on a hundredth of the made-up data, and the FLOPs of its floor by hand.

Of bench_peers.py only what needs no other library: those come from the network.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import ModelConfig
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import load_sequences

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY_MODEL = ("model.dim=2", "model.maxlen=4", "model.blocks=1")


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """In the test's own folder, without real data; one thread, as the busy machine of the tests likes it."""

    def run(*args: str, script: str = "bench.py") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"SASREC_LAB_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPTS / script), *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return run


def test_jobs_run_and_write_json(bench, tmp_path):
    softmax = ("loss=softmax", "loss.negatives=0", "optimizer.name=adam")  # in place of job d's own
    done = bench("--jobs", "c,d,e", "--small", "--steps", "2", "--json", "out.json", *softmax, *TINY_MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    training, million, loading = json.loads((tmp_path / "out.json").read_text())
    assert [result["job"] for result in (training, million, loading)] == ["c", "d", "e"]
    measured = ("positions_per_s", "users_per_s", "floor_positions_per_s", "fraction_of_floor")
    for result in (training, million):
        own = ("peak_rss_mb", "floor_users_per_s", "lists_per_s", "lists_peak_rss_mb")
        assert all(result[key] > 0 for key in (*measured, *own))
        assert result["lists"] == result["users"]
        assert result["listed_items"] == 10 * result["lists"]
        assert result["fraction_of_floor"] == pytest.approx(
            result["positions_per_s"] / result["floor_positions_per_s"], rel=1e-6
        )
    assert (training["users"], training["items"], training["steps"]) == (3000, 157, 2)
    assert (million["users"], million["items"]) == (2000, 10_000)
    assert all(loading[key] is None for key in measured)
    assert loading["rows"] == 59_000
    assert loading["peak_rss_mb"] > 0
    assert loading["cached_seconds"] > 0
    for shown in ("c kion-like", "d million", "e loading", "59,000 rows"):
        assert shown in done.stdout


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_loading_another_data_set_is_cold_too_and_leaves_its_cache(bench, tmp_path, name):
    (tmp_path / "own").mkdir()
    text = b"user,item\n" + b"".join(b"%d,%d\n" % (user, user + k) for user in range(50) for k in range(4))
    (tmp_path / "own" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    csv = ("dataset=csv", "dataset.path=own/x.csv", "dataset.user=user", "dataset.item=item", "dataset.time=null")
    words = [*csv, f"data_dir={tmp_path}"]
    load_sequences(load(words).dataset, str(tmp_path))  # it is in the cache
    before = sorted(tmp_path.glob("cache/*"))
    marked = {file: file.stat().st_mtime_ns for folder in before for file in folder.iterdir()}
    done = bench("--jobs", "e", "--small", "--json", "out.json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (loading,) = json.loads((tmp_path / "out.json").read_text())
    assert loading["rows"] == 200
    assert loading["seconds"] > loading["cached_seconds"]
    assert sorted(tmp_path.glob("cache/*")) == before
    assert {file: file.stat().st_mtime_ns for folder in before for file in folder.iterdir()} == marked
    assert not list((tmp_path / "outputs/bench").glob("tmp*"))


def test_a_job_without_its_data_says_so_and_the_others_go_on(bench):
    done = bench("--jobs", "b,e", "--small")
    assert done.returncode == 1
    failed, loading = done.stdout.splitlines()[1:]
    assert failed.startswith("b sparse could not run: dataset.path=home-5core/interactions.csv: there is no such file")
    assert loading.startswith("e loading")
    assert done.stderr == ""


def test_a_mistaken_key_and_a_mistaken_job_are_one_line(bench):
    done = bench("--jobs", "e", "--small", "model.dmi=3")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == ["e loading could not run: unknown key 'model.dmi'; did you mean model.dim?"]
    done = bench("--jobs", "a,z")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("'z' is none of a, b, c, d, e")


@pytest.fixture
def tiny_model() -> ModelConfig:
    return load([*TINY_MODEL]).model


def test_flops_of_a_training_position(tiny_model):
    from benchmark.roofline import flops_per_position

    # dim 2: query, key, value 3 * 2 * 2 * 2 = 24; feed-forward 2 * 2 * 2 * 2 = 16. Sequences of 1 and 3 positions look
    # at 1, 1, 2 and 3: 7 / 4 in the mean, each 2 * 2 for the score and 2 * 2 for the value: 14. 5 items: 20.
    assert flops_per_position(tiny_model, 5, np.array([1, 3])) == 3 * (24 + 16 + 14 + 20)


def test_flops_of_a_ranked_user(tiny_model):
    from benchmark.roofline import flops_per_user

    # One block, so for the newest item alone the matrices of query and key, made one, and value 16, the feed-forward 16
    # and attention to 3 items 3 * 8 = 24; 5 items: 20.
    assert flops_per_user(tiny_model, 5, np.array([3])) == 16 + 16 + 24 + 20
    # A block below computes everything: 3 * (16 + 16), attention to 1, 2 and 3 items: 6 * 8.
    tiny_model.blocks = 2
    assert flops_per_user(tiny_model, 5, np.array([3])) == 76 + 3 * 32 + 48


def test_what_is_given_replaces_what_a_job_says():
    from benchmark.jobs import JOBS, job_overrides

    folder = Path("made_up")
    words = job_overrides(JOBS["c"], ["model.dim=8", "trainer=gpu"], folder)
    assert [word for word in words if word.startswith(("model.dim", "trainer", "data_dir"))] == [
        "model.dim=8",
        "trainer=gpu",
        "data_dir=made_up",
    ]
    words = job_overrides(JOBS["c"], ["dataset=ml_100k"], folder)
    assert [word for word in words if word.startswith("data")] == ["dataset=ml_100k"]
    assert "model.dim=128" in words


def test_peers_get_the_sequences_that_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from benchmark.subprocesses import run_module

    words = ["dataset=synthetic", "dataset.synthetic.users=30", "dataset.catalogue=train", "model.maxlen=4"]
    task = run_module("benchmark.windows", "windows.npz", *words, f"data_dir={tmp_path}")
    cfg = load([*words, f"data_dir={tmp_path}"])
    holdout = hold_out(load_sequences(cfg.dataset, cfg.data_dir), cfg.dataset.windows, cfg.dataset.catalogue, 4)
    assert (task["num_items"], task["maxlen"], task["dropout"]) == (holdout.num_items, 4, 0.2)
    arrays = np.load(task["windows"])
    windows = np.split(arrays["items"], arrays["offsets"][1:-1])
    trained_on = zip(holdout.window_starts, holdout.window_ends, strict=True)
    for window, (start, end) in zip(windows, trained_on, strict=True):
        assert window.tolist() == holdout.items[start:end].tolist()


def test_peers_are_not_set_up_for_a_job_without_data(bench, tmp_path):
    done = bench("--jobs", "b", script="bench_peers.py")
    assert done.returncode == 1
    failed = done.stdout.splitlines()[1]
    assert failed.startswith(
        "b sparse: sasrec_lab could not run: dataset.path=home-5core/interactions.csv: there is no"
    )
    assert not (tmp_path / "outputs/bench/venvs").exists()
    assert bench("--jobs", "d", script="bench_peers.py").stderr.endswith("argument --jobs: 'd' is none of a, b, c, e\n")
