"""The run folder's contract: written by train, read by report and recommend.

run.json says what ran and on what; metrics.json how it ended, under which protocol, and what was measured; ranks.npz
the rank of each test user's target; train.log, .hydra/, checkpoints/ and tb/ come from Hydra and Lightning.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sasrec_lab.config import InputError, TrainConfig, plain

_NOT_COMPARED = ("ckpt", "data_dir")  # they say where things lie, not what is run


def check(folder: Path, cfg: TrainConfig) -> dict[str, Any] | None:
    """Whether this configuration may run in the folder; gives its metrics.json where it has finished there already.

    Raises:
        InputError: the folder cannot be written, or holds another configuration's results, or this one's unfinished
            ones and nothing says to go on with them.
    """
    _check_writable(folder)
    before = _read(folder / "run.json")
    if before is None:
        if cfg.ckpt == "last":
            raise InputError(f"ckpt=last: {folder} holds no run; give the folder to go on in as hydra.run.dir=<folder>")
        return None
    resumed = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time") if cfg.ckpt else ()
    if differing := [key for key in _differences(before["config"], plain(cfg)) if key not in resumed]:
        raise InputError(
            f"{folder} holds another configuration's results ({', '.join(differing[:3])}"
            f"{', ...' if len(differing) > 3 else ''} differ{'s' if len(differing) == 1 else ''});"
            " choose another hydra.run.dir"
        )
    last = folder / "checkpoints" / "last.ckpt"
    if cfg.ckpt == "last":
        if not last.is_file():
            raise InputError(f"ckpt=last: {last} does not exist (no epoch was finished); start anew without ckpt")
        return None
    metrics = _read(folder / "metrics.json")
    if metrics and metrics["status"] == "finished":
        return metrics
    if last.is_file():
        raise InputError(f"{folder} holds this run unfinished; go on with ckpt=last, or choose another hydra.run.dir")
    return None


class Run:
    """The record of one run. run.json is written at the start and at the end, metrics.json when it ends, however."""

    def __init__(self, folder: Path, cfg: TrainConfig):
        self.folder = folder
        self.facts: dict[str, Any] = {
            "git": code_version(),
            "command": command(),
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": cfg.seed,
            "seconds": {},
            "config": plain(cfg),
        }
        self.results: dict[str, Any] = {
            "status": "failed",
            "error": None,
            "protocol": {},
            "metrics": {},
            "baselines": {},
            "best_epoch": None,
            "epochs": 0,
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds spent inside are added to run.json under this name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.facts["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def write(self) -> None:
        _write(self.folder / "run.json", self.facts)

    def end(self, status: str, error: str | None = None) -> None:
        """`status` is finished, failed or interrupted."""
        self.results |= {"status": status, "error": error}
        self.write()
        _write(self.folder / "metrics.json", self.results)


@contextmanager
def recorded(folder: Path, cfg: TrainConfig) -> Iterator[Run]:
    """However the block ends, the folder says so; a process that is not the first of several writes nothing."""
    run = Run(folder, cfg)
    first = all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "NODE_RANK"))
    end = run.end if first else lambda status, error=None: None
    if first:
        (folder / "metrics.json").unlink(missing_ok=True)  # of an earlier try that failed
        run.write()
    try:
        yield run
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(OSError):  # a full disk must not hide the error
            end("interrupted" if interrupted else "failed", None if interrupted else f"{type(error).__name__}: {error}")
        raise
    end("finished")


def write_ranks(folder: Path, ranks: dict[str, Any], user_ids: np.ndarray, item_ids: np.ndarray) -> None:
    """ranks.npz: of each test user the external ids of user and target and the target's rank, 0 for a miss.

    A target that the model does not know has no item number; its id is left as the empty one (0 or "").
    """
    columns = {name: np.asarray(column) for name, column in ranks.items()}
    unknown = np.zeros(1, dtype=item_ids.dtype)
    columns["user"] = user_ids[columns["user"]]
    columns["target"] = np.concatenate([unknown, item_ids])[columns["target"]]
    draft = folder / ".ranks.npz"
    try:
        np.savez(draft, **columns)
        draft.replace(folder / "ranks.npz")
    finally:
        draft.unlink(missing_ok=True)


def code_version() -> dict[str, Any]:
    """Commit of the clone that the package runs from, and whether it has uncommitted changes; None without a clone."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit, status = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def command() -> str:
    module = Path(sys.argv[0]).name
    start = "python -m sasrec_lab.train" if module == "train.py" else module
    return " ".join([start, *(f"'{word}'" if set(word) & set(" ()*[]{},$'") else word for word in sys.argv[1:])])


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = [
            _differences(before.get(key), now.get(key), f"{prefix}{key}.")
            for key in keys
            if prefix or key not in _NOT_COMPARED
        ]
        return [key for keys in inner for key in keys]
    return [] if before == now else [prefix[:-1]]


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: the run folder cannot be written: {error.strerror}; choose another hydra.run.dir"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not what a run writes ({error}); choose another hydra.run.dir") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one atomic step, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
