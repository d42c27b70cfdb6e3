"""A config as plain values, as run.json and TensorBoard have it. Imports nothing that takes time."""

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

_BESIDE = ("ckpt", "data_dir", "published", "tensorboard", "trainer.enable_progress_bar")


def plain(typed: Any) -> Any:
    """A typed config as dicts, lists, numbers and text (an Enum member is its name), for JSON and TensorBoard."""
    if is_dataclass(typed):
        return {field.name: plain(getattr(typed, field.name)) for field in fields(typed)}
    if isinstance(typed, dict):
        return {key: plain(value) for key, value in typed.items()}
    if isinstance(typed, (list, tuple)):
        return [plain(value) for value in typed]
    return typed.name if isinstance(typed, Enum) else typed


def flat(tree: dict[str, Any], prefix: str = "", joint: str = "/") -> dict[str, Any]:
    """`{"model": {"dim": 64}}` -> `{"model/dim": 64}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}{joint}", joint) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def is_beside(key: str) -> bool:
    """Whether a dotted key says where things lie, what stands beside a run or what is shown, and not what is run."""
    return any(f"{key}.".startswith(f"{own}.") for own in _BESIDE)
