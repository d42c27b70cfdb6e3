"""The library of compiled kernels: its compilers, and the checks of arguments.

What a kernel computes is tested with the Python function that calls it.
"""

import inspect
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sasrec_lab.ops import (
    attention,
    block,
    cross_entropy,
    divergence,
    dropout,
    library,
    lookup_loss,
    pointwise,
    ranking,
    relative_sums,
    softmax_products,
    time_buckets,
    time_decay,
)

needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
# what other compilers run as well
COMPARISONS = (
    "ops/test_dropout.py::test_dropout_keeps_the_mean_and_drops_at_its_rate",
    "ops/test_dropout.py::test_dropouts_gradient_has_its_mask_on_any_thread_count",
    "ops/test_attention.py::test_compiled_attention_equals_the_bucketed_one",
    "ops/test_attention.py::test_biased_attention_equals_the_plain_loop",
    "model/test_model.py::test_a_compiled_block_equals_the_plain_one",
    "model/test_model.py::test_nan_in_a_compiled_block_stays_in_its_sequence",
    "ops/test_attention.py::test_compiled_dropout_has_its_rate_and_follows_the_seed",
    "ops/test_attention.py::test_masks_of_sequences_and_heads_are_independent",
    "ops/test_attention.py::test_compiled_dropout_has_the_gradients_of_its_mask",
    "ops/test_divergence.py::test_the_kernel_equals_torch_on_the_same_logits",
    "ops/test_pointwise.py::test_the_kernel_equals_torchs_form",
    "ops/test_pointwise.py::test_the_kernel_takes_scores_of_any_size",
    "ops/test_pointwise.py::test_the_kernels_buckets_of_pairs_equal_torchs",
    "ops/test_relative_sums.py::test_the_kernel_equals_torchs_form",
    "ops/test_time_decay.py::test_decayed_attention_equals_the_plain_loop",
    "training/test_losses.py::test_softmax_on_three_threads",
    "training/test_losses.py::test_a_target_of_vanishing_probability",
    "training/test_losses.py::test_with_every_item_drawn_once_it_is_the_full_softmax",
    "training/test_losses.py::test_the_compiled_softmax_keeps_nan",
    "training/test_losses.py::test_autocast_is_close",
    "evaluation/test_metrics.py::test_compiled_ranks_against_a_sort",
    "evaluation/test_metrics.py::test_a_compiled_score_has_the_same_bits_anywhere",
    "ops/test_ranking.py",
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "flags", ["-mno-avx512f", "-mno-avx", "-fsanitize=undefined -fsanitize-undefined-trap-on-error"]
)
def test_other_processors_compute_the_same(flags):
    """Narrower registers; registers without fused multiply-add; a trap for what C++ does not define."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are for x86-64")
    check_comparisons_with(f"{shlex.join(library.find_kernels().compiler)} {flags}")


@pytest.mark.slow
@needs_compiler
def test_processors_without_tiles_multiply_bfloat16_alike():
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "amx_bf16" not in processor.read_text():
        pytest.skip("needs a CPU with AMX; elsewhere this is the only form")
    compiler = shlex.join(library.find_kernels().compiler)
    check_comparisons_with(f"{compiler} -mno-amx-bf16", ("ops/test_softmax_bf16.py",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clang++", "ziglang"])
def test_other_compilers_compute_the_same(name):
    command = name
    if name == "ziglang" and find_spec("ziglang"):
        command = f"{shlex.quote(sys.executable)} -m ziglang c++"
    elif not shutil.which(name):
        pytest.skip(f"needs {name}")
    check_comparisons_with(command)


def check_comparisons_with(cxx: str, comparisons: tuple[str, ...] = COMPARISONS) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *comparisons]
    env = os.environ | {"CXX": cxx}
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "on_path", "packages", "compilers"),
    [
        ({}, {"g++", "clang++"}, {"ziglang"}, [["clang++"], ["g++"], [sys.executable, "-m", "ziglang", "c++"]]),
        ({}, {"g++"}, set(), [["g++"]]),
        ({}, set(), {"ziglang"}, [[sys.executable, "-m", "ziglang", "c++"]]),
        ({}, set(), set(), []),
        ({"CXX": "ccache 'my g++'"}, {"g++"}, {"ziglang"}, [["ccache", "my g++"]]),
        ({"CXX": ""}, {"g++"}, {"ziglang"}, []),
        ({"CXX": "g++ 'an unbalanced quote"}, {"g++"}, {"ziglang"}, []),
    ],
)
def test_compilers_come_from_cxx_or_the_path(environment, on_path, packages, compilers, monkeypatch):
    monkeypatch.setattr(library.os, "environ", environment)
    monkeypatch.setattr(library.shutil, "which", lambda name: name in on_path)
    monkeypatch.setattr(library, "find_spec", lambda name: name in packages)
    assert library.compilers() == compilers


@needs_compiler
def test_a_failing_compiler_is_followed_by_the_next(monkeypatch):
    works = library.find_kernels().compiler
    monkeypatch.setattr(library, "compilers", lambda: [["no-such-compiler"], ["false"], works])
    assert library.find_kernels.__wrapped__().compiler == works


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[list[str]]:
    """A cache with a copy of this machine's library, and the commands that would have compiled another copy."""
    works = library.find_kernels().compiler
    content = library.find_library(works).read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "compilers", lambda: [works])
    commands = []

    def copy(compiler: list[str]) -> Path:
        commands.append(compiler)
        path = library._library_folder() / f"{library._library_key(compiler)}-{library._checksum(content)}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    copy(works)
    commands.clear()
    monkeypatch.setattr(library, "_compile", copy)
    return commands


