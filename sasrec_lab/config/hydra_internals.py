"""Hydra's parser of command-line flags and its grid of a sweep: all that this package uses of `hydra._internal`.

Neither has a public name in Hydra 1.3, nor in 1.4 (read at 1.4.0rc3, where both are still found under these names):
- `get_args_parser` knows Hydra's flags (`-m`, `--cfg`, `--config-dir`, ...), so that we read a command line as Hydra
  will. Hydra 1.4 calls `parse_intermixed_args` on it, which accepts overrides on both sides of a flag; do the same
  here then, and delete `overrides._flags_first`.
- `BasicSweeper.split_arguments` turns the overrides of a sweep into jobs, in the order in which Hydra numbers them. If
  it disappears: `itertools.product` over `Override.sweep_string_iterator()` of each key, params before arguments.
"""

from argparse import Namespace
from collections.abc import Mapping

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


def parse_flags(words: list[str]) -> Namespace:
    """Return Hydra's flags and the `overrides` of a command line; exit with a usage message if a flag is unknown."""
    return get_args_parser().parse_args(words)


def parse_known_flags(words: list[str]) -> tuple[Namespace, list[str]]:
    """Return Hydra's flags and the `overrides` before the last flag, and the remaining words."""
    return get_args_parser().parse_known_args(words)


def parse_sweep(words: list[str], params: Mapping[str, str] | None = None) -> list[Override]:
    """Return the overrides of a sweep: those of its sweeper's `params`, then those of the command line.

    Call it while Hydra is initialized: `glob(*)` lists the files of a config group.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return parser.parse_overrides([*(f"{key}={value}" for key, value in (params or {}).items()), *words])


def expand_grid(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of each job of a grid, as Hydra numbers the jobs; a later override of a key wins."""
    (grid,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return grid
