"""How a file is recognised without being read: what the system says of it, left in the folders built from it.

A stamp trusts that whoever changes a file changes its size, its inode or one of its two times, which the system sets
to the nanosecond or, on old systems, to two seconds. So a file that was changed less than two seconds ago is left
without one. Anything else, such as a copy or a touched file, only means that the checksum is taken again.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_NAME = "stamp.json"
_SETTLED = 2_000_000_000  # nanoseconds

Stamp = dict[str, int]


def of(path: Path) -> Stamp:
    said = path.stat()
    return {"size": said.st_size, "mtime_ns": said.st_mtime_ns, "ctime_ns": said.st_ctime_ns, "inode": said.st_ino}


def recall(stamp: Stamp, cache: Path) -> str | None:
    """The sha256 that a folder of the cache has for this stamp."""
    for file in cache.glob(f"*/{_NAME}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the folder just deleted, or spoilt by hand
            left = json.loads(file.read_text())
            if left["file"] == stamp:
                return left["sha256"]
    return None


def leave(stamp: Stamp, sha256: str, folder: Path) -> None:
    """Put the stamp into the folder in one atomic step; of two processes either one's may stay, for both are true."""
    if time.time_ns() - max(stamp["mtime_ns"], stamp["ctime_ns"]) < _SETTLED:
        return
    with suppress(OSError):  # a cache that others own is used all the same
        draft, name = tempfile.mkstemp(dir=folder, prefix=f".{_NAME}-")
        with open(draft, "w") as file:
            json.dump({"file": stamp, "sha256": sha256}, file)
            os.fchmod(draft, 0o644)  # as the arrays beside it: who reads them need not take the checksum again
        os.replace(name, folder / _NAME)
