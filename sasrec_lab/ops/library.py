"""The functions of cpp/, compiled where there is a compiler. Without one `library()` is None, and torch does the same,
slower.

What is measured with and without: README, "Speed". An empty CXX switches it off.
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
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pooch
import torch
from torch import Tensor

from sasrec_lab.files import display_path

log = logging.getLogger(__name__)
SOURCES = sorted((Path(__file__).parent / "cpp").iterdir())
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd"]


@dataclass(frozen=True)
class Kernels:
    library: ctypes.CDLL | None
    compiler: list[str]
    missing: str = ""  # why there is none


def library() -> ctypes.CDLL | None:
    return find_kernels().library


@cache
def find_kernels() -> Kernels:
    """The kernels that are compiled already, else those by the first compiler that works."""
    failures = []
    for compiler in sorted(compilers(), key=lambda compiler: not os.path.isfile(library_path(compiler))):
        try:
            kernels = load_or_compile(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{compiler_name(compiler)}: {reason(error)}")
        else:
            kernels.weights_size.restype = ctypes.c_int64
            return Kernels(kernels, compiler)
    if not failures and "CXX" not in os.environ:
        failures = [f"no C++ compiler; {display_path(Path(sys.executable))} -m pip install ziglang brings one"]
    return Kernels(None, [], "; ".join(failures) or "CXX names no compiler")


def supports(*tensors: Tensor) -> bool:
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


def compilers() -> list[list[str]]:
    """The commands to try: what CXX names, else those that are here of clang++, g++ and the package ziglang (a clang).

    Clang's kernels train 2 % faster than those of g++ 12 and rank 8 % faster.
    """
    if "CXX" in os.environ:
        try:
            words = shlex.split(os.environ["CXX"])
        except ValueError:  # a quote without its other
            words = []
        return [words] if words else []
    ziglang = [[sys.executable, "-m", "ziglang", "c++"]] if find_spec("ziglang") else []
    return [[name] for name in ("clang++", "g++") if shutil.which(name)] + ziglang


def compiler_name(compiler: list[str]) -> str:
    return "ziglang" if "ziglang" in compiler else Path(compiler[0]).name


def library_path(compiler: list[str]) -> Path:
    """Where in the user's cache folder the library by this compiler is."""
    sources = [path.read_bytes() for path in SOURCES]
    key = hashlib.sha256(repr((sources, _command(compiler), _processor(), torch.__version__)).encode()).hexdigest()
    return Path(pooch.os_cache("sasrec_lab")) / "kernels" / f"{key[:16]}.so"


def load_or_compile(compiler: list[str]) -> ctypes.CDLL:
    """The library by this compiler, made if it is not there yet: in seconds, by ziglang in a minute.

    Raises:
        OSError, subprocess.SubprocessError: there is no such compiler, it fails, or the cache cannot be written.
    """
    path = library_path(compiler)
    if not path.is_file():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # it is broken: made again next time
        path.unlink(missing_ok=True)
        raise


def _command(compiler: list[str]) -> list[str]:
    # torch brings its own OpenMP; a second one's threads would wait for work in the first one's way
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    threads = str(own[0]) if own else "-lgomp"
    return [*compiler, *FLAGS, *(str(path) for path in SOURCES if path.suffix == ".cpp"), threads]


def _compile(compiler: list[str], path: Path) -> None:
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError("no such command")
    path.parent.mkdir(parents=True, exist_ok=True)
    log.warning(f"compiling kernels with {compiler_name(compiler)}, once on this machine")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        env = os.environ | {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}  # 90 MB, used once
        command = [*_command(compiler), "-o", str(draft)]
        subprocess.run(command, env=env, check=True, capture_output=True, text=True, errors="replace", timeout=300)
        draft.replace(path)


def reason(error: OSError | subprocess.SubprocessError) -> str:
    """Why it failed, in one line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done in {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (line.strip() for line in error.stderr.splitlines())
        return next((line for line in lines if "error: " in line), f"exit code {error.returncode}")
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)


def _processor() -> str:
    """What -march=native depends on, where a home folder is shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
