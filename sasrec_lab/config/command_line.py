"""From words on the command line to a typed config, and one line for whatever Hydra refuses.

As config.py it imports neither torch nor Lightning.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Optional

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from sasrec_lab.config import overrides as arguments
from sasrec_lab.config.convert import hint_for, to_typed
from sasrec_lab.config.schema import CONF_DIR, SCHEMAS, RecommendConfig, TrainConfig
from sasrec_lab.errors import InputError, MissingKey, did_you_mean
from sasrec_lab.files import job_folders

# Hydra's plugins, which are extras of this package.
_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray", "optuna": "optuna"}


@dataclass(frozen=True)
class Job:
    """One configuration and where it runs; `cfg` is the mistake where it is none."""

    cfg: TrainConfig | RecommendConfig | InputError
    folder: Path


@dataclass(frozen=True)
class Search:
    """A sweep whose sweeper chooses the jobs: one that it could choose, and the keys that it chooses."""

    example: Job
    keys: list[str]


@dataclass(frozen=True)
class Command:
    """One job, or the jobs of a sweep (none where only its sweeper knows them) and the folder above them."""

    jobs: list[Job]
    sweep_folder: Path | None = None
    sweeper: DictConfig | None = None
    launcher: DictConfig | None = None
    search: Search | None = None


def compose_config(overrides: list[str], config_dir: Optional[str] = None, name: str = "train") -> DictConfig:
    """Compose conf/<name>.yaml with these overrides, Hydra's own keys included, as the command line would.

    Raises:
        InputError: anything that Hydra refuses, in one line, with the nearest name that exists.
    """
    arguments.check_syntax(overrides)
    with _composing(config_dir, name) as search_path:
        return compose(name, overrides=search_path + overrides, return_hydra_config=True)


def load(overrides: list[str]) -> TrainConfig:
    """The typed config for these overrides, for notebooks and tests."""
    return _typed(compose_config(overrides))


def check_command_line(argv: list[str], name: str = "train") -> Command | None:
    """What the command `name` would run for these arguments and where, before Hydra makes a folder for it.

    None where nothing is run: help, completion, a printed config, or one that another run wrote.

    Raises:
        InputError: a mistake on the command line or in a config file. A rule that only some jobs of a sweep break is
            told as their `cfg`.
    """
    args = get_args_parser().parse_args(argv)
    if args.hydra_help or args.shell_completion or args.config_path:
        return None
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise InputError(f"--config-dir {args.config_dir} is not a folder; give the one that holds your config groups")
    if args.config_name not in (None, name, f"{name}.yaml"):
        raise InputError(
            f"--config-name {args.config_name}: it is always {name}; choose a file of a group as group=name"
        )
    if args.help or args.info:
        _check_one(args.overrides, args.config_dir, name)
        return None
    if args.multirun and name != "train":
        raise InputError(f"{name} has no sweeps; leave {'-m' if '-m' in argv else '--multirun'} out")
    if args.multirun and args.cfg:
        raise InputError("--cfg prints the config of one run; leave out -m")
    if args.multirun:
        return _sweep(args.overrides, args.config_dir)
    cfg = compose_config(args.overrides, args.config_dir, name)
    chosen = [cfg.hydra.runtime.choices[f"hydra/{group}"] for group in ("launcher", "sweeper")]
    if cfg.hydra.mode is not None or cfg.hydra.sweeper.get("params") or chosen != ["basic", "basic"]:
        raise InputError("a sweep is chosen and would run as one job; add -m to run each of its jobs")
    folder = _folder(cfg, "hydra.run.dir")
    job = Job(_typed(cfg), folder)
    return None if args.cfg else Command([job])


def _check_one(overrides: list[str], config_dir: Optional[str], name: str) -> None:
    """Raises InputError where help has no config of one run to show."""
    arguments.check_syntax(overrides)
    swept = [o.input_line for o in OverridesParser.create().parse_overrides(overrides) if o.is_sweep_override()]
    if swept:
        raise InputError(f"help shows the config of one run; leave out {' '.join(swept)}")
    compose_config(overrides, config_dir, name)


def _sweep(overrides: list[str], config_dir: Optional[str]) -> Command:
    """Its jobs as Hydra's own sweeper numbers them."""
    arguments.check_syntax(overrides)
    with _composing(config_dir) as search_path:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(overrides)
        common = search_path + [o.input_line for o in parsed if o.get_key_element().startswith("hydra.")]
        swept = [o for o in parsed if not o.get_key_element().startswith("hydra.")]
        if several := [o.input_line for o in swept if o.get_key_element() == "sweep" and o.is_sweep_override()]:
            raise InputError(f"{several[0]}: one search at a time; run the command once for each")
        fixed = [o.input_line for o in swept if not o.is_sweep_override()]
        cfg = compose("train", overrides=common + fixed, return_hydra_config=True)
        params = parser.parse_overrides([f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()])
        given = {override.get_key_element(): override for override in params + swept}  # the command line's stands
        is_grid = cfg.hydra.sweeper._target_.endswith(".BasicSweeper")
        if is_grid:
            (grid,) = BasicSweeper.split_arguments(params + swept, max_batch_size=None)
        else:
            grid = [[f"{key}={_first(override)}" for key, override in given.items()]]
        if not grid:
            asked = " ".join(o.input_line for o in swept if o.is_sweep_override())
            raise InputError(f"{asked} matches nothing, so there is no job to run; --help lists what each group has")
        first = compose("train", overrides=common + grid[0], return_hydra_config=True)
        folder = _folder(first, "hydra.sweep.dir")
        common.append(arguments.format_override("hydra.sweep.dir", str(folder)))  # of all jobs, whatever their names
        jobs = [_job(number, common + job) for number, job in enumerate(grid)]
        if is_grid:
            return Command(_numbered(jobs, folder), folder, cfg.hydra.sweeper, cfg.hydra.launcher)
        searched = [key for key, override in given.items() if override.is_sweep_override()]
        return Command([], folder, cfg.hydra.sweeper, cfg.hydra.launcher, Search(jobs[0], searched))


