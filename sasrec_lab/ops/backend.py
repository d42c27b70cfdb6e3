"""What the run stands on: the device, the backend of matrix products, versions, memory."""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil, floor, log2
from pathlib import Path

import pooch
import torch

from sasrec_lab.files import folder_name

MAX_ERROR = 2e-6  # relative, of a product over 64 terms in float32; bfloat16 would be off by 1e-3


def choose_matmul(device: torch.device, before: str | None = None) -> str:
    """Choose how float32 matrices are multiplied and say so; the same in every run on one machine.

    The two ways differ in the last bits, so a stopwatch must not choose anew in each run: what it said first is kept
    in the user's cache folder for this processor, number of threads and torch.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
        return f"{device.type} float32 without TF32"
    same = before and (before.startswith("torch") or (before.startswith("oneDNN") and _is_exact("medium")))
    chosen = before if same else _cached_choice(fastest_exact_matmul)
    torch.set_float32_matmul_precision("medium" if chosen.startswith("oneDNN") else "highest")
    return chosen


@contextmanager
def fastest_matmul(device: torch.device) -> Iterator[None]:
    """Inside, products are as in a run; behind it as they were, for a caller who has other work for torch."""
    before = torch.get_float32_matmul_precision()
    choose_matmul(device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fastest_exact_matmul() -> str:
    """Compare torch's default with oneDNN, which the "medium" precision switch chooses, by a stopwatch.

    On some CPUs (AMD's) the default library leaves speed unused, and oneDNN computes in real float32; on CPUs with AMX
    the same switch computes in bfloat16. So both are tried on a product of the kind that training makes, and oneDNN is
    taken only where it is exact and faster.
    """
    a, b = _factors()
    best = dict.fromkeys(("highest", "medium"), float("inf"))
    for _ in range(10):  # in turns, because other work on the machine comes and goes
        for precision in best:
            torch.set_float32_matmul_precision(precision)
            best[precision] = min(best[precision], _seconds(a, b))
    operations = 2 * len(a) * a.shape[1] * b.shape[1]
    default, onednn = (f"{operations / seconds / 1e9:.0f}" for seconds in best.values())
    if best["medium"] < 0.95 * best["highest"] and _is_exact("medium"):
        return f"oneDNN float32, {onednn} GFLOP/s (torch's default: {default})"
    return f"torch's default float32, {default} GFLOP/s"


def keep_freed_memory() -> None:
    """Have glibc hand freed memory of tensors out again instead of giving it back to the system.

    Otherwise, as the heap happens to lie, a step asks for its large tensors anew and the system fills them page by page
    with zeros: on the paper's Beauty, where a step makes two gradients of 11 MB, 2,260 page faults a step or none, two
    fifths of its time. Called when the data is loaded, so that what loading freed is given back.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no large piece lies outside the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free end stays


def processor() -> str:
    """The CPU's model."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cached_choice(choose: Callable[[], str]) -> str:
    """What was chosen first on a machine like this; of two processes that choose at once the first one's stands."""
    name = f"matmul {processor()} {torch.get_num_threads()} threads torch {torch.__version__}"
    path = Path(pooch.os_cache("sasrec_lab")) / f"{folder_name(name)}.txt"
    with suppress(OSError):
        return path.read_text()
    chosen = choose()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(chosen)
        try:
            os.link(draft, path)
        finally:
            draft.unlink()
    except FileExistsError:
        return path.read_text()
    except OSError:  # nothing can be written there
        pass
    return chosen


def _is_exact(precision: str) -> bool:
    torch.set_float32_matmul_precision(precision)
    a, b = _factors()
    exact = a.double() @ b.double()
    return bool(((a @ b).double() - exact).norm() / exact.norm() < MAX_ERROR)


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(320, 64, generator=random), torch.randn(64, 4096, generator=random)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the product a b."""
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start


def round_up_size(n: int, steps_per_octave: int = 8) -> int:
    """Round up to a multiple of an eighth of the power of two below, so at most eight sizes between n and 2n; or of
    another power of two's part."""
    step = max(1, 2 ** floor(log2(max(n, 1))) // steps_per_octave)
    return ceil(n / step) * step
