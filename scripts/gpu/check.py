"""A check on a device: how long it may take, and the rows that it measures."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from sasrec_lab.errors import InputError

Row = dict[str, Any]  # `what` was measured, or `skipped` or `failed` with a reason, then numbers


@dataclass(frozen=True)
class Setting:
    """The device to check, and whether to take sizes that a CPU finishes in seconds."""

    device: torch.device
    tiny: bool


@dataclass(frozen=True)
class Check:
    """A check that yields a row as soon as it is measured; on a GPU it is cut off between rows after `seconds`."""

    name: str
    about: str
    seconds: int
    rows: Callable[[Setting], Iterator[Row]]


def measure(check: Check, setting: Setting, seconds: float) -> Iterator[Row]:
    """Yield the rows of a check, for which there are this many seconds; whatever ends it early is a row too."""
    seconds = min(check.seconds, seconds)
    end = time.perf_counter() + seconds
    rows = chain([None], check.rows(setting))  # so that the time before the first row counts too
    while True:
        if time.perf_counter() > end and not setting.tiny:
            yield {"check": check.name, "what": "the rest", "skipped": f"cut off after {max(seconds, 0):.0f} s"}
            return
        try:
            row = next(rows)
        except StopIteration:
            return
        except InputError as error:
            row, rows = {"what": check.about, "skipped": str(error)}, iter(())
        except Exception as error:  # a card that fails one check is still worth the others
            row, rows = {"what": check.about, "failed": describe(error)}, iter(())
        if row is not None:
            yield {"check": check.name, **row}


def attempt(what: str, function: Callable[[], Row]) -> Row:
    """Return what was measured, or why it could not be, so that the check can continue."""
    try:
        return {"what": what, **function()}
    except InputError as error:
        return {"what": what, "skipped": str(error)}
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return {"what": what, "failed": describe(error)}


def describe(error: Exception) -> str:
    """Return an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over that of the exact tensor, whose device and type count."""
    return float((found.detach().to(exact) - exact.detach()).norm() / exact.detach().norm())
