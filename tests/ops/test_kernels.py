"""The library of compiled functions itself; what they compute is tested beside the Python function that calls them."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec_lab.ops import library as kernels

TWINS = (
    "model/test_model.py::test_dropout_keeps_the_mean_and_drops_at_its_rate",
    "model/test_model.py::test_the_gradient_is_dropped_where_the_value_was_on_any_number_of_threads",
    "ops/test_attention.py::test_the_compiled_form_is_the_bucketed_one",
    "model/test_model.py::test_a_compiled_block_is_the_plain_one",
    "model/test_model.py::test_nan_in_a_compiled_block_stays_and_stays_with_its_sequence",
    "ops/test_attention.py::test_compiled_dropout_drops_at_its_rate_keeps_the_mean_and_follows_the_seed",
    "ops/test_attention.py::test_masks_of_neighbouring_sequences_and_heads_are_independent",
    "ops/test_attention.py::test_compiled_dropout_has_the_gradients_of_its_own_mask",
    "training/test_losses.py::test_softmax_on_three_threads",
    "training/test_losses.py::test_a_hopeless_target_beside_ordinary_ones",
    "training/test_losses.py::test_with_every_item_drawn_once_it_is_the_full_softmax",
    "training/test_losses.py::test_the_compiled_softmax_keeps_nan",
    "training/test_losses.py::test_autocast_is_close",
    "evaluation/test_metrics.py::test_compiled_ranks_against_a_sort",
    "evaluation/test_metrics.py::test_a_compiled_score_is_the_same_to_the_last_bit_wherever_it_is_made",
    "ops/test_ranking.py",
)


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "flags", ["-mno-avx512f", "-mno-avx", "-fsanitize=undefined -fsanitize-undefined-trap-on-error"]
)
def test_other_processors_and_a_stricter_compiler_compute_the_same(flags):
    """Narrower registers; none that have a product and a sum in one; no step outside what C++ defines."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are x86-64's")
    check_twins_with(f"{shlex.join(kernels.find_kernels().compiler)} {flags}")


@pytest.mark.parametrize("name", ["clang++", "ziglang"])
def test_other_compilers_compute_the_same(name):
    command = name
    if name == "ziglang" and find_spec("ziglang"):
        command = f"{shlex.quote(sys.executable)} -m ziglang c++"
    elif not shutil.which(name):
        pytest.skip(f"needs {name}")
    check_twins_with(command)


def check_twins_with(cxx: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWINS]
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
        ({"CXX": "g++ 'a quote without its other"}, {"g++"}, {"ziglang"}, []),
    ],
)
def test_which_compilers_are_tried(environment, on_path, packages, compilers, monkeypatch):
    monkeypatch.setattr(kernels.os, "environ", environment)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name in on_path)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name in packages)
    assert kernels.compilers() == compilers


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
def test_a_compiler_that_fails_is_followed_by_the_next(monkeypatch):
    works = kernels.find_kernels().compiler
    monkeypatch.setattr(kernels, "compilers", lambda: [["no-such-compiler"], ["false"], works])
    assert kernels.find_kernels.__wrapped__().compiler == works


@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
def test_kernels_that_are_compiled_are_taken_and_broken_ones_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works = kernels.find_kernels().compiler
    monkeypatch.setattr(kernels, "compilers", lambda: [works])
    assert kernels.find_kernels.__wrapped__().library is not None
    made = []
    monkeypatch.setattr(
        kernels, "_compile", lambda command, path: made.append(command) or path.write_text("no library")
    )
    other = [*works, "-other"]
    monkeypatch.setattr(kernels, "compilers", lambda: [other, works])
    assert (kernels.find_kernels.__wrapped__().compiler, made) == (works, [])
    monkeypatch.setattr(kernels, "compilers", lambda: [other])
    for times in (1, 2):
        assert kernels.find_kernels.__wrapped__().library is None
        assert made == [other] * times


@pytest.mark.parametrize(
    ("commands", "told"),
    [
        ([["no-such-compiler"]], "no-such-compiler: no such command"),
        ([["false"], ["sh", "-c", "sleep 60"]], "false: exit code 1; sh: not done in 0 s"),
        ([["sh", "-c", "echo ' x.h: error: no' >&2; exit 1"]], "sh: x.h: error: no"),
    ],
)
def test_why_no_compiler_worked_is_told(commands, told, monkeypatch, tmp_path):
    run = subprocess.run

    def impatient(command, timeout, **given):
        return run(command, timeout=0.2 if "sleep 60" in command else timeout, **given)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "compilers", lambda: commands)
    monkeypatch.setattr(kernels.subprocess, "run", impatient)
    assert kernels.find_kernels.__wrapped__() == kernels.Kernels(None, [], told)


def test_where_there_is_no_compiler_it_is_told_how_to_get_one(monkeypatch):
    monkeypatch.setattr(kernels, "compilers", list)
    monkeypatch.delenv("CXX", raising=False)
    told = kernels.find_kernels.__wrapped__().missing
    assert re.fullmatch(r"no C\+\+ compiler; .+ -m pip install ziglang brings one", told)
    monkeypatch.setenv("CXX", "")
    assert kernels.find_kernels.__wrapped__().missing == "CXX names no compiler"


FEWER_THREADS = """
import torch
from sasrec_lab import kernels
from sasrec_lab.metrics import Scores
torch.set_num_threads(4)
states, table, none = torch.ones(3, 2), torch.ones(500, 2), torch.zeros(0, dtype=torch.long)
assert Scores(states, table).count_not_below_target(torch.tensor([1, 2, 3]), none, none).tolist() == [500] * 3
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
    assert not kernels.supports(torch.zeros(2, device="meta"))
    assert not kernels.supports(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_without_a_compiler_there_are_no_kernels_and_no_error():
    for cxx in ("", "no-such-compiler", "false"):
        code = "from sasrec_lab import kernels; assert kernels.library() is None"
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CXX": cxx})


@pytest.mark.parametrize("argument", [None, "8", True, np.int64(8), [1.0]])
def test_a_kernel_refuses_what_it_would_misread(argument):
    with pytest.raises(TypeError, match="a kernel takes"):
        kernels._argument(argument)
