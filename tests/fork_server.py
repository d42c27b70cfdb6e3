"""A process that has imported torch and forks a training command on request, so that tests can start hundreds of them.

`ForkServer` is the test's side. Run as a program it is the server: it has one thread, so its forks are whole processes.
A request may make a file operation of the command fail, by tests/fault.c, which LD_PRELOAD has loaded.
"""

import ctypes
import gc
import json
import logging
import os
import pkgutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from commands import environment


@dataclass(frozen=True)
class Ended:
    """How a command ended: the exit code, negative for a signal, and what it printed."""

    code: int
    stdout: str
    stderr: str


class ForkServer:
    """Starts one training command after the other, each in a fork of the server.

    If `composed`, the server composes the configuration once for all that have the same words, because Hydra takes half
    the time of a tiny run; Hydra's own files are then missing.
    """

    def __init__(self, folder: Path, preload: Path | None = None, composed: bool = False):
        self.folder, self.composed = folder, composed
        env = environment(folder) | ({"LD_PRELOAD": str(preload)} if preload else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=folder, env=env, **pipes)

    def start(self, *words: str, **fault: Any) -> int:
        """Start the command and return its process id; `fault` goes to `fail` of the server."""
        request = {"words": words, "folder": str(self.folder), "composed": self.composed, "fault": fault}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> Ended:
        """Wait until the command has ended."""
        code = int(self.process.stdout.readline())
        return Ended(code, *((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")))

    def run(self, *words: str, **fault: Any) -> Ended:
        """Start the command and wait for it."""
        self.start(*words, **fault)
        return self.wait()

    def close(self) -> None:
        """End the server."""
        self.process.communicate()


def serve() -> None:
    """Import what a run needs, then fork a command for each line of stdin; print its process id and exit code."""
    import pandas  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from kept_configs import keep_configs

    from sasrec_lab import train
    from sasrec_lab.config.composition import load
    from sasrec_lab.errors import InputError
    from sasrec_lab.ops import library

    for part in ("data", "evaluation", "run", "training"):
        for module in pkgutil.iter_modules([str(Path(train.__file__).with_name(part))]):
            import_module(f"sasrec_lab.{part}.{module.name}")
    library.library()
    keep_configs()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    others = threads - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # jemalloc is ready for forks
    assert not others, f"{others}: a fork would lack these threads, which may hold locks"
    gc.freeze()  # so that no command visits what was imported, as each would at its end
    known: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        words = [word for word in request["words"] if not word.startswith("hydra.")]
        with suppress(InputError):  # a command that is refused says so itself
            if str(words) not in known:
                known[str(words)] = load(words)  # also if a command composes it again: its parts are then kept
        cfg = known[str(words)] if request.pop("composed") else None
        child = os.fork()
        if child == 0:
            command(train.entry, cfg, **request)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def command(entry: Any, cfg: Any, words: list[str], folder: str, fault: dict[str, Any]) -> None:
    """Run the command in this process, with its output in files, and exit."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [sys.modules[entry.__module__].__file__, *words]
    if fault:
        fail(**fault)
    if cfg is None:
        entry()
    else:
        (run,) = (word.partition("=")[2] for word in words if word.startswith("hydra.run.dir="))
        train_composed(cfg, Path(folder, run))
    sys.exit(0)


def train_composed(cfg: Any, folder: Path) -> None:
    """Do what the command does after Hydra has composed the configuration."""
    from sasrec_lab.run.lock import lock_folder
    from sasrec_lab.run.resume import check_can_run
    from sasrec_lab.train import train

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    if check_can_run(folder, cfg):
        print("already finished")
        return
    with lock_folder(folder):
        train(cfg, folder)


def fail(below: str, at: int, error: int, always: bool = False, log: str = "/dev/null") -> None:
    """Let operation `at` on a file below a folder fail with an error number, and all after it if `always`.

    The names of the operations, counted from 0, go to the file `log`.
    """
    ctypes.CDLL(os.environ["LD_PRELOAD"]).fault(below.encode(), at, error, int(always), log.encode())


if __name__ == "__main__":
    serve()
