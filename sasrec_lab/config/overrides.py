"""Quote and check overrides for Hydra's grammar and the shell."""

import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from sasrec_lab.config.hydra_internals import parse_known_flags
from sasrec_lab.errors import InputError

_SINGLE_PATHS = ("run", "output", "interactions", "hydra.run.dir", "hydra.sweep.dir")  # a comma is part of the path
_PATHS = (*_SINGLE_PATHS, "data_dir", "ckpt", "dataset.path")  # a comma in the last three separates jobs of a sweep


def normalize(words: list[str]) -> list[str]:
    """Return a command line as Hydra accepts it: flags first, and paths in the quotes that the grammar asks for.

    The folder of a job, such as 0-model.dim=8,seed=1, contains characters that have a meaning in the grammar.
    """
    return [_quote_path(word) for word in _flags_first(words)]


def format_override(key: str, value: str) -> str:
    """Return `key=value` as a word that Hydra reads as exactly this value."""
    override = _parse(f"{key}={value}")
    is_exact = override is not None and not override.is_sweep_override() and str(override.value()) == value
    return f"{key}={value}" if is_exact else _quote(key, value)


def check_syntax(words: list[str]) -> None:
    """Raise InputError for the first word that Hydra's grammar rejects, with the word to write instead."""
    for before, word in zip(["", *words], words, strict=False):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            fix = f"remove the space: {before}{word}" if before.endswith("=") else f"write {word}=<value>"
            raise InputError(f"{word} is not of the form key=value; {fix}")
        if not key:
            raise InputError(f"{word} has no key before the '='; write <key>{word}")
        if _parse(word) is not None:
            continue
        if value.startswith("="):
            raise InputError(f"{word} has more than one '='; write {key}={value.lstrip('=')}")
        if any(value.count(opening) > value.count(closing) for opening, closing in ("[]", "{}", "()")):
            raise InputError(f"{word} has an unclosed bracket; close it, or quote the whole word if it contains spaces")
        quoted = shlex.quote(_quote_each(key, value))
        raise InputError(f"{word} needs quotes around the value, and quotes around these for the shell; write {quoted}")


def _flags_first(words: list[str]) -> list[str]:
    """Move the flags to the front, because Hydra 1.3 accepts overrides on one side of a flag only."""
    flags, others = parse_known_flags(words)
    if not others or any(word.startswith("-") for word in others):
        return words
    remaining = list(words)
    for word in (*flags.overrides, *others):
        remaining.remove(word)
    return [*remaining, *flags.overrides, *others]


def _quote_path(word: str) -> str:
    """Quote the value of a path that the grammar rejects, or would split at a comma."""
    key, _, path = word.partition("=")
    if key not in _PATHS:
        return word
    override = _parse(word)
    is_read = override is not None and not (override.is_sweep_override() and key in _SINGLE_PATHS)
    return word if is_read else _quote(key, path)


def _parse(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _quote(key: str, value: str) -> str:
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def _quote_each(key: str, value: str) -> str:
    """Quote the value, or each element of a list."""
    if not (value.startswith("[") and value.endswith("]")):
        return _quote(key, value.strip("'\""))
    elements = (element.strip(" '\"") for element in value[1:-1].split(","))
    return f"{key}=[{','.join(QuotedString(element, Quote.double).with_quotes() for element in elements)}]"
