"""Handlers of Ctrl-C and a scheduler's SIGTERM for each phase of a command; a signal that is ignored stays ignored.

While modules are imported and the config is composed there is nothing to lose, and an exception could leave an import
as another one: the process ends at once. While files are written, an exception lets them be cleaned up. This module
imports little, because the handlers are set only after its import.
"""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], object] | signal.Handlers


class Interrupted(KeyboardInterrupt):
    """A signal's KeyboardInterrupt.

    When a KeyboardInterrupt itself leaves code that `exec` got as text, as dataclasses' does, Python ends the process
    by SIGINT at its exit, whatever status it exits with. Of a subclass it takes no note.
    """


def exit_at_once() -> None:
    """Let a signal end this process with one line and the shell's status of the signal."""
    _handle(_exit_at_once)


def raise_exit() -> None:
    """Let a signal that ends the process at once raise SystemExit with the shell's status from now on."""
    if any(signal.getsignal(number) is _exit_at_once for number in STOP_SIGNALS):
        _handle(_raise_exit)


def raise_interrupt() -> None:
    """Let a signal raise Interrupted, also SIGTERM: a run is recorded as interrupted and can be resumed."""
    _handle(_raise_interrupt)


def use_defaults() -> None:
    """Let a signal end this process silently."""
    _handle(signal.SIG_DFL)


def expect_exit() -> None:
    """Let a signal end this process silently and its exit be fast: the command has ended, only Python's exit follows.

    Python's last collection would visit every object, which takes a second if torch is loaded.
    """
    use_defaults()
    atexit.register(gc.freeze)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raise the Interrupted of a signal after the body, which imports or begins a record; a second does not wait."""
    if not any(signal.getsignal(number) is _raise_interrupt for number in STOP_SIGNALS):  # a notebook, or a launcher
        yield
        return
    arrived: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if arrived:
            _exit_at_once(number, frame)
        arrived.append(number)

    _handle(remember)
    try:
        yield
    finally:
        raise_interrupt()
    if arrived:
        raise Interrupted


def _handle(handler: Handler) -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGINT, and so does a shell for `command &`
            signal.signal(number, handler)


def _exit_at_once(number: int, _: FrameType | None) -> None:
    with suppress(Exception):  # the signal may have interrupted a write to the same stream
        sys.stdout.flush()
    _print_line()
    os._exit(128 + number)


def _raise_exit(number: int, _: FrameType | None) -> None:
    _print_line()
    raise SystemExit(128 + number)


def _raise_interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted


def _print_line() -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
