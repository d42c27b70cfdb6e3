"""Text of any kind as the name of one folder or file."""

import re
from hashlib import sha1
from pathlib import Path


def folder_name(text: str) -> str:
    """Text such as a job's overrides as the name of one folder: no separators, not too long, another text another."""
    name = re.sub(r"[^\w.,=+@-]+", "-", text).encode()
    if len(name) <= 200:
        return name.decode()
    return f"{name[:191].decode(errors='ignore')}-{sha1(text.encode()).hexdigest()[:8]}"


def job_folder(sweeper: str, number: int, overrides: str, sweep: str) -> str:
    """`<number>-<overrides>`; of a search the overrides alone.

    It counts from 0 each time it is taken up, and what it tries again has been tried already. A job that has its folder
    in the sweep's keeps it, whatever its number is now; a sweep that got more values counts otherwise.
    """
    name = folder_name(overrides)
    if not sweeper.endswith(".BasicSweeper"):
        return name
    there = [folder for folder in job_folders(Path(sweep)) if folder.partition("-")[2] == name]
    return there[0] if there else f"{number}-{name}"


def job_folders(sweep: Path) -> list[str]:
    """Names of the folders of a sweep's jobs, in the order of their numbers."""
    names = [path.name for path in sweep.glob("*-*") if path.is_dir() and path.name.partition("-")[0].isdigit()]
    return sorted(names, key=lambda name: int(name.partition("-")[0]))
