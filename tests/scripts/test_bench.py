"""scripts/bench.py as a user runs it, on 1/100 of the generated data, and the FLOPs of its roofline by hand.

bench_peers.py is tested without other libraries, since those come from the network.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import load_sequences

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY_MODEL = ("model.dim=2", "model.maxlen=4", "model.blocks=1")


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in the test's own folder, without real data, on one thread because tests share their machine."""

    def run(*args: str, script: str = "bench.py") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"SASREC_LAB_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPTS / script), *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
def test_jobs_run_and_write_json(bench, tmp_path):
    softmax = ("loss=softmax", "loss.negatives=0", "optimizer.name=adam")  # in place of the job's own
    done = bench(
        "--jobs", "kion-like,d,loading", "--small", "--steps", "2", "--json", "out.json", *softmax, *TINY_MODEL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"].startswith("python scripts/bench.py --jobs kion-like,d,loading --small --steps 2 --json")
    training, million, loading = written["rows"]
    assert [result["job"] for result in (training, million, loading)] == ["kion-like", "million", "loading"]
    measured = ("positions_per_s", "users_per_s", "roofline_positions_per_s", "fraction_of_roofline")
    for result in (training, million):
        own = ("peak_rss_mb", "roofline_users_per_s", "lists_per_s", "lists_peak_rss_mb")
        assert all(result[key] > 0 for key in (*measured, *own))
        assert result["lists"] == result["users"]
        assert result["listed_items"] == 10 * result["lists"]
        assert result["fraction_of_roofline"] == pytest.approx(
            result["positions_per_s"] / result["roofline_positions_per_s"], rel=1e-6
        )
    assert (training["users"], training["items"], training["steps"]) == (3000, 157, 2)
    assert (million["users"], million["items"]) == (2000, 10_000)
    assert all(loading[key] is None for key in measured)
    assert loading["rows"] == 59_000
    assert loading["peak_rss_mb"] > 0
    assert loading["cached_seconds"] > 0
    for shown in ("kion-like", "million", "loading", "59,000 rows"):
        assert shown in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_loading_starts_cold_and_keeps_the_users_cache(bench, tmp_path, name):
    (tmp_path / "own").mkdir()
    text = b"user,item\n" + b"".join(b"%d,%d\n" % (user, user + k) for user in range(50) for k in range(4))
    (tmp_path / "own" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    csv = ("dataset=csv", "dataset.path=own/x.csv", "dataset.user=user", "dataset.item=item", "dataset.time=null")
    words = [*csv, f"data_dir={tmp_path}"]
    load_sequences(load(words).dataset, str(tmp_path))  # fills the cache
    before = sorted(tmp_path.glob("cache/*"))
    marked = {file: file.stat().st_mtime_ns for folder in before for file in folder.iterdir()}
    done = bench("--jobs", "e", "--small", "--json", "out.json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (loading,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert loading["rows"] == 200
    assert loading["seconds"] > loading["cached_seconds"]
    assert sorted(tmp_path.glob("cache/*")) == before
    assert {file: file.stat().st_mtime_ns for folder in before for file in folder.iterdir()} == marked
    assert not list((tmp_path / "outputs/bench").glob("tmp*"))


def test_a_job_without_data_fails_and_the_others_run(bench):
    done = bench("--jobs", "b,e", "--small")
    assert done.returncode == 1
    failed, loading = done.stdout.splitlines()[1:]
    assert failed.startswith("sparse failed: dataset.path=home-5core/interactions.csv: ")
    assert loading.startswith("loading  ")
    assert done.stderr == ""


@pytest.mark.slow
def test_scale_takes_data_through_every_stage(bench, tmp_path, monkeypatch):
    pytest.importorskip("duckdb", reason="DuckDB is not installed")
    monkeypatch.setenv("CXX", "")  # the kernels are not what is tested
    done = bench("--scale", "3e3", "--steps", "2", "--json", "out.json", "model.dim=8", "loss.negatives=8")
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["note"].startswith("on a machine with other work")
    assert [row["stage"] for row in written["rows"][:3]] == ["build", "prepare", "2 steps"]
    assert re.fullmatch(r"ranks of \d+ users", written["rows"][3]["stage"])
    assert [row["interactions"] for row in written["rows"]] == [3000] * 4
    assert all(row["cpu_seconds"] > 0 and row["peak_rss_mb"] > 0 for row in written["rows"])
    assert [row["cpu_us_per_row"] > 0 for row in written["rows"] if "cpu_us_per_row" in row] == [True] * 2
    assert len(list((tmp_path / "outputs/bench/scale-3e3/cache").iterdir())) == 1


def test_an_unknown_key_or_job_is_one_line(bench):
    done = bench("--scale", "10")
    assert "'10' must be numbers of interactions from 1000, such as 1e6,1e7" in done.stderr
    done = bench("--jobs", "loading", "--small", "model.dmi=3")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == ["loading failed: unknown key 'model.dmi'; did you mean model.dim?"]
    done = bench("--jobs", "a,z")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "'z' must be one of ml1m, sparse, kion-like, million, loading, ligr, bert4rec, hstu"
    )


@pytest.fixture
def tiny_model() -> ModelConfig:
    return load([*TINY_MODEL]).model


def test_flops_of_a_training_position(tiny_model):
    from benchmark.roofline import flops_per_position

    # dim 2: query, key, value 3 * 2 * 2 * 2 = 24; feed-forward 2 * 2 * 2 * 2 = 16. Sequences of 1 and 3 positions
    # attend to 1, 1, 2 and 3 positions: 7 / 4 on average, each 2 * 2 for the score and 2 * 2 for the value: 14.
    # 5 items: 20.
    assert flops_per_position(tiny_model, 5, np.array([1, 3])) == 3 * (24 + 16 + 14 + 20)


def test_flops_of_a_bidirectional_position(tiny_model):
    from benchmark.roofline import flops_per_position

    # As above, but positions attend to 1, 3, 3 and 3: 10 / 4 on average, 20. Half of them have a label, so half of the
    # query 8, the feed-forward and attention count, of the head's layer 8 and of 5 items 20; of key and value all 16.
    # Such a model's feed-forward would be wider if the key did not say 2.
    tiny_model.causal, tiny_model.head_transform, tiny_model.ff_dim = False, True, 2
    assert flops_per_position(tiny_model, 5, np.array([1, 3]), 0.5) == 3 * (16 + (8 + 16 + 20 + 8 + 20) / 2)


def test_flops_of_a_ranked_user(tiny_model):
    from benchmark.roofline import flops_per_user

    # One block, so only for the newest item: the matrices of query and key, merged, and value 16, the feed-forward 16,
    # attention to 3 items 3 * 8 = 24; 5 items: 20.
    assert flops_per_user(tiny_model, 5, np.array([3])) == 16 + 16 + 24 + 20
    # A block below computes everything: 3 * (16 + 16), attention to 1, 2 and 3 items: 6 * 8.
    tiny_model.blocks = 2
    assert flops_per_user(tiny_model, 5, np.array([3])) == 76 + 3 * 32 + 48


def test_peers_name_known_jobs():
    from benchmark.figure import COLORS
    from benchmark.jobs import JOBS
    from benchmark.peer import PEERS

    for peer in PEERS.values():
        assert set(peer.jobs) <= set(JOBS)
        assert (SCRIPTS / "peers" / peer.script).is_file()
        assert peer.name in COLORS


def test_overrides_replace_job_settings():
    from benchmark.jobs import JOBS, job_overrides

    folder = Path("generated")
    words = job_overrides(JOBS["kion-like"], ["model.dim=8", "trainer=gpu"], folder)
    assert [word for word in words if word.startswith(("model.dim", "trainer", "data_dir"))] == [
        "model.dim=8",
        "trainer=gpu",
        "data_dir=generated",
    ]
    words = job_overrides(JOBS["kion-like"], ["dataset=ml_100k"], folder)
    assert [word for word in words if word.startswith("data")] == ["dataset=ml_100k"]
    assert "model.dim=128" in words
    words = job_overrides(JOBS["bert4rec"], [], folder)
    assert [word for word in words if word.startswith("model.heads")] == ["model.heads=2"]  # not that of the others


def test_peers_get_the_sequences_that_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from benchmark.subprocesses import run_module

    words = ["dataset=synthetic", "dataset.synthetic.users=30", "dataset.catalogue=train", "model.maxlen=4"]
    task = run_module("benchmark.windows", "windows.npz", *words, f"data_dir={tmp_path}")
    cfg = load([*words, f"data_dir={tmp_path}"])
    holdout = hold_out(load_sequences(cfg.dataset, cfg.data_dir), cfg.dataset.windows, cfg.dataset.catalogue, 4)
    assert (task["num_items"], task["maxlen"], task["dropout"]) == (holdout.num_items, 4, 0.2)
    assert (task["model"], task["ff_dim"], task["mask_share"]) == ("sasrec", 64, 0.0)
    arrays = np.load(task["windows"])
    windows = np.split(arrays["items"], arrays["offsets"][1:-1])
    trained_on = zip(holdout.window_starts, holdout.window_ends, strict=True)
    for window, (start, end) in zip(windows, trained_on, strict=True):
        assert window.tolist() == holdout.items[start:end].tolist()


def test_peers_are_not_set_up_for_a_job_without_data(bench, tmp_path):
    done = bench("--jobs", "sparse", script="bench_peers.py")
    assert done.returncode == 1
    failed = done.stdout.splitlines()[1]
    assert failed.startswith("sparse: sasrec_lab failed: dataset.path=home-5core/interactions.csv: ")
    assert not (tmp_path / "outputs/bench/venvs").exists()
    refused = bench("--jobs", "d", script="bench_peers.py")
    assert refused.stderr.endswith(
        "argument --jobs: 'd' must be one of ml1m, sparse, kion-like, loading, ligr, bert4rec, hstu\n"
    )
