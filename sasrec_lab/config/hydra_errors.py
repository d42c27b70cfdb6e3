"""Turn Hydra's errors about a config that does not compose into one-line messages with the nearest existing name."""

import re
from pathlib import Path

from sasrec_lab.config.convert import hint_for
from sasrec_lab.config.schema import CONF_DIR, SCHEMAS
from sasrec_lab.errors import did_you_mean

# Hydra's plugins, and the extra of this package that installs each.
_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray", "optuna": "optuna"}
_NOISE = (
    r"object_type=|reference_type=|full_key:|See http|Error merging|provider=|Config search path"
    r"|In '[^']+': \w+ raised while composing config"
)


def explain(error: Exception, command: str) -> str:
    """Return the error of Hydra, OmegaConf or their parser in one line; `command` names the file in conf/."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    return (
        _missing_plugin(text)
        or _chosen_twice(text)
        or _several_values(text, command)
        or _search_in_a_grid(text)
        or _file_at_fault(text, command) + (_missing_choice(text) or _unknown_key(text, command) or _shortened(text))
    )


def _missing_plugin(text: str) -> str | None:
    found = re.search(r"Could not (?:find|load) 'hydra/(?:launcher|sweeper)/(\w+)'", text)
    if found and found[1] in _EXTRAS:
        return f"Hydra's plugin for {found[1]} is not installed; pip install 'sasrec-lab[{_EXTRAS[found[1]]}]'"
    return None


def _chosen_twice(text: str) -> str | None:
    found = re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once in the final defaults list", text)
    if found:
        group = found[1] or found[2]
        return f"{group} has a choice already; to replace it, write {group}=... without '+'"
    return None


def _several_values(text: str, command: str) -> str | None:
    found = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text)
    if found:
        as_sweep = "add -m to run one job per value, or " if command == "train" else ""
        return f"{found[1]} has several values; {as_sweep}write [...] for a list"
    return None


def _search_in_a_grid(text: str) -> str | None:
    if re.search(r"BasicSweeper does not support sweep type", text):
        return "interval(...) needs a search: list the values instead, or choose hydra/sweeper=optuna_stored"
    return None


def _missing_choice(text: str) -> str | None:
    found = re.search(r"Could not (?:find|load) '(hydra/\w+|[^/']+)/([^']*)'", text)
    if found is None:
        return None
    group, choice = found.groups()
    options = re.search(r"Available options in '[^']+':(.*?)(?:\nConfig|\Z)", text, re.S)
    folder = Path(CONF_DIR, group)
    ours = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
    names = sorted(ours | set(options[1].split() if options and "/" not in choice else []))
    below = [name for name in names if name.rpartition("/")[2] == choice]
    suggestion = f"; did you mean {below[0]}?" if below else did_you_mean(choice, names)
    return f"{group}={choice} does not exist{suggestion} ({group} is one of: {', '.join(names)})"


def _unknown_key(text: str, command: str) -> str | None:
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
    elif found := re.search(r"Key '([^']+)' (?:not in '\w+'|is not in struct)", text):
        key = (_full_key(text) or found)[1]
        if key == "experiment":
            return "an experiment sets keys of the whole config; begin the file with '# @package _global_'"
    else:
        return None
    return f"unknown key {key!r}{hint_for(key, SCHEMAS[command])}"


def _file_at_fault(text: str, command: str) -> str:
    """Return `file.yaml: ` if Hydra names a file other than the command's own and Hydra's."""
    file = re.search(r"In '([^']+)'", text)
    return f"{file[1]}.yaml: " if file and file[1] not in (command, "hydra/config") else ""


def _shortened(text: str) -> str:
    """Return the text in one line, without the lines that do not help a user."""
    key = _full_key(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (f"{key[1]}: " if key else "") + "; ".join(dict.fromkeys(x for x in lines if not re.match(_NOISE, x)))


def _full_key(text: str) -> re.Match[str] | None:
    return re.search(r"full_key: (\S+)", text)
