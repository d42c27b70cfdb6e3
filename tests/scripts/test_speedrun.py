"""scripts/speedrun.py as a user runs it, on generated data: its clock, its rows, how it resumes and what it refuses."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Done, environment, in_this_process, process_state

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = [
    "dataset=synthetic",
    "dataset.synthetic.users=60",
    "dataset.synthetic.items=30",
    "model=tiny",
    "trainer.max_epochs=2",
]


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def speedrun(folder: Path, *words: str) -> Done:
    command = [sys.executable, str(SCRIPTS / "speedrun.py"), *words]
    return subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)


@pytest.fixture
def speedrun_here(tmp_path, monkeypatch) -> Callable[..., Done]:
    """Run the script in this process, and so the training commands that it starts."""
    import speedrun as script

    def train(command: list[str], **options: object) -> Done:
        assert command[1:3] == ["-m", "sasrec_lab.train"]
        return in_this_process("sasrec_lab.train", tmp_path)(*command[3:])

    def run(*words: str) -> Done:
        out, err, code = io.StringIO(), io.StringIO(), 0
        command = [str(SCRIPTS / "speedrun.py"), *words]
        with process_state(command, environment(tmp_path), tmp_path), contextlib.redirect_stdout(out):
            try:
                script.main()
            except SystemExit as end:
                code = 1
                print(end.code, file=err)
        return Done(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=train))
    return run


@pytest.mark.slow
def test_seeds_are_timed_and_finished_ones_are_kept(speedrun_here, tmp_path):
    first = speedrun(tmp_path, *SMALL, "--seeds", "1")
    assert (first.returncode, first.stderr) == (0, "")
    folder = tmp_path / "outputs/speedrun_ml_1m"
    one = json.loads((folder / "speedrun.json").read_text())["seconds"]["1"]
    info = json.loads((folder / "1/run.json").read_text())
    assert info["seconds"]["fit"] < one < 600
    metrics = (folder / "1/metrics.json").read_bytes()

    (folder / "2").mkdir()  # as a seed that was cut off leaves it
    both = speedrun_here(*SMALL, "--seeds", "1", "2", "--json", "result.json")
    assert (both.returncode, both.stderr) == (0, "")
    assert (folder / "1/metrics.json").read_bytes() == metrics
    assert len(list(folder.glob("2-cut-off-*"))) == 1
    written = json.loads((tmp_path / "result.json").read_text())
    assert {"measured", "commit", "machine", "threads", "versions", "command"} <= written.keys()
    (row,) = written["rows"]
    assert [run["seed"] for run in row["by_seed"]] == [1, 2]
    assert row["by_seed"][0]["seconds"] == one
    ndcg = [run["ndcg"] for run in row["by_seed"]]
    middle, half = sum(ndcg) / 2, abs(ndcg[0] - ndcg[1]) / 2  # of two values half the distance is the standard error
    assert row["bound"] == pytest.approx(middle - 2.13 * half)
    assert row["counts"] is False
    assert f"mean of 2: {row['seconds']['mean']:.1f} s, test/ndcg@10 {middle:.4f}" in both.stdout
    assert "an attempt counts with the seeds 301, 302, 303, 304, 305" in both.stdout

    other = speedrun_here(*SMALL, "model.dim=8", "--seeds", "1")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert other.stderr.startswith("error: outputs/speedrun_ml_1m has an attempt with other settings (experiment=")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=3"], "seed=3: the script sets this key for each seed; use --seeds, or --folder"),
        (["evaluation.patience=3"], "evaluation.patience=3 may end training early"),
        (["evaluation.test=false"], "the result is test/ndcg@10; set evaluation.test=true and evaluation.k=10"),
        (["model.dimm=3"], "unknown key"),
    ],
)
def test_settings_that_break_the_rules_are_refused(words, message):
    import speedrun as script

    from sasrec_lab.errors import InputError

    with pytest.raises(InputError) as caught:
        script.check_rules([f"experiment={script.EXPERIMENT}", *words])
    assert str(caught.value).startswith(message)


def test_an_attempt_counts_by_its_mean_minus_the_error(tmp_path):
    import speedrun as script

    seconds = {}
    for seed, ndcg in zip(script.SEEDS, [0.183, 0.184, 0.185, 0.184, 0.184], strict=True):
        run = tmp_path / str(seed)
        run.mkdir()
        metrics = {"test/ndcg@10": ndcg, "test/recall@10": 0.3, "val/ndcg@10": 0.19}
        results = {"status": "finished", "error": None, "epochs": 14, "best_epoch": 12, "metrics": metrics}
        (run / "metrics.json").write_text(json.dumps(results | {"protocol": {}, "baselines": {}}))
        seconds[str(seed)] = 100.0
    record = {"words": [], "seconds": seconds}
    result = script.summary(tmp_path, record, script.SEEDS)
    assert result["bound"] == pytest.approx(0.184 - 2.13 * (2e-6 / 4 / 5) ** 0.5, abs=1e-9)
    assert result["counts"]
    assert "the attempt counts" in script.describe(result)
    for seed, other in zip(script.SEEDS, range(1, 6), strict=True):
        (tmp_path / str(seed)).rename(tmp_path / str(other))
        seconds[str(other)] = 100.0
    others = script.summary(tmp_path, record, list(range(1, 6)))
    assert not others["counts"]
    assert "an attempt counts with the seeds 301, " in script.describe(others)
    (tmp_path / "1").rename(tmp_path / "301")
    assert script.row(tmp_path, record, 301).split()[:4] == ["301", "100.0", "0.1900", "0.1830"]


def test_a_seed_given_twice_is_refused(tmp_path):
    done = speedrun(tmp_path, "--seeds", "301", "301")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --seeds must not repeat a seed; remove the duplicates\n"
