"""The functions of cpp/, compiled where there is a compiler. Without one `library()` is None, and torch does the same,
slower.

What is measured with and without: README, "Speed". An empty CXX switches it off.
"""

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sasrec_lab.ops.compiler import compilers, loaded, name_of, path_of, reason
from sasrec_lab.run.provenance import near


@dataclass(frozen=True)
class Found:
    library: ctypes.CDLL | None
    compiler: list[str]
    missing: str = ""  # why there is none


def library() -> ctypes.CDLL | None:
    return found().library


@cache
def found() -> Found:
    """The kernels that are compiled already, else those by the first compiler that works."""
    failures = []
    for compiler in sorted(compilers(), key=lambda compiler: not os.path.isfile(path_of(compiler))):
        try:
            kernels = loaded(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{name_of(compiler)}: {reason(error)}")
        else:
            kernels.weights_size.restype = ctypes.c_int64
            return Found(kernels, compiler)
    if not failures and "CXX" not in os.environ:
        failures = [f"no C++ compiler; {near(Path(sys.executable))} -m pip install ziglang brings one"]
    return Found(None, [], "; ".join(failures) or "CXX names no compiler")


def serve(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: on the CPU, in single precision."""
    served = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
    return served and library() is not None  # in this order: what needs none compiles none


def call(name: str, *arguments: Tensor | int | float) -> int:
    """Call a kernel: tensors by address, int as int64, float as double."""
    return getattr(library(), name)(*map(_argument, arguments))


def _argument(value):
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int) and not isinstance(value, bool):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    raise TypeError(f"a kernel takes tensors, int and float, not {value!r}")
