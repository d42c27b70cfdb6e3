"""Convert a composed config to typed objects, and these to plain dicts; suggest keys for an unknown one."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasrec_lab.config.checks import REJECTED_FLAGS, TRAINER_FLAGS, check_numbers
from sasrec_lab.config.combinations import check_combinations
from sasrec_lab.config.foreign import Foreign, trust_parts
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.model_rules import check_model
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import ObjectiveName
from sasrec_lab.errors import InputError, MissingKey, did_you_mean, nearest

_BOOKKEEPING_KEYS = (
    "capture",  # the same computation in one launch; older runs lack it
    "ckpt",
    "cluster.cpus",
    "cluster.restarts",
    "data_dir",
    "dataset.check_ids",  # it refuses a file or does not; what is read is the same, and older runs lack it
    "dataset.memory_limit",  # the arrays are the same
    "dataset.sources",
    "dataset.titles",
    "evaluation.lists",  # measured in addition; older runs lack it
    "logger",
    "evaluation.recent_days",  # of a baseline only; older runs lack it
    "published",
    "tensorboard",
    "trainer.enable_progress_bar",
)
# Sections whose keys are the user's: names of parts, and options that a part's own dataclass has
FREE_SECTIONS = (
    "callbacks", "evaluation.metrics", "loss.options", "loss.sampler_options", "model.options", "model.head_options",
    "objective.options",
)  # fmt: skip
INTERPOLATION_FIX = "${...} must name another key that exists; correct it, or write the value"

# names that other programs give to keys -> the key
_USUAL_NAMES = {
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "device": "trainer.accelerator",
    "gpus": "trainer.devices",
    "batch": "batch_size",
    "bs": "batch_size",
    "layers": "model.blocks",
    "n_layers": "model.blocks",
    "num_layers": "model.blocks",
    "num_blocks": "model.blocks",
    "n_heads": "model.heads",
    "num_heads": "model.heads",
    "hidden": "model.dim",
    "hidden_size": "model.dim",
    "hidden_units": "model.dim",
    "embedding_dim": "model.dim",
    "d_model": "model.dim",
    "max_len": "model.maxlen",
    "max_length": "model.maxlen",
    "seq_len": "model.maxlen",
    "max_seq_length": "model.maxlen",
    "early_stopping": "evaluation.patience",
    "topk": "evaluation.k",
    "top_k": "evaluation.k",
    "data": "dataset",
    "file": "dataset.path",
    "output_dir": "hydra.run.dir",
    "resume": "ckpt",
    "checkpoint": "ckpt",
}


def to_typed(cfg: DictConfig) -> Any:
    """Convert a composed config to plain typed objects: a TrainConfig, or the schema of another command.

    Raises:
        InputError: a value breaks a rule, is missing or does not go with another, or a key was appended that the
            schema does not have.
    """
    try:
        if isinstance(schema := OmegaConf.get_type(cfg), type) and is_dataclass(schema):
            _reject_interpolated_sections(cfg, "", schema)
        if missing := OmegaConf.missing_keys(cfg):
            raise MissingKey(sorted(missing)[0])
        check_numbers("", OmegaConf.to_container(cfg, resolve=True))
        typed = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        key = f"{error.full_key}: " if error.full_key else ""
        raise InputError(f"{key}{str(error).splitlines()[0]}; {INTERPOLATION_FIX}") from error
    except RecursionError as error:
        raise InputError("an interpolation ${...} refers to itself; write the value instead") from error
    _reject_appended_keys(typed, "", type(typed))
    if isinstance(typed, TrainConfig):
        check_combinations(typed)
    trust_parts(typed)  # the command is the user's
    return typed


def _reject_interpolated_sections(cfg: DictConfig, prefix: str, schema: type) -> None:
    """Raise InputError for a section given as `${...}`, whose value OmegaConf 2.3 checks against no schema."""
    for name, hint in get_type_hints(schema).items():
        sections = _sections(hint)
        if sections and name in cfg:
            key = prefix + name
            if OmegaConf.is_interpolation(cfg, name):
                raise InputError(
                    f"{key} is a section and must not be an interpolation (${{...}}); set its keys,"
                    f" as in {key}.<key>=<value>"
                )
            if isinstance(section := cfg[name], DictConfig):
                _reject_interpolated_sections(section, f"{key}.", sections[0])


def _reject_appended_keys(typed: Any, prefix: str, schema: type) -> None:
    """Raise InputError for a key that was appended with `+`, which is a stray attribute of the typed object."""
    if is_dataclass(typed):
        names = [field.name for field in fields(typed)]
        for name, value in vars(typed).items():
            if name not in names:
                key = prefix + name
                model = type(typed) if prefix == "model." else None
                raise InputError(f"unknown key {key!r}{hint_for(key, schema, model)}")
            _reject_appended_keys(value, f"{prefix}{name}.", schema)


def section_of(config: dict[str, Any], name: str, schema: type, trust: Iterable[str] = ()) -> Any:
    """Return a section of a plain config, such as run.json records it, as a typed object.

    The same rules hold as for a config that is composed, because the run folder may be a stranger's. It is data, so it
    names code that is imported only if its module is in `trust`.

    Raises:
        InputError: a value breaks a rule, or a key or a value does not exist in this version.
    """
    try:
        if "${" in str(config[name]):
            raise InputError("it has an interpolation (${...}), which no run records")
        check_numbers(name, config[name])
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config[name]))
        if isinstance(typed, ModelConfig):
            check_model(typed)
        trust_parts(typed, trust)
        return typed
    except InputError as error:
        raise InputError(f"the run's {name} is not valid: {error}") from error
    except Exception as error:  # those of OmegaConf on values of any type share no base class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the run's {name} does not fit this version: {reason}; train it again, or use the"
            " version that trained it (git.commit in its run.json)"
        ) from error


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded plain config with the keys that its version lacked, at the values that act as it did.

    A section that is not valid stays as it is.
    """
    lacking = {"objective": {"name": ObjectiveName.next_item.name}, "callbacks": {}}
    full = lacking | config
    for name, hint in get_type_hints(TrainConfig).items():
        for schema in _sections(hint) if isinstance(full.get(name), dict) else ():
            with suppress(InputError):  # of another kind of model, or not valid
                full[name] = to_plain(section_of(full, name, schema))
                break
    return full