@needs_compiler
def test_cached_kernels_are_reused(compiled, monkeypatch):
    (works,) = library.compilers()
    monkeypatch.setattr(library, "compilers", lambda: [[*works, "-other"], works])
    found = library.find_kernels.__wrapped__()
    assert (found.compiler, compiled) == (works, [])
    assert found.library is not None


@needs_compiler
@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "under another's name"])
def test_damaged_kernels_are_compiled_again_unloaded(compiled, damage, monkeypatch):
    (works,) = library.compilers()
    path = library.find_library(works)
    content = path.read_bytes()
    if damage == "under another's name":
        path.rename(path.with_name(path.name.replace("-", "-0")))
    else:
        flipped = bytes([*content[:5000], content[5000] ^ 1, *content[5001:]])
        path.write_bytes({"flipped": flipped, "short": content[:5000], "empty": b""}[damage])
    loaded = []
    load = library.ctypes.CDLL
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: loaded.append(Path(name).read_bytes()) or load(name))
    assert library.find_kernels.__wrapped__().library is not None
    assert (compiled, loaded) == ([works], [content])
    assert list(path.parent.iterdir()) == [path]


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_removed(compiled, monkeypatch):
    def refuse(name: str) -> None:
        raise OSError("not for this machine")

    monkeypatch.setattr(library.ctypes, "CDLL", refuse)
    found = library.find_kernels.__wrapped__()
    assert found.library is None
    assert found.missing.endswith(": not for this machine")
    assert library.find_library(*library.compilers()) is None


@pytest.mark.parametrize(
    ("commands", "missing"),
    [
        ([["no-such-compiler"]], "no-such-compiler: no such command"),
        ([["false"], ["sh", "-c", "sleep 60"]], "false: exit code 1; sh: not done in 0 s"),
        ([["sh", "-c", "echo ' x.h: error: no' >&2; exit 1"]], "sh: x.h: error: no"),
    ],
)
def test_reasons_of_failing_compilers_are_reported(commands, missing, monkeypatch, tmp_path):
    run = subprocess.run

    def impatient(command, timeout, **given):
        return run(command, timeout=0.2 if "sleep 60" in command else timeout, **given)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "compilers", lambda: commands)
    monkeypatch.setattr(library.subprocess, "run", impatient)
    assert library.find_kernels.__wrapped__() == library.Kernels(None, [], missing)


