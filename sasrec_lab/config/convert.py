"""A composed config as typed objects, and what to say of a key that the schema does not have.

As config.py it imports neither torch nor Lightning.
"""

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasrec_lab.config.checks import REJECTED_FLAGS, TRAINER_FLAGS
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, MissingKey, did_you_mean

_BOOKKEEPING_KEYS = ("ckpt", "data_dir", "published", "tensorboard", "trainer.enable_progress_bar")


def to_typed(cfg: DictConfig) -> Any:
    """Convert a composed config to plain typed objects: a TrainConfig, or the schema of another command.

    Raises:
        InputError: a value breaks a rule, is missing, or a key was appended that the schema does not have.
    """
    try:
        if missing := OmegaConf.missing_keys(cfg):
            raise MissingKey(sorted(missing)[0])
        typed = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation of nothing
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _refuse_appended(typed, "", type(typed))
    return typed


def section_of(config: dict[str, Any], name: str, schema: type) -> Any:
    """A section of a config that `plain` made plain, such as a run folder keeps it, as a typed object again.

    Raises:
        InputError: a value or a key is not one of this version.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config[name]))
    except (OmegaConfBaseException, KeyError) as error:
        raise InputError(
            f"the run's {name} is not this version's: {str(error).splitlines()[0]}; train it again, or use the version"
            " that trained it (git.commit in its run.json)"
        ) from error


def known_keys(schema: type = TrainConfig) -> list[str]:
    """Every key of the schema, dotted, the sections among them."""
    flags = [f"trainer.{flag}" for flag in TRAINER_FLAGS] if schema is TrainConfig else []
    return _keys_of(schema, "") + flags


def _keys_of(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner):
                keys += _keys_of(inner, f"{prefix}{name}.")
    return keys


def _refuse_appended(typed: Any, prefix: str, schema: type) -> None:
    """Keys appended with `+` become stray attributes of the typed object; refuse them by name."""
    if is_dataclass(typed):
        names = [field.name for field in fields(typed)]
        for name, value in vars(typed).items():
            if name not in names:
                key = prefix + name
                raise InputError(f"unknown key '+{key}'{hint_for(key, schema)}")
            _refuse_appended(value, f"{prefix}{name}.", schema)


def hint_for(key: str, schema: type = TrainConfig) -> str:
    """What to say behind an unknown key: how to add a Trainer flag, the nearest key, or what its section has."""
    if key.startswith("trainer.") and (reason := REJECTED_FLAGS.get(key.removeprefix("trainer."))):
        return f": {reason}"
    keys = known_keys(schema)
    if key in keys:
        return f": it is a Lightning Trainer flag that this file leaves out; write +{key}=..."
    section = key.rpartition(".")[0] + "."
    inside = [known.removeprefix(section) for known in keys if known.startswith(section)]
    return did_you_mean(key, keys) or (
        f"; {section[:-1]} has {', '.join(name for name in inside if '.' not in name)}"
        if inside
        else "; --help lists the keys"
    )


def to_plain(typed: Any) -> Any:
    """A typed config as dicts, lists, numbers and text (an Enum member is its name), for JSON and TensorBoard."""
    if is_dataclass(typed):
        return {field.name: to_plain(getattr(typed, field.name)) for field in fields(typed)}
    if isinstance(typed, dict):
        return {key: to_plain(value) for key, value in typed.items()}
    if isinstance(typed, (list, tuple)):
        return [to_plain(value) for value in typed]
    return typed.name if isinstance(typed, Enum) else typed


def flatten(tree: dict[str, Any], prefix: str = "", joint: str = "/") -> dict[str, Any]:
    """`{"model": {"dim": 64}}` -> `{"model/dim": 64}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            flatten(value, f"{prefix}{key}{joint}", joint) if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return leaves


def is_bookkeeping(key: str) -> bool:
    """Whether a dotted key says where things lie, what stands beside a run or what is shown, and not what is run."""
    return any(f"{key}.".startswith(f"{own}.") for own in _BOOKKEEPING_KEYS)
