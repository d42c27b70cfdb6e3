"""Hostile files against whole commands, and the tests behind each sentence of docs/security.md."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Done, environment, in_this_process
from small_sweep import TINY

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "security.md"
RUN = TINY[:-1]  # without the sweep's folder

Commands = dict[str, Callable[[], Done]]


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def make_run(folder: Path) -> None:
    done = in_this_process("sasrec_lab.train", folder)(*RUN, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(made_once, tmp_path) -> Path:
    """A finished run that the test may damage."""
    return shutil.copytree(made_once("a-run-to-damage", make_run) / "run", tmp_path / "run")


@pytest.fixture
def readers(run, tmp_path) -> Commands:
    """The commands that read the run folder."""
    train, report = (in_this_process(f"sasrec_lab.{name}", tmp_path) for name in ("train", "report.__main__"))
    recommend, export, evaluate = (
        in_this_process(f"sasrec_lab.{name}.__main__", tmp_path) for name in ("recommend", "export", "evaluate")
    )
    (tmp_path / "lists.csv").write_text("user_id,item_id,rank\n1,2,1\n")
    return {
        "report": lambda: report("run", "--html", "report.html"),
        "recommend": lambda: recommend("run=run", "users=all", "k=2"),
        "export": lambda: export("run", "x.pt2"),
        "evaluate": lambda: evaluate("lists=lists.csv", "run=run"),
        "repeat": lambda: train(*RUN, "hydra.run.dir=run"),
    }


def is_one_line(done: Done) -> bool:
    """Return whether a command did its work, or ended in one line."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    return done.returncode == 0 or (len(lines) == 1 and lines[0].startswith("error: "))


# Run folders


@pytest.mark.parametrize(
    ("command", "name", "kind"),
    [
        ("repeat", "run.json", "pipe"),
        ("recommend", "run.json", "device"),
        ("recommend", "metrics.json", "pipe"),
        ("evaluate", "run.json", "pipe"),
        ("evaluate", "metrics.json", "device"),
        ("recommend", "items.npz", "pipe"),
        ("export", "items.npz", "device"),
        ("recommend", "checkpoints/best.ckpt", "pipe"),
        ("recommend", "checkpoints/best.ckpt", "folder"),
        ("report", "ranks.npz", "pipe"),
        ("report", ".lock", "device"),
        ("repeat", ".lock", "pipe"),
    ],
)
def test_no_command_waits_for_what_is_no_file(run, readers, command, name, kind):
    path = run / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    done = readers[command]()
    assert is_one_line(done), done.stderr


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", {"config": 7}),
        ("run.json", {"seconds": {"fit": -1}}),
        ("metrics.json", {"protocol": []}),
        ("metrics.json", {"best_epoch": "x"}),
        ("metrics.json", {"epochs": 10**400}),
    ],
)
def test_every_command_names_a_malformed_field(run, readers, file, change):
    content = json.loads((run / file).read_text())
    (key,) = change
    for name in ("report", "recommend", "evaluate", "repeat"):
        (run / file).write_text(json.dumps(content | change))
        done = readers[name]()
        assert done.returncode == 1
        assert is_one_line(done), (name, done.stderr)
        assert key in done.stderr


# Checkpoints


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": {}},
        {"optimizer_states": [{"state": [], "param_groups": []}]},
        {"callbacks": 3},
        {"pytorch-lightning_version": "x"},
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(run, tmp_path, change):
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(saved | change, tmp_path / "theirs.ckpt")
    train = in_this_process("sasrec_lab.train", tmp_path)
    done = train(*RUN, "hydra.run.dir=mine", "ckpt=theirs.ckpt", "trainer.max_epochs=3")
    assert is_one_line(done), done.stderr


# Config folders


def theirs(folder: Path, hydra: str) -> list[str]:
    """Write a stranger's experiment that sets Hydra's keys, and return the words that choose it."""
    (folder / "theirs" / "experiment").mkdir(parents=True)
    (folder / "theirs" / "experiment" / "best.yaml").write_text(f"# @package _global_\nhydra:\n  {hydra}\n")
    return [*RUN, "--config-dir", "theirs", "experiment=best"]


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module whose callback leaves a file; return the path of that file."""
    (tmp_path / "modules").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "modules" / "their_module.py").write_text(
        f"from hydra.experimental.callback import Callback\nopen({str(mark)!r}, 'a')\nclass Theirs(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    return mark


CALLBACK = "callbacks: {x: {_target_: their_module.Theirs}}"


def test_a_config_folder_runs_nothing(tmp_path, train_here, module):
    words = theirs(tmp_path, CALLBACK)
    for more in (["hydra.run.dir=run"], ["-m", "seed=1,2", "hydra.sweep.dir=sweep"], ["--help"], ["--cfg", "job"]):
        done = train_here(*more, *words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: hydra.callbacks.x._target_=their_module.Theirs would run code ")
    assert not module.exists()
    assert not (tmp_path / "run").exists()


def test_no_process_of_several_runs_what_the_first_refuses(tmp_path, train_command):
    done = train_command(*theirs(tmp_path, CALLBACK), env={"LOCAL_RANK": "1"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: hydra.callbacks.x._target_=their_module.Theirs would run code ")


def test_an_own_callback_runs_if_it_is_named(tmp_path, train_here, module):
    done = train_here(*theirs(tmp_path, CALLBACK), "hydra.callbacks.x._target_=their_module.Theirs")
    assert (done.returncode, module.exists()) == (0, True)


def test_a_pickled_job_is_not_run(tmp_path, train_here):
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Code(tmp_path / "mark")))
    done = train_here("--experimental-rerun", "job.pickle")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not (tmp_path / "mark").exists()


def test_what_a_config_folder_still_decides(tmp_path, train_here):
    assert train_here(*theirs(tmp_path, "run: {dir: 'elsewhere/${oc.env:LANG_OF_TEST,x}'}")).returncode == 0
    assert (tmp_path / "elsewhere" / "x" / "metrics.json").is_file()


# Programs and folders


def test_torch_warns_of_exported_programs():
    assert "untrusted source" in torch.export.load.__doc__


def test_python_imports_from_the_current_folder(tmp_path):
    (tmp_path / "argparse.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    command = [sys.executable, "-m", "sasrec_lab.report", "--help"]
    for options, exists in ((["-P"], False), ([], True)):  # a console script starts as with -P
        subprocess.run(
            [command[0], *options, *command[1:]], cwd=tmp_path, env=environment(tmp_path), capture_output=True
        )
        assert (tmp_path / "mark").exists() is exists


# The page


def claims() -> list[str]:
    """Return the sentences of the page that are list items."""
    return re.split(r"^- ", PAGE.read_text(), flags=re.M)[1:]


def test_every_claim_of_the_page_names_tests_that_exist():
    sources = [file.read_text() for file in TESTS.rglob("test_*.py")]
    existing = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.M)}
    assert len(claims()) >= 20
    for claim in claims():
        (named,) = re.findall(r"<!-- tests: ([\w, ]+) -->", claim)
        assert set(named.split(", ")) <= existing, claim