def test_without_a_compiler_the_message_names_one(monkeypatch):
    monkeypatch.setattr(library, "compilers", list)
    monkeypatch.delenv("CXX", raising=False)
    missing = library.find_kernels.__wrapped__().missing
    assert re.fullmatch(r"no C\+\+ compiler found; install one with .+ -m pip install ziglang", missing)
    monkeypatch.setenv("CXX", "")
    assert library.find_kernels.__wrapped__().missing == "CXX names no compiler"


FEWER_THREADS = """
import torch
from sasrec_lab.ops.softmax_products import _softmax_products_compiled
from sasrec_lab.ops.ranking import Scores
torch.set_num_threads(4)
states, table, none = torch.ones(3, 2), torch.ones(500, 2), torch.zeros(0, dtype=torch.long)
assert Scores(states, table).count_not_below_target(torch.tensor([1, 2, 3]), none, none).tolist() == [500] * 3
table[7] = 400.0  # so large that the sums are computed twice
log_p, _, _ = _softmax_products_compiled(states, table, states, torch.ones(3, 1), torch.float32)
torch.testing.assert_close(log_p, torch.full((3, 1), 2.0 - 800.0))
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}, {}], ids=str)
def test_fewer_threads_than_torch_has_set_compute_the_same(limit):
    subprocess.run([sys.executable, "-c", FEWER_THREADS], check=True, env=os.environ | limit)


def test_unsupported_tensors_compile_nothing(monkeypatch):
    monkeypatch.setattr(library, "library", lambda: pytest.fail("compiled"))
    assert not library.supports(torch.zeros(2, device="meta"))
    assert not library.supports(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


WITHOUT_COMPILER = """
import os, sys
from sasrec_lab.ops import library
for compiler in sys.argv[1:]:
    os.environ["CXX"] = compiler
    library.find_kernels.cache_clear()
    assert library.library() is None
"""


@pytest.mark.slow
def test_a_failing_compiler_is_no_error():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER, "", "no-such-compiler", "false"], check=True)


# Arguments

MODULES = (
    attention,
    block,
    divergence,
    dropout,
    lookup_loss,
    pointwise,
    ranking,
    relative_sums,
    softmax_products,
    time_buckets,
    time_decay,
)
KERNELS = {
    name.strip("_").removesuffix("_kernel"): function
    for module in MODULES
    for name, function in vars(module).items()
    if name.endswith("_kernel")
}
POINTERS = {
    "float*": library.Floats,
    "uint16_t*": library.Halves,
    "int64_t*": library.Integers,
    "uint8_t*": library.Bytes,
}
NUMBERS = {"int64_t": int, "uint64_t": int, "double": float}


def prototypes() -> dict[str, tuple[str, list[str]]]:
    """Return the result and argument types of the functions that cpp/ exports."""
    found = {}
    for path in library.SOURCES:
        _, _, exported = path.read_text().partition('extern "C" {\n\n')
        for result, name, arguments in re.findall(r"^(\w+) (\w+)\(([^)]*)\) \{", exported, re.M):
            types = [
                argument.split()[-2] for argument in arguments.split(",") if argument
            ]  # without const and the name
            found[name] = result, types
    return found


def test_every_exported_function_is_declared_once():
    assert set(KERNELS) == set(prototypes())
    declarations = [name for module in MODULES for name in vars(module) if name.endswith("_kernel")]
    assert len(declarations) == len(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_declaration_has_the_types_of_the_cpp_function(name):
    result, types = prototypes()[name]
    signature = inspect.signature(KERNELS[name])
    assert signature.return_annotation == {"void": None, "int64_t": int}[result]
    declared = [parameter.annotation for parameter in signature.parameters.values()]
    assert len(declared) == len(types)
    for annotation, of_cpp in zip(declared, types, strict=True):
        if of_cpp in POINTERS:
            assert annotation in (POINTERS[of_cpp], POINTERS[of_cpp] | None)
        else:
            assert annotation is NUMBERS[of_cpp]


@library.kernel
def _example_kernel(x: library.Floats, places: library.Integers | None, count: int, rate: float) -> int:
    """Stand for a C++ function."""


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Return the arguments of the calls that reach C++."""
    reached = []

    def example(*arguments):
        reached.append(arguments)
        return len(reached)

    monkeypatch.setattr(library, "library", lambda: SimpleNamespace(example=example))
    return reached


