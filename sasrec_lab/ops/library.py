"""Compiled C++ kernels: find a compiler, build cpp/ once per machine, load it, and call its functions with checks.

Without a compiler `library()` is None and the slower torch code runs. CXX names another compiler; an empty CXX disables
the kernels. Speed of both: docs/speed.md.
"""

import ctypes
import hashlib
import inspect
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from sasrec_lab.files import atomic_write, display_path, draft_folder, user_cache

log = logging.getLogger(__name__)
SOURCES = sorted((Path(__file__).parent / "cpp").iterdir())
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd"]
COMPILE_SECONDS = 300  # at most
ROW_MULTIPLE = 16  # floats; rows of parameters are padded to whole registers of any processor

# Argument types of kernels, next to int (int64_t, uint64_t) and float (double)
Floats = Annotated[Tensor, torch.float32]  # float*
Halves = Annotated[Tensor, torch.bfloat16]  # uint16_t*
Integers = Annotated[Tensor, torch.int64]  # int64_t*
Bytes = Annotated[Tensor, torch.uint8]  # uint8_t*


@dataclass(frozen=True)
class Kernels:
    """The loaded library and the compiler command that built it, or the reason why it is missing."""

    library: ctypes.CDLL | None
    compiler: list[str]
    missing: str = ""  # the reason


def library() -> ctypes.CDLL | None:
    """Return the loaded library, None without a working compiler."""
    return find_kernels().library


@cache
def find_kernels() -> Kernels:
    """Load the library, preferably one that is compiled already, else by the first compiler that works."""
    failures = []
    for compiler in sorted(compilers(), key=lambda compiler: find_library(compiler) is None):
        try:
            return Kernels(load_or_compile(compiler), compiler)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{compiler_name(compiler)}: {failure_reason(error)}")
    if not failures and "CXX" not in os.environ:
        python = display_path(Path(sys.executable))
        failures = [f"no C++ compiler found; install one with {python} -m pip install ziglang"]
    return Kernels(None, [], "; ".join(failures) or "CXX names no compiler")


def supports(*tensors: Tensor) -> bool:
    """Return whether kernels can take these tensors: contiguous float32 on the CPU, and a library to call."""
    fit = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
    return fit and library() is not None  # in this order, so that nothing is compiled for tensors that do not fit


# Declaring kernels


