"""What is said of a user's mistake."""

import difflib


class InputError(ValueError):
    """A user's mistake. The message is one line: the key or the file and row, the value, the rule, the fix."""


class InputWarning(UserWarning):
    """What a user should know of the input and need not mend. The message is one line."""


class FolderInUse(InputError):
    """Another process runs in the folder."""


class MissingKey(InputError):
    """A key has no value."""

    def __init__(self, key: str):
        super().__init__(f"{key} has no value; give it one, in a file or on the command line")
        self.key = key


def did_you_mean(word: str, options: list[str]) -> str:
    """`; did you mean x?` for the nearest option, or nothing."""
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