def to_plain(typed: Any) -> Any:
    """Return a typed config as dicts, lists, numbers and text (enum members by name), for JSON and TensorBoard."""
    if isinstance(typed, Foreign):
        return typed.name
    if is_dataclass(typed):
        return {field.name: to_plain(getattr(typed, field.name)) for field in fields(typed)}
    if isinstance(typed, dict):
        return {key: to_plain(value) for key, value in typed.items()}
    if isinstance(typed, (list, tuple)):
        return [to_plain(value) for value in typed]
    return typed.name if isinstance(typed, Enum) else typed


def flatten(tree: dict[str, Any], prefix: str = "", separator: str = "/") -> dict[str, Any]:
    """Return the leaves of nested dicts by their joined keys: `{"model": {"dim": 64}}` -> `{"model/dim": 64}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, name + separator, separator) if isinstance(value, dict) else {name: value}
    return leaves


def is_bookkeeping(key: str) -> bool:
    """Return whether a dotted key is ignored when configurations are compared: it does not change what is computed."""
    return any(f"{key}.".startswith(f"{own}.") for own in _BOOKKEEPING_KEYS)


def known_keys(schema: type = TrainConfig) -> list[str]:
    """Return every dotted key of the schema, its sections and the Trainer flags included."""
    flags = [f"trainer.{flag}" for flag in TRAINER_FLAGS] if schema is TrainConfig else []
    return list(dict.fromkeys(_keys_of(schema, "") + flags))  # kinds of model may share a key


def _keys_of(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        for section in _sections(hint):
            keys += _keys_of(section, f"{prefix}{name}.")
    return keys


def _sections(hint: Any) -> list[type]:
    """Return the dataclasses that a key with this type may have as its value: of `model`, every kind of model."""
    found = [inner for inner in (hint, *get_args(hint)) if isinstance(inner, type) and is_dataclass(inner)]
    return [kind for section in found for kind in _kinds(section)]


def _kinds(section: type) -> list[type]:
    """Return the classes that inherit from a section, without those that others inherit from."""
    inner: list[type] = section.__subclasses__()
    return [kind for each in inner for kind in _kinds(each)] or [section]


def hint_for(key: str, schema: type = TrainConfig, model: type | None = None) -> str:
    """Return the end of the message on an unknown key: the fix, the nearest key, or the keys of its section.

    `model` is the kind of model whose keys `model` has, if that is known.
    """
    if key.startswith("trainer.") and (reason := REJECTED_FLAGS.get(key.removeprefix("trainer."))):
        return f": {reason}"
    if any(key.startswith(f"{section}.") for section in FREE_SECTIONS):
        return f": the config does not set it; add it as +{key}=..."
    keys = known_keys(schema)
    if model is not None:
        own = [f"model.{field.name}" for field in fields(model)]
        keys = [known for known in keys if known in own or not known.startswith("model.")]
    if key in keys:
        return f": it is a Lightning Trainer flag that the config does not set; add it as +{key}=..."
    if same_ending := [known for known in keys if known.endswith(f".{key}")]:
        return f"; did you mean {' or '.join(same_ending)}?"
    section, _, name = key.rpartition(".")
    inside = [known.removeprefix(f"{section}.") for known in keys if known.startswith(f"{section}.")]
    if inside:
        suggestion = nearest(name, inside)
        names = ", ".join(name for name in inside if "." not in name)
        return f"; did you mean {section}.{suggestion}?" if suggestion else f"; {section} has {names}"
    if suggestion := did_you_mean(key, keys):
        return suggestion
    usual = _USUAL_NAMES.get(key.lower().replace("-", "_")) if schema is TrainConfig else None
    return f"; did you mean {usual}?" if usual else "; --help lists the keys"
