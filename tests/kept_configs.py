"""Parts of composed configs, kept for the whole process: Hydra takes longer to compose one than a tiny run to train.

What is kept is found by the content of what went in. Each caller gets a copy of its own, unless Hydra only reads it.
"""

import copy
import pickle
from functools import lru_cache
from typing import Any

import omegaconf
import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.grammar_parser import parse as parse_interpolation


def keep_configs() -> None:
    """Let Hydra parse each file, override and interpolation, and merge the same files, only once in this process."""
    patch = pytest.MonkeyPatch()  # never undone
    patch.setattr(OmegaConf, "load", staticmethod(_load_once(OmegaConf.load)))
    patch.setattr(OverridesParser, "parse_rule", _parse_once(OverridesParser.parse_rule))
    patch.setattr(defaults_list, "_create_interpolation_map", _map_once(defaults_list._create_interpolation_map))
    patch.setattr(ConfigStore, "__deepcopy__", _copy_of_store, raising=False)
    name = "_compose_config_from_defaults_list"
    patch.setattr(ConfigLoaderImpl, name, _merge_once(getattr(ConfigLoaderImpl, name)))
    parse = lru_cache(maxsize=None)(parse_interpolation)  # nothing changes a parsed tree
    for module in (omegaconf.base, omegaconf._utils):
        patch.setattr(module, "parse", parse)


def _copy_of_store(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    """Return a store with groups of its own, and the same configs: Hydra copies each that it loads."""
    other = copy.copy(store)
    other.repo = _copy_of_groups(store.repo)
    return other


def _copy_of_groups(repo: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy_of_groups(node) if isinstance(node, dict) else node for name, node in repo.items()}


def _load_once(load: Any) -> Any:
    kept: dict[str, bytes] = {}

    def load_once(file: Any) -> Any:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in kept:
            file.seek(0)
            kept[text] = pickle.dumps(load(file))
        return pickle.loads(kept[text])  # a fifth of the time of deepcopy

    return load_once


def _parse_once(parse: Any) -> Any:
    kept: dict[tuple[str, str], Any] = {}

    def parse_once(parser: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in kept:
            kept[text, rule] = parse(parser, text, rule)
        return copy.deepcopy(kept[text, rule])

    return parse_once


def _map_once(make: Any) -> Any:
    kept: dict[str, DictConfig] = {}

    def map_once(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
        content = repr((overrides.known_choices, defaults, self_added))
        if content not in kept:
            kept[content] = make(overrides, defaults, self_added)
        return kept[content]  # interpolations only read it

    return map_once


def _merge_once(merge: Any) -> Any:
    kept: dict[bytes, bytes] = {}

    def merge_once(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
        loaded = [repo.load_config(default.config_path) for default in defaults]
        places = [(default.config_path, default.package, default.primary) for default in defaults]
        content = pickle.dumps((places, [(one.config, one.header, one.is_schema_source) for one in loaded]))
        if content not in kept:
            kept[content] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(kept[content])

    return merge_once
