"""Exceptions and warnings for invalid user input, and helpers for their messages."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid user input. The message is one line: the key (or file and row), the value, the rule, the fix."""


class InputWarning(UserWarning):
    """Something in the input that a user should know but need not fix. The message is one line."""


class FolderInUse(InputError):
    """A folder that another process is writing to."""


class MissingKey(InputError):
    """A config key without a value."""

    def __init__(self, key: str):
        super().__init__(f"{key} has no value; set it on the command line ({key}=...) or in a config file")
        self.key = key


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelled most like the word, or None if no option is close."""
    return next(iter(difflib.get_close_matches(word, list(options), n=1)), None)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean x?` with the nearest option, or an empty string."""
    suggestion = nearest(word, options)
    return f"; did you mean {suggestion}?" if suggestion else ""


def first_few(values: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """Return the first values and how many follow, such as `3, 7, 8, and 12 more`."""
    values = list(values)
    rest = [f"and {len(values) - limit:,} more"] if len(values) > limit else []
    return separator.join([*map(str, values[:limit]), *rest])
