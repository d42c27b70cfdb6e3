"""Keys of a search, and the plan of one: what its trials share, and the space that they are drawn from."""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from functools import reduce
from hashlib import sha1
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import MISSING, DictConfig

from sasrec_lab.config.checks import check_at_least
from sasrec_lab.config.command_line import by_key, check_config_flags, check_parts, compose_sweep, word_of
from sasrec_lab.config.composition import compose_checked, compose_config, composing, typed_without_hydra, without_hydra
from sasrec_lab.config.convert import is_bookkeeping, known_keys, to_plain, to_typed
from sasrec_lab.config.flags import read_flags
from sasrec_lab.config.hydra_internals import MAX_JOBS
from sasrec_lab.config.overrides import check_syntax
from sasrec_lab.config.schema import SCHEMAS, TrainConfig
from sasrec_lab.config.search_space import Dimension, dimension_of, example_value
from sasrec_lab.errors import InputError, nearest
from sasrec_lab.files import folder_name

Sampler = Enum("Sampler", ["tpe", "random", "grid"])
Pruner = Enum("Pruner", ["none", "median", "hyperband", "wilcoxon"])

FOLDER_KEY = "hydra.sweep.dir"
_DEFAULT_TRIALS = 20
_FIRST_SEEDS = 4  # with fewer the test of pruner=wilcoxon cannot reach its level of 10%


@dataclass
class SearchConfig:
    """All keys of conf/search.yaml: those of the command sasrec_lab.search that are not a run's."""

    trials: Optional[int] = MISSING
    sampler: Sampler = MISSING
    pruner: Pruner = MISSING
    seeds: int = MISSING
    jobs: int = MISSING

    def __post_init__(self) -> None:
        if self.trials is not None:
            check_at_least("trials", self.trials, 1)
        check_at_least("seeds", self.seeds, 1)
        check_at_least("jobs", self.jobs, 1)
        if self.pruner is Pruner.wilcoxon and self.seeds <= _FIRST_SEEDS:
            raise InputError(
                f"pruner=wilcoxon compares trials on equal seeds, of which it needs {_FIRST_SEEDS} before it can stop"
                f" one; set seeds to at least {_FIRST_SEEDS + 1}, not {self.seeds}, or use another pruner"
            )


SCHEMAS["search"] = SearchConfig
ConfigStore.instance().store(name="search_schema", node=SearchConfig)


@dataclass(frozen=True)
class SearchPlan:
    """A search: its own keys, the words that its trials share, their space, and one configuration of them."""

    cfg: SearchConfig
    fixed: list[str]
    config_dir: str | None
    space: list[Dimension]
    example: TrainConfig
    folder: Path

    @property
    def trials(self) -> int:
        """Return the number of trials: what was asked for, but of a grid no more than there are combinations."""
        if self.cfg.sampler is not Sampler.grid:
            return self.cfg.trials or _DEFAULT_TRIALS
        combinations = prod(int(dimension.size) for dimension in self.space)
        return min(self.cfg.trials or combinations, combinations)

    def combinations(self) -> Iterator[dict[str, str | float]]:
        """Yield the values of each trial of a grid, in the order of a sweep."""
        keys = [dimension.key for dimension in self.space]
        lists: list[list[str | float]] = [dimension.listed() for dimension in self.space]
        for values in product(*lists):
            yield dict(zip(keys, values, strict=True))

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of each trial."""
        return [self.example.seed + number for number in range(self.cfg.seeds)]

    def words(self, params: dict[str, str | float], seed: int) -> list[str]:
        """Return the overrides of the run of a trial with this seed, in the form of the command sasrec_lab.train."""
        words = [*self.fixed, *self._searched(params)]
        if self.cfg.seeds == 1:
            return words
        return [*(word for word in words if _key(word) != "seed"), f"seed={seed}"]

    def run_folder(self, number: int, params: dict[str, str | float], seed: int) -> Path:
        """Return the folder of the run of a trial with this seed, such as 3-model.dim=32,seed=1."""
        words = sorted(self._searched(params)) + ([f"seed={seed}"] if self.cfg.seeds > 1 else [])
        return self.folder / folder_name(f"{number}-{','.join(words)}")

    def _searched(self, params: dict[str, str | float]) -> list[str]:
        return [dimension.word(params[dimension.key]) for dimension in self.space]

    def definition(self) -> dict[str, object]:
        """Return, for JSON, what must not change in the folder of a search: its space, its seeds, and all other keys.

        Keys that do not change what is computed are not in it, and sampler and pruner may change. `fixed` has the words
        for sections that are searched as a whole.
        """
        searched = tuple(f"{dimension.key}." for dimension in self.space)
        return {
            "space": {dimension.key: dimension.text for dimension in self.space},
            "seeds": self.cfg.seeds,
            "fixed": {_key(word): word for word in self.fixed if word.lstrip("+").startswith(searched)},
            "config": self.without_searched(to_plain(self.example)),
        }

    def without_searched(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Remove the searched keys from a plain config and return it."""
        for dimension in self.space:
            *sections, name = dimension.key.lstrip("+").split(".")
            section = reduce(lambda node, part: node.get(part) or {}, sections, plain)
            section.pop(name, None)
        return plain


