"""What several test modules need: the command as a user runs it, and the real data where they are."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fresh_cache import cache_in
from interruption import default_sigint

from sasrec_lab.ops import library as kernels

ROOT = Path(__file__).resolve().parent.parent


def in_a_fresh_process(module: str, folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m module` in a fresh process, in this folder and with a cache there.

    `env` adds variables; without it the process has no SASREC_LAB_DATA, so nothing depends on the machine's data.
    """

    def run(*args: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("SASREC_LAB_DATA", "PYTHONPATH")}
        return subprocess.run(
            [sys.executable, "-m", module, *args],
            cwd=folder,
            # one thread: several of them wait for each other on a busy machine, and these runs are tiny
            env=clean | {"XDG_CACHE_HOME": cache_in(folder), "OMP_NUM_THREADS": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def train_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command as a user runs it, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.train", tmp_path)


@pytest.fixture
def recommend_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command as a user runs it, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.recommend", tmp_path)


@pytest.fixture
def report_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command as a user runs it, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.report", tmp_path)


@pytest.fixture
def interrupt_at(tmp_path: Path) -> Callable[[str, list[str], signal.Signals], tuple[int, str]]:
    """As `train_command`, with a signal sent when a line with the start is printed; gives exit code and errors."""

    def run(start: str, settings: list[str], sent: signal.Signals) -> tuple[int, str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("SASREC_LAB_DATA", "PYTHONPATH")}
        process = subprocess.Popen(
            [sys.executable, "-m", "sasrec_lab.train", *settings],
            cwd=tmp_path,
            env=clean | {"XDG_CACHE_HOME": cache_in(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=default_sigint,
        )
        for line in process.stdout:
            if line.startswith(start):
                break
        process.send_signal(sent)
        _, error = process.communicate(timeout=120)
        return process.returncode, error

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors too small to share: on a busy machine two threads take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; tests that need one are skipped where it is not given."""
    given = os.environ.get("SASREC_LAB_DATA")
    if not given:
        pytest.skip("needs real data: SASREC_LAB_DATA=<folder of data sets>")
    root = Path(given).resolve()
    if not root.is_dir():
        pytest.fail(f"SASREC_LAB_DATA={given} is not a folder")
    return root


@pytest.fixture(params=["compiled", "torch"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "supports", lambda *tensors: False)
    elif kernels.library() is None:
        pytest.skip("needs a C++ compiler")
