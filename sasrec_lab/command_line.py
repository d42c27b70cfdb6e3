"""From words on the command line to a typed config, and one line for whatever Hydra refuses.

As config.py it imports neither torch nor Lightning.
"""

import re
from pathlib import Path
from typing import Optional

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig, open_dict

from sasrec_lab.config import CONF_DIR, InputError, TrainConfig, did_you_mean, hint_for, to_typed


def compose_config(overrides: list[str], config_dir: Optional[str] = None) -> DictConfig:
    """Compose `train` with these overrides, Hydra's own keys included, as the command line would.

    Raises:
        InputError: anything that Hydra refuses, in one line, with the nearest name that exists.
    """
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
            return compose("train", overrides=search_path + overrides, return_hydra_config=True)
    except Exception as error:  # Hydra's, OmegaConf's and the parser's exceptions share no base class
        raise InputError(_explain(error)) from error


def load(overrides: list[str]) -> TrainConfig:
    """The typed config for these overrides, for notebooks and tests."""
    cfg = compose_config(overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return to_typed(cfg)


def check_command_line(argv: list[str]) -> tuple[TrainConfig, Path] | None:
    """What `train` would run for these arguments and where, before Hydra makes a folder for it.

    None where nothing is trained (help, completion) or a sweep makes its own jobs, of which the first is checked.

    Raises:
        InputError: a mistake on the command line or in a config file.
    """
    args = get_args_parser().parse_args(argv)
    if args.help or args.hydra_help or args.info or args.shell_completion or args.config_name or args.config_path:
        return None
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise InputError(f"--config-dir {args.config_dir} is not a folder; give the one that holds your config groups")
    overrides = [_first_of_sweep(override) for override in args.overrides] if args.multirun else args.overrides
    cfg = compose_config([override for override in overrides if override], args.config_dir)
    folder = None if args.multirun or args.cfg else Path(cfg.hydra.run.dir)
    with open_dict(cfg):
        del cfg["hydra"]
    typed = to_typed(cfg)
    return None if folder is None else (typed, folder)


def _first_of_sweep(override: str) -> str | None:
    """`seed=1,2` -> `seed=1`; None for what only the sweeper can expand."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    if parsed.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return None
    return f"{parsed.input_line.split('=')[0]}={next(parsed.sweep_string_iterator())}"


def _explain(error: Exception) -> str:
    """Hydra's message about a config that does not compose, in one line, with the nearest name that exists."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    key = re.search(r"full_key: (\S+)", text)
    file = re.search(r"In '([^']+)'", text)
    where = f"{file[1]}.yaml: " if file and file[1] != "train" else ""
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key {found[1]!r}{hint_for(found[1])}"
    if found := re.search(r"Could not find '([^']+)'", text):
        group, _, name = found[1].partition("/")
        options = re.search(r"Available options in '[^']+':(.*?)(?:\nConfig|\Z)", text, re.S)
        folder = Path(CONF_DIR, group)
        ours = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
        names = sorted(ours | set(options[1].split() if options and "/" not in name else []))
        return f"{where}{group}={name} does not exist{did_you_mean(name, names)}; {group} is one of: {', '.join(names)}"
    if found := re.search(r"Key '([^']+)' (?:not in '\w+'|is not in struct)", text):
        name = key[1] if key else found[1]
        return f"{where}unknown key {name!r}{hint_for(name)}"
    if found := re.search(r"Multiple values for (\S+?)\.", text):
        return f"{found[1]} is chosen already; to choose another write {found[1]}=..., without '+'"
    if "Unexpected type for root: NoneType" in text:
        return "a key is given below one that is null here, such as dataset.weight; set that one: dataset.weight={...}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found[1]} has several values; add -m to run one job for each, or write [...] for a list"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = r"object_type=|reference_type=|full_key:|See http|Error merging|provider=|Config search path"
    return where + (f"{key[1]}: " if key else "") + "; ".join(dict.fromkeys(x for x in lines if not re.match(noise, x)))
