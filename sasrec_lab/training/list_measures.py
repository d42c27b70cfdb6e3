"""Metrics beyond accuracy of a trained model's own lists, measured after its test (evaluation.lists)."""

import torch

from sasrec_lab.config.model import ModelConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.evaluation_data import EvaluationData
from sasrec_lab.data.items import ItemFeatures
from sasrec_lab.evaluation.list_metrics import ItemCategories, TopLists, list_metrics, training_counts
from sasrec_lab.evaluation.row_lists import RowScorer, lists_of_rows


def measure_lists(
    scorer: RowScorer, data: SequenceData, device: torch.device, features: ItemFeatures | None = None
) -> dict[str, float]:
    """Return the metrics beyond accuracy of the test's lists of `evaluation.lists` items, such as `test/coverage@10`.

    If the test may not be seen, they are those of validation.
    `features` are those that item vectors are made of; without categories there is no diversity.
    """
    cfg, k = data.cfg, data.cfg.evaluation.lists
    stage = cfg.evaluation.final_stage
    rows = EvaluationData(data.holdout, stage, data.objective, None)
    precision = cfg.trainer.get("precision") if isinstance(cfg.model, ModelConfig) else None
    found = lists_of_rows(scorer, rows, cfg.evaluation, k, cfg.model.dim, device, precision)
    owners, places = found.items.nonzero()
    lists = TopLists(owners, found.items[owners, places].astype("int64"), found.ranks[owners, places])
    categories = ItemCategories(features.offsets, features.categories) if features and features.names else None
    values = list_metrics(lists, training_counts(data.holdout), categories, [k])
    return {f"{stage}/{name}": value for name, value in values.items()}
