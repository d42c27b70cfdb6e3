"""Explain failures of torch and Lightning that a user can mend, in one line.

It looks at the names of types, so that no command imports torch for it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sasrec_lab.errors import InputError, ProcessLost

_LOST = re.compile(r"gloo.*(Read error|Write error|Connection (closed|reset))|remote process exited|Broken pipe")
_LOST_LINE = "another process of this run ended, so the run ends; resume it with ckpt=last"
_ANOMALY = "returned nan values"  # of trainer.detect_anomaly


@contextmanager
def explaining_failures() -> Iterator[None]:
    """Raise an InputError in place of a failure that `explain` knows."""
    try:
        yield
    except Exception as error:  # torch's and Lightning's errors share no base class
        if _is_lost(error):
            raise ProcessLost(_LOST_LINE) from error
        if line := explain(error):
            raise InputError(line) from error
        raise


def explain(error: Exception) -> str | None:
    """Return one line on what a user can do about a failure, or None if there is nothing or the error has a line."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if name == "MisconfigurationException":
        return f"trainer: {text}"
    if _is_lost(error):
        return _LOST_LINE
    if name == "RuntimeError" and _ANOMALY in text:
        return f"training diverged: {text}; lower optimizer.lr or set trainer.gradient_clip_val=1"
    return None


def _is_lost(error: Exception) -> bool:
    """Return whether the failure is that of a connection to a process that has ended."""
    return type(error).__name__ in ("RuntimeError", "DistBackendError") and bool(
        _LOST.search(" ".join(str(error).split()))
    )
