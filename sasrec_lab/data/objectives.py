"""Objectives, which say what a model is trained to predict, and how it is asked for the item after a history.

B sequences, T tokens, R labels.
"""

import numpy as np
import torch

from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.training import ObjectiveConfig, ObjectiveName, Replace
from sasrec_lab.data.batches import MASK, Labels, Objective, PackedBatch, as_tensor, pack, with_times
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import concatenate_ranges
from sasrec_lab.ops.backend import round_up_size

# Of the chosen items with replace=mixed (Devlin et al. 2019, arXiv 1810.04805, 3.1); the rest stay as they are
MASKED, RANDOM = 0.8, 0.1


class NextItem:
    """Predict the item after each token: the labels are the inputs shifted by one (Kang and McAuley 2018, III-E)."""

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig):
        self.maxlen, self.reads_times = model.maxlen, model.reads_times

    def training(self, holdout: Holdout, windows: np.ndarray, rng: np.random.Generator) -> tuple[PackedBatch, Labels]:
        """Return all items of each window but the last, and the item after each, which is asked for at its own time.

        Items before a window's first label are context: what follows them is a label of another window.
        """
        starts, ends = holdout.window_starts[windows], holdout.window_ends[windows]
        inputs, places = pack(starts, ends - 1, holdout.items)
        if self.reads_times:
            assert holdout.times is not None
            inputs = with_times(inputs, holdout.times[places], holdout.times[places + 1])
        dummies = (0, len(inputs.items) - len(places))
        weights = None
        if holdout.weights is not None:
            weights = torch.from_numpy(np.pad(holdout.weights[places + 1], dummies).astype(np.float32))
        following = holdout.items[places + 1]
        if holdout.window_labels is not None:
            first = np.repeat(holdout.window_labels[windows], ends - 1 - starts)
            following = np.where(places + 1 >= first, following, 0)
        targets = as_tensor(np.pad(following, dummies))
        return inputs, Labels(targets, counts=ends - 1 - starts, weights=weights)

    def inference(
        self,
        items: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        times: np.ndarray | None = None,
        query_times: np.ndarray | None = None,
    ) -> PackedBatch:
        """Return the newest items of each history."""
        inputs, places = pack(np.maximum(starts, ends - self.maxlen), ends, items)
        if not self.reads_times:
            return inputs
        assert times is not None
        own, newest = times[places].astype(np.int64), inputs.last.numpy()
        asked = np.append(own[1:], own[-1])
        asked[newest] = own[newest] if query_times is None else query_times
        return with_times(inputs, own, asked)

    def count_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many tokens `inference` packs for a history of each length."""
        return np.minimum(lengths, self.maxlen)


class MaskedItems:
    """Predict masked items from those before and after them (BERT4Rec: Sun et al. 2019, arXiv 1904.06690, 3.6).

    Each item is chosen with probability `mask_share`, as in RecTools and RePlay; the authors choose a fixed number. To
    ask for the next item, a mask is put behind the history.
    """

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig):
        self.cfg, self.maxlen = cfg, model.maxlen

    def training(self, holdout: Holdout, windows: np.ndarray, rng: np.random.Generator) -> tuple[PackedBatch, Labels]:
        """Return the newest maxlen items of each window with masks among them, and the items that were masked.

        The first of the maxlen + 1 items of a full window is the newest of the user's next older window. If a user has
        full windows only, the very first item is in no batch: windows are cut for next_item, where it has no label.
        """
        ends = holdout.window_ends[windows]
        starts = np.maximum(holdout.window_starts[windows], ends - self.maxlen)
        inputs, places = pack(starts, ends, holdout.items)
        rows, counts = self._choose(ends - starts, rng)
        targets = holdout.items[places[rows]]
        inputs.items[torch.from_numpy(rows)] = as_tensor(self._shown(targets, holdout.num_compared, rng))
        dummies = (0, round_up_size(len(rows)) - len(rows))  # few sizes of R, as of T
        weights = None
        if holdout.weights is not None:
            weights = torch.from_numpy(np.pad(holdout.weights[places[rows]], dummies).astype(np.float32))
        labels = Labels(
            targets=as_tensor(np.pad(targets, dummies)),
            counts=counts,
            rows=as_tensor(np.pad(rows, dummies, mode="edge")),
            weights=weights,
        )
        return inputs, labels

    def _choose(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (R,) to predict, in ascending order, and their number in each sequence (B,).

        A sequence may have none, as in RecTools and Turning Dross; RePlay chooses its newest item then. Only a batch
        without any label gets the newest item of each sequence here, because its loss would be a mean of nothing.
        """
        ends = np.cumsum(lengths)
        is_only_last = rng.random(len(lengths)) < self.cfg.last_share  # (B,)
        is_chosen = rng.random(ends[-1]) < self.cfg.mask_share  # (T,)
        is_chosen &= ~np.repeat(is_only_last, lengths)
        is_chosen[ends[is_only_last] - 1] = True
        if not is_chosen.any():
            is_chosen[ends - 1] = True
        return np.flatnonzero(is_chosen), np.add.reduceat(is_chosen, ends - lengths, dtype=np.int64)

    def _shown(self, targets: np.ndarray, num_items: int, rng: np.random.Generator) -> np.ndarray:
        """Return what the input has in the place of each target (R,): the mask, or now and then an item."""
        if self.cfg.replace is Replace.mask:
            return np.full_like(targets, MASK)
        points = rng.random(len(targets))
        shown = np.where(points < MASKED + RANDOM, rng.integers(1, num_items + 1, size=len(targets)), targets)
        return np.where(points < MASKED, MASK, shown)

    def inference(
        self,
        items: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        times: np.ndarray | None = None,
        query_times: np.ndarray | None = None,
    ) -> PackedBatch:
        """Return the newest maxlen - 1 items of each history with a mask behind them, whose state is the newest."""
        starts = np.maximum(starts, ends - (self.maxlen - 1))
        masks = np.cumsum(ends - starts)  # (B,) behind the last item of each history
        with_masks = np.insert(items[concatenate_ranges(starts, ends)], masks, MASK)
        ends = masks + np.arange(1, len(masks) + 1)
        inputs, _ = pack(np.append(0, ends[:-1]), ends, with_masks)
        return inputs

    def count_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many tokens `inference` packs for a history of each length."""
        return np.minimum(lengths + 1, self.maxlen)


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    ObjectiveName.next_item: NextItem,
    ObjectiveName.masked_items: MaskedItems,
}


def build_objective(cfg: ObjectiveConfig, model: ModelConfig) -> Objective:
    """Return the objective that a config names, which may be a class of the user's."""
    objective = load(cfg.name) if isinstance(cfg.name, Foreign) else OBJECTIVES[cfg.name]
    return objective(cfg, model)
