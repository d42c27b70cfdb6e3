"""Parts of a run that are the user's own code: `package.module:Name` in the place of a built-in part's name.

A config only names such a part, and reading it imports nothing: foreign_code.py does, for parts that are trusted. These
are the parts that the user named, on the command line, in a config of theirs or by `trust`; a name in a run folder is
data. docs/extend.md says what a part of each kind must provide.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from sasrec_lab.config.checks import typed_form
from sasrec_lab.errors import InputError, did_you_mean

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
OPTIONS = "options"  # the parameter that takes a part's options; its annotation is their dataclass
_PLACES = (("objective", "name"), ("loss", "name"), ("loss", "sampler"), ("model", "block"), ("model", "head"))
_E = TypeVar("_E", bound=Enum)


class Kind(NamedTuple):
    """What a part of a kind provides: with how many arguments it is called, and which attributes it has."""

    noun: str
    takes: tuple[str, ...]
    has: tuple[str, ...] = ()


LOSS = Kind("loss", ("states", "table", "labels", "negatives", "cfg"))
SAMPLER = Kind("sampler", ("holdout", "count"), ("per", "draw"))
BLOCK = Kind("block", ("cfg",), ("forward",))
HEAD = Kind("head", ("num_items", "cfg"), ("forward", "item_vectors"))
OBJECTIVE = Kind("objective", ("cfg", "model"), ("training", "inference", "count_tokens"))
METRIC = Kind("metric", ("ranked", "k"))
CALLBACK = Kind("callback", ())


@dataclass(frozen=True)
class Foreign:
    """A part that the user brings: the key that names it, its name `package.module:Name`, and its options."""

    key: str
    name: str
    kind: Kind
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    is_trusted: bool = field(default=False, compare=False)

    @property
    def module(self) -> str:
        """Return the module that has the part."""
        return self.name.partition(":")[0]

    @property
    def title(self) -> str:
        """Return the part's name in its module."""
        return self.name.partition(":")[2]


@dataclass
class OwnPart:
    """A part that a mapping names: one of `callbacks`, or of `evaluation.metrics`."""

    name: Foreign
    options: dict[str, Any] = field(default_factory=dict)


def options_key(key: str) -> str:
    """Return the key with the options of the part that `key` names: of a section's `name` and `block` just `options`.

    A section may have two parts, so the other one's are named after it, such as `loss.sampler_options`.
    """
    section, _, name = key.rpartition(".")
    return f"{section}.{OPTIONS if name in ('name', 'block') else f'{name}_{OPTIONS}'}"


def choose(key: str, value: object, choices: type[_E], kind: Kind, options: dict[str, Any]) -> _E | Foreign:
    """Return the built-in part, or the one of the user's, that a key names.

    Raises:
        InputError: it is neither, or a built-in part is given options.
    """
    value = value.name if isinstance(value, choices) else value
    if isinstance(value, Foreign) or (isinstance(value, str) and ":" in value):
        return foreign(key, value, kind, options)
    if not isinstance(value, str) or value not in choices.__members__:
        hint = did_you_mean(str(value), choices.__members__) or f"; a {kind.noun} of your own is package.module:Name"
        raise InputError(f"{key}={typed_form(value)} is not one of {', '.join(choices.__members__)}{hint}")
    if options:
        raise InputError(
            f"{options_key(key)} has {', '.join(options)}, but {key}={value} has no options: they are for a"
            f" {kind.noun} of your own; remove them"
        )
    return choices[value]


def foreign(key: str, value: object, kind: Kind, options: object) -> Foreign:
    """Return the part of the user's that a key names; raise InputError if the name is malformed."""
    name = value.name if isinstance(value, Foreign) else value
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{key}={typed_form(name)} must be package.module:Name, the {kind.noun} and its module")
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options):
        raise InputError(f"{options_key(key)} must be names with values; write <name>: <value>")
    return Foreign(key, name, kind, options, isinstance(value, Foreign) and value.is_trusted)


def own_parts(section: str, parts: object, kind: Kind) -> dict[str, Any]:
    """Return the parts that a mapping names, as {name: {name: package.module:Name, options: {...}}}.

    Raises:
        InputError: it has another form.
    """
    if not isinstance(parts, dict):
        raise InputError(f"{section} must be a mapping; write {section}.<name>.name=package.module:Name")
    typed = {}
    for name, part in parts.items():
        key = f"{section}.{name}"
        if isinstance(part, OwnPart):
            part = {"name": part.name, OPTIONS: part.options}
        if not isinstance(name, str) or not re.fullmatch(r"[a-z_]\w*", name):
            raise InputError(f"{key} must be named by lower-case letters, digits and '_'")
        if not isinstance(part, dict):
            raise InputError(f"{key} is a section; set {key}.name=package.module:Name")
        if unknown := [each for each in part if each not in ("name", OPTIONS)]:
            hint = did_you_mean(str(unknown[0]), ["name", OPTIONS]) or f"; write {key}.{OPTIONS}.{unknown[0]}"
            raise InputError(f"unknown key '{key}.{unknown[0]}'{hint}")
        if "name" not in part:
            raise InputError(f"{key} must name its part; set {key}.name=package.module:Name")
        options = part.get(OPTIONS) or {}
        typed[name] = OwnPart(foreign(f"{key}.name", part["name"], kind, options), options)
    return typed


def parts_in(typed: Any) -> Iterator[Foreign]:
    """Yield the parts of the user's in a typed config, or in a section of one."""
    if isinstance(typed, Foreign):
        yield typed
    elif dataclasses.is_dataclass(typed):
        for each in dataclasses.fields(typed):
            yield from parts_in(getattr(typed, each.name))
    elif isinstance(typed, dict):
        for value in typed.values():
            yield from parts_in(value)


def trust_parts(typed: Any, trust: Iterable[str] | None = None) -> None:
    """Mark the parts of the user's in a typed config as trusted, those of these packages and modules, or all.

    A trusted package is trusted with all its modules.
    """
    trusted = None if trust is None else tuple(trust)

    def mark(value: Any) -> Any:
        if isinstance(value, Foreign):
            is_named = trusted is None or any(f"{value.module}.".startswith(f"{name}.") for name in trusted)
            return dataclasses.replace(value, is_trusted=True) if is_named else value
        if dataclasses.is_dataclass(value):
            for each in dataclasses.fields(value):
                setattr(value, each.name, mark(getattr(value, each.name)))
        elif isinstance(value, dict):
            for name, inner in value.items():
                value[name] = mark(inner)
        return value

    mark(typed)


def check_trust(trust: object) -> list[str]:
    """Return the names of trusted packages and modules; raise InputError for anything else."""
    names = [trust] if isinstance(trust, str) else trust
    if not isinstance(names, (list, tuple)):
        raise InputError(f"trust={typed_form(trust)} must be a list of packages, such as [my_package]")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise InputError(f"trust={typed_form(name)} must be the name of a package or module, such as my_package")
    return list(names)


def names_in(config: dict[str, Any]) -> list[str]:
    """Return the names of the user's parts in a plain config, such as run.json records it; nothing is imported."""
    sections = {name: config.get(name) for name in ("objective", "loss", "model", "evaluation")}
    known = {name: section if isinstance(section, dict) else {} for name, section in sections.items()}
    named = [known[name].get(key) for name, key in _PLACES]
    for parts in (known["evaluation"].get("metrics"), config.get("callbacks")):
        named += (
            [part.get("name") for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
        )
    return list(dict.fromkeys(name for name in named if isinstance(name, str) and _NAME.fullmatch(name)))
