"""Hydra's launchers and its Optuna search, as a user runs them. Tests of extras that are not installed are skipped."""

import importlib.util
import json
import os
import re
import signal
import sqlite3
from pathlib import Path

import pytest
from small_sweep import TINY, ends

from sasrec_lab.config.command_line import check_command_line, load
from sasrec_lab.config.convert import to_plain
from sasrec_lab.errors import InputError
from sasrec_lab.run import sweep as sweeps

PLUGINS = {  # module -> extra
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "hydra_plugins.hydra_ray_launcher": "ray",
    "hydra_plugins.hydra_optuna_sweeper": "optuna",
}
any_plugin = importlib.util.find_spec("hydra_plugins")  # without it, the search below is an error
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
    _, error = process.communicate(timeout=60)
    if sent is signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in error
        assert error.splitlines()[-1].endswith("evaluation.patience=null hydra.sweep.dir=sweep"), error
        assert set(ends(tmp_path / "sweep").values()) == {"interrupted"}
    done = train_command(*command)
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path / "sweep") == {"0": "finished", "1": "finished"}
    assert "#0   epoch   4" not in done.stdout  # the first job resumed from its last epoch


def trials(study: Path) -> list[tuple[str, float | None]]:
    """Return the state and value of each trial in the database."""
    with sqlite3.connect(study) as database:
        query = "select state, value from trials left join trial_values using (trial_id) order by number"
        return database.execute(query).fetchall()


@pytest.mark.slow
@needs("optuna")
def test_search_resumes_and_learns_from_failures(train_command, interrupt_at, tmp_path):
    """The first search has values that diverge or are invalid; the second one is killed in its first trial."""
    sweep = tmp_path / "sweep"
    search = ["-m", "sweep=optuna_small", *TINY, "evaluation.patience=null", "model.dropout=0.1", "model.dim=16"]
    space = ["optimizer.lr=choice(0.01,0.02,1e30)", "model.heads=choice(1,3)"]
    done = train_command(*search, *space, "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1")
    seen = trials(sweep / "study.db")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [state for state, _ in seen] == ["COMPLETE"] * 6  # a failed trial has the worst value
    finished = [json.loads(file.read_text()) for file in sweep.glob("*/metrics.json")]
    best = max(end["metrics"]["val/ndcg@10"] for end in finished if end["status"] == "finished")
    assert max(value for _, value in seen if isinstance(value, float)) == best

    space = ["optimizer.lr=interval(0.001,0.01)", "trainer.max_epochs=30", "hydra.sweep.dir=long"]
    long = [*search, *space, "hydra.sweeper.n_trials=2"]
    stopped, _ = interrupt_at("epoch   8", long, signal.SIGKILL)
    assert stopped == -9
    (cut_off,) = (tmp_path / "long").glob("*/.hydra")
    assert [state for state, _ in trials(tmp_path / "long" / "study.db")] == ["RUNNING"]
    done = train_command(*long)
    assert (done.returncode, done.stderr) == (0, "")
    assert [state for state, _ in trials(tmp_path / "long" / "study.db")] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert len(list((tmp_path / "long").glob("*/.hydra"))) == 2
    assert len(json.loads((cut_off.parent / "run.json").read_text())["earlier"]) == 1
    assert not re.search(r"epoch   [2-7]", done.stdout.partition("all 2 jobs")[0].partition("#1 ")[0])

    before = {file: file.read_bytes() for file in (tmp_path / "long").glob("*/metrics.json")}
    assert train_command(*long).returncode == 0
    assert before == {file: file.read_bytes() for file in before}
    assert len(list((tmp_path / "long").glob("*/metrics.json"))) == 4


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["hydra/launcher=joblib", "seed=1,2"], "joblib"),
        (["hydra/launcher=joblib_shared", "seed=1,2"], "joblib"),
        (["hydra/launcher=slurm", "seed=1,2"], "slurm"),
        (["hydra/launcher=ray_shared", "seed=1,2"], "ray"),
        (["sweep=optuna_small"], "optuna"),
    ],
)
def test_preset_composes_or_names_what_to_install(words, extra):
    if extra in MISSING:
        with pytest.raises(InputError, match=rf"is not installed; pip install 'sasrec-lab\[{extra}\]'$"):
            check_command_line(["-m", *words])
    else:
        command = check_command_line(["-m", *words])
        assert len(command.jobs) == (0 if extra == "optuna" else 2)


def test_search_needs_the_multirun_flag():
    if "optuna" in MISSING:
        pytest.skip("needs pip install 'sasrec-lab[optuna]'")
    with pytest.raises(InputError, match="add -m to run each of its jobs"):
        check_command_line(["sweep=optuna_small"])


@needs("optuna")
def test_invalid_search_space_is_rejected_before_the_start():
    with pytest.raises(InputError) as caught:
        check_command_line(["-m", "hydra/sweeper=optuna_stored", "optimizer.lrr=interval(0,1)"])
    assert str(caught.value) == "unknown key 'optimizer.lrr'; did you mean optimizer.lr?"


@needs("optuna")
def test_search_rejects_a_folder_with_another_searchs_runs(tmp_path):
    def prepare(*words: str) -> None:
        space = ["sweep=optuna_small", "model.dim=16", "optimizer.lr=interval(0.01,0.1)"]
        sweeps.prepare(check_command_line(["-m", *space, f"hydra.sweep.dir={tmp_path}", *words]))

    run = tmp_path / "optimizer.lr=0.05"
    run.mkdir()
    cfg = load(["model.dim=16", "optimizer.lr=0.05", "model.dropout=0.4"])
    (run / "run.json").write_text(json.dumps({"config": to_plain(cfg)}))
    prepare()  # searched keys may differ
    with pytest.raises(InputError) as caught:
        prepare("model.blocks=1")
    assert str(caught.value) == (
        f"{tmp_path} already holds runs of another search (model.blocks differs); choose another hydra.sweep.dir"
    )
