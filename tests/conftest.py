"""What several test modules need: the command as a user runs it, and the real data where they are."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def train_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m sasrec_lab.train` in a fresh process, in the test's own folder and with a cache there.

    `env` adds variables; without it the process has no SASREC_LAB_DATA, so nothing depends on the machine's data.
    """

    def run(*args: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("SASREC_LAB_DATA", "PYTHONPATH")}
        return subprocess.run(
            [sys.executable, "-m", "sasrec_lab.train", *args],
            cwd=tmp_path,
            # one thread: several of them wait for each other on a busy machine, and these runs are tiny
            env=clean | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


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
