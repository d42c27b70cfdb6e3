"""Run the tests that need a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from benchmark.subprocesses import SCRIPTS

from gpu.check import Check, Row, Setting

SECONDS = 70
FILES = ("tests/ops/test_cuda.py", "tests/ops/test_triton_softmax_products.py")


def rows(setting: Setting) -> Iterator[Row]:
    """Yield how many tests passed, and the names of those that failed."""
    what = " ".join(FILES)
    if setting.device.type != "cuda":
        yield {"what": what, "skipped": "needs a GPU"}
        return
    options = ["-q", "-rf", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *FILES, *options]
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    try:
        done = subprocess.run(
            command, cwd=SCRIPTS.parent, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield {"what": what, "failed": f"not finished after {SECONDS} s"}
        return
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.M)
    if done.returncode and not failed:
        failed = (done.stdout + done.stderr).strip().splitlines()[-1:]
    yield {"what": what, **counts} | ({"failed": ", ".join(failed)} if failed else {})


CHECK = Check("tests", "the tests that need a GPU", SECONDS, rows)
