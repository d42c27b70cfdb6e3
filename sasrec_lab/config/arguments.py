"""Parser of the arguments of the commands that take no config, whose errors are one line."""

import argparse
from typing import NoReturn

from sasrec_lab.errors import InputError, did_you_mean


class Arguments(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are InputErrors."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        if message.startswith("the following arguments are required"):
            names = (action.metavar or action.dest for action in self._actions if not action.option_strings)
            message += f": write {self.prog} {' '.join(f'<{name}>' for name in names)}"
        raise InputError(f"{message}; --help lists the options")

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Return the arguments.

        Raises:
            InputError: an option is unknown (the message names the nearest one), or an argument is missing.
        """
        options = [option for action in self._actions for option in action.option_strings]
        for word in words:
            option = word.partition("=")[0]
            if "\0" in word:
                raise InputError(f"{word} contains a NUL character; remove it")
            if option.startswith("--") and option not in options:
                raise InputError(f"unknown option {option}{did_you_mean(option, options) or '; --help lists them'}")
        return self.parse_args(words)