def _numbered(jobs: list[Job], sweep: Path) -> list[Job]:
    """A job that is new to the sweep's folder gets a number that no other's folder has; equal jobs share one."""
    there = job_folders(sweep)
    taken = {name.partition("-")[0] for name in there}
    free = count(max([len(jobs), *(int(number) + 1 for number in taken)]))
    folders: dict[str, Path] = {}
    numbered = []
    for job in jobs:
        number, dash, overrides = job.folder.name.partition("-")
        is_taken = number in taken and job.folder.name not in there
        own = job.folder.with_name(f"{next(free)}-{overrides}") if is_taken else job.folder
        numbered.append(replace(job, folder=folders.setdefault(overrides if dash else number, own)))
    return numbered


def _first(override: Override) -> Any:
    """Of what a key may be in a search; what it is, where that is fixed."""
    if not override.is_sweep_override():
        return override.get_value_element_as_str()
    return override.value().start if override.is_interval_sweep() else next(override.sweep_string_iterator())


def _job(number: int, overrides: list[str]) -> Job:
    cfg = compose("train", overrides=[*overrides, f"hydra.job.num={number}"], return_hydra_config=True)
    folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
    try:
        return Job(_typed(cfg), folder)
    except InputError as error:
        return Job(error, folder)


@contextmanager
def _composing(config_dir: Optional[str], name: str = "train") -> Iterator[list[str]]:
    """Inside, Hydra composes from conf/; gives the override that lets it look into the user's folder too."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
            yield [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    except InputError:
        raise
    except Exception as error:  # Hydra's, OmegaConf's and the parser's exceptions share no base class
        raise InputError(_explain(error, name)) from error


def _folder(cfg: DictConfig, key: str) -> Path:
    folder = OmegaConf.select(cfg, key)
    if not folder:
        raise InputError(f"{key} is empty; name the folder to write into, or leave the key out")
    return Path(folder)


def _typed(cfg: DictConfig) -> TrainConfig | RecommendConfig:
    chosen = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    try:
        return to_typed(cfg)
    except MissingKey as error:
        group = error.key.partition(".")[0]
        if group not in chosen or Path(CONF_DIR, group, f"{chosen[group]}.yaml").is_file():
            raise
        base = next(Path(CONF_DIR, group).glob("[!_]*.yaml")).stem
        raise InputError(
            f"{group}/{chosen[group]}.yaml leaves out {error.key}; give it there,"
            f" or begin the file with a 'defaults:' list of what it changes, such as [{base}]"
        ) from error


def _explain(error: Exception, name: str) -> str:
    """Hydra's message about a config that does not compose, in one line, with the nearest name that exists."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    key = re.search(r"full_key: (\S+)", text)
    file = re.search(r"In '([^']+)'", text)
    where = f"{file[1]}.yaml: " if file and file[1] != name else ""
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key {found[1]!r}{hint_for(found[1], SCHEMAS[name])}"
    found = re.search(r"Could not (?:find|load) 'hydra/(?:launcher|sweeper)/(\w+)'", text)
    if found and found[1] in _EXTRAS:
        return f"Hydra's plugin for {found[1]} is not installed; pip install 'sasrec-lab[{_EXTRAS[found[1]]}]'"
    if found := re.search(r"Could not find '(hydra/\w+|[^/']+)/([^']*)'", text):
        group, choice = found.groups()
        options = re.search(r"Available options in '[^']+':(.*?)(?:\nConfig|\Z)", text, re.S)
        folder = Path(CONF_DIR, group)
        ours = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")}
        names = sorted(ours | set(options[1].split() if options and "/" not in choice else []))
        below = [name for name in names if name.rpartition("/")[2] == choice]
        near = f"; did you mean {below[0]}?" if below else did_you_mean(choice, names)
        return f"{where}{group}={choice} does not exist{near}; {group} is one of: {', '.join(names)}"
    if found := re.search(r"Key '([^']+)' (?:not in '\w+'|is not in struct)", text):
        unknown = key[1] if key else found[1]
        if unknown == "experiment":
            return f"{where}the keys of an experiment are those of the whole; begin the file with '# @package _global_'"
        return f"{where}unknown key {unknown!r}{hint_for(unknown, SCHEMAS[name])}"
    if found := re.search(r"Multiple values for (\S+?)\.", text):
        return f"{found[1]} is chosen already; to choose another write {found[1]}=..., without '+'"
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text):
        several = "add -m to run one job for each, or write" if name == "train" else "write"
        return f"{found[1]} has several values; {several} [...] for a list"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = r"object_type=|reference_type=|full_key:|See http|Error merging|provider=|Config search path"
    return where + (f"{key[1]}: " if key else "") + "; ".join(dict.fromkeys(x for x in lines if not re.match(noise, x)))
