"""The fields that commands use of run.json, metrics.json and search.json, with the types that they must have.

A run folder may be a stranger's, or edited. Fields that are not named here are not used, and one that is missing was
not yet known to the version that wrote the file.
"""

from collections.abc import Callable, Iterator
from typing import Any

_MAX_DEPTH = 30  # a run's own records are 8 levels deep
_LARGEST = 1e30  # sums and squares of larger numbers overflow
_MAX_COUNT = 2**63
_ENDS = ("finished", "failed", "interrupted", "pruned")


def check_fields(content: dict[str, Any], file: str) -> None:
    """Check what a record, such as run.json, has in the fields that commands use.

    Raises:
        ValueError: a field is missing or has another type, a number is negative or not finite, or the record is deeply
            nested.
    """
    _check_depth(content)
    required = _REQUIRED.get(file, ()) + (_OF_FINISHED if content.get("status") == "finished" else ())
    if missing := [key for key in required if key not in content]:
        raise ValueError(f"it has no {missing[0]}")
    for key, (is_valid, rule) in _RULES.get(file, {}).items():
        for name, value in _values_at(content, key.split("."), ""):
            if not is_valid(value):
                raise ValueError(f"{name} must be {rule}, not {value!r:.50}")


def _values_at(value: Any, names: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of a field, if it is there; `*` is every place of a dict or list."""
    if not names:
        yield path.removeprefix("."), value
    elif isinstance(value, dict):
        for name in value if names[0] == "*" else {names[0]} & value.keys():
            yield from _values_at(value[name], names[1:], f"{path}.{name}")
    elif isinstance(value, list) and names[0] == "*":
        for number, inner in enumerate(value):
            yield from _values_at(inner, names[1:], f"{path}.{number}")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_MAX_DEPTH):
        containers = [value for value in level if isinstance(value, (dict, list))]
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST  # NaN is not


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _is_trial(value: Any) -> bool:
    return isinstance(value, dict) and {"number", "status", "value"} <= value.keys()


def _or_null(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    is_valid, text = rule
    return lambda value: value is None or is_valid(value), f"{text} or null"


_OBJECT = (lambda value: isinstance(value, dict), "an object")
_LIST = (lambda value: isinstance(value, list), "a list")
_TEXT = (lambda value: isinstance(value, str) and "\0" not in value, "text")
_NUMBER = (_is_number, "a finite number")
_POSITIVE = (lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_COUNT = (_is_count, "an integer of at least 0")
_END = (lambda value: isinstance(value, str) and value in _ENDS, f"one of {', '.join(_ENDS)}")
_COUNTS = (
    lambda value: isinstance(value, list) and len(value) > 0 and all(map(_is_count, value)),
    "a list of integers",
)

_RULES: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "run.json": {
        "start": _TEXT,
        "end": _TEXT,
        "directory": _TEXT,
        "command": _TEXT,
        "matmul": _TEXT,
        "kernels": _TEXT,
        "git": _OBJECT,
        "git.commit": _or_null(_TEXT),
        "seconds": _OBJECT,
        "seconds.*": _POSITIVE,
        "earlier": _LIST,
        "earlier.*": _OBJECT,
        "earlier.*.seconds": _OBJECT,
        "earlier.*.seconds.*": _POSITIVE,
        "item_features": _TEXT,
        "init_from": _OBJECT,
        "init_from.other_data": _or_null(_TEXT),
        "foreign": _OBJECT,
        "foreign.modules": _OBJECT,
        "foreign.modules.*": _TEXT,
        "parameters": _COUNT,
        "config": _OBJECT,
        "config.row": _or_null(_TEXT),
        "config.seed": _COUNT,
        "config.data_dir": _or_null(_TEXT),
        "config.published": _or_null(_OBJECT),
        "config.published.dataset": _TEXT,
        "config.published.source": _TEXT,
        "config.published.cells": _OBJECT,
        "config.published.cells.*": _OBJECT,
        "config.published.cells.*.*": _NUMBER,
        "config.dataset": _OBJECT,
        "config.model": _OBJECT,
        "config.model.block": _TEXT,
        "config.dataset.name": _TEXT,
        "config.dataset.path": _or_null(_TEXT),
        "config.dataset.sources": _or_null(_LIST),
        "config.dataset.titles": _or_null(_OBJECT),
        "config.dataset.titles.path": _or_null(_TEXT),
        "config.dataset.features": _or_null(_OBJECT),
        "config.dataset.features.path": _or_null(_TEXT),
        "config.evaluation": _OBJECT,
        "config.evaluation.k": _COUNTS,
        "config.evaluation.sampled": _COUNT,
        "config.evaluation.monitor": _TEXT,
    },
    "metrics.json": {
        "status": _END,
        "error": _or_null(_TEXT),
        "epochs": _COUNT,
        "best_epoch": _or_null(_COUNT),
        "metrics": _OBJECT,
        "metrics.*": _NUMBER,
        "baselines": _OBJECT,
        "baselines.*": _OBJECT,
        "baselines.*.*": _NUMBER,
        "cold_targets": _OBJECT,
        "cold_targets.*": _OBJECT,
        "cold_targets.*.*": _NUMBER,
        "protocol": _OBJECT,
        "protocol.dataset": _TEXT,
        "protocol.file": _TEXT,
        "protocol.sha256": _or_null(_TEXT),
        "protocol.held_out_users": _COUNT,
        "protocol.tested": _TEXT,
        "protocol.query_time": _TEXT,
        "protocol.candidates": _OBJECT,
        "protocol.candidates.full": _COUNT,
        "protocol.sampled_candidates": _or_null(_OBJECT),
        "protocol.sampled_candidates.draw": _TEXT,
        "protocol.seen_items": _TEXT,
        "protocol.leak": _POSITIVE,
    },
    "search.json": {
        "sampler": _TEXT,
        "pruner": _TEXT,
        "monitor": _TEXT,
        "space": _OBJECT,
        "space.*": _TEXT,
        "trials": _LIST,
        "trials.*": (_is_trial, "an object with number, status and value"),
        "trials.*.number": _COUNT,
        "trials.*.status": _TEXT,
        "trials.*.value": _or_null(_NUMBER),
        "importance": _OBJECT,
        "importance.*": _POSITIVE,
    },
}
_REQUIRED = {
    "run.json": ("config",),
    "metrics.json": ("status",),
    "search.json": ("sampler", "pruner", "monitor", "space", "trials", "importance"),
}
_OF_FINISHED = ("protocol", "metrics", "baselines", "best_epoch", "epochs")
