"""Help that goes to `| head` or to a full disk, in a fresh process."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["train", "recommend"])
def test_help_that_is_not_read_to_the_end_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        assert run(command, closed) == (0, "")
    with open("/dev/full", "w") as full:
        assert run(command, full) == (
            1,
            "error: nothing more can be printed: No space left on device; free some space\n",
        )


def run(command: str, stdout) -> tuple[int, str]:
    words = [sys.executable, "-m", f"sasrec_lab.{command}", "--help"]
    done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr
