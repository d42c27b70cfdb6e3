"""Text of any kind as the name of one folder or file."""

import re
from hashlib import sha1


def folder_name(text: str) -> str:
    """Text such as a job's overrides as the name of one folder: no separators, not too long, another text another."""
    name = re.sub(r"[^\w.,=+@-]+", "-", text).encode()
    if len(name) <= 200:
        return name.decode()
    return f"{name[:191].decode(errors='ignore')}-{sha1(text.encode()).hexdigest()[:8]}"


def job_folder(sweeper: str, number: int, overrides: str) -> str:
    """`<number>-<overrides>`; of a search the overrides alone.

    It counts from 0 each time it is taken up, and what it tries again has been tried already.
    """
    name = folder_name(overrides)
    return f"{number}-{name}" if sweeper.endswith(".BasicSweeper") else name
