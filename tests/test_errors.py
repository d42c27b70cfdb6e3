"""Messages in one printable line, spelling suggestions and shortened lists."""

import numpy as np
import pytest
import torch

from sasrec_lab.errors import (
    InputError,
    MissingKey,
    counted,
    did_you_mean,
    explain_out_of_memory,
    first_few,
    nearest,
    printable,
)


def test_the_nearest_option_is_suggested_if_one_is_close():
    assert nearest("hedas", ["heads", "dim"]) == "heads"
    assert nearest("xyz", {"heads": 1, "dim": 2}) is None
    assert did_you_mean("hedas", ["heads", "dim"]) == "; did you mean heads?"
    assert did_you_mean("xyz", ["heads", "dim"]) == ""


def test_a_long_list_is_cut_with_its_remaining_count():
    assert first_few([3, 7, 8]) == "3, 7, 8"
    assert first_few(range(2000), 3) == "0, 1, 2, and 1,997 more"
    assert first_few(["a b", "c", "d"], 2, "; ") == "a b; c; and 1 more"
    assert first_few([]) == ""


def test_a_count_has_its_noun_in_the_plural_unless_it_is_one():
    assert [counted(number, "user") for number in (0, 1, 2, 1234)] == ["0 users", "1 user", "2 users", "1,234 users"]
    assert [counted(2, noun) for noun in ("process", "entry", "key")] == ["2 processes", "2 entries", "2 keys"]


def test_a_missing_key_names_itself_and_the_fix():
    error = MissingKey("run")
    assert error.key == "run"
    assert str(error) == "run has no value; set it on the command line (run=...) or in a config file"


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31mb\r\u202ec\x9b\ud800") == r"a\x1b[31mb\r\u202ec\x9b\ud800"
    assert printable("naïve 中文 🎬") == "naïve 中文 🎬"


def test_an_input_error_is_one_printable_line():
    assert str(InputError("first\n  second\x1b]0;title\x07")) == r"first second\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (lambda: np.empty(2**50), " (8.00 PiB more were needed)"),
        (lambda: torch.empty(2**50), " (4503599627370496 bytes more were needed)"),
        (lambda: torch.empty(2**62, 2**62), ""),
        (lambda: raise_(MemoryError()), ""),
        (
            lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0")),
            " (20.50 GiB more were needed)",
        ),
    ],
)
def test_an_allocation_that_fails_is_one_line(allocate, asked):
    with pytest.raises(InputError) as caught, explain_out_of_memory("lower a"):
        allocate()
    assert str(caught.value) == f"out of memory{asked}; lower a"


def test_another_error_is_not_one_of_memory():
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory("lower a"):
        raise_(RuntimeError("shapes do not fit"))


def raise_(error: BaseException) -> None:
    raise error
