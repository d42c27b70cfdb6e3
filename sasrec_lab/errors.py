"""Exceptions and warnings for invalid user input, and helpers for their messages."""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# C0 and C1 controls (terminal escapes among them), line separators, changes of writing direction, lone surrogates
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# what torch says if an allocation fails, or if the number of bytes does not fit in 64 bits
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "Storage size calculation overflowed")
_ASKED_FOR = re.compile(r"(?:tried|unable) to allocate ([\d.,]+ ?(?:bytes|[KMGTPE]i?B))", re.IGNORECASE)

_LONGEST = 1500  # characters of a message; its begin has the key and the file, its end the fix


def printable(text: str) -> str:
    """Return the text with control characters as visible escapes, so that a terminal shows them and obeys none."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, limit: int = 60, quotes: int = 0) -> str:
    """Return a value for a message; a long one, such as a number of 5,000 digits, is cut in its middle.

    `quotes` of its characters are not counted.
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]} ({len(text) - quotes:,} characters)"


def shown(value: object) -> str:
    """Return the repr of any value for a message, shortened; Python refuses that of integers of over 4,300 digits."""
    try:
        return shortened(repr(value), quotes=2 if isinstance(value, str) else 0)
    except ValueError:
        return f"a value of type {type(value).__name__} that is too long to print"


class InputError(ValueError):
    """Invalid user input. The message is one line: the key (or file and row), the value, the rule, the fix."""

    def __init__(self, message: str):
        super().__init__(shortened(printable(" ".join(line.strip() for line in message.splitlines())), _LONGEST))


class InputWarning(UserWarning):
    """Something in the input that a user should know but need not fix. The message is one line."""


def warn(message: str) -> None:
    """Give an InputWarning at the line of the code that called this package, however deep in it this is."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("sasrec_lab."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, InputWarning, stacklevel=depth + 1)


class Pruned(Exception):
    """The end of a run that a search has stopped early. The message is one line with the reason."""


class FolderInUse(InputError):
    """A folder that another process is writing to."""


class ProcessLost(InputError):
    """Another process of a run on several devices has ended. The run can be resumed."""


class MissingKey(InputError):
    """A config key without a value."""

    def __init__(self, key: str):
        super().__init__(f"{key} has no value; set it on the command line ({key}=...) or in a config file")
        self.key = key


@contextmanager
def explain_out_of_memory(fix: str) -> Iterator[None]:
    """Turn the error of an allocation that fails in the body into an InputError that ends in `fix`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        asked = _ASKED_FOR.search(str(error))
        raise InputError(f"out of memory{f' ({asked[1]} more were needed)' if asked else ''}; {fix}") from error


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelled most like the word or has it as first part, or None if no option is close."""
    options = list(options)
    longer = [option for option in options if option.startswith(f"{word}_")]
    return next(iter(difflib.get_close_matches(word, options, n=1) or longer), None)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean x?` with the nearest option, or an empty string."""
    suggestion = nearest(word, options)
    return f"; did you mean {suggestion}?" if suggestion else ""


def first_few(values: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """Return the first values and how many follow, such as `3, 7, 8, and 12 more`."""
    values = list(values)
    rest = [f"and {len(values) - limit:,} more"] if len(values) > limit else []
    return separator.join([*map(str, values[:limit]), *rest])


def counted(number: int, noun: str) -> str:
    """Return the number and its noun, in the plural unless it is one: `1 user`, `1,234 users`, `2 processes`."""
    if number == 1:
        return f"{number:,} {noun}"
    plural = re.sub(r"(?<=[^aeiou])y$", "ie", noun) + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"
