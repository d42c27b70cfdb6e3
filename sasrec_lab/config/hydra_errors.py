"""Turn Hydra's errors about a config that does not compose into one-line messages with the nearest existing name."""

import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from omegaconf.errors import InterpolationResolutionError
from yaml import MarkedYAMLError

from sasrec_lab.config.convert import INTERPOLATION_FIX, hint_for, known_keys
from sasrec_lab.config.model import ModelConfig, ModelSection
from sasrec_lab.config.schema import CONF_DIR, MODEL_SCHEMAS, SCHEMAS
from sasrec_lab.config.value_errors import full_key, wrong_value
from sasrec_lab.errors import InputError, did_you_mean

# Hydra's plugins, and the extra of this package that installs each.
_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
_NULLABLE_SECTIONS = ("published", r"dataset\.weight", r"dataset\.titles", r"dataset\.features", r"dataset\.synthetic")
_IS_NULL = (
    r"Unexpected type for root: NoneType|'NoneType' object has no attribute 'get'"  # OmegaConf 2.3
    r"|Cannot set '[^']+' because '[^']+' is None"  # 2.4
)
_CANNOT_OVERRIDE = r"Could not override '([^']+)'|No earlier Group Default for '([^']+)'"  # Hydra 1.3, also 1.4
_FAULTS = (AttributeError, NameError, KeyError, IndexError, TypeError, AssertionError, ZeroDivisionError)
_NOISE = (
    r"object_type=|reference_type=|full_key:|See http|Error merging|provider=|Config search path"
    r"|In '[^']+': \w+ raised while composing config"
)


def run_hydra(main: Callable[[], object], command: str) -> None:
    """Call Hydra's entry, which reads sys.argv.

    Raises:
        InputError: Hydra fails outside of the function that it calls; that function's own exceptions pass through.
        OSError: Hydra cannot write its files, or what it prints.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    try:
        main()
    except InputError:
        raise
    except Exception as error:
        called = inspect.unwrap(main).__code__
        if any(frame.f_code is called for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        if failed := next((part for part in (error, error.__cause__) if isinstance(part, OSError)), None):
            raise failed from None
        if fault := _fault(error):
            raise InputError(fault) from error
        raise InputError(f"Hydra failed: {explain(error, command)}; correct the keys that begin with hydra.") from error


def explain(error: Exception, command: str, words: Iterable[str] = ()) -> str:
    """Return the error of Hydra, OmegaConf or their parser in one line.

    `command` names the file in conf/, and `words` are the overrides.
    """
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    if isinstance(error, RecursionError):
        return (
            "the config refers to itself: a list of defaults, an interpolation ${...}, or too many brackets; remove it"
        )
    return (
        _missing_plugin(text)
        or _broken_file(error)
        or _missing_folder(text)
        or _chosen_twice(text)
        or _added_twice(text)
        or _several_values(text, command)
        or _search_in_a_grid(text)
        or _file_at_fault(text, command)
        + (
            _missing_choice(text)
            or _wrong_package(text, command)
            or _unknown_key(text, command, words)
            or wrong_value(text)
            or _wrong_section(text, words)
            or _broken_interpolation(error, text, words)
            or _fault(error)
            or _shortened(text)
        )
    )


def _missing_plugin(text: str) -> str | None:
    found = re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text)
    if found and found[1] in _EXTRAS:
        return f"Hydra's plugin for {found[1]} is not installed; pip install 'sasrec-lab[{_EXTRAS[found[1]]}]'"
    return None


def _chosen_twice(text: str) -> str | None:
    found = re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once in the final defaults list", text)
    if found:
        group = found[1] or found[2]
        return f"{group} has a choice already; to replace it, write {group}=... without '+'"
    return None


def _added_twice(text: str) -> str | None:
    """Return the message on a `+` before what exists; a group of the user's is unknown without its folder."""
    found = re.search(r"Could not append to config. An item is already at '([^']+)'.*'\1=([^']*)'", text, re.S)
    if found and found[1] == "callbacks":
        file = f"callbacks/{found[2]}.yaml"
        return f"+callbacks={found[2]}: there is no file {file}; give the folder that has it with --config-dir"
    return f"{found[1]} has a value already; to replace it, write {found[1]}=... without '+'" if found else None


