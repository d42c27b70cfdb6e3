"""Objectives, which say what a model is trained to predict, and how it is asked for the item after a history.

B sequences, T tokens, R labels.
"""

import numpy as np
import torch

from sasrec_lab.config.schema import ModelConfig, ObjectiveConfig, ObjectiveName
from sasrec_lab.data.batches import Labels, Objective, PackedBatch, as_tensor, pack
from sasrec_lab.data.holdout import Holdout


class NextItem:
    """Predict the item after each token: the labels are the inputs shifted by one (Kang and McAuley 2018, III-E)."""

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig):
        self.maxlen = model.maxlen

    def training(self, holdout: Holdout, windows: np.ndarray, rng: np.random.Generator) -> tuple[PackedBatch, Labels]:
        """Return all items of each window but the last, and the item after each."""
        starts, ends = holdout.window_starts[windows], holdout.window_ends[windows]
        inputs, places = pack(starts, ends - 1, holdout.items)
        dummies = (0, len(inputs.items) - len(places))
        weights = None
        if holdout.weights is not None:
            weights = torch.from_numpy(np.pad(holdout.weights[places + 1], dummies).astype(np.float32))
        targets = as_tensor(np.pad(holdout.items[places + 1], dummies))
        return inputs, Labels(targets, counts=ends - 1 - starts, weights=weights)

    def inference(self, items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> PackedBatch:
        """Return the newest items of each history."""
        inputs, _ = pack(np.maximum(starts, ends - self.maxlen), ends, items)
        return inputs


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {ObjectiveName.next_item: NextItem}
