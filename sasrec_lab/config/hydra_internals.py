"""All that this package uses of `hydra._internal`: the parser of flags, the grid of a sweep, the folders of configs.

None has a public name in Hydra 1.3. Nor have the first two in 1.4 (read at 1.4.0rc3, which still has their names):
- `get_args_parser` knows Hydra's flags (`-m`, `--cfg`, `--config-dir`, ...), so that we read a command line as Hydra
  will. Hydra 1.4 calls `parse_intermixed_args` on it, which accepts overrides on both sides of a flag; do the same
  here then, and delete `flags.flags_first`.
- `BasicSweeper.split_arguments` turns the overrides of a sweep into jobs, in the order in which Hydra numbers them. If
  it disappears: `itertools.product` over `Override.sweep_string_iterator()` of each key, params before arguments.
- `ConfigLoaderImpl.repository` holds the folders of configs, to which Hydra's own entry adds that of --config-dir.
"""

import os
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import prod
from typing import Any

import hydra
import omegaconf
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.version import VersionBase
from omegaconf import OmegaConf

from sasrec_lab.errors import InputError, first_few, shortened

# Hydra 1.4 behaves so without the argument, and warns of it
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}

MAX_JOBS = 10_000  # of a sweep; each one's config is composed before the first runs


def register_resolver(name: str, function: Callable[..., Any], use_cache: bool = False) -> None:
    """Register what `${name:...}` is replaced by, with the function that OmegaConf 2.3 or 2.4 has for it."""
    is_old = omegaconf.__version__.startswith("2.3.")  # it has an older function with the name of 2.4's
    register: Any = OmegaConf.register_new_resolver if is_old else OmegaConf.register_resolver
    register(name, function, use_cache=use_cache, replace=True)


@contextmanager
def hydra_state_restored() -> Iterator[None]:
    """Restore what Hydra keeps for the whole process after the body: a notebook may use Hydra on its own."""
    initialized, version_base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = initialized
        VersionBase.instance().version_base = version_base


def add_config_dir(folder: str) -> None:
    """Add the folder of --config-dir to where Hydra, once initialized, looks for configs: as its own entry does.

    So `hydra.searchpath` and `glob(*)` mean the same when a command line is checked and when it runs.
    """
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    path = loader.get_search_path()
    path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(path)


def parse_flags(words: list[str]) -> tuple[Namespace, list[str]]:
    """Return Hydra's flags with the `overrides` before the last flag, and the remaining words.

    Raises:
        InputError: a flag lacks its value, or has one that it does not take.
    """
    try:
        return _flag_parser().parse_known_args(words)
    except ArgumentError as error:
        raise InputError(f"{error.argument_name}: {shortened(error.message)}; --hydra-help lists the flags") from error


def known_flags() -> list[str]:
    """Return the names of Hydra's flags, such as `-m` and `--multirun`."""
    return list(_flag_parser()._option_string_actions)


def _flag_parser() -> ArgumentParser:
    """Return Hydra's parser of flags, which raises its errors and takes no flag for its abbreviation."""
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.exit_on_error = False
    return parser


def parse_sweep(words: list[str], params: Mapping[str, str] | None = None) -> list[Override]:
    """Return the overrides of a sweep: those of its sweeper's `params`, then those of the command line.

    Call it while Hydra is initialized: `glob(*)` lists the files of a config group.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*(f"{key}={value}" for key, value in (params or {}).items()), *words])


def expand_grid(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of each job of a grid, as Hydra numbers the jobs; a later override of a key wins.

    Raises:
        InputError: there would be more than 10,000 jobs; they are counted before one is made.
    """
    _check_size(overrides)
    (grid,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return grid


def _check_size(overrides: list[Override]) -> None:
    by_key = {override.get_key_element(): override for override in overrides}
    sweeps = [override for override in by_key.values() if override.is_discrete_sweep()]
    if prod(map(_count_values, sweeps)) > MAX_JOBS:
        words = first_few([printed.input_line[:80] for printed in sweeps if printed.input_line], 3, " ")
        raise InputError(f"{words}: a sweep may have {MAX_JOBS:,} jobs at most; give fewer values")


def _count_values(sweep: Override) -> int:
    """Return how many values a sweep has, at most one more than is allowed."""
    value = sweep.value()
    values = value.range() if isinstance(value, RangeSweep) else sweep.sweep_string_iterator()
    return sum(1 for _ in islice(values, MAX_JOBS + 1))
