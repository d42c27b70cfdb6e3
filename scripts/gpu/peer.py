"""Time RecTools' flat SASRec on the first job, if `rectools` can be imported here."""

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark.jobs import JOBS, job_overrides
from benchmark.subprocesses import SCRIPTS, JobFailed, run_module

from gpu.check import Check, Row, Setting, attempt
from gpu.training import missing_data

JOB, WINDOWS = JOBS["ml1m"], Path("outputs/bench/ml1m_windows.npz")
STEPS = 100


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the network's speed with the logits of all cells and of real positions."""
    what = "RecTools' flat SASRec, ml1m"
    if find_spec("rectools") is None:
        yield {"what": what, "skipped": "rectools is not installed: pip install 'rectools[torch]'"}
        return
    given = ["dataset=synthetic", "dataset.synthetic.users=40", "model.maxlen=8"] if setting.tiny else []
    overrides = job_overrides(JOB, given, Path())
    if missing := missing_data(overrides):
        yield {"what": what, "skipped": missing}
        return
    try:
        task = run_module("benchmark.windows", str(WINDOWS), *overrides)
    except JobFailed as error:
        yield {"what": what, "skipped": str(error)}
        return
    task["steps"] = 2 if setting.tiny else STEPS
    for name, with_padding in (("all logits", True), ("logits of real positions", False)):
        yield attempt(f"{what}, {name}", partial(_trained, task, with_padding, setting.device))


def _trained(task: dict[str, Any], with_padding: bool, device: torch.device) -> Row:
    sys.path.insert(0, str(SCRIPTS / "peers"))  # the script runs in RecTools' environment too, without this package
    job = import_module("rectools_flat_job")
    x, y, items = job.read_windows(task)
    net = job.FlatSASRecNet(
        len(items), task["dim"], task["blocks"], task["heads"], task["maxlen"], dropout=task["dropout"]
    )
    return {"positions_per_s": job.train(net.to(device), x, y, task, with_padding)}


CHECK = Check("peer", "RecTools' flat SASRec", 25, rows)
