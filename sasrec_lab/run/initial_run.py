"""Find the run whose weights training starts from, which the key init_from names."""

from pathlib import Path
from typing import Any, NamedTuple

from sasrec_lab.config.checks import typed_form
from sasrec_lab.config.convert import completed, to_plain
from sasrec_lab.config.foreign import names_in
from sasrec_lab.config.model import POINTWISE, BlockName
from sasrec_lab.config.schema import MODEL_SCHEMAS, TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run.folder import load_finished
from sasrec_lab.run.model_name import model_name

KEY = "init_from"
# Keys of `model` that leave the weights' meaning as it is, and their shapes except those of tables of positions
_MAY_DIFFER = (
    "blocks",
    "dropout",
    "dropout_attention",
    "dropout_inner",
    "dropout_input",
    "dropout_items",
    "dropout_output",
    "head_transform",
    "id_dropout",
    "init",
    "maxlen",
    "output_bias",
    "position_bias",
    "query_time",
    "temperature",
    "time_bias",
    "token_dropout",
)
_FIXED_IN_FUXI = ("position_bias", "time_bias")  # each adds a map, and columns to a matrix


class InitialRun(NamedTuple):
    """A finished run to start from: its folder, its config as this version completes it, and its metrics.json."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]


def find_initial_run(cfg: TrainConfig) -> InitialRun | None:
    """Return the run to start from, None if the config names none.

    Raises:
        InputError: the run is missing or unfinished, or its weights mean something else in this run's model.
    """
    if cfg.init_from is None:
        return None
    folder = Path(cfg.init_from).expanduser()
    config, results = load_finished(folder, KEY)
    config = completed(config)
    before, now = config["model"], to_plain(cfg.model)
    if str(before.get("name")) in MODEL_SCHEMAS:
        raise InputError(f"{KEY}={folder}: {model_name(config)} has no weights that training could start from")
    before, now = _with_divisor(before), _with_divisor(now)
    fixed = _FIXED_IN_FUXI if cfg.model.block is BlockName.fuxi else ()
    may_differ = set(_MAY_DIFFER).difference(fixed)
    if differing := [key for key in now if key not in may_differ and before.get(key) != now[key]]:
        key = differing[0]
        had, has = (typed_form(value) for value in (before.get(key), now[key]))
        fix = f"set model.{key} to that value"
        if names_in({"model": {key: before.get(key)}}):
            fix = f"it is code that is not of this package: if you trust it, {fix}"
        raise InputError(f"{KEY}={folder} has model.{key}={had}, not {has}; {fix}")
    return InitialRun(folder, config, results)


def _with_divisor(model: dict[str, Any]) -> dict[str, Any]:
    """Return the section `model` with the number that null means for `divisor`: other lengths then need it typed."""
    is_pointwise = model.get("block") in [block.name for block in POINTWISE]
    return model | {"divisor": model.get("divisor") or float(model["maxlen"])} if is_pointwise else model
