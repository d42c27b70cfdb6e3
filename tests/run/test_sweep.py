"""Sweeps as a user runs them: jobs that fail, sweeps that are interrupted and resumed, folders in use."""

import fcntl
import json
import re
import signal
import subprocess
import sys

import pytest
from commands import in_this_process
from small_sweep import TINY, ends

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import to_plain
from sasrec_lab.errors import InputError
from sasrec_lab.run.sweep import check


@pytest.mark.slow
def test_failed_jobs_are_listed_and_finished_ones_skipped(train_here, tmp_path):
    command = ["-m", *TINY, "model.heads=3,1", "optimizer.lr=0.01,1e30"]
    done = train_here(*command)
    assert done.returncode == 1
    assert ends(tmp_path / "sweep") == {"0": "failed", "1": "failed", "2": "finished", "3": "failed"}
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert len(lines) == 2 + 3 + 4  # the invalid jobs, the failed jobs, the list at the end
    assert lines[0].endswith("is invalid: model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    assert lines[5] == "error: 3 jobs in sweep are not finished:"
    assert lines[6].endswith(": model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    assert "training diverged" in lines[8]

    (finished,) = (tmp_path / "sweep").glob("2-*")
    before = {name: (finished / name).read_bytes() for name in ("run.json", "metrics.json", "ranks.npz")}
    again = train_here(*command)
    assert again.returncode == 1
    assert before == {name: (finished / name).read_bytes() for name in before}

    other = train_here(*command, "model.dim=8")
    assert other.returncode == 1
    assert re.fullmatch(
        r"error: .* already holds results of a different configuration \(model.dim differs\); .*\n", other.stderr
    )
    other = train_here("-m", *TINY, "batch_size=16,32")
    assert other.returncode == 1
    assert re.fullmatch(
        r"error: sweep already holds jobs of another sweep \(0-.*\); choose another hydra.sweep.dir\n", other.stderr
    )
    facts = json.loads((finished / "run.json").read_text())
    facts["config"]["model"]["dim"] = 8  # as if a file of conf/ had changed
    (finished / "run.json").write_text(json.dumps(facts))
    other = train_here(*command)
    assert re.fullmatch(
        r"error: .* already holds results of a different configuration \(model.dim differs\); .*\n", other.stderr
    )


def test_jobs_may_not_share_a_folder(train_here, tmp_path):
    done = train_here("-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=x")
    assert done.returncode == 1
    assert done.stderr == (
        "error: hydra.sweep.subdir gives different jobs the folder x; remove it, or let it have ${hydra.job.num}\n"
    )
    assert not (tmp_path / "sweep" / "x" / "run.json").exists()


@pytest.mark.slow
def test_sweep_can_be_extended_in_its_folder(train_here, tmp_path):
    """Each job keeps its folder, although more values change its number; new jobs get free numbers."""
    sweep = tmp_path / "sweep"
    command = ["-m", *TINY, "trainer.max_epochs=1", "model.heads=1,2"]
    assert train_here(*command, "seed=range(2)").returncode == 0
    before = {file: file.read_bytes() for file in sweep.glob("*/*.json")}
    extended = [*command, "seed=range(3)"]
    done = train_here(*extended)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all 6 jobs have finished" in done.stdout
    assert re.search(r"model\.heads=2 +3 +0\.\d{4} +0\.\d{4}\n", done.stdout)
    assert re.search(r"report +\S+ -m sasrec_lab\.report sweep --html sweep/report\.html\n", done.stdout)
    assert {folder.name.partition("-")[2] for folder in sweep.glob("*-*")} == {
        f"model.heads={heads},seed={seed}" for heads in (1, 2) for seed in range(3)
    }
    assert before == {file: file.read_bytes() for file in before}
    assert sorted(ends(sweep)) == ["0", "1", "2", "3", "5", "6"]
    said = {job.folder.name.partition("-")[0]: (job.cfg.model.heads, job.cfg.seed) for job in jobs_of(extended, sweep)}
    assert said == {"0": (1, 0), "1": (1, 1), "2": (2, 0), "3": (2, 1), "5": (2, 2), "6": (1, 2)}


def jobs_of(command, sweep):
    return check_command_line([*command, f"hydra.sweep.dir={sweep}"]).jobs


def test_equal_jobs_share_a_folder():
    names = [job.folder.name for job in check_command_line(["-m", "seed=3,3,4"]).jobs]
    assert names == ["0-seed=3", "0-seed=3", "2-seed=4"]
    assert [job.folder.name for job in check_command_line(["-m"]).jobs] == ["0-"]


def test_job_of_another_process_is_not_touched(train_here, tmp_path):
    command = ["-m", *TINY, "seed=0,1"]
    held = check_command_line(command).jobs[0].folder
    (tmp_path / held).mkdir(parents=True)
    with open(tmp_path / held / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train_here(*command)
    assert done.returncode == 1
    assert ends(tmp_path / "sweep") == {"1": "finished"}
    assert done.stderr.splitlines()[-2] == "error: 1 job in sweep is not finished:"
    assert "another process is running in" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_invalid_and_diverging_jobs_do_not_stop_the_others(train_here, tmp_path):
    """Job 1 has a learning rate that diverges, job 3 a number of heads that does not divide dim."""
    table = [f"{{heads: {3 if job == 3 else 1}, dropout: 0.{job}, dim: 16}}" for job in range(5)]
    (tmp_path / "rows").mkdir()
    for job, model in enumerate(table):
        rate = 1e30 if job == 1 else 0.01
        text = f"# @package _global_\nmodel: {model}\noptimizer: {{lr: {rate}}}\n"
        (tmp_path / "rows" / f"row{job}.yaml").write_text(text)
    names = ",".join(f"row{job}" for job in range(5))
    done = train_here("-m", "--config-dir", ".", *TINY, f"+rows={names}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    bad = {"1", "3"}
    assert ends(tmp_path / "sweep") == {str(job): "failed" if str(job) in bad else "finished" for job in range(5)}
    (diverged,) = (tmp_path / "sweep").glob("1-*/metrics.json")
    results = json.loads(diverged.read_text())
    assert "training diverged" in results["error"]
    assert not any(name.startswith("test/") for name in results["metrics"])
    assert done.stderr.splitlines()[-3] == "error: 2 jobs in sweep are not finished:"


@pytest.mark.slow
def test_two_sweeps_of_the_same_second_get_two_folders(tmp_path):
    words = [word for word in TINY if not word.startswith("hydra.sweep.dir")]
    command = [sys.executable, "-m", "sasrec_lab.train", "-m", *words, "seed=0,1"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    folders = list((tmp_path / "outputs" / "synthetic").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}-\d{6}", folder.name) for folder in folders)
    assert [ends(folder) for folder in folders] == [{"0": "finished", "1": "finished"}] * 2


@pytest.mark.parametrize("words", [["sweep=dim"], ["sweep=small"], ["hydra/launcher=joblib_shared"]])
def test_sweep_options_are_rejected_without_the_flag(words):
    with pytest.raises(InputError, match=r"add -m to run each of its jobs|is not installed"):
        check_command_line(words)


def test_config_is_printed_for_one_run_only():
    with pytest.raises(InputError, match=r"^--cfg and -m exclude each other; remove one$"):
        check_command_line(["-m", "seed=0,1", "--cfg", "job"])


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_sweep_is_resumed(train_here, made_once, interrupt_at, tmp_path, sent, code):
    command = ["-m", *TINY, "seed=0,1", "trainer.max_epochs=40", "evaluation.patience=null"]
    whole = made_once("uninterrupted-sweep", lambda folder: in_this_process("sasrec_lab.train", folder)(*command))
    stopped, error = interrupt_at("epoch   6", command, sent)
    assert stopped == code
    if sent is signal.SIGINT:
        assert error.splitlines()[1].endswith("evaluation.patience=null hydra.sweep.dir=sweep")
    done = train_here(*command)
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path / "sweep") == {"0": "finished", "1": "finished"}
    assert "epoch   4" not in done.stdout.partition("#1")[0]  # the first job resumed from its last epoch
    assert ends(whole / "sweep") == {"0": "finished", "1": "finished"}
    for job in (whole / "sweep").glob("*/metrics.json"):
        resumed = tmp_path / "sweep" / job.parent.name / "metrics.json"
        expected, found = (json.loads(file.read_text())["metrics"] for file in (job, resumed))
        assert found == pytest.approx(expected, abs=1e-7)


def test_sweep_in_a_config_needs_the_flag(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      model.dim: 16,32\n"
    (tmp_path / "experiment" / "dims.yaml").write_text(text)
    words = ["--config-dir", str(tmp_path), "experiment=dims"]
    with pytest.raises(InputError) as caught:
        check_command_line(words)
    assert str(caught.value) == "this config is a sweep, but would run as one job; add -m to run each of its jobs"
    assert [job.cfg.model.dim for job in check_command_line(["-m", *words]).jobs] == [16, 32]


def test_results_in_a_jobs_folder_ask_for_another_sweep_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = check_command_line(["-m", *TINY, "seed=1,2"])
    job = command.jobs[1]
    config = to_plain(job.cfg)
    config["model"]["dim"] = 8
    job.folder.mkdir(parents=True)
    (job.folder / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(InputError, match=r"\(model\.dim differs\); choose another hydra\.sweep\.dir$"):
        check(command)


def test_sweep_without_a_valid_job_or_folder_is_rejected(train_here, tmp_path):
    done = train_here("-m", *TINY, "model.heads=3,5")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    (tmp_path / "file").write_text("")
    done = train_here("-m", *TINY[:-1], "seed=1,2", "hydra.sweep.dir=file/sweep")
    assert (done.returncode, done.stderr) == (
        1,
        "error: file/sweep: the run folder cannot be written: Not a directory; choose another hydra.sweep.dir\n",
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "file"]  # the cache is the test's own
