"""The library of compiled functions itself; what they compute is tested beside the Python function that calls them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab import kernels

TWINS = (
    "test_attention.py::test_the_compiled_form_is_the_bucketed_one",
    "test_losses.py::test_softmax_on_three_threads",
    "test_losses.py::test_a_hopeless_target_beside_ordinary_ones",
    "test_losses.py::test_with_every_item_drawn_once_it_is_the_full_softmax",
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWINS]
    env = os.environ | {"CXX": f"{os.environ.get('CXX', 'g++')} {flags}"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def test_without_a_compiler_there_are_no_kernels_and_no_error():
    for compiler in ("", "no-such-compiler", "false"):
        code = "from sasrec_lab import kernels; assert kernels.library() is None"
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CXX": compiler})


@pytest.mark.parametrize("argument", [None, "8", True, np.int64(8), [1.0]])
def test_a_kernel_refuses_what_it_would_misread(argument):
    with pytest.raises(TypeError, match="a kernel takes"):
        kernels._argument(argument)
