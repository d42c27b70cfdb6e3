"""The words of a command line as Hydra's grammar and the shell take them.

As config.py it imports neither torch nor Lightning.
"""

import shlex

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from sasrec_lab.errors import InputError

_ONE_PATH = ("run", "output", "interactions", "hydra.run.dir", "hydra.sweep.dir")  # a comma is part of it
_PATHS = (*_ONE_PATH, "data_dir", "ckpt", "dataset.path")  # of the others a comma makes a sweep


def normalize(words: list[str]) -> list[str]:
    """A command as Hydra takes it: its flags first, and around a path the quotes that the grammar asks for.

    A job's folder, 0-model.dim=8,seed=1 for one, has signs that mean something there.
    """
    return [_quoted_path(word) for word in _flags_first(words)]


def _flags_first(words: list[str]) -> list[str]:
    """Hydra takes overrides on one side of a flag only."""
    args, others = get_args_parser().parse_known_args(words)
    if not others or any(word.startswith("-") for word in others):
        return words
    flags = list(words)
    for word in (*args.overrides, *others):
        flags.remove(word)
    return [*flags, *args.overrides, *others]


def _quoted_path(word: str) -> str:
    key, _, path = word.partition("=")
    if key not in _PATHS:
        return word
    read = _read(word)
    is_read = read is not None and not (read.is_sweep_override() and key in _ONE_PATH)
    return word if is_read else _quoted(key, path)


def format_override(key: str, value: str) -> str:
    """`key=value` as a word that Hydra reads as just that."""
    read = _read(f"{key}={value}")
    plain = read is not None and not read.is_sweep_override() and str(read.value()) == value
    return f"{key}={value}" if plain else _quoted(key, value)


def check_syntax(words: list[str]) -> None:
    """Raises InputError for a word that Hydra's grammar does not take."""
    for before, word in zip(["", *words], words, strict=False):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            joined = before.endswith("=")
            fix = f"leave out the blank: {before}{word}" if joined else f"write {word}=<value>"
            raise InputError(f"{word} is no key=value; {fix}")
        if not key:
            raise InputError(f"{word} has no key before the '='; write <key>{word}")
        if _read(word) is not None:
            continue
        if value.startswith("="):
            raise InputError(f"{word} has one '=' too many; write {key}={value.lstrip('=')}")
        if any(value.count(opening) > value.count(closing) for opening, closing in ("[]", "{}", "()")):
            raise InputError(f"{word} does not close a bracket; put quotes around the whole word where it has blanks")
        quoted = shlex.quote(_each_quoted(key, value))
        raise InputError(f"{word} has a sign that needs quotes around the value, themselves quoted: {quoted}")


def _read(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _quoted(key: str, value: str) -> str:
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def _each_quoted(key: str, value: str) -> str:
    """The value in quotes, or of a list each element."""
    if not (value.startswith("[") and value.endswith("]")):
        return _quoted(key, value.strip("'\""))
    elements = (element.strip(" '\"") for element in value[1:-1].split(","))
    return f"{key}=[{','.join(QuotedString(element, Quote.double).with_quotes() for element in elements)}]"