def _several_values(text: str, command: str) -> str | None:
    found = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text)
    if found:
        as_sweep = "add -m to run one job per value, or " if command == "train" else ""
        return f"{found[1]} has several values; {as_sweep}write [...] for a list"
    return None


def _search_in_a_grid(text: str) -> str | None:
    if re.search(r"BasicSweeper does not support sweep type", text):
        return "interval(...) needs a search: list the values instead, or run python -m sasrec_lab.search"
    return None


def _missing_choice(text: str) -> str | None:
    found = re.search(r"Could not (?:find|load) '(hydra/\w+|[^/']+)/([^']*)'", text)
    if found is None:
        return None
    group, choice = found.groups()
    if group == "dataset" and ("/" in choice or "." in choice):
        return f"dataset={choice} does not exist; for a file of your own write dataset=csv dataset.path={choice}"
    options = re.search(r"Available options in '[^']+':(.*?)(?:\nConfig|\Z)", text, re.S)
    folder = Path(CONF_DIR, group)
    ours = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
    names = sorted(ours | set(options[1].split() if options and "/" not in choice else []))
    below = [name for name in names if name.rpartition("/")[2] == choice]
    suggestion = f"; did you mean {below[0]}?" if below else did_you_mean(choice, names)
    return f"{group}={choice} does not exist{suggestion} ({group} is one of: {', '.join(names)})"


def _broken_file(error: Exception) -> str | None:
    """Return the message on a file that is not YAML, with its line."""
    if isinstance(error, UnicodeDecodeError):
        return f"a config file is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        problem = error.problem or error.context
        return f"{mark.name}, line {mark.line + 1}: not valid YAML ({problem}); correct the line"
    return None


def _missing_folder(text: str) -> str | None:
    found = re.match(r"provider=hydra.searchpath in .*, path=(.*) is not available", text)
    return f"hydra.searchpath: there is no folder {found[1]}; correct the path, or use --config-dir" if found else None


def _wrong_package(text: str, command: str) -> str | None:
    """Return the message on a file of a group whose keys are not those of a section, if it sets some there."""
    file, key = re.search(r"In '([^']+)/[^'/]+'", text), full_key(text)
    if file is None or key is None or not re.search(r"Key '[^']+' not in '\w+'", text):
        return None
    group = file[1].partition("/")[0]
    if key[1] == group or key[1].startswith("_"):
        return "it sets keys of the whole config; its first line must be '# @package _global_'"
    if key[1] == f"{group}.{group}":
        return f"it sets keys of {group} already; remove the line '{group}:' and the blanks before its keys"
    return None


def _unknown_key(text: str, command: str, words: Iterable[str]) -> str | None:
    if found := re.search(_CANNOT_OVERRIDE, text):
        inner = re.search(r"Key '[^']+' (?:not in '\w+'|is not in struct)", text)
        key = found[1] or found[2]
        full = full_key(text)
        if inner and full and not f"{key}.".startswith(f"{full[1]}."):  # a key inside of the value
            key = full[1] if full[1].startswith(key) else f"{key}.{full[1]}"
    elif found := re.search(r"Key '([^']+)' (?:not in '\w+'|is not in struct)", text):
        key = (full_key(text) or found)[1]
    elif found := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return f"~{found[1]} has nothing to delete; remove it"
    else:
        return None
    section = re.search(r"Key '[^']+' not in '(\w+)'", text)
    if section and section[1] == ModelSection.__name__:
        return (
            "it names no kind of model; begin the file with 'defaults: [sasrec]', or the name of another model, to"
            " inherit what it does not change"
        )
    model = next((kind for kind in MODEL_SCHEMAS.values() if section and kind.__name__ == section[1]), None)
    if model is not None and key in known_keys() and (fix := _fix_of_another_models_key(text, words, model)):
        kind = next(name for name, kind in MODEL_SCHEMAS.items() if kind is model)
        return f"{key} is not a key of {'encoders' if model is ModelConfig else f'model={kind}'}; {fix}"
    return f"unknown key {key!r}{hint_for(key, SCHEMAS[command], model)}"


