"""Refuse code that a composed config names for Hydra to run, unless it is shipped or the command line names it too.

Hydra imports and calls what its own keys name (callbacks, logging handlers, launchers) before a command sees
its config, and such a config may be a stranger's: a folder of --config-dir. Shipped is what Hydra and its installed
plugins register. Names are compared as a whole: `hydra_plugins.x.os.system` begins like a plugin, and is os.system.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sasrec_lab.config.overrides import format_override
from sasrec_lab.errors import InputError

_LOGGING = ("hydra.job_logging.", "hydra.hydra_logging.")
_INSTANTIATED = (*_LOGGING, "hydra.callbacks.", "hydra.launcher.", "hydra.sweeper.", "hydra.job.env_set.")
_LOGGING_NAMES = ("logging.StreamHandler", "logging.FileHandler", "colorlog.ColoredFormatter")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILES = ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log")
# any other launcher takes shell commands or packages among its options
_LOCAL_LAUNCHERS = (".BasicLauncher", ".JoblibLauncher")
_LOCAL_CHOICES = ("basic", "joblib")
_MAX_DEPTH = 50  # interpolations may lead in a circle


def check_code(cfg: DictConfig, typed: set[str]) -> None:
    """Check the `hydra` section of a composed config, before Hydra acts on it; the command line set the typed keys.

    Raises:
        InputError: it names code that neither Hydra nor a plugin ships, or a variable of the environment, and the
            command line does not; or a file chose a launcher that runs commands.
    """
    shipped = _shipped_targets()
    for key, value, is_fixed in _leaves(cfg.hydra, _text_of(cfg.hydra), "hydra", 0):
        name = key.rpartition(".")[2]
        if key in typed and (is_fixed or not key.startswith(_INSTANTIATED)):
            continue
        if key in typed:
            raise InputError(f"{key}={value} takes its value from a resolver; type the value itself")
        if (name == "_target_" and value not in shipped) or _is_logging_code(key, name, value):
            raise _untrusted(key, value, "would run code that neither this package nor a plugin of Hydra ships")
        if key.startswith(_LOGGING) and name == "filename" and value not in _LOG_FILES:
            raise _untrusted(key, value, "would write lines of the config's choice to this file, which may be a script")
        if key.startswith("hydra.job.env_set.") and os.environ.get(name) != value:
            raise _untrusted(key, value, "would set an environment variable, which may choose programs to run")
        if not is_fixed and key.startswith(_INSTANTIATED):
            raise _untrusted(key, value, "takes its value from a resolver, so what would run is not known")
    _check_launcher(cfg.hydra, typed)


def is_in_run_folder(config_dir: str) -> bool:
    """Return whether a folder of configs is a run folder, or inside one: then it may be a stranger's records."""
    folder = Path(config_dir).absolute()
    return any((place / "run.json").exists() or place.name == ".hydra" for place in (folder, *folder.parents))


def _check_launcher(hydra: DictConfig, typed: set[str]) -> None:
    """Raise InputError if a launcher that runs commands is not the one that the command line chooses."""
    target, choice = str(hydra.launcher._target_), str(hydra.runtime.choices["hydra/launcher"])
    is_local_choice = choice.removesuffix("_shared") in _LOCAL_CHOICES
    key, value = ("hydra.launcher._target_", target) if is_local_choice else ("hydra/launcher", choice)
    if target.endswith(_LOCAL_LAUNCHERS) or typed & {key, "hydra.launcher._target_"}:
        return
    raise InputError(
        f"{target.rpartition('.')[2]}, which a config file chooses, runs commands among its options; if you trust the"
        f" file, add {shlex.quote(format_override(key, value))} to the command line"
    )


def _untrusted(key: str, value: object, why: str) -> InputError:
    word = shlex.quote(format_override(key, str(value)))
    is_typable = re.fullmatch(r"[\w.]+", key) and "${" not in str(value)
    fix = f"if you trust it, add {word} to the command line" if is_typable else "remove it from the config file"
    return InputError(f"{key}={value} {why}; {fix}")


def _is_logging_code(key: str, name: str, value: object) -> bool:
    if not key.startswith(_LOGGING):
        return False
    is_code = name in ("class", "()") and value not in _LOGGING_NAMES
    sets_attributes = ".." in key  # keys below "." become attributes of the handler, such as its file
    return (
        is_code or sets_attributes or (isinstance(value, str) and value.startswith("ext://") and value not in _STREAMS)
    )


def _shipped_targets() -> set[str]:
    """Return every `_target_` that Hydra and its installed plugins have registered."""
    return set(_targets_in(ConfigStore.instance().repo.get("hydra", {})))


def _targets_in(entry: Any) -> Iterator[str]:
    if isinstance(entry, ConfigNode):
        entry = OmegaConf.to_container(entry.node, resolve=False)
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from [value] if key == "_target_" and isinstance(value, str) else _targets_in(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _targets_in(value)


def _text_of(node: Any) -> Any:
    """Return a section as Python objects, with the text of its interpolations."""
    return OmegaConf.to_container(node, resolve=False)


def _leaves(node: Any, unresolved: Any, path: str, depth: int) -> Iterator[tuple[str, Any, bool]]:
    """Yield the path and the value of each leaf, and whether a resolver cannot change it until Hydra reads it.

    Interpolations are followed. A value that is not known yet, such as the run's folder, is its interpolation's text.
    """
    if depth > _MAX_DEPTH:
        raise InputError(f"{path} is nested more than {_MAX_DEPTH} levels deep; make it simpler")
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inner, is_interpolated = f"{path}.{key}", OmegaConf.is_interpolation(node, key)
        text = str(unresolved[key]) if is_interpolated else ""
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException:
            value = text
        if isinstance(value, DictConfig | ListConfig):
            if re.search(r"\$\{[^}]*:", text):
                raise _untrusted(inner, text, "takes its value from a resolver, so what would run is not known")
            yield from _leaves(value, _text_of(value) if is_interpolated else unresolved[key], inner, depth + 1)
        else:
            is_name = is_interpolated and key in ("_target_", "class", "()", "filename")
            yield inner, text if is_name else value, not re.search(r"\$\{[^}]*:", text)
