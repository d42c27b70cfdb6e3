"""Other libraries: their versions, their environments, and the files of peers/ that run them."""

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.jobs import FOLDER
from benchmark.subprocesses import SCRIPTS, JobFailed, run


@dataclass(frozen=True)
class Peer:
    """Another library and the script that measures it."""

    name: str
    script: str
    pins: tuple[str, ...]
    jobs: tuple[str, ...]  # that it can run
    environment_name: str

    @property
    def version(self) -> dict[str, str]:
        """Return the version of the library by the name of its package."""
        package, _, version = self.pins[0].partition("==")
        return {package.partition("[")[0]: version}

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Run the script on a task and return what it prints.

        Raises:
            JobFailed: the environment could not be created, or the script failed.
        """
        python = self.environment()
        return run([str(python), str(SCRIPTS / "peers" / self.script), json.dumps(task)], {"PYTHONPATH": ""})

    def environment(self) -> Path:
        """Return the environment's Python; the first use creates it and downloads some 100 MB (several GB for CUDA)."""
        folder = FOLDER / "venvs" / self.environment_name
        python = folder / "bin" / "python"
        complete = folder / "complete"
        if not complete.is_file() or complete.read_text() != "\n".join(self.pins):
            print(f"creating {folder} with {', '.join(self.pins)}", file=sys.stderr, flush=True)
            if not python.is_file():
                venv.create(folder, with_pip=True)
            install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *self.pins]
            done = subprocess.run(install, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
            if done.returncode:
                printed = done.stderr.strip().splitlines() or ["no message from pip"]
                raise JobFailed(f"{folder} could not be created: {printed[-1].removeprefix('ERROR: ')}")
            complete.write_text("\n".join(self.pins))
        return python


SASREC_JOBS = ("ml1m", "sparse", "kion-like")
RECTOOLS = (
    "rectools[torch]==0.19.0",
    "numpy==1.26.4",
    "pandas==2.3.3",
    "pytorch-lightning==2.5.2",
    "torch==2.13.0",
)
REPLAY = ("replay-rec[torch]==0.22.0", "lightning==2.6.6", "torch==2.13.0")
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "rectools", "rectools_job.py", RECTOOLS, (*SASREC_JOBS, "ligr", "bert4rec", "hstu", "loading"), "rectools"
        ),
        Peer("rectools-flat", "rectools_flat_job.py", RECTOOLS, SASREC_JOBS, "rectools"),
        Peer("replay", "replay_job.py", REPLAY, SASREC_JOBS, "replay"),
    )
}