def _fix_of_another_models_key(text: str, words: Iterable[str], model: type) -> str | None:
    """Return the end of the message on a key that only other models have, set by a file or for several models."""
    if any(re.match(r"model=.*[,(]", word) for word in words):
        return "give the models that have it a sweep of their own"
    file = re.search(r"In '(experiment|dross|ablation)/([^']+)'", text)
    if file and model is not ModelConfig:
        return f"{file[1]}={file[2]} is for encoders: choose one, or remove {file[1]}"
    return None


def _wrong_section(text: str, words: Iterable[str]) -> str | None:
    """Return the message on a section or group with a value, or on a key in a section that is null."""
    if found := re.search(r"Invalid type assigned: (\w+) is not a subclass of", text):
        return f"a section must be keys with values, not a {found[1]}; write key: value"
    if re.search(_IS_NULL, text):
        inside = [word for word in words if re.match(rf"\+*({'|'.join(_NULLABLE_SECTIONS)})\.", word)]
        if tracker := next((found[1] for word in words if (found := re.match(r"\+*logger\.(\w+)[.=]", word))), None):
            return f"logger.{tracker} has no keys unless it is chosen; add logger={tracker}"
        if word := next((word for word in words if re.match(r"\+*cluster\.", word)), None):
            return f"{word}: a run has no cluster unless it is chosen; add cluster=ray"
        return f"{', '.join(inside) or 'a key'}: the section is null; set it as <section>={{<key>: <value>}}"
    is_list = any(re.match(r"[\w/]+=\[", word) for word in words)  # of which Hydra takes each to be a name
    if re.search(r"Config group override must be a string or a list", text) or (
        is_list and re.match(r"argument of type '\w+' is not", text)
    ):
        return "a config group takes the name of a file, as in model=sasrec; to change a key write model.<key>=<value>"
    return None


def _file_at_fault(text: str, command: str) -> str:
    """Return `file.yaml: ` if Hydra names a file other than the command's own and Hydra's."""
    file = re.search(r"In '([^']+)'", text)
    return f"{file[1]}.yaml: " if file and file[1] not in (command, "hydra/config") else ""


def _shortened(text: str) -> str:
    """Return the text in one line, without the lines that do not help a user."""
    key = full_key(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    useful = list(dict.fromkeys(line for line in lines if not re.match(_NOISE, line)))
    return (f"{key[1]}: " if key else "") + ("; ".join(useful) or "this cannot be composed")


def _broken_interpolation(error: Exception, text: str, words: Iterable[str]) -> str | None:
    """Return the message on `${...}` that names no key, or no group in the place of a file's name."""
    if found := re.match(r"Error resolving interpolation '(.*)', possible interpolation keys: (.*)", text):
        typed = next((word for word in words if found[1] in word), found[1])
        return f"{typed} must name a file of the group, or refer to one of {found[2]}; write the file's name"
    if isinstance(error, InterpolationResolutionError):
        return f"{error.full_key}: {text.splitlines()[0]}; {INTERPOLATION_FIX}"
    return None


def _fault(error: Exception) -> str | None:
    """Print the traceback of an exception that only a fault of the program raises, and return its line."""
    if type(error) not in _FAULTS:  # exactly: OmegaConf's errors are subclasses of some
        return None
    traceback.print_exception(error)
    return (
        f"unexpected {type(error).__name__}: {error}; this is a fault of sasrec_lab, please report it with the"
        " traceback above"
    )
