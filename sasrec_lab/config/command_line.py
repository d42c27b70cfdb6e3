"""Turn a command line into typed configs and their folders, before Hydra makes any folder.

Like all of config/ it imports neither torch nor Lightning.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from sasrec_lab.config.composition import (
    compose_checked,
    compose_config,
    composing,
    explained,
    typed_without_hydra,
    without_hydra,
)
from sasrec_lab.config.flags import read_flags
from sasrec_lab.config.hydra_internals import expand_grid, parse_sweep
from sasrec_lab.config.job_folders import UNNAMED_KEYS, common_keys, job_folders
from sasrec_lab.config.list_commands import EvaluateConfig, RecommendConfig
from sasrec_lab.config.overrides import check_syntax, format_override
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.trust import is_in_run_folder
from sasrec_lab.errors import InputError

_MAX_NAME, _MAX_PATH = 255, 3000  # bytes of a folder's name, characters of a path that has room for files below it


@dataclass(frozen=True)
class Job:
    """One configuration and its run folder; an invalid configuration has the mistake as `cfg`."""

    cfg: TrainConfig | RecommendConfig | EvaluateConfig | InputError
    folder: Path


@dataclass(frozen=True)
class Command:
    """The jobs of a command: one, or those of a sweep."""

    jobs: list[Job]


@dataclass(frozen=True)
class Sweep(Command):
    """A command that runs a sweep, and the folder for all its jobs."""

    sweep_folder: Path
    launcher: DictConfig
    naming: list[str]  # the overrides, for Hydra, by which folders are named after what differs between the jobs


def check_command_line(argv: list[str], name: str = "train") -> Command | None:
    """Return the jobs that the command `name` would run for these arguments, or None if it would run none.

    None is for help, completion and a printed config. A rule that only some jobs of a sweep break is stored as their
    `cfg`.

    Raises:
        InputError: a mistake on the command line or in a config file.
    """
    flags = read_flags(argv, name)
    check_config_flags(flags, name)
    if flags.shell_completion:
        return None
    if flags.help or flags.info or flags.hydra_help:
        _check_help(flags, name)
        return None
    if flags.multirun:
        return _plan_sweep(flags)
    job = _plan_run(flags, name)
    return None if flags.cfg else Command([job])


def grid_jobs(overrides: list[str], params: Mapping[str, str] | None) -> list[list[str]]:
    """Return the overrides of each job of a grid, from the overrides and sweeper params in its multirun.yaml.

    Raises:
        InputError: these are not a grid, or its config groups are not in conf/.
    """
    with composing():
        return expand_grid(parse_sweep(overrides, params))


def check_config_flags(flags: Namespace, name: str) -> None:
    """Raise InputError for a flag that would replace this package's configs, or names no folder of configs."""
    if flags.experimental_rerun is not None:
        raise InputError(
            f"--experimental-rerun {flags.experimental_rerun} would unpickle a file, which can run code; repeat a run"
            " with the command in its run.json"
        )
    if flags.config_path is not None:
        raise InputError(
            f"--config-path {flags.config_path} would replace this package's configs; add your own with --config-dir"
        )
    if flags.config_dir and not os.path.isdir(flags.config_dir):
        raise InputError(
            f"--config-dir {flags.config_dir} is not a folder; pass the one that contains your config groups"
        )
    if flags.config_name not in (None, name, f"{name}.yaml"):
        raise InputError(
            f"--config-name {flags.config_name} must be {name}; to choose a file of a config group, write group=file"
        )


def _check_help(flags: Namespace, name: str) -> None:
    """Raise InputError if help cannot show the config, because it is invalid or a sweep."""
    check_syntax(flags.overrides, name)
    parsed = OverridesParser.create().parse_overrides(flags.overrides)
    if swept := [word_of(override) for override in parsed if override.is_sweep_override()]:
        raise InputError(f"help shows the config of one run; remove {' '.join(swept)}")
    compose_config(flags.overrides, flags.config_dir, name)


