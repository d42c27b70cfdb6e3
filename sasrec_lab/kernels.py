"""The functions of cpp/, compiled where there is a compiler. Without one `library()` is None, and torch does the same,
slower.

The compiler is what CXX names, else g++ or clang++, else that of the package ziglang, which pip installs. An empty CXX
switches all of it off. What is measured with and without: README, "Speed".
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
    command = _command()
    if command is None:
        return None
    sources = [path.read_bytes() for path in SOURCES]
    key = hashlib.sha256(repr((sources, command, _processor(), torch.__version__)).encode()).hexdigest()
    path = Path(pooch.os_cache("sasrec_lab")) / "kernels" / f"{key[:16]}.so"
    try:
        if not path.is_file():
            log.info("compiling kernels, once on this machine: some seconds, by ziglang up to a minute")
            _compile(command, path)
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):  # no such compiler, one that fails, a cache that cannot be written
        return None
    kernels.weights_size.restype = ctypes.c_int64
    return kernels


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


def _command() -> list[str] | None:
    compiler = _compiler()
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    # torch brings its own OpenMP; a second one's threads would wait for work in the first one's way
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    threads = str(own[0]) if own else "-lgomp"
    return [*compiler, *FLAGS, *(str(path) for path in SOURCES if path.suffix == ".cpp"), threads]


def _compiler() -> list[str]:
    if "CXX" in os.environ:
        try:
            return shlex.split(os.environ["CXX"])
        except ValueError:  # a quote without its other
            return []
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else []


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        subprocess.run([*command, "-o", str(draft)], check=True, capture_output=True, timeout=300)
        draft.replace(path)


def _processor() -> str:
    """What -march=native depends on, where a home folder is shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
