"""Refuse keys that were typed although the composed config reads them only with another key.

A file may hold such keys, so that `dataset=kion dataset.features.path=null` turns its features off.
"""

from collections.abc import Iterable

from omegaconf import DictConfig, ListConfig, OmegaConf

from sasrec_lab.config.checks import typed_form
from sasrec_lab.errors import InputError

# A key, or the beginning of keys; the keys of which one must be set for it to be read; and how one is set
_READ_WITH: dict[str, tuple[tuple[str, ...], str]] = {
    "dataset.weight.": (("dataset.weight.column",), "dataset.weight.column=..."),
    "dataset.titles.": (("dataset.titles.path",), "dataset.titles.path=..."),
    "dataset.features.": (("dataset.features.path",), "dataset.features.path=..."),
    "dataset.until_stable": (("dataset.min_user", "dataset.min_item"), "dataset.min_user=5 dataset.min_item=5"),
    "evaluation.draw": (("evaluation.sampled",), "evaluation.sampled=100"),
}


def check_unread(cfg: DictConfig, typed: Iterable[str]) -> None:
    """Raise InputError for the first typed key that would change nothing, with the key that it needs."""
    for key in typed:
        value = _value(cfg, key)
        if key.startswith("dataset.synthetic.") and typed_form(_value(cfg, "dataset.format")) != "synthetic":
            name = _value(cfg, "dataset.name")
            raise InputError(f"{key}={typed_form(value)} is not read for dataset={name}; use dataset=synthetic")
        for beginning, (others, fix) in _READ_WITH.items():
            is_set = any(_value(cfg, other) for other in others)
            if key.startswith(beginning) and key not in others and value is not False and not is_set:
                needed = " and ".join(f"{other}={typed_form(_value(cfg, other))}" for other in others)
                raise InputError(f"{key}={typed_form(value)} is not read with {needed}; set {fix}, or remove {key}")


def _value(cfg: DictConfig, key: str) -> object:
    """Return a value of the config, None for one that is missing or refers to a key that does not exist."""
    value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    return list(value) if isinstance(value, ListConfig) else value