def _plan_run(flags: Namespace, name: str) -> Job:
    for word in flags.overrides:
        if _key(word) in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            raise InputError(f"{word} has an effect only with -m; for one run write hydra.run.dir=<folder>")
    cfg = compose_config(flags.overrides, flags.config_dir, name)
    with explained(name, flags.overrides):
        job = job_of(cfg)
        if flags.cfg:
            _check_printed(cfg, flags)
            return job
        check_parts(job.cfg, flags.overrides, flags.config_dir)
        return job


def job_of(cfg: DictConfig) -> Job:
    """Return the composed config of one run as typed objects, and its run folder; `cfg` is as before afterwards.

    Raises:
        InputError: the config is a sweep, or a value or the folder is not valid.
    """
    choices = [cfg.hydra.runtime.choices.get(f"hydra/{group}") for group in ("launcher", "sweeper")]
    if cfg.hydra.mode is not None or cfg.hydra.sweeper.get("params") or choices != ["basic", "basic"]:
        raise InputError("this config is a sweep, but would run as one job; add -m to run each of its jobs")
    folder = _folder_at(cfg, "hydra.run.dir")
    return Job(typed_without_hydra(cfg.copy()), folder)


def _check_printed(cfg: DictConfig, flags: Namespace) -> None:
    """Raise InputError if a config cannot be printed as --cfg, --resolve and --package ask."""
    printed = cfg if flags.cfg == "all" else cfg.hydra if flags.cfg == "hydra" else without_hydra(cfg)
    if flags.package is not None and OmegaConf.select(cfg, flags.package) is None:
        raise InputError(f"--package {flags.package} is not a section of the config; --help lists them")
    if flags.resolve and flags.cfg == "job":
        OmegaConf.resolve(printed)


def _plan_sweep(flags: Namespace) -> Sweep:
    """Return the jobs of a sweep as Hydra's sweeper numbers them."""
    check_syntax(flags.overrides)
    with composing(flags.config_dir, words=flags.overrides):
        hydra_words, hydra, swept = compose_sweep(flags.overrides)
        for word in hydra_words:
            if _key(word) == "hydra.run.dir":
                raise InputError(f"{word} has no effect with -m; write hydra.sweep.dir=<folder for all jobs>")
        if not hydra.sweeper._target_.endswith(".BasicSweeper"):
            raise InputError(
                f"hydra/sweeper={hydra.runtime.choices['hydra/sweeper']} proposes jobs, but a sweep is a grid; remove"
                " it, and search with python -m sasrec_lab.search"
            )
        combinations = expand_grid(swept)
        if not combinations:
            asked = " ".join(word_of(override) for override in swept if override.is_sweep_override())
            raise InputError(f"{asked} gives no job to run; --help lists the choices of each group")
        searched = [key for key, override in by_key(swept).items() if override.is_sweep_override()]
        naming = _omit_from_names(combinations, searched) if UNNAMED_KEYS not in map(_key, hydra_words) else []
        words = [[*hydra_words, *naming, *each] for each in combinations]
        first = compose_checked([*words[0], "hydra.job.num=0"])
        folder = _folder_at(first, "hydra.sweep.dir")
        first.hydra.sweep.dir = str(folder)  # one for all jobs, even of different names
        shared = format_override("hydra.sweep.dir", str(folder))
        others = (compose_checked([*words[n], shared, f"hydra.job.num={n}"]) for n in range(1, len(words)))
        cfgs = chain([first], others)  # one at a time: a sweep may have thousands
        jobs = [_job_of_sweep(cfg, each, flags.config_dir) for cfg, each in zip(cfgs, words, strict=True)]
    return Sweep(_assign_folders(jobs, folder), folder, hydra.launcher, naming)