FLOATS, INTEGERS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
GOOD = (FLOATS, INTEGERS, 2, 0.5)


def test_arguments_arrive_as_addresses_and_numbers(calls):
    assert _example_kernel(*GOOD) == 1
    assert _example_kernel(FLOATS, None, -(2**63), 0.5) == 2
    assert [getattr(argument, "value", argument) for argument in calls[0]] == [
        FLOATS.data_ptr(),
        INTEGERS.data_ptr(),
        2,
        0.5,
    ]
    assert calls[1][1] is None


@pytest.mark.parametrize("arguments", [(), GOOD[:-1], (*GOOD, 1), (*GOOD, None)])
def test_a_wrong_number_of_arguments_is_an_error(arguments, calls):
    with pytest.raises(TypeError, match=f"^example takes 4 arguments, not {len(arguments)}$"):
        _example_kernel(*arguments)
    assert not calls


@pytest.mark.parametrize(
    ("place", "argument", "name"),
    [
        *[(0, wrong, "x") for wrong in (None, 8, 1.0, [1.0], np.zeros(2, np.float32), FLOATS.double(), INTEGERS)],
        *[(0, wrong, "x") for wrong in (FLOATS.T, torch.zeros(2, device="meta"), torch.eye(2).to_sparse())],
        *[(1, wrong, "places") for wrong in (0, INTEGERS.int(), FLOATS, torch.zeros(4, dtype=torch.int64)[::2])],
        *[(2, wrong, "count") for wrong in (None, True, 2.0, "8", np.int64(8), torch.tensor(8), 2**63, -(2**63) - 1)],
        *[(3, wrong, "rate") for wrong in (None, 1, False, "0.5", np.float32(0.5), torch.tensor(0.5))],
    ],
    ids=repr,
)
def test_a_wrong_kind_of_argument_is_an_error(place, argument, name, calls):
    arguments = [*GOOD[:place], argument, *GOOD[place + 1 :]]
    with pytest.raises(TypeError, match=f"^example: {name} must be "):
        _example_kernel(*arguments)
    assert not calls


def test_a_declaration_with_an_unknown_type_is_an_error():
    def _example_kernel(flag: bool) -> None:
        """Stand for a C++ function."""

    with pytest.raises(KeyError):
        library.kernel(_example_kernel)


NONE = torch.zeros(0, dtype=torch.int64)
LAYOUT = attention.BatchLayout(np.array([0, 2, 5]), 6, torch.device("cpu"))


