"""Training from Python: the command's run folder and numbers, and a process that is as before afterwards."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import environment
from fresh_cache import cache_in
from hydra import initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sasrec_lab import InputError, compose, train_model
from sasrec_lab.config import logger
from sasrec_lab.config.schema import CONF_DIR

WORDS = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=40", "model=tiny", "trainer=fast"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache_in(tmp_path))
    monkeypatch.delenv("SASREC_LAB_DATA", raising=False)


def records(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def files(folder: Path) -> list[str]:
    """Return the names of the files of a run; those of TensorBoard have the time in theirs."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"tfevents\..*", "tfevents", name) for name in names)


def test_folder_and_numbers_are_those_of_the_command(train_here, capsys):
    done = train_here(*WORDS, "hydra.run.dir=by_command")
    assert done.returncode == 0, done.stderr
    run = train_model(*WORDS, folder="from_python")
    own, other = run.folder, Path("by_command")
    assert capsys.readouterr().out.replace("from_python", "by_command") == done.stdout
    assert files(own) == files(other)
    assert records(own) == records(other) == run.results
    ranks = np.load(own / "ranks.npz"), np.load(other / "ranks.npz")
    assert ranks[0].files == ranks[1].files
    assert all((ranks[0][name] == ranks[1][name]).all() for name in ranks[0].files)
    info = [json.loads((folder / "run.json").read_text()) for folder in (own, other)]
    assert info[0].keys() == info[1].keys()
    assert info[0]["config"] == info[1]["config"] == run.config
    assert info[0]["command"].endswith(f"-m sasrec_lab.train {' '.join(WORDS)} hydra.run.dir=from_python")
    for name in ("config", "overrides"):
        assert (own / f".hydra/{name}.yaml").read_text() == (other / f".hydra/{name}.yaml").read_text()
    hydra = [OmegaConf.load(folder / ".hydra/hydra.yaml").hydra for folder in (own, other)]
    assert hydra[0].run.dir == "from_python"
    assert hydra[0].runtime.choices == hydra[1].runtime.choices


def test_two_runs_of_one_process_are_equal_and_apart(capsys):
    first, second, other = train_model(*WORDS), train_model(*WORDS), train_model(*WORDS, "seed=1")
    assert first.folder != second.folder
    assert first.folder.parent == Path("outputs/synthetic")
    assert first.metrics == second.metrics != other.metrics
    lines = [(run.folder / "train.log").read_text().count("[INFO] epoch") for run in (first, second, other)]
    assert lines == [2, 2, 2]


def state() -> dict:
    """Return what a training changes in its process."""
    loggers = {name: logging.getLogger(name) for name in ("", "sasrec_lab", "sasrec_lab.errors", "py.warnings")}
    return {
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
        "logging": [(x.handlers, x.level, x.propagate) for x in loggers.values()],
        "raises": logging.raiseExceptions,
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "hook": threading.excepthook,
        "warnings": (warnings.showwarning, warnings.filters[:]),
        "hydra": (GlobalHydra.instance().hydra, version.getbase()),
        "arguments": (sys.argv[:], Path.cwd()),
    }


