"""What the run stands on: the device, the backend of matrix products, versions, memory."""

import importlib.metadata
import platform
import resource
import sys
import time
from typing import Any

import torch

MAX_ERROR = 2e-6  # relative, of a product over 64 terms in float32; bfloat16 would be off by 1e-3


def fastest_exact_matmul(device: torch.device) -> str:
    """Choose how float32 matrices are multiplied and say so.

    On some CPUs (AMD's) torch's default library leaves speed unused, and the "medium" precision switch sends products
    to oneDNN, which computes them in real float32; on CPUs with AMX the same switch computes in bfloat16. So both are
    tried on a product of the kind that training makes: the switch stays only where it is exact and faster.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
        return f"{device.type} float32 without TF32"
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(320, 64, generator=random), torch.randn(64, 4096, generator=random)
    exact = a.double() @ b.double()
    best = dict.fromkeys(("highest", "medium"), float("inf"))
    for _ in range(10):  # in turns, because other work on the machine comes and goes
        for precision in best:
            torch.set_float32_matmul_precision(precision)
            best[precision] = min(best[precision], _seconds(a, b))
    error = ((a @ b).double() - exact).norm() / exact.norm()  # of "medium", which was last
    default, onednn = (f"{2 * exact.numel() * a.shape[1] / seconds / 1e9:.0f} GFLOP/s" for seconds in best.values())
    if error < MAX_ERROR and best["medium"] < 0.95 * best["highest"]:
        return f"oneDNN float32, {onednn} (torch's default: {default})"
    torch.set_float32_matmul_precision("highest")
    return f"torch's default float32, {default}"


def facts(device: torch.device) -> dict[str, Any]:
    """What run.json says of the machine; chooses the backend of matrix products on the way."""
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "matmul": fastest_exact_matmul(device),
        "versions": versions(),
        "system": platform.platform(),
    }


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    names = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "torchmetrics", "pandas", "numpy", "sasrec-lab")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


def peak_memory_mb() -> dict[str, int]:
    """Most memory that the process has held, and most that tensors have held on the GPU, in MiB."""
    unit = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit // 1024}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated() // 2**20
    return peak


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the product a b."""
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