def check_search(argv: list[str]) -> SearchPlan | None:
    """Return the search that these arguments ask for, or None for help and completion.

    Raises:
        InputError: a mistake on the command line, in a config file or in the space.
    """
    flags = read_flags(argv, "search")
    check_config_flags(flags, "search")
    if flags.shell_completion or flags.help or flags.hydra_help:
        return None
    for attribute in ("cfg", "info", "run"):
        if getattr(flags, attribute):
            raise InputError(f"--{attribute} is for one run: python -m sasrec_lab.train --{attribute}; remove it here")
    own_keys = [field.name for field in fields(SearchConfig)]
    own = [word for word in flags.overrides if _key(word) in own_keys]
    others = [word for word in flags.overrides if word not in own]
    check_syntax(flags.overrides, "search")
    for word in others:
        _check_not_misspelled(_key(word), own_keys)
    cfg = to_typed(without_hydra(compose_config(own, name="search")))
    assert isinstance(cfg, SearchConfig)
    return _plan(cfg, flags, others)


def _check_not_misspelled(key: str, own_keys: list[str]) -> None:
    known = known_keys()
    if key not in known and "." not in key and (found := nearest(key, [*own_keys, *known])) in own_keys:
        raise InputError(f"unknown key {key!r}; did you mean {found}?")


def _plan(cfg: SearchConfig, flags: Namespace, words: list[str]) -> SearchPlan:
    """Compose every file that can take part in the search, which checks it, and return the plan."""
    folder = _typed_folder([word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))])
    with composing(flags.config_dir, words=words):
        _, hydra, overrides = compose_sweep(words)
        searched = by_key(overrides)
        space = [dimension_of(key, override) for key, override in searched.items() if override.is_sweep_override()]
        _check_space(cfg, space)
        fixed = [word_of(override) for override in searched.values() if not override.is_sweep_override()]
        examples = _examples(searched)
        composed = [compose_checked(example) for example in examples]
        example = _typed_example(composed[0].copy(), fixed)
    _check_example(example)
    for each, its_words in zip(composed, examples, strict=True):
        if (typed := _typed_if_valid(each)) is not None:
            check_parts(typed, its_words, flags.config_dir)
    sweep = hydra.runtime.choices.get("sweep")
    plan = SearchPlan(cfg, fixed, flags.config_dir, space, example, folder or Path())
    return plan if folder else SearchPlan(cfg, fixed, flags.config_dir, space, example, _own_folder(plan, sweep))


