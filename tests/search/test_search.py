"""Searches as a user runs them: trials that fail or are pruned, searches that are interrupted, several processes."""

import json
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from commands import Done, in_a_fresh_process, in_this_process, start

pytest.importorskip("optuna", minversion="5", reason="needs pip install 'sasrec-lab[search]'")

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=100",
    "dataset.synthetic.items=40",
    "model=tiny",
    "trainer=fast",
    "hydra.sweep.dir=found",
]
LONG = [*TINY, "trainer.max_epochs=40", "evaluation.patience=null", "optimizer.lr=interval(0.001,0.01)", "trials=2"]


def search_in(folder: Path, *words: str) -> Done:
    return in_this_process("sasrec_lab.search.__main__", folder)(*words)


def record(folder: Path) -> dict:
    return json.loads((folder / "found/search.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    """Return the status of each run by the number of its trial."""
    found = sorted(folder.glob("found/*/metrics.json"))
    return {file.parent.name.partition("-")[0]: json.loads(file.read_text())["status"] for file in found}


def value(file: Path) -> float:
    return json.loads(file.read_text())["metrics"]["val/ndcg@10"]


@pytest.mark.slow
def test_failed_trials_do_not_stop_a_search(tmp_path, report_here):
    """Trial 1 diverges, trials 2 and 3 have a number of heads that does not divide dim."""
    command = [*TINY, "sampler=grid", "model.heads=1,3", "optimizer.lr=0.01,1e30"]
    done = search_in(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert statuses(tmp_path) == {"0": "finished", "1": "failed", "2": "failed", "3": "failed"}
    ended = record(tmp_path)["trials"]
    assert [trial["status"] for trial in ended] == ["finished", "failed", "failed", "failed"]
    (finished,) = (tmp_path / "found").glob("0-*/metrics.json")
    assert ended[0]["value"] == value(finished)
    assert "training diverged" in ended[1]["error"]
    assert ended[2]["error"] == "model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16"
    assert done.stderr.count(" failed: ") == 3
    assert "4 trials: 1 finished, 3 failed\nbest trial 0 on validation, val/ndcg@10 0." in done.stdout
    assert re.search(r"report +\S+ -m sasrec_lab\.report found --html found/report\.html\n", done.stdout)
    info = json.loads(finished.with_name("run.json").read_text())
    assert info["command"].endswith(f"-m sasrec_lab.search {' '.join(command)}")

    before = {file: file.read_bytes() for file in tmp_path.glob("found/*/*.json")}
    again = search_in(tmp_path, *command)
    assert (again.returncode, again.stderr) == (0, "")
    assert before == {file: file.read_bytes() for file in before}
    reported = report_here("found", "--figures", "figures", "--html", "report.html")
    assert (reported.returncode, reported.stderr) == (0, "")
    assert "search: 4 trials (1 finished, 3 failed), sampler grid, pruner median; val/ndcg@10 over" in reported.stdout
    assert (tmp_path / "figures/search.png").is_file()


def test_a_search_whose_trials_all_fail_is_an_error(tmp_path):
    done = search_in(tmp_path, *TINY, "sampler=grid", "model.heads=3,5")
    assert done.returncode == 1
    fix = "model.dim=16 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16"
    assert done.stderr.splitlines()[-1] == (
        f"error: all 2 trials failed; the first: {fix}; failed trials are not run again: correct the cause, and remove"
        " found or choose another hydra.sweep.dir"
    )


@pytest.mark.slow
def test_pruned_trials_keep_their_epochs_and_can_be_resumed(tmp_path, report_here, train_here):
    """Learning rates from good to useless: hyperband stops some of the latter after an epoch or three."""
    rates = "0.01,0.000001,0.0000011,0.0000012,0.0000013,0.0000014"
    command = [*TINY, "sampler=grid", "pruner=hyperband", "trainer.max_epochs=9", f"optimizer.lr={rates}"]
    done = search_in(tmp_path, *command)
    assert (done.returncode, done.stderr) == (0, "")
    ends = statuses(tmp_path)
    pruned = [number for number, status in ends.items() if status == "pruned"]
    assert ends["0"] == "finished"
    assert pruned
    assert [trial["status"] for trial in record(tmp_path)["trials"]] == list(ends.values())
    (run,) = (tmp_path / "found").glob(f"{pruned[0]}-*")
    results = json.loads((run / "metrics.json").read_text())
    stopped = re.fullmatch(r"stopped after epoch (\d) with val/ndcg@10 0\.\d{4}, by pruner=hyperband", results["error"])
    assert results["epochs"] == int(stopped[1]) < 9
    assert not any(name.startswith("test/") for name in results["metrics"])
    reported = report_here("found")
    assert re.search(rf"pruned \({len(pruned)}\)", reported.stdout)
    assert f"{run.name}: stopped after epoch" in reported.stdout

    words = [word for word in command if not word.startswith(("sampler", "pruner", "optimizer.lr", "hydra"))]
    rate = rates.split(",")[int(pruned[0])]
    finished = train_here(*words, f"optimizer.lr={rate}", f"hydra.run.dir=found/{run.name}", "ckpt=last")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_search_is_resumed(tmp_path, made_once, default_sigint, sent):
    """The second trial continues after its last epoch, and both searches have the same trials."""
    whole = made_once("uninterrupted-search", lambda folder: search_in(folder, *LONG))
    process = start("sasrec_lab.search", LONG, tmp_path)
    ended = 0
    for line in process.stdout:
        ended += line.startswith("trial 0: ")
        if ended and line.startswith("epoch   6"):
            break
    process.send_signal(sent)
    _, error = process.communicate(timeout=300)
    assert process.returncode == (130 if sent is signal.SIGINT else -9)
    if sent is signal.SIGINT:
        assert re.fullmatch(r"interrupted\nresume with: \S+ -m sasrec_lab\.search dataset=.* trials=2\n", error)
        assert statuses(tmp_path) == {"0": "finished", "1": "interrupted"}
    done = search_in(tmp_path, *LONG)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 trials, 2 of them before" in done.stdout
    assert "epoch   4" not in done.stdout
    assert record(tmp_path)["trials"] == [
        trial | {"value": pytest.approx(trial["value"], abs=1e-7)} for trial in record(whole)["trials"]
    ]


@pytest.mark.slow
def test_processes_share_a_search(tmp_path):
    """The same command in two shells, one of them with two processes: no trial runs twice, none is left."""
    command = [*TINY, "sampler=random", "trials=6", "optimizer.lr=interval(0.001,0.01)"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    shells = [start("sasrec_lab.search", [*command, *more], tmp_path, **pipes) for more in ([], ["jobs=2"])]
    printed = [shell.communicate(timeout=300) for shell in shells]
    assert [(shell.returncode, error) for shell, (_, error) in zip(shells, printed, strict=True)] == [(0, "")] * 2
    assert statuses(tmp_path) == {str(number): "finished" for number in range(6)}
    runs = [json.loads(file.read_text()) for file in tmp_path.glob("found/*/run.json")]
    assert not any("earlier" in run for run in runs)
    ended = [re.findall(r"^trial (\d): ", out, re.M) for out, _ in printed]
    assert sorted(ended[0] + ended[1]) == list("012345")
    assert re.search(r"^#\d   epoch   2  loss", printed[1][0], re.M)
    assert "6 trials: 6 finished" in search_in(tmp_path, *command).stdout


def test_a_search_without_optuna_names_the_extra(tmp_path, monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for version, reason in ((missing, "which is not installed"), (lambda name: "2.10.1", "but 2.10.1 is installed")):
        monkeypatch.setattr(metadata, "version", version)
        done = search_in(tmp_path, *TINY, "model.dim=8,16")
        assert (done.returncode, done.stderr) == (
            1,
            f"error: a search needs Optuna 5, {reason}; pip install 'sasrec-lab[search]'\n",
        )
    assert not (tmp_path / "found").exists()


def test_a_mistake_of_a_search_is_one_line(tmp_path):
    done = in_a_fresh_process("sasrec_lab.search", tmp_path)("sweep=smal")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    done = search_in(tmp_path, "dataset=csv", "dataset.path=none.csv", "model.dim=8,16")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # the test's own
