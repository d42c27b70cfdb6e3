"""What is printed, where a pipe closes or the disk behind it is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sasrec_lab.errors import InputError


@contextmanager
def printed() -> Iterator[None]:
    """What prints in here and does nothing else may end early: `| head` has read enough.

    Raises:
        InputError: what stdout leads to takes no more.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
        if not isinstance(error, BrokenPipeError):
            raise InputError(f"nothing more can be printed: {error.strerror}; free some space") from error
