"""The data set of a finished run: its sequences as they were, and the config that its split depends on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.model import AnyModel, ModelConfig
from sasrec_lab.config.schema import MODEL_SCHEMAS
from sasrec_lab.data.sequences import Sequences, load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.files import display_path


def load_split_model(config: dict[str, Any]) -> AnyModel:
    """Return the model section of a plain config, of any kind of model; the split depends on some of its keys."""
    schema = MODEL_SCHEMAS.get(str(config["model"].get("name")), ModelConfig)  # an encoder has no name
    model: AnyModel = section_of(config, "model", schema)
    return model


def load_run_sequences(
    folder: Path, dataset: DatasetConfig, data_dir: str | None, sha256: str | None, *, is_data_dir_given: bool, fix: str
) -> Sequences:
    """Return the sequences of the data set that a run was trained on, whose file had this checksum.

    Nothing is written to a data root that the user has not given.

    Raises:
        InputError: the data set is missing or has changed; the message ends in `fix`.
    """
    sequences = load_sequences(replace(dataset, sha256=None), data_dir, may_write_root=is_data_dir_given)
    if sequences.sha256 != sha256:
        raise InputError(
            f"{sequences.file} has sha256 {sequences.sha256}, but {display_path(folder)} was trained on {sha256}; {fix}"
        )
    return sequences
