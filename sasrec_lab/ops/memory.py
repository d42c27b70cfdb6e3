"""The memory that this process can still get, and an error of one line if a need exceeds it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sasrec_lab.errors import InputError

_ROOT = Path("/")


@dataclass(frozen=True)
class Need:
    """Bytes that a part of a run cannot do without, and the config keys that decide how many."""

    what: str
    keys: tuple[str, ...]  # such as model.dim=64
    size: int


def check_memory(needs: list[Need], device: str, fix: str | None = None) -> None:
    """Raise InputError, which names the keys of the largest needs, if all of them exceed the memory that is there.

    It ends in `fix`; without one it asks for lower values of the keys.
    """
    there, total = available_bytes(device), sum(need.size for need in needs)
    if there is None or total <= there:
        return
    largest = [need for need in sorted(needs, key=lambda need: -need.size) if need.size >= total / 10]
    keys = dict.fromkeys(key for need in largest for key in need.keys)
    parts = ", ".join(f"{format_bytes(need.size)} for {need.what}" for need in largest)
    fix = fix or f"lower {'these' if len(keys) > 1 else 'it'}"
    raise InputError(
        f"{', '.join(keys)}: the run needs at least {format_bytes(total)} of memory ({parts}),"
        f" but {format_bytes(there)} are available on {device}; {fix}"
    )


def format_bytes(size: int) -> str:
    """Return a size such as 1.5 GiB."""
    value, units = float(size), iter(("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while value >= 1024 and (larger := next(units, None)):
        value, unit = value / 1024, larger
    return f"{size} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def available_bytes(device: str) -> int | None:
    """Return how much memory this process could have on the device at most, None if that is not known.

    What it has already counts as available, because a sweep's jobs follow each other in one process.
    """
    if device.startswith("cuda"):
        import torch  # here, because data is read without it

        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device != "cpu":
        return None
    swap = _meminfo("SwapFree") or 0
    free = [size for size in (_free_on_machine(), *_free_in_groups()) if size is not None]
    return min(free) + swap + _own_bytes() if free else None


def _free_on_machine() -> int | None:
    """Return what Linux calls available, and the file cache of ZFS, which it does not count although it shrinks."""
    available, zfs = _meminfo("MemAvailable"), 0
    with suppress(OSError, ValueError):
        lines = (_ROOT / "proc/spl/kstat/zfs/arcstats").read_text().splitlines()
        zfs = _number_after("size", lines, place=2) or 0
    return None if available is None else available + zfs


def _meminfo(name: str) -> int | None:
    with suppress(OSError, ValueError):
        lines = (_ROOT / "proc/meminfo").read_text().splitlines()
        return _number_after(f"{name}:", lines, unit=1024)
    return None


def _own_bytes() -> int:
    with suppress(OSError, ValueError):
        lines = (_ROOT / "proc/self/status").read_text().splitlines()
        return _number_after("VmRSS:", lines, unit=1024) or 0
    return 0


def _free_in_groups() -> Iterator[int]:
    """Yield the limits of this process's control groups (v1 and v2), less what cannot be reclaimed in each."""
    with suppress(OSError):
        for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0":
                yield from _free_below(_ROOT / "sys/fs/cgroup", group, "memory.max", "anon")
            elif "memory" in controllers.split(","):
                yield from _free_below(_ROOT / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes", "total_rss")


def _free_below(mount: Path, group: str, limit: str, used: str) -> Iterator[int]:
    """Yield the free memory of a group and of those above it; in a container the first ones may not be there."""
    inside = mount / group.strip("/")
    for folder in (inside, *inside.parents):
        if not folder.is_relative_to(mount):
            return
        with suppress(OSError, ValueError):  # no such group, or no limit, which reads "max"
            most = int((folder / limit).read_text())
            yield most - (_number_after(used, (folder / "memory.stat").read_text().splitlines()) or 0)


def _number_after(name: str, lines: list[str], unit: int = 1, place: int = 1) -> int | None:
    """Return the number in the line that begins with this word."""
    found = (words[place] for words in map(str.split, lines) if words[:1] == [name] and len(words) > place)
    number = next(found, None)
    return None if number is None else int(number) * unit
