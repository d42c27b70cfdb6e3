"""Metrics of cold test targets, items that training does not have, and of the others."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.data.holdout import Holdout
from sasrec_lab.evaluation.ranks import metrics_from_counts


def cold_and_known(holdout: Holdout, ranks: Tensor, k: list[int]) -> dict[str, dict[str, Any]]:
    """Return number and metrics of the cold test targets and of the known ones, empty if none is cold.

    `ranks` (G,) are those among all items, in the order of the test's rows. Each target counts as a row of its own. A
    target outside the catalogue is cold.
    """
    counts = np.append(0, holdout.training_counts())
    is_cold = torch.from_numpy(counts[holdout.test.targets] == 0)
    if not is_cold.any():
        return {}
    groups = {"cold": is_cold, "known": ~is_cold}
    values: dict[str, dict[str, Any]] = {}
    for name, is_wanted in groups.items():
        if not is_wanted.any():
            continue
        measured = metrics_from_counts(torch.bincount(ranks[is_wanted], minlength=max(k) + 1).double(), k)
        values[name] = {"targets": int(is_wanted.sum())} | {f"test/{key}": value for key, value in measured.items()}
    return values
