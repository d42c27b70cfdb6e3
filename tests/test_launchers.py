"""Hydra's launchers and its search by Optuna, as a user runs them. Each is an extra; without it its tests are skipped."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=100",
    "dataset.synthetic.items=40",
    "model=tiny",
    "trainer=fast",
    "hydra.sweep.dir=sweep",
]
PLUGINS = {  # module -> extra
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_ray_launcher": "ray",
    "hydra_plugins.hydra_optuna_sweeper": "optuna",
}
MISSING = {extra for module, extra in PLUGINS.items() if importlib.util.find_spec(module) is None}


def needs(extra: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(extra in MISSING, reason=f"needs pip install 'sasrec-lab[{extra}]'")


def ends(sweep: Path) -> dict[str, str]:
    found = {file.parent.name: json.loads(file.read_text()) for file in sweep.glob("*/metrics.json")}
    return {name.partition("-")[0]: end["status"] for name, end in found.items()}


def facts(sweep: Path, job: str) -> dict:
    (file,) = sweep.glob(f"{job}-*/run.json")
    return json.loads(file.read_text())


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib_shared", "hydra.launcher.n_jobs=2"],
    "slurm": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    "ray": [
        "hydra/launcher=ray_shared",
        "hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [pytest.param(extra, marks=needs(extra)) for extra in LAUNCHERS])
def test_jobs_of_other_processes_are_listed_and_skipped_next_time(extra, train_command, tmp_path):
    """One of the four is no valid configuration, one diverges."""
    sweep = tmp_path / "sweep"
    command = ["-m", *LAUNCHERS[extra], *TINY, "optimizer.lr=0.01,1e30", "model.heads=1,3"]
    command[-2:] = ["model.heads=1,3", "optimizer.lr=0.01,1e30"]
    done = train_command(*command, env={"OMP_NUM_THREADS": ""} if extra == "joblib" else None)
    assert ends(sweep) == {"0": "finished", "1": "failed", "2": "failed", "3": "failed"}, done.stderr
    assert done.returncode == 1
    listed = done.stderr[done.stderr.index("error: 3 of the jobs in sweep failed:\n") :].splitlines()
    assert [line.partition(",")[0] for line in listed[1:]] == [f"{job}-dataset.synthetic.items=40" for job in (1, 2, 3)]
    assert "training diverged in epoch" in listed[1]
    assert listed[2].endswith("model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16")
    ran = facts(sweep, "0")
    assert " -m sasrec_lab.train -m hydra/launcher=" in ran["command"]
    if extra == "joblib":
        assert re.search(r"^joblib  2 jobs at a time, \d+ threads? each \(of \d+ cores?\)$", done.stdout, re.M)
        threads = re.search(r"2 jobs at a time, (\d+) thread", done.stdout)[1]
        assert ran["threads"] == int(threads)
        assert re.search(r"^#0   epoch   1  loss", done.stdout, re.M)

    before = {file: file.read_bytes() for file in sweep.glob("0-*/*.*")}
    again = train_command(*command)
    assert again.returncode == 1
    assert before == {file: file.read_bytes() for file in before}
