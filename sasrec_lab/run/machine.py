"""Describe the machine that a run used: device, threads, kernels, versions and peak memory."""

import importlib.metadata
import platform
import resource
import sys
from typing import Any

import torch

from sasrec_lab.ops import library as kernels
from sasrec_lab.ops.library import compiler_name


def describe_machine(device: torch.device, matmul: str) -> dict[str, Any]:
    """Return what run.json says of the machine; `matmul` is the name of the chosen matmul backend (ops/backend.py)."""
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "matmul": matmul,
        **_kernels(device),
        "versions": versions(),
        "system": platform.platform(),
    }


def _kernels(device: torch.device) -> dict[str, str]:
    found = kernels.find_kernels() if device.type == "cpu" else kernels.Kernels(None, [])
    whose = f"compiled by {compiler_name(found.compiler)}" if found.library else "torch's"
    return {"kernels": whose} | ({"no_kernels": found.missing} if found.missing else {})


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'' if threads == 1 else 's'})"


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
