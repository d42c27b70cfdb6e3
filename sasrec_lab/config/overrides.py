"""Quote and check overrides for Hydra's grammar and the shell."""

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from sasrec_lab.config.convert import flatten, known_keys
from sasrec_lab.config.flags import flags_first
from sasrec_lab.config.hydra_internals import known_flags
from sasrec_lab.config.schema import CONF_DIR, SCHEMAS
from sasrec_lab.errors import InputError, nearest, shortened

_SINGLE_PATHS = ("run", "lists", "output", "interactions", "hydra.run.dir", "hydra.sweep.dir")  # a comma is part of it
_MAX_KEY = 200  # characters: file systems allow no longer name of a group's folder
_MAX_SHOWN = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # without tab and line feed
_PATHS = (*_SINGLE_PATHS, "data_dir", "ckpt", "init_from", "dataset.path")  # commas in the last four separate jobs


def normalize(words: list[str]) -> list[str]:
    """Return a command line as Hydra accepts it: flags first, and paths in the quotes that the grammar asks for.

    The folder of a job, such as 0-model.dim=8,seed=1, contains characters that have a meaning in the grammar.
    """
    return [_quote_path(word) for word in flags_first(words)]


def format_override(key: str, value: str) -> str:
    """Return `key=value` as a word that Hydra reads as exactly this value."""
    override = _parse(f"{key}={value}")
    is_exact = override is not None and not override.is_sweep_override() and str(override.value()) == value
    return f"{key}={value}" if is_exact else _quote(key, value)


def check_syntax(words: list[str], name: str = "train") -> None:
    """Raise InputError for the first word that Hydra's grammar rejects, with the word to write instead.

    `name` is the command: train, recommend, evaluate or search.
    """
    for before, word in zip(["", *words], words, strict=False):
        shown, (key, equals, _) = shortened(word, _MAX_SHOWN), word.partition("=")
        if _CONTROL.search(word) or not is_utf8(word):
            raise InputError(f"{shown} contains control characters or bytes that are not UTF-8; remove them")
        if not equals and not word.startswith("~"):
            fix = (
                f"remove the space: {shortened(before + word)}"
                if before.endswith("=")
                else _suggest_override(word, name)
            )
            raise InputError(f"{shown} is not of the form key=value; {fix}")
        if not key:
            raise InputError(f"{shown} has no key before the '='; write <key>{shown}")
        if len(key) > _MAX_KEY:
            raise InputError(f"{shown} has a key of {len(key):,} characters; --help lists the keys")
        if _parse(word) is None:
            raise _syntax_error(word, shown)
        if word.startswith("~"):
            _check_deletion(word, SCHEMAS[name])


def typed_keys(overrides: list[str]) -> set[str]:
    """Return the keys that the overrides set, each key of a typed dictionary included."""
    keys = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.get_key_element().lstrip("+~"), override.value()
        keys |= set(flatten(value, f"{key}.", ".")) if isinstance(value, dict) else {key}
    return keys


def is_utf8(word: str) -> bool:
    """Return whether an argument is text: bytes that are not UTF-8 are lone surrogates in it."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _syntax_error(word: str, shown: str) -> InputError:
    """Return the error for a word that the grammar rejects."""
    key, _, value = word.partition("=")
    if value.startswith("="):
        return InputError(f"{shown} has more than one '='; write {key}={value.lstrip('=')}")
    if key.strip(" '\"") != key and _parse(bare := word.strip(" '\"")) is not None:
        return InputError(f"{shown} has a stray quote or blank; write {shortened(bare, _MAX_SHOWN)}")
    if _parse(f"{key}=1") is None:
        return InputError(f"{shown} has a malformed key; keys are names with dots between them, such as model.dim")
    if re.search(r"\d{1000}", value):
        return InputError(f"{shown} is a number of too many digits; write a shorter one")
    if any(value.count(opening) > value.count(closing) for opening, closing in ("[]", "{}", "()")):
        return InputError(f"{shown} has an unclosed bracket; close it, or quote the whole word if it contains spaces")
    quoted = _quote_each(key, value)
    if _parse(quoted) is None or shown != word:
        return InputError(f"{shown} has a value that cannot be read; close its quotes and brackets")
    return InputError(
        f"{shown} needs quotes around the value, and quotes around these for the shell; write {shlex.quote(quoted)}"
    )


def _suggest_override(word: str, name: str) -> str:
    """Return what to write instead of a word without '=': a flag, a run's folder, a data file, a key or a choice."""
    if len(word) > _MAX_KEY:
        return "--help lists the keys"
    if f"--{word}" in known_flags():
        return f"write --{word}"
    if name in ("recommend", "evaluate") and ("/" in word or Path(word).is_dir()):
        return f"write {shlex.quote(format_override('run', word))}"
    if name == "train" and word.endswith((".csv", ".csv.gz", ".tsv", ".txt", ".dat")):
        return f"write dataset=csv {shlex.quote(format_override('dataset.path', word))}"
    choices = {file.stem: file.parent.name for file in Path(CONF_DIR).glob("[!h]*/*.yaml")}  # not hydra/'s
    if name == "train" and word in choices:
        return f"write {choices[word]}={word}"
    keys = known_keys(SCHEMAS[name])
    if word in keys:
        return f"write {word}=<value>"
    suggestion = nearest(word, keys)
    return f"did you mean {suggestion}=<value>?" if suggestion else "--help lists the keys"


def _check_deletion(word: str, schema: type) -> None:
    """Raise InputError if a word such as `~model.dim` deletes a key that has a type and thus needs a value."""
    key = word[1:].partition("=")[0]
    if key in known_keys(schema) and not key.startswith("trainer."):
        raise InputError(f"{word} would delete a key that every run needs; remove {word}, or write {key}=<value>")


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
    except (HydraException, ValueError, RecursionError):  # numbers of 5,000 digits, brackets in brackets
        return None


def _quote(key: str, value: str) -> str:
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def _quote_each(key: str, value: str) -> str:
    """Quote the value, or each element of a list."""
    if not (value.startswith("[") and value.endswith("]")):
        return _quote(key, value.strip("'\""))
    elements = (element.strip(" '\"") for element in value[1:-1].split(","))
    return f"{key}=[{','.join(QuotedString(element, Quote.double).with_quotes() for element in elements)}]"
