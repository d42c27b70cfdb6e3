"""The held-out rows that lists are compared with: those of a finished run, or of a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec_lab.config.composition import load, load_dataset
from sasrec_lab.config.convert import completed, section_of, to_plain
from sasrec_lab.config.dataset import DatasetConfig, FeaturesConfig, HoldoutMode
from sasrec_lab.config.evaluation import EvaluationConfig
from sasrec_lab.config.overrides import format_override
from sasrec_lab.data.evaluation_rows import EvaluationRows
from sasrec_lab.data.holdout import Holdout, hold_out_for
from sasrec_lab.data.items import read_features
from sasrec_lab.data.sequences import Sequences, load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.list_metrics import ItemCategories, TrainingCounts, training_counts
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run.protocol import protocol
from sasrec_lab.run.split import load_run_sequences, load_split_model

_OF_MODEL = ("training_windows", "selected_by", "validation", "candidates", "seen_items", "ties")


@dataclass(frozen=True)
class HeldOut:
    """The rows of one split with the data set that they are of."""

    split: str  # val or test
    dataset: DatasetConfig
    data_dir: str | None
    sequences: Sequences
    holdout: Holdout
    lengths: list[int]  # of lists, to measure at
    protocol: dict[str, Any]

    @property
    def rows(self) -> EvaluationRows:
        """Return the rows to find the targets of."""
        return self.holdout.rows(self.split)

    @property
    def counts(self) -> TrainingCounts:
        """Return how often items occur in training."""
        return training_counts(self.holdout)

    def categories(self) -> ItemCategories | None:
        """Return the categories of the items, None if the data set has no file of them.

        Raises:
            InputError: the file is missing, or not as the config describes it.
        """
        features = read_features(self.dataset, self.data_dir, self.holdout.item_ids, self.holdout.num_items)
        if features is None or not features.names:
            return None
        return ItemCategories(features.offsets, features.categories)


def of_run(folder: Path, split: str, data_dir: str | None, words: list[str]) -> HeldOut:
    """Return the rows of a finished run; `words` may choose a data set for the items' features.

    Raises:
        InputError: the run cannot be read, it holds nothing out, or its data set is missing or has changed.
    """
    config, results = run_folder.load_finished(folder)
    config = completed(config)
    dataset = section_of(config, "dataset", DatasetConfig)
    _check_holdout(dataset, f"run={folder}")
    root = data_dir or config["data_dir"]
    sequences = load_run_sequences(
        folder,
        dataset,
        root,
        results["protocol"]["sha256"],
        is_data_dir_given=bool(data_dir),
        fix="restore that file, or give data_dir=...",
    )
    holdout = hold_out_for(sequences, dataset, load_split_model(config))
    if words:
        dataset.features = _features_of(words, dataset)
    lengths = section_of(config, "evaluation", EvaluationConfig).k
    return HeldOut(split, dataset, root, sequences, holdout, lengths, results["protocol"])


def _features_of(words: list[str], dataset: DatasetConfig) -> FeaturesConfig | None:
    """Return the features of the data set that the words choose, which must be the run's."""
    chosen = load_dataset(words)
    keys = [key for word in words if (key := word.lstrip("+~").partition("=")[0]).startswith("dataset.")]
    sections = [key.split(".")[1] for key in keys] + ["name"]
    for key, section in zip([*keys, "dataset"], sections, strict=True):
        of_words, of_run = (to_plain(getattr(each, section)) for each in (chosen, dataset))
        if section == "path" and of_words and of_run:
            of_words, of_run = Path(of_words).absolute(), Path(of_run).absolute()
        if section != "features" and of_words != of_run:
            raise InputError(
                f"{key} is not as in the run, whose own data set is measured; with run=... give only what adds features"
                " to it, such as dataset.features.path"
            )
    return chosen.features


def of_dataset(words: list[str], split: str, data_dir: str | None) -> HeldOut:
    """Return the rows of the data set that these words of the training command choose.

    Raises:
        InputError: a word is wrong, nothing is held out, or the file is missing or broken.
    """
    cfg = load([*words, *([format_override("data_dir", data_dir)] if data_dir else [])])
    _check_holdout(cfg.dataset, f"dataset={cfg.dataset.name}")
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out_for(sequences, cfg.dataset, cfg.model)
    known = {key: value for key, value in protocol(cfg, sequences, holdout).items() if key not in _OF_MODEL}
    return HeldOut(split, load_dataset(words), cfg.data_dir, sequences, holdout, cfg.evaluation.k, known)


def _check_holdout(dataset: DatasetConfig, name: str) -> None:
    if dataset.holdout is HoldoutMode.none:
        raise InputError(f"{name} holds nothing out (dataset.holdout=none), so lists cannot be measured on it")