@needs_compiler
@pytest.mark.parametrize(
    "call",
    [
        lambda x: attention.attend(x(6, 4), x(6, 4), x(5, 4), LAYOUT, 1, 0.0),
        lambda x: attention.attend(x(5, 4), x(5, 4), x(5, 4), LAYOUT, 1, 0.0),
        lambda x: attention.attend(x(6, 4), x(6, 3), x(6, 4), LAYOUT, 1, 0.0),
        lambda x: pointwise.attend_pointwise(x(6, 4), x(6, 3), x(6, 4), LAYOUT, 1, 1.0),
        lambda x: pointwise.attend_pointwise(x(6, 4), x(6, 4), x(5, 4), LAYOUT, 1, 1.0),
        lambda x: pointwise.attend_pointwise(x(6, 4), x(6, 4), x(6, 4), LAYOUT, 1, 1.0, None, x(128)),
        lambda x: relative_sums.relative_sums(x(5, 4), LAYOUT, x(3)),
        lambda x: relative_sums.relative_sums(x(6, 4), LAYOUT, None, x(128)),
        lambda x: attention.BatchLayout(np.array([0, 5]), 6, torch.device("cpu"), times=INTEGERS, query_times=INTEGERS),
        lambda x: ranking.top_k_items(x(3, 4), x(9, 5), 2, NONE, NONE),
        lambda x: ranking.top_k_items(x(3, 4), x(9, 4), 2, torch.zeros(1, dtype=torch.int64), NONE),
        lambda x: ranking.Scores(x(3, 4), x(9, 5)).count_not_below_target(INTEGERS[[0, 0, 0]], NONE, NONE),
        lambda x: ranking.Scores(x(3, 4), x(9, 4)).count_not_below_target(INTEGERS, NONE, NONE),
        lambda x: ranking.Scores(x(2, 4), x(9, 4)).count_not_below_target(INTEGERS, INTEGERS, NONE),
        lambda x: cross_entropy.linear_cross_entropy(x(3, 4), x(9, 5), INTEGERS[[0, 0, 0]], x(3)),
        lambda x: cross_entropy.linear_cross_entropy(x(3, 4), x(9, 4), INTEGERS, x(3)),
        lambda x: cross_entropy.linear_cross_entropy(x(3, 4), x(9, 4), INTEGERS[[0, 0, 0]], x(2)),
        lambda x: cross_entropy.sampled_cross_entropy(x(3, 4), x(9, 4), INTEGERS, x(6), x(3)),
        lambda x: softmax_products.softmax_and_log_p(x(3, 4), INTEGERS[:, None]),
        lambda x: lookup_loss.lookup_cross_entropy(x(3, 4), x(9, 5), INTEGERS[[0, 0, 0]][:, None], x(3)),
        lambda x: lookup_loss.lookup_cross_entropy(x(2, 4), x(9, 4), INTEGERS[[0, 0, 0]][:, None], x(2)),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(call):
    with pytest.raises(ValueError, match="must have shape"):
        call(torch.ones)


@needs_compiler
@pytest.mark.parametrize("targets", [[0, 1], [1, 10], [-(2**40), 1]])
def test_targets_outside_the_table_are_an_error(targets):
    scores = ranking.Scores(torch.ones(2, 4), torch.ones(9, 4))
    with pytest.raises(ValueError, match="targets must be from 1 to 9, not"):
        scores.count_not_below_target(torch.tensor(targets), NONE, NONE)


@needs_compiler
@pytest.mark.parametrize("rows", [[0, 9], [-1, 3]])
def test_rows_outside_the_table_are_an_error(rows):
    with pytest.raises(ValueError, match="rows must be from 0 to 8, not"):
        lookup_loss.lookup_cross_entropy(torch.ones(1, 4), torch.ones(9, 4), torch.tensor([rows]), torch.ones(1))


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "items", "name"), [([0], [10], "items"), ([0], [0], "items"), ([2], [1], "rows"), ([-1], [1], "rows")]
)
def test_seen_pairs_outside_the_table_are_an_error(rows, items, name):
    seen = torch.tensor(rows), torch.tensor(items)
    for call in (
        lambda: ranking.top_k_items(torch.ones(2, 4), torch.ones(9, 4), 2, *seen),
        lambda: ranking.Scores(torch.ones(2, 4), torch.ones(9, 4)).count_not_below_target(torch.tensor([1, 1]), *seen),
    ):
        with pytest.raises(ValueError, match=f"seen_{name} must be from"):
            call()


@pytest.mark.parametrize("offsets", [[1, 2], [0, 3, 2], [0, 7]])
def test_offsets_outside_the_tokens_are_an_error(offsets):
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most the 6 tokens"):
        attention.BatchLayout(np.array(offsets), 6, torch.device("cpu"))
