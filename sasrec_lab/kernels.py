"""The functions of cpp/, compiled where there is a compiler. Without one `library()` is None, and torch does the same,
slower.

The compiler is what CXX names, else the first that works of g++, clang++ and the package ziglang, which pip installs.
An empty CXX switches all of it off. What is measured with and without: README, "Speed".
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pooch
import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = sorted((Path(__file__).parent / "cpp").iterdir())
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; compiled once a machine, into the user's cache folder."""
    for compiler in _compilers():
        with suppress(OSError, subprocess.SubprocessError):  # it is not there, it fails, the cache cannot be written
            kernels = ctypes.CDLL(str(_compiled(compiler)))
            kernels.weights_size.restype = ctypes.c_int64
            return kernels
    return None


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


def _compilers() -> list[list[str]]:
    if "CXX" in os.environ:
        with suppress(ValueError):  # a quote without its other
            return [words] if (words := shlex.split(os.environ["CXX"])) else []
        return []
    ziglang = [[sys.executable, "-m", "ziglang", "c++"]] if find_spec("ziglang") else []
    return [[name] for name in ("g++", "clang++") if shutil.which(name)] + ziglang


def _compiled(compiler: list[str]) -> Path:
    """The library by this compiler, made if it is not there yet."""
    # torch brings its own OpenMP; a second one's threads would wait for work in the first one's way
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    threads = str(own[0]) if own else "-lgomp"
    command = [*compiler, *FLAGS, *(str(path) for path in SOURCES if path.suffix == ".cpp"), threads]
    sources = [path.read_bytes() for path in SOURCES]
    key = hashlib.sha256(repr((sources, command, _processor(), torch.__version__)).encode()).hexdigest()
    path = Path(pooch.os_cache("sasrec_lab")) / "kernels" / f"{key[:16]}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling kernels, once on this machine: some seconds, by ziglang up to a minute")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        subprocess.run([*command, "-o", str(draft)], check=True, capture_output=True, timeout=600)
        draft.replace(path)
    return path


def _processor() -> str:
    """What -march=native depends on, where a home folder is shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
