"""Describe the machine for run.json: device, threads, matmul backend, kernels, versions and peak memory.

It imports torch. run/provenance.py, which help and error messages need at once, is therefore separate.
"""

import importlib.metadata
import platform
import resource
import sys
from typing import Any

import torch

from sasrec_lab.ops import library

_PACKAGES = (
    "torch",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "pandas",
    "numpy",
    "scipy",
    "sasrec-lab",
)


def describe_machine(device: torch.device, matmul: str | None) -> dict[str, Any]:
    """Return the machine's part of run.json.

    `matmul` is what `ops.backend.choose_matmul` returned; None says that neither torch's products nor kernels are used.
    """
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        **({} if matmul is None else {"matmul": matmul, **_describe_kernels(device)}),
        "versions": versions(),
        "system": platform.platform(),
    }


def _describe_kernels(device: torch.device) -> dict[str, str]:
    found = library.find_kernels() if device.type == "cpu" else library.Kernels(None, [])
    kernels = f"compiled by {library.compiler_name(found.compiler)}" if found.library else "torch's"
    return {"kernels": kernels} | ({"no_kernels": found.missing} if found.missing else {})


def describe_device(device: torch.device) -> str:
    """Return a phrase such as `cpu (2 threads)` or `cuda (<model of the GPU>)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'' if threads == 1 else 's'})"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


def peak_memory_mb() -> dict[str, int]:
    """Return the peak memory of the process, and of tensors on the GPU if there is one, in MiB."""
    unit = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit // 1024}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated() // 2**20
    return peak