@pytest.mark.parametrize("words", [[], ["optimizer.lr=1e30", "dataset.windows=all"]])
def test_the_process_is_as_before(words, capsys):
    import sasrec_lab.train  # noqa: F401  its decorator sets Hydra's version

    with initialize_config_dir(CONF_DIR, version_base="1.2"):
        before = state()
        if words:
            with pytest.raises(InputError, match=r"diverged|not finite|finite"):
                train_model(*WORDS, *words, folder="run")
            assert records(Path("run"))["status"] == "failed"
        else:
            train_model(*WORDS, folder="run")
        assert state() == before
    assert (Path("run/train.log").read_text().count("[ERROR]") == 1) == bool(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.dimm=3"], "unknown key 'model.dimm'; did you mean model.dim?"),
        (["seed=0,1"], "seed=0,1 has several values; call this once for each, or write [...] for a list"),
        (["-m"], "-m is a flag of the command line; give overrides such as 'model.dim=64'"),
        (["++hydra.run.dir=x"], "++hydra.run.dir=x is for the command line; the argument `folder` chooses"),
        (["hydra.run.dir=x"], "hydra.run.dir=x is for the command line; the argument `folder` chooses the run folder"),
        ([["a=1"]], "['a=1'] is not an override; write each as a text of its own, such as 'model.dim=64'"),
        (["trainer.devices=2"], "trainer.devices=2: from Python a run trains on one device; start this run with the"),
        (["dataset=csv", "dataset.path=no.csv"], "no.csv"),
        (["ckpt=last"], "ckpt=last: no run found in run"),
    ],
)
def test_mistakes_raise_one_line_and_leave_no_folder(words, message):
    with pytest.raises(InputError) as error:
        train_model(*words, folder="run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("run").exists()


def test_a_tracker_that_is_not_installed_leaves_no_folder(monkeypatch):
    monkeypatch.setattr(logger, "_is_installed", lambda distribution: False)
    with pytest.raises(InputError, match="logger=wandb needs a package that is not installed"):
        train_model(*WORDS, "logger=wandb", folder="run")
    assert not Path("run").exists()


def test_a_mistake_in_the_data_is_recorded():
    Path("x.csv").write_text("user_id,item_id\n1,2\n1\n")
    with pytest.raises(InputError, match=r"x\.csv") as error:
        train_model("dataset=csv", "dataset.path=x.csv", folder="run")
    assert records(Path("run"))["error"] == str(error.value)


def test_a_full_disk_is_an_input_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run/items.npz")

    monkeypatch.setattr("sasrec_lab.train.write_items", full)
    with pytest.raises(InputError, match=r"^run/items\.npz: No space left on device; free some space"):
        train_model(*WORDS, folder="run")


def test_an_interrupted_run_resumes(default_sigint, capsys):
    whole = train_model(*WORDS, "trainer.max_epochs=3")

    def interrupt(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("epoch   2"):
            signal.raise_signal(signal.SIGINT)
        return True

    logger = logging.getLogger("sasrec_lab.training.checkpoints")
    logger.addFilter(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_model(*WORDS, "trainer.max_epochs=3", folder="run")
    finally:
        logger.removeFilter(interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert records(Path("run"))["status"] == "interrupted"
    assert "\nresume with folder='run' and the override 'ckpt=last'\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^run contains this run, unfinished; add the override 'ckpt=last' to resume"):
        train_model(*WORDS, "trainer.max_epochs=3", folder="run")
    resumed = train_model(*WORDS, "trainer.max_epochs=3", "ckpt=last", folder="run")
    assert resumed.metrics == whole.metrics


def test_a_finished_folder_is_not_trained_again(capsys):
    first = train_model(*WORDS, folder="run")
    written = Path("run/run.json").stat().st_mtime_ns
    assert train_model(*WORDS, folder="run").metrics == first.metrics
    assert Path("run/run.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"different configuration \(seed differs\); choose another folder"):
        train_model(*WORDS, "seed=1", folder="run")


def test_it_trains_in_another_thread(capsys):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train_model, *WORDS, folder="run").result()
    assert run.metrics == train_model(*WORDS, folder="again").metrics


def test_compose_returns_typed_values_and_own_files():
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/wide.yaml").write_text("defaults: [sasrec]\ndim: 128\n")
    assert compose("model=wide", config_dir="mine").model.dim == 128
    assert compose("dataset=csv", "dataset.path=/a folder/x=(1).csv").dataset.path == "/a folder/x=(1).csv"
    with pytest.raises(InputError, match="config_dir=no is not a folder"):
        compose(config_dir="no")


def test_imports_are_late(tmp_path):
    """`import sasrec_lab` loads neither Hydra nor torch, and composing no torch."""
    code = (
        "import sys, sasrec_lab\n"
        "print({'hydra', 'torch', 'numpy', 'pandas'} & set(sys.modules), 'train_model' in dir(sasrec_lab))\n"
        "sasrec_lab.compose('model.dim=8')\n"
        "print({'torch', 'pandas', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set() True\nset()\n", "")
