"""Fixtures of several test modules: the commands, what is made once, signals, threads, real data."""

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Done, in_a_fresh_process, in_this_process, start
from filelock import FileLock
from fresh_cache import fill_shared_cache
from kept_configs import keep_configs

from sasrec_lab.ops import library as kernels

# Files with tests of half a minute or more
LONGEST = ("test_durability.py", "test_kernels.py", "test_bench.py", "test_support_matrix.py", "test_notebooks.py")


def pytest_configure(config: pytest.Config) -> None:
    """Fill the cache that all tests use, before pytest-xdist starts processes that would each do so."""
    if not hasattr(config, "workerinput"):
        fill_shared_cache()
    keep_configs()  # modules of tests compose some while they are collected


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let garbage collection pass over what is imported and collected, which stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, so that none is left when the other processes of pytest-xdist have finished."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Let runs in this process not wait until their files are on the disk; tests/test_durability.py has real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture
def train_command(tmp_path: Path) -> Callable[..., Done]:
    """Run the training command in a fresh process, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.train", tmp_path)


@pytest.fixture
def recommend_command(tmp_path: Path) -> Callable[..., Done]:
    """Run the recommend command in a fresh process, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.recommend", tmp_path)


@pytest.fixture
def report_command(tmp_path: Path) -> Callable[..., Done]:
    """Run the report command in a fresh process, in the test's own folder."""
    return in_a_fresh_process("sasrec_lab.report", tmp_path)


@pytest.fixture
def train_here(tmp_path: Path) -> Callable[..., Done]:
    """Run the training command in this process, in the test's own folder."""
    return in_this_process("sasrec_lab.train", tmp_path)


@pytest.fixture
def recommend_here(tmp_path: Path) -> Callable[..., Done]:
    """Run the recommend command in this process, in the test's own folder."""
    return in_this_process("sasrec_lab.recommend.__main__", tmp_path)


@pytest.fixture
def report_here(tmp_path: Path) -> Callable[..., Done]:
    """Run the report command in this process, in the test's own folder."""
    return in_this_process("sasrec_lab.report.__main__", tmp_path)


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that returns the folder of a name; the first test that asks for the name fills the folder.

    The processes of pytest-xdist share it, so a test only reads it, or copies it to change the copy.
    """
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a process of pytest-xdist, with a folder of its own in the common one
        base = base.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / f"shared-{name}", base / f"shared-{name}.made"
        with FileLock(base / f"shared-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Give this process and those that it starts Python's handler of SIGINT.

    They would ignore the signal if the tests were started with it ignored, as `nohup make test &` and some CI do.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start_command(default_sigint: None, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the training command in the test's own folder, for a test that sends it a signal."""
    return partial(start, "sasrec_lab.train", folder=tmp_path)


@pytest.fixture
def interrupt_at(start_command: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str]]:
    """Run the training command, send it a signal when a line begins so, and return its exit code and errors."""

    def run(line_start: str, words: list[str], sent: signal.Signals) -> tuple[int, str]:
        process = start_command(words)
        for line in process.stdout:
            if line.startswith(line_start):
                break
        process.send_signal(sent)
        _, error = process.communicate(timeout=300)
        return process.returncode, error

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine two threads that share tiny tensors mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data sets, or skip the test if there is none."""
    given = os.environ.get("SASREC_LAB_DATA")
    if not given:
        pytest.skip("needs real data: SASREC_LAB_DATA=<folder of data sets>")
    root = Path(given).resolve()
    if not root.is_dir():
        pytest.fail(f"SASREC_LAB_DATA={given} is not a folder")
    return root


@pytest.fixture(params=["compiled", "torch"])
def both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test once with compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "supports", lambda *tensors: False)
    elif kernels.library() is None:
        pytest.skip("needs a C++ compiler")
