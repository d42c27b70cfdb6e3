"""The library of compiled functions itself; what they compute is tested beside the Python function that calls them."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec_lab import kernels

TWINS = (
    "test_model.py::test_dropout_keeps_the_mean_and_drops_at_its_rate",
    "test_model.py::test_the_gradient_is_dropped_where_the_value_was_on_any_number_of_threads",
    "test_attention.py::test_the_compiled_form_is_the_bucketed_one",
    "test_model.py::test_a_compiled_block_is_the_plain_one",
    "test_model.py::test_nan_in_a_compiled_block_stays_and_stays_with_its_sequence",
    "test_attention.py::test_compiled_dropout_drops_at_its_rate_keeps_the_mean_and_follows_the_seed",
    "test_attention.py::test_masks_of_neighbouring_sequences_and_heads_are_independent",
    "test_attention.py::test_compiled_dropout_has_the_gradients_of_its_own_mask",
    "test_losses.py::test_softmax_on_three_threads",
    "test_losses.py::test_a_hopeless_target_beside_ordinary_ones",
    "test_losses.py::test_with_every_item_drawn_once_it_is_the_full_softmax",
    "test_losses.py::test_the_compiled_softmax_keeps_nan",
    "test_losses.py::test_autocast_is_close",
    "test_metrics.py::test_compiled_ranks_against_a_sort",
    "test_metrics.py::test_a_compiled_score_is_the_same_to_the_last_bit_wherever_it_is_made",
    "test_topk.py",
)


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx", "-fsanitize=undefined -fno-sanitize-recover"])
def test_other_processors_and_a_stricter_compiler_compute_the_same(flags):
    """Narrower registers; none that have a product and a sum in one; no step outside what C++ defines."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are x86-64's")
    check_twins_with(f"{shlex.join(kernels._compilers()[0])} {flags}")


@pytest.mark.parametrize("compiler", ["clang++", "ziglang"])
def test_other_compilers_compute_the_same(compiler):
    if compiler == "ziglang" and find_spec("ziglang"):
        compiler = f"{shlex.quote(sys.executable)} -m ziglang c++"
    elif not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    check_twins_with(compiler)


def check_twins_with(compiler: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWINS]
    env = os.environ | {"CXX": compiler}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "on_path", "packages", "compilers"),
    [
        ({}, {"g++", "clang++"}, {"ziglang"}, [["g++"], ["clang++"], [sys.executable, "-m", "ziglang", "c++"]]),
        ({}, {"clang++"}, set(), [["clang++"]]),
        ({}, set(), {"ziglang"}, [[sys.executable, "-m", "ziglang", "c++"]]),
        ({}, set(), set(), []),
        ({"CXX": "ccache 'my g++'"}, {"g++"}, {"ziglang"}, [["ccache", "my g++"]]),
        ({"CXX": ""}, {"g++"}, {"ziglang"}, []),
        ({"CXX": "g++ 'a quote without its other"}, {"g++"}, {"ziglang"}, []),
    ],
)
def test_which_compilers_are_tried(environment, on_path, packages, compilers, monkeypatch):
    monkeypatch.setattr(kernels.os, "environ", environment)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name in on_path)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name in packages)
    assert kernels._compilers() == compilers


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
def test_a_compiler_that_fails_is_followed_by_the_next(monkeypatch):
    (works,) = kernels._compilers()[:1]
    monkeypatch.setattr(kernels, "_compilers", lambda: [["no-such-compiler"], ["false"], works])
    assert kernels.library.__wrapped__() is not None
    monkeypatch.setattr(kernels, "_compilers", lambda: [["no-such-compiler"], ["false"]])
    assert kernels.library.__wrapped__() is None


FEWER_THREADS = """
import torch
from sasrec_lab import kernels
from sasrec_lab.metrics import Scores
torch.set_num_threads(4)
states, table, none = torch.ones(3, 2), torch.ones(500, 2), torch.zeros(0, dtype=torch.long)
assert Scores(states, table).not_below_target(torch.tensor([1, 2, 3]), none, none).tolist() == [500] * 3
table[7] = 400.0  # so that the sums are made again
made = torch.empty(3), torch.empty(3, 2), torch.empty(500, 2)
kernels.call("softmax_products", states, 3, 2, table, 500, none, none, states, 0, torch.ones(3), 16, *made)
torch.testing.assert_close(made[0], torch.full((3,), 2.0 - 800.0))
"""


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}, {}], ids=str)
def test_with_fewer_threads_than_torch_has_set_they_compute_the_same(limit):
    subprocess.run([sys.executable, "-c", FEWER_THREADS], check=True, env=os.environ | limit)


def test_tensors_that_no_kernel_serves_have_none_compiled(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: pytest.fail("compiled"))
    assert not kernels.serve(torch.zeros(2, device="meta"))
    assert not kernels.serve(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_without_a_compiler_there_are_no_kernels_and_no_error():
    for compiler in ("", "no-such-compiler", "false"):
        code = "from sasrec_lab import kernels; assert kernels.library() is None"
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CXX": compiler})


@pytest.mark.parametrize("argument", [None, "8", True, np.int64(8), [1.0]])
def test_a_kernel_refuses_what_it_would_misread(argument):
    with pytest.raises(TypeError, match="a kernel takes"):
        kernels._argument(argument)
