"""Find the run whose weights training starts from, which the key init_from names."""

from pathlib import Path
from typing import Any

from sasrec_lab.config.convert import completed, to_plain
from sasrec_lab.config.foreign import names_in
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


def find_initial_run(cfg: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and metrics.json of the run to start from, None if the config names none.

    Raises:
        InputError: the run is missing or unfinished, or its weights mean something else in this run's model.
    """
    if cfg.init_from is None:
        return None
    folder = Path(cfg.init_from).expanduser()
    config, results = load_finished(folder, KEY)
    before, now = completed(config)["model"], to_plain(cfg.model)
    if str(before.get("name")) in MODEL_SCHEMAS:
        raise InputError(f"{KEY}={folder}: {model_name(config)} has no weights that training could start from")
    if differing := [key for key in now if key not in _MAY_DIFFER and before.get(key) != now[key]]:
        key = differing[0]
        had, has = (_shown(value) for value in (before.get(key), now[key]))
        fix = f"set model.{key} to that value"
        if names_in({"model": {key: before.get(key)}}):
            fix = f"it is code that is not of this package: if you trust it, {fix}"
        raise InputError(f"{KEY}={folder} has model.{key}={had}, not {has}; {fix}")
    return folder, results


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