def _typed_folder(hydra_words: list[str]) -> Path | None:
    """Return the folder that the command line chooses, None without a choice."""
    folder = None
    for word in hydra_words:
        key, _, value = word.partition("=")
        if key != FOLDER_KEY:
            fix = "jobs=<number> runs several trials at a time" if "launcher" in key else f"only {FOLDER_KEY} is used"
            raise InputError(f"{word} has no effect on a search: {fix}; remove it")
        folder = Path(value.strip("'\""))
    if folder == Path():
        raise InputError(f"{FOLDER_KEY} must not be empty; set it to a folder, or omit it")
    return folder


def _own_folder(plan: SearchPlan, sweep: str | None) -> Path:
    """Return a folder that the same command always has, whatever the number of its trials and jobs."""
    words = [word for word in plan.fixed if not is_bookkeeping(_key(word))]
    space = [f"{dimension.key}={dimension.text}" for dimension in plan.space]
    cfg = plan.cfg
    text = json.dumps([sorted(words), space, cfg.sampler.name, cfg.pruner.name, cfg.seeds])
    name = f"search-{sweep}-" if sweep else "search-"
    return Path("outputs", plan.example.name, folder_name(name + sha1(text.encode()).hexdigest()[:8]))


def _check_space(cfg: SearchConfig, space: list[Dimension]) -> None:
    if not space:
        raise InputError(
            "there is nothing to search: choose a space such as sweep=small, or give a key several values, such as"
            " model.dim=32,64 or 'optimizer.lr=interval(0.001,0.01)'"
        )
    if cfg.sampler is not Sampler.grid:
        return
    for dimension in space:
        if dimension.kind == "float" and dimension.step is None:
            raise InputError(
                f"sampler=grid needs values to list, but {dimension.key}={dimension.text} is an interval; list some, or"
                " use sampler=random"
            )
    if prod(dimension.size for dimension in space) > MAX_JOBS:
        raise InputError(f"sampler=grid: a grid may have {MAX_JOBS:,} combinations at most; use sampler=random")


def _examples(searched: dict[str, Override]) -> list[list[str]]:
    """Return the overrides of one run that the search could propose, then of one run per further file that it searches.

    Every file that can take part is composed once, so that `check_code` sees it.
    """
    first = {key: example_value(override) for key, override in searched.items()}
    examples = [first]
    for key, override in searched.items():
        if "." not in key and override.is_sweep_override() and not override.is_interval_sweep():
            examples += [first | {key: value} for value in islice(override.sweep_string_iterator(), 1, None)]
    return [[f"{key}={value}" for key, value in example.items()] for example in examples]


def _typed_example(composed: DictConfig, fixed: list[str]) -> TrainConfig:
    """Return a typed config of the search; if its first combination is invalid, that without the searched keys."""
    try:
        example = typed_without_hydra(composed)
    except InputError as error:
        try:
            example = typed_without_hydra(compose_checked(fixed))
        except InputError:
            raise error from None
    assert isinstance(example, TrainConfig)
    return example


def _typed_if_valid(composed: DictConfig) -> object:
    """Return a typed config of the search, or None for an invalid one: a trial that proposes it will fail."""
    try:
        return typed_without_hydra(composed)
    except InputError:
        return None


def _check_example(example: TrainConfig) -> None:
    """Raise InputError if the runs of a search have no validation, or several processes."""
    if not example.has_validation:
        raise InputError(
            "a search compares trials on validation, which dataset.holdout=none and trainer.limit_val_batches=0 turn"
            " off; remove them"
        )
    if example.ckpt is not None:
        raise InputError(f"ckpt={example.ckpt} is for one run; remove it: the same command continues its search")
    if example.cluster is not None:
        raise InputError("cluster is for one run on several machines; remove it, and start the search on each of them")
    for flag in ("devices", "num_nodes"):
        value = example.trainer.get(flag, 1)
        if value != 1 and not (isinstance(value, list) and len(value) == 1):
            raise InputError(f"trainer.{flag}={value}: each run of a search has one device; set it to 1")


def _key(word: str) -> str:
    return word.partition("=")[0]
