"""What ran: the command as one would type it here, and the code. Of several processes the first one writes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sasrec_lab.files import display_path

COMMAND = "SASREC_LAB_COMMAND"  # of a sweep, for its jobs in other processes, whose own command line is a launcher's


def code_version() -> dict[str, Any]:
    """Commit of the clone that the package runs from, and whether it has uncommitted changes; None without a clone."""
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
    """The command as it was called, or as it would be called with these words."""
    words = sys.argv[1:] if words is None else words
    program = Path(sys.argv[0]).name
    if program == "train.py":
        return shlex.join([display_path(Path(sys.executable)), "-m", "sasrec_lab.train", *words])
    return shlex.join([program, *words])


def is_first_process() -> bool:
    """Of a run on several devices; the others write nothing."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "NODE_RANK"))
