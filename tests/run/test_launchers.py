"""Hydra's launchers, as a user runs them. Tests of extras that are not installed are skipped."""

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import pytest
from small_sweep import TINY, ends

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.errors import InputError

PLUGINS = {  # module -> extra
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_ray_launcher": "ray",
}
any_plugin = importlib.util.find_spec("hydra_plugins")  # without it, the look-up below is an error
MISSING = {extra for module, extra in PLUGINS.items() if not (any_plugin and importlib.util.find_spec(module))}


def needs(extra: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(extra in MISSING, reason=f"needs pip install 'sasrec-lab[{extra}]'")


def facts(sweep: Path, job: str) -> dict:
    (file,) = sweep.glob(f"{job}-*/run.json")
    return json.loads(file.read_text())


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib_shared", "hydra.launcher.n_jobs=2"],
    "slurm": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    "ray": ["hydra/launcher=ray_shared", "+hydra.launcher.ray.init={num_cpus: 2, include_dashboard: false}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [pytest.param(extra, marks=needs(extra)) for extra in LAUNCHERS])
def test_launched_jobs_are_listed_then_skipped(extra, train_command, tmp_path):
    """Two of the four have an invalid configuration, and one diverges."""
    sweep = tmp_path / "sweep"
    command = ["-m", *LAUNCHERS[extra], *TINY, "model.heads=1,3", "optimizer.lr=0.01,1e30"]
    done = train_command(*command, env={"OMP_NUM_THREADS": ""} if extra == "joblib" else None)
    assert ends(sweep) == {"0": "finished", "1": "failed", "2": "failed", "3": "failed"}, done.stderr
    assert done.returncode == 1
    listed = done.stderr[done.stderr.index("error: 3 jobs in sweep are not finished:\n") :].splitlines()
    assert [line.partition(",")[0] for line in listed[1:4]] == [
        f"{job}-dataset.synthetic.items=40" for job in (1, 2, 3)
    ]
    assert "training diverged in epoch" in listed[1]
    assert listed[2].endswith("model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    ran = facts(sweep, "0")
    assert " -m sasrec_lab.train -m hydra/launcher=" in ran["command"]
    if extra == "joblib":
        assert re.search(r"^joblib  2 jobs at a time, \d+ threads? each \(of \d+ cores?\)$", done.stdout, re.M)
        threads = re.search(r"2 jobs at a time, (\d+) thread", done.stdout)[1]
        assert ran["threads"] == int(threads)
        assert re.search(r"^#0   epoch   2  loss", done.stdout, re.M)

    before = {file: file.read_bytes() for file in sweep.glob("0-*/*.json")}
    again = train_command(*command)
    assert again.returncode == 1
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.slow
@needs("joblib")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_parallel_jobs_are_resumed(train_command, start_command, tmp_path, sent):
    """The signal reaches every process, as with Ctrl-C in a terminal or when the machine fails."""
    long = ["seed=0,1", "trainer.max_epochs=30", "evaluation.patience=null"]
    command = ["-m", *LAUNCHERS["joblib"], *TINY, *long]
    process = start_command(command, start_new_session=True)
    for line in process.stdout:
        if line.startswith("#0   epoch   6"):
            break
    os.killpg(process.pid, sent)
    _, error = process.communicate(timeout=300)
    if sent is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in error
        assert error.splitlines()[-1].endswith("evaluation.patience=null hydra.sweep.dir=sweep"), error
        assert set(ends(tmp_path / "sweep").values()) == {"interrupted"}
    done = train_command(*command)
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path / "sweep") == {"0": "finished", "1": "finished"}
    assert "#0   epoch   4" not in done.stdout  # the first job resumed from its last epoch


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["hydra/launcher=joblib", "seed=1,2"], "joblib"),
        (["hydra/launcher=joblib_shared", "seed=1,2"], "joblib"),
        (["hydra/launcher=slurm", "seed=1,2"], "slurm"),
        (["hydra/launcher=ray_shared", "seed=1,2"], "ray"),
    ],
)
def test_preset_composes_or_names_what_to_install(words, extra):
    if extra in MISSING:
        with pytest.raises(InputError, match=rf"is not installed; pip install 'sasrec-lab\[{extra}\]'$"):
            check_command_line(["-m", *words])
    else:
        assert len(check_command_line(["-m", *words]).jobs) == 2
