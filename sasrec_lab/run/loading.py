"""Load what a run trains on, and record it: the data set under its protocol, and the features of its items."""

import logging
from collections.abc import Callable

import numpy as np

from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import Holdout, hold_out_for
from sasrec_lab.data.items import ItemFeatures, read_features, read_titles
from sasrec_lab.data.reach import count_unreachable, describe_unreachable
from sasrec_lab.data.sequences import Sequences, load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.run.protocol import protocol
from sasrec_lab.run.record import RunRecord
from sasrec_lab.run.summary import data_line

log = logging.getLogger(__name__)


def load_data(
    run: RunRecord, cfg: TrainConfig, check_fits: Callable[[Holdout], None]
) -> tuple[Sequences, SequenceData, np.ndarray | None]:
    """Return the data set's sequences, the batches of its holdout, and the titles of the items, if it has any.

    `check_fits` raises InputError if the model does not fit in memory. Protocol and counts are recorded and logged.
    """
    dataset = cfg.dataset
    with run.phase("data"):
        fetch_missing(dataset, cfg.data_dir)
        sequences = load_sequences(dataset, cfg.data_dir)
        holdout = hold_out_for(sequences, dataset, cfg.model)
        check_fits(holdout)
        titles = read_titles(dataset, cfg.data_dir, holdout.item_ids)
        data = SequenceData(holdout, cfg)
    run.results["protocol"] = protocol(cfg, sequences, holdout)
    log.info(data_line(sequences, holdout))
    _report_unreachable(run, holdout, cfg)
    return sequences, data, titles


def _report_unreachable(run: RunRecord, holdout: Holdout, cfg: TrainConfig) -> None:
    """Record and log how many targets no model can rank; raise InputError if these are all."""
    evaluation = cfg.evaluation
    unreachable = count_unreachable(holdout, evaluation.filter_seen, evaluation.stages)
    run.results["unreachable_targets"] = unreachable
    targets = {stage: len(holdout.rows(stage).targets) for stage in unreachable}
    if line := describe_unreachable(unreachable, targets, cfg):
        log.warning(f"       {line}")


def read_item_features(run: RunRecord, cfg: TrainConfig, holdout: Holdout) -> ItemFeatures | None:
    """Return the features that the model makes item vectors of, None if it does not.

    Raises:
        InputError: their file is missing or wrong, or has changed since the run that resumes began.
    """
    features = read_features(cfg.dataset, cfg.data_dir, holdout.item_ids, holdout.num_compared)
    if features is None or cfg.dataset.features is None:
        return None
    checksum = features.checksum()
    if run.info.setdefault("item_features", checksum) != checksum:
        raise InputError(
            f"dataset.features.path={cfg.dataset.features.path} has other features than when this run began; restore"
            " the file, or start over in another folder"
        )
    log.info(f"       item features: {features}")
    return features
