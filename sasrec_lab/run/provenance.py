"""Provenance of a run: its command line, its git commit, and which of several processes records them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sasrec_lab.files import display_path

COMMAND = "SASREC_LAB_COMMAND"  # environment variable with a sweep's command line; its jobs' own is their launcher's


def code_version() -> dict[str, Any]:
    """Return the commit of the clone that the package runs from, and whether it is dirty; None without a clone."""
    root = Path(__file__).resolve().parents[2]
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


def as_typed(words: list[str] | None = None) -> str:
    """Return the command as a user would type it here, with these words instead of its own if given.

    In another process, such as a notebook, that is the command with which the words would do the same.
    """
    program = Path(sys.argv[0])
    is_package = program.name == "__main__.py" and program.parts[-3:-2] == ("sasrec_lab",)
    module = program.parent.name if is_package else "train" if program.name == "train.py" else None
    if words is not None and module is None and not program.name.startswith("sasrec-"):
        module = "train"
    words = sys.argv[1:] if words is None else words
    if module:
        return shlex.join([display_path(Path(sys.executable)), "-m", f"sasrec_lab.{module}", *words])
    return shlex.join([program.name, *words])


def report_command(words: list[str]) -> str:
    """Return the command of the report with these words, called as the present one was."""
    is_installed = Path(sys.argv[0]).name in ("sasrec-train", "sasrec-search")
    program = ["sasrec-report"] if is_installed else [display_path(Path(sys.executable)), "-m", "sasrec_lab.report"]
    return shlex.join([*program, *words])


def is_first_process() -> bool:
    """Return whether this process records the run: the others of a run on several devices write nothing.

    Lightning sets ranks within a machine and of machines, torchrun and Ray the rank among all, Slurm its own.
    """
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def is_started_with_others() -> bool:
    """Return whether torchrun, Slurm or Ray has started several processes with the same configuration at once."""
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return True
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
