"""Sweeps as a user runs them: jobs that fail, sweeps that are cut off and taken up again, folders that are taken."""

import json
import re
import signal
from pathlib import Path

import pytest

from sasrec_lab.command_line import check_command_line
from sasrec_lab.errors import InputError

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=100",
    "dataset.synthetic.items=40",
    "model=tiny",
    "trainer=fast",
    "hydra.sweep.dir=sweep",
]


def ends(sweep: Path) -> dict[str, str]:
    return {
        file.parent.name.partition("-")[0]: json.loads(file.read_text())["status"]
        for file in sweep.glob("*/metrics.json")
    }


def test_failing_jobs_are_listed_and_the_others_go_on_and_are_skipped_next_time(train_command, tmp_path):
    command = ["-m", *TINY, "model.heads=3,1", "optimizer.lr=0.01,1e30"]
    done = train_command(*command)
    assert done.returncode == 1
    assert ends(tmp_path / "sweep") == {"0": "failed", "1": "failed", "2": "finished", "3": "failed"}
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert len(lines) == 2 + 3 + 4  # what will fail, what failed, the list at the end
    assert lines[0].endswith("will fail: model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    assert lines[5] == "error: 3 of the jobs in sweep failed:"
    assert lines[6].endswith(": InputError: model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    assert "training diverged" in lines[8]

    (finished,) = (tmp_path / "sweep").glob("2-*")
    before = {name: (finished / name).read_bytes() for name in ("run.json", "metrics.json", "ranks.npz")}
    again = train_command(*command)
    assert again.returncode == 1
    assert before == {name: (finished / name).read_bytes() for name in before}

    other = train_command(*command, "model.dim=8")
    assert other.returncode == 1
    assert re.fullmatch(
        r"error: sweep holds another sweep's jobs \(0-.*\); choose another hydra.sweep.dir\n", other.stderr
    )
    facts = json.loads((finished / "run.json").read_text())
    facts["config"]["model"]["dim"] = 8  # as where a file of conf/ has changed
    (finished / "run.json").write_text(json.dumps(facts))
    other = train_command(*command)
    assert re.fullmatch(r"error: .* holds another configuration's results \(model.dim differs\); .*\n", other.stderr)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_sweep_that_was_cut_off_goes_on(train_command, interrupt_at, tmp_path, sent, code):
    command = ["-m", *TINY, "seed=0,1", "trainer.max_epochs=40", "evaluation.patience=null"]
    stopped, error = interrupt_at("epoch   5", command, sent)
    assert stopped == code
    if sent is signal.SIGINT:
        assert error.splitlines()[1].endswith("evaluation.patience=null hydra.sweep.dir=sweep")
    done = train_command(*command)
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path / "sweep") == {"0": "finished", "1": "finished"}
    assert "epoch   3" not in done.stdout.partition("#1")[0]  # the first job went on from its last epoch


def test_a_sweep_needs_its_flag(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      model.dim: 16,32\n"
    (tmp_path / "experiment" / "dims.yaml").write_text(text)
    words = ["--config-dir", str(tmp_path), "experiment=dims"]
    with pytest.raises(InputError) as caught:
        check_command_line(words)
    assert str(caught.value) == "a sweep is chosen and would run as one job; add -m to run each of its jobs"
    assert [job.cfg.model.dim for job in check_command_line(["-m", *words]).jobs] == [16, 32]


def test_a_sweep_without_one_valid_job_or_a_folder_is_refused(train_command, tmp_path):
    done = train_command("-m", *TINY, "model.heads=3,5")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    (tmp_path / "file").write_text("")
    done = train_command("-m", *TINY[:-1], "seed=1,2", "hydra.sweep.dir=file/sweep")
    assert (done.returncode, done.stderr) == (
        1,
        "error: file/sweep: the run folder cannot be written: Not a directory; choose another hydra.sweep.dir\n",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