def kernel(declaration: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a declaration `_name_kernel` into a call of the C++ function `name`.

    The parameters' annotations are the C++ function's argument types, in order: Floats, Halves, Integers, Bytes, int,
    float, or `... | None` for a pointer that may be null. ctypes neither knows these types nor minds surplus arguments,
    so a call with a wrong number or kind of argument raises TypeError here, before C++ reads memory that is not its
    own. Callers derive sizes from the tensors, and compare shapes that must agree with `check_shape`, and indices from
    data with `check_range`.
    """
    name, signature = declaration.__name__.strip("_").removesuffix("_kernel"), inspect.signature(declaration)
    arguments = [(parameter.name, _KINDS[parameter.annotation]) for parameter in signature.parameters.values()]
    result = {None: None, int: ctypes.c_int64}[signature.return_annotation]

    @wraps(declaration)
    def call(*values: Tensor | int | float | None) -> int | None:
        if len(values) != len(arguments):
            raise TypeError(f"{name} takes {len(arguments)} arguments, not {len(values)}")
        converted = []
        for (argument, kind), value in zip(arguments, values, strict=True):
            if not kind.accepts(value):
                raise TypeError(f"{name}: {argument} must be {kind.description}, not {_describe(value)}")
            converted.append(kind.convert(value))
        function = getattr(library(), name)
        function.restype = result
        return function(*converted)

    return call


def check_shape(name: str, tensor: Tensor, *sizes: int) -> None:
    """Raise ValueError unless the tensor has these sizes, which a kernel relies on."""
    if tensor.shape != sizes:
        raise ValueError(f"{name} must have shape {sizes}, not {tuple(tensor.shape)}")


def check_range(name: str, indices: Tensor, least: int, most: int) -> None:
    """Raise ValueError unless all indices are from `least` to `most`, which a kernel relies on."""
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if not least <= low <= high <= most:
            raise ValueError(f"{name} must be from {least} to {most}, not {low} to {high}")


@dataclass(frozen=True)
class _Kind:
    """One type of argument: which values it accepts, and how C++ gets them."""

    description: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any]


def _tensor_kind(dtype: torch.dtype) -> _Kind:
    def accepts(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == dtype and value.is_cpu and value.is_contiguous()

    description = f"a contiguous {str(dtype).removeprefix('torch.')} tensor on the CPU"
    return _Kind(description, accepts, lambda tensor: ctypes.c_void_p(tensor.data_ptr()))


def _nullable(kind: _Kind) -> _Kind:
    return _Kind(
        f"{kind.description} or None",
        lambda value: value is None or kind.accepts(value),
        lambda value: None if value is None else kind.convert(value),
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        contiguous = value.layout is torch.strided and value.is_contiguous()
        return f"a {'' if contiguous else 'non-contiguous '}{value.dtype} tensor on {value.device}"
    return repr(value)


_FLOATS, _INTEGERS, _BYTES = _tensor_kind(torch.float32), _tensor_kind(torch.int64), _tensor_kind(torch.uint8)
_KINDS = {
    Floats: _FLOATS,
    Halves: _tensor_kind(torch.bfloat16),
    Integers: _INTEGERS,
    Bytes: _BYTES,
    Floats | None: _nullable(_FLOATS),
    Integers | None: _nullable(_INTEGERS),
    Bytes | None: _nullable(_BYTES),
    # no bool, which is an int to Python, and no integer that C++ would cut
    int: _Kind("an int of 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**63, ctypes.c_int64),
    float: _Kind("a float", lambda value: isinstance(value, float), ctypes.c_double),
}


# Compiling


def compilers() -> list[list[str]]:
    """Return the commands to try: what CXX names, else those of clang++, g++ and the package ziglang that exist.

    Clang comes first, because its kernels are a little faster than those of g++; ziglang contains a clang.
    """
    if "CXX" in os.environ:
        try:
            words = shlex.split(os.environ["CXX"])
        except ValueError:  # an unbalanced quote
            words = []
        return [words] if words else []
    ziglang = [[sys.executable, "-m", "ziglang", "c++"]] if find_spec("ziglang") else []
    return [[name] for name in ("clang++", "g++") if shutil.which(name)] + ziglang


def compiler_name(compiler: list[str]) -> str:
    """Return the short name of a compiler command, such as g++."""
    return "ziglang" if "ziglang" in compiler else Path(compiler[0]).name


def find_library(compiler: list[str]) -> Path | None:
    """Return this compiler's library in the user's cache folder, if its content has the checksum in its name."""
    for path in sorted(_library_folder().glob(f"{_library_key(compiler)}-*.so")):
        with suppress(OSError):
            if path.stem.endswith(f"-{_checksum(path.read_bytes())}"):
                return path
            path.unlink()  # loading it could end the process
    return None


def load_or_compile(compiler: list[str]) -> ctypes.CDLL:
    """Load this compiler's library; compile it first if it does not exist, in seconds, or by ziglang in a minute.

    Raises:
        OSError, subprocess.SubprocessError: the compiler is missing or fails, or the cache is not writable.
    """
    path = find_library(compiler) or _compile(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # made on another system that shares the folder; the next call compiles again
        path.unlink(missing_ok=True)
        raise


def _library_folder() -> Path:
    return user_cache() / "kernels"


def _library_key(compiler: list[str]) -> str:
    sources = [path.read_bytes() for path in SOURCES]
    return _checksum(repr((sources, _command(compiler), _processor(), torch.__version__)).encode())


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _command(compiler: list[str]) -> list[str]:
    # torch ships its own OpenMP; the threads of a second one would compete with those of the first
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    threads = str(shipped[0]) if shipped else "-lgomp"
    return [*compiler, *FLAGS, *(str(path) for path in SOURCES if path.suffix == ".cpp"), threads]


def _compile(compiler: list[str]) -> Path:
    """Compile the library and return its path, whose name has the content's checksum."""
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError("no such command")
    _library_folder().mkdir(parents=True, exist_ok=True)
    log.warning(f"compiling C++ kernels with {compiler_name(compiler)} (first run only)")
    with draft_folder(_library_folder() / "kernels") as folder:
        env = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}  # 90 MB, used once
        built = folder / "kernels.so"
        command = [*_command(compiler), "-o", str(built)]
        subprocess.run(
            command, env=env, check=True, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
        )
        path = _library_folder() / f"{_library_key(compiler)}-{_checksum(built.read_bytes())}.so"
        with atomic_write(path) as draft:
            shutil.copy(built, draft)
    return path


def failure_reason(error: OSError | subprocess.SubprocessError) -> str:
    """Return why a compiler failed, in one line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done in {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (line.strip() for line in error.stderr.splitlines())
        return next((line for line in lines if "error: " in line), f"exit code {error.returncode}")
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)


def _processor() -> str:
    """Return the CPU features that -march=native depends on: unlike machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