def compose_sweep(words: list[str]) -> tuple[list[str], DictConfig, list[Override]]:
    """Return the words for Hydra's own keys, its composed section, and the overrides of a sweep with its params."""
    hydra_words, given = _split_off_hydra(parse_sweep(words))
    fixed = [word_of(override) for override in given if not override.is_sweep_override()]
    # keys of `model` wait for the jobs: the default model may lack them
    hydra = compose_checked(hydra_words + [word for word in fixed if not word.startswith("model.")]).hydra
    return hydra_words, hydra, parse_sweep([word_of(override) for override in given], hydra.sweeper.params)


def _omit_from_names(jobs: list[list[str]], searched: list[str]) -> list[str]:
    """Return the override that keeps what all jobs of a sweep share out of the names of their folders."""
    shared = [key for key in common_keys(jobs) if key not in searched]
    return [f"{UNNAMED_KEYS}=[{','.join(map(repr, shared))}]"]


def _key(word: str) -> str:
    return word.partition("=")[0]


def _split_off_hydra(overrides: list[Override]) -> tuple[list[str], list[Override]]:
    """Return the words for Hydra's own keys, and the remaining overrides."""
    own = [word_of(override) for override in overrides if override.get_key_element().startswith("hydra.")]
    others = [override for override in overrides if not override.get_key_element().startswith("hydra.")]
    for override in others:
        if override.get_key_element() == "sweep" and override.is_sweep_override():
            raise InputError(f"{override.input_line}: choose one sweep at a time; run the command once for each")
    return own, others


def word_of(override: Override) -> str:
    """Return the word that an override was parsed from."""
    assert override.input_line is not None
    return override.input_line


def by_key(overrides: list[Override]) -> dict[str, Override]:
    """Return the overrides by key; a later one wins, so the command line over the sweeper's params."""
    return {override.get_key_element(): override for override in overrides}


def _job_of_sweep(cfg: DictConfig, overrides: list[str], config_dir: str | None) -> Job:
    folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
    try:
        typed = typed_without_hydra(cfg)
        check_parts(typed, overrides, config_dir)
        return Job(typed, folder)
    except InputError as error:
        return Job(error, folder)


def check_parts(cfg: object, overrides: list[str], config_dir: str | None) -> None:
    """Import the parts of the user's that a config names, so that a mistake in them costs no time.

    The user names them by an override, or by the files of --config-dir. A run folder is data, even as that folder: what
    its files name must be an override as well.

    Raises:
        InputError: a part is missing, of another kind or has a wrong option, or only a run folder names it.
    """
    if not isinstance(cfg, TrainConfig):
        return
    if config_dir and is_in_run_folder(config_dir):
        for part in cfg.parts:
            if not any(word.lstrip("+") == f"{part.key}={part.name}" for word in overrides):
                raise InputError(
                    f"{part.key}={part.name} is code that a config of a run folder names ({config_dir}); if you trust"
                    f" it, add {part.key}={part.name} to the command line, or copy the config elsewhere"
                )
    cfg.check_parts()


def _assign_folders(jobs: list[Job], sweep: Path) -> list[Job]:
    """Give each job that is new to the sweep's folder a number that is not taken there; equal jobs share a folder."""
    existing = job_folders(sweep)
    taken = {name.partition("-")[0] for name in existing}
    free = count(max([len(jobs), *(int(number) + 1 for number in taken)]))
    folders: dict[str, Path] = {}
    assigned = []
    for job in jobs:
        number, dash, overrides = job.folder.name.partition("-")
        is_taken = number in taken and job.folder.name not in existing
        folder = job.folder.with_name(f"{next(free)}-{overrides}") if is_taken else job.folder
        assigned.append(replace(job, folder=folders.setdefault(overrides if dash else number, folder)))
    return assigned


def _folder_at(cfg: DictConfig, key: str) -> Path:
    folder = OmegaConf.select(cfg, key)
    if not folder:
        raise InputError(f"{key} must not be empty; set it to a folder, or omit it")
    if any(len(os.fsencode(part)) > _MAX_NAME for part in folder.split("/")) or len(folder) > _MAX_PATH:
        raise InputError(f"{key}={folder[:50]}... is too long for a folder; choose a shorter one")
    return Path(folder)
