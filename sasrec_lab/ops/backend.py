"""Choose the fastest exact float32 matmul backend, keep freed memory, and name the processor."""

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil, floor, log2
from pathlib import Path

import torch

from sasrec_lab.files import folder_name, read_small_text, user_cache

MAX_ERROR = 2e-6  # relative, of a product over 64 terms in float32; bfloat16 would be off by 1e-3
_CHOICE = re.compile(r"(oneDNN|torch's default) float32, \d+ GFLOP/s( \(torch's default: \d+\))?")


def choose_matmul(device: torch.device, previous: str | None = None) -> str:
    """Set the backend of float32 matrix products and return its name; every run on one machine gets the same one.

    The backends differ in the last bits, so a stopwatch must not choose again in each run: its first choice is kept in
    the user's cache folder for this processor, number of threads and torch. A resumed run passes its `previous` choice,
    which is kept if it is exact here.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # for recurrent layers; torch's default is true
        return f"{device.type} float32 without TF32"
    chosen = previous if previous and _is_kept(previous) else _cached_choice(fastest_exact_matmul)
    torch.set_float32_matmul_precision("medium" if chosen.startswith("oneDNN") else "highest")
    return chosen


@contextmanager
def fastest_matmul(device: torch.device) -> Iterator[None]:
    """Choose the backend as a run does, and restore the caller's afterwards."""
    precision = torch.get_float32_matmul_precision()
    choose_matmul(device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def fastest_exact_matmul() -> str:
    """Return the faster of torch's default and oneDNN, by a stopwatch, if oneDNN is exact.

    The "medium" precision switch selects oneDNN. On some CPUs (AMD's) torch's default library is slow and oneDNN
    computes in real float32; on CPUs with AMX the same switch computes in bfloat16. So both are tried on a product of
    the kind that training makes.
    """
    a, b = _factors()
    best = dict.fromkeys(("highest", "medium"), float("inf"))
    for _ in range(10):  # taking turns, because the load of the machine changes
        for precision in best:
            torch.set_float32_matmul_precision(precision)
            best[precision] = min(best[precision], _seconds(a, b))
    operations = 2 * len(a) * a.shape[1] * b.shape[1]
    default, onednn = (f"{operations / seconds / 1e9:.0f}" for seconds in best.values())
    if best["medium"] < 0.95 * best["highest"] and _is_exact("medium"):
        return f"oneDNN float32, {onednn} GFLOP/s (torch's default: {default})"
    return f"torch's default float32, {default} GFLOP/s"


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    By default each step may request its large tensors from the system again, which fills them page by page with zeros.
    Call it after the data is loaded, so that what loading freed is still returned.
    """
    with suppress(OSError, AttributeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large pieces come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks


def processor() -> str:
    """Return the CPU's model name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_kept(choice: str) -> bool:
    return choice.startswith("torch") or (choice.startswith("oneDNN") and _is_exact("medium"))


def _cached_choice(choose: Callable[[], str]) -> str:
    """Return the first choice made on such a machine; if two processes choose at once, both get the first one's."""
    name = f"matmul {processor()} {torch.get_num_threads()} threads torch {torch.__version__}"
    path = user_cache() / f"{folder_name(name)}.txt"
    if found := _read_choice(path):
        return found
    chosen = choose()
    with suppress(OSError):  # the cache folder is not writable
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")  # not atomic_write: the first process's choice is to stay
        draft.write_text(chosen)
        try:
            os.link(draft, path)
        except FileExistsError:
            if found := _read_choice(path):
                return found
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return chosen


def _read_choice(path: Path) -> str | None:
    """Return the choice in a file; None if there is no file, or a damaged one."""
    with suppress(OSError, ValueError):
        text = read_small_text(path)
        if _CHOICE.fullmatch(text):
            return text
    return None


def _is_exact(precision: str) -> bool:
    """Set a precision and return whether products are then within MAX_ERROR of the exact ones."""
    torch.set_float32_matmul_precision(precision)
    a, b = _factors()
    exact = a.double() @ b.double()
    return bool(((a @ b).double() - exact).norm() / exact.norm() < MAX_ERROR)


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random matrices of the sizes of a training step's products."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(320, 64, generator=random), torch.randn(64, 4096, generator=random)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the seconds that the product a b takes."""
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start


def round_up_size(n: int, steps_per_octave: int = 8) -> int:
    """Round n up to one of a few sizes, `steps_per_octave` per power of two, to keep tensor shapes few."""
    step = max(1, 2 ** floor(log2(max(n, 1))) // steps_per_octave)
    return ceil(n / step) * step
