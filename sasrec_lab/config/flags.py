"""Read and check the flags of a command line, such as `-m` and `--cfg job`, before Hydra reads them."""

from argparse import Namespace

from sasrec_lab.config.convert import known_keys
from sasrec_lab.config.hydra_internals import known_flags, parse_flags
from sasrec_lab.config.schema import SCHEMAS
from sasrec_lab.errors import InputError, nearest, shortened

_ACTIONS = {
    "cfg": "--cfg",
    "info": "--info",
    "multirun": "-m",
    "run": "--run",
    "shell_completion": "--shell-completion",
}
_COMPLETIONS = ("install", "uninstall", "query")


def flags_first(words: list[str]) -> list[str]:
    """Move the flags to the front, so that overrides can be appended: Hydra 1.3 reads them on one side of a flag only.

    Raises:
        InputError: a flag lacks its value, or has one that it does not take.
    """
    flags, others = parse_flags(words)
    if any(word.startswith("-") for word in others):  # unknown flags, which read_flags reports
        return words
    overrides = [*flags.overrides, *others]
    remaining = list(words)
    for word in overrides:
        remaining.remove(word)
    if overrides and remaining and remaining[-1] in ("--info", "-i"):
        remaining.append("all")  # its default; without it the first override would be taken for its value
    return [*remaining, *overrides]


def read_flags(argv: list[str], name: str) -> Namespace:
    """Return the flags and the `overrides` of a command line of the command `name`.

    Raises:
        InputError: a flag is unknown or abbreviated, or two flags exclude each other.
    """
    flags, others = parse_flags(argv)
    if others:
        raise InputError(_describe_unknown(others[0], name))
    actions = [flag for attribute, flag in _ACTIONS.items() if getattr(flags, attribute)]
    if len(actions) > 1 and not flags.help:
        raise InputError(f"{actions[0]} and {actions[1]} exclude each other; remove one")
    if flags.multirun and name != "train":
        raise InputError(f"{name} cannot run a sweep; remove -m")
    for attribute, flag in (("resolve", "--resolve"), ("package", "--package")):
        if (
            getattr(flags, attribute) not in (None, False)
            and not flags.cfg
            and not (flags.help and attribute == "resolve")
        ):
            raise InputError(f"{flag} only applies to a printed config; add --cfg job, or remove {flag}")
    if flags.shell_completion:
        _check_completion(flags.overrides)
    return flags


def _describe_unknown(word: str, name: str) -> str:
    """Return the message on a word that is not a flag, with the nearest flag or key."""
    flag, equals, value = shortened(word).partition("=")
    flags, keys = known_flags(), known_keys(SCHEMAS[name])
    found = nearest("--" + flag.lstrip("-"), [*flags, *(f"--{key}" for key in keys)])
    if found in flags:
        return f"{flag} is not a flag; did you mean {found}?"
    if found:
        return f"{flag} is not a flag, and keys have no dashes; write {found[2:]}={value if equals else '<value>'}"
    return f"{flag} is not a flag; --hydra-help lists the flags, and --help the keys"


def _check_completion(words: list[str]) -> None:
    given = [word.partition("=")[0] for word in words]
    if len(given) != 1 or given[0] not in _COMPLETIONS:
        raise InputError("--shell-completion takes one of install=bash, install=zsh and install=fish; add one")
