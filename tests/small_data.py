"""Small data sets as the arrays that the package works on."""

from types import SimpleNamespace

import numpy as np

from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.config.model import QueryTime
from sasrec_lab.config.training import ObjectiveConfig, ObjectiveName, Replace
from sasrec_lab.data.batches import TrainingBatch
from sasrec_lab.data.holdout import Holdout, hold_out
from sasrec_lab.data.negatives import per_label
from sasrec_lab.data.objectives import MaskedItems, NextItem
from sasrec_lab.data.sequences import Sequences


def sequences_of(
    users: list[list[int]], weights: list[list[float]] | None = None, times: list[list[int]] | None = None
) -> Sequences:
    """Return sequences of these item indices, a list per user. Item 1 has the raw id 10, user 0 the raw id 100."""
    items = np.array([item for items in users for item in items], dtype=np.int32)
    return Sequences(
        items=items,
        offsets=np.cumsum([0] + [len(items) for items in users]),
        user_ids=np.arange(100, 100 + len(users)),
        item_ids=10 * np.arange(1, items.max() + 1),
        times=None if times is None else np.concatenate(times),
        weights=None if weights is None else np.array([w for row in weights for w in row], dtype=np.float32),
        file="x.csv",
        sha256=None,
    )


def holdout_of(
    users: list[list[int]],
    *,
    maxlen: int = 50,
    windows: Windows = Windows.last,
    catalogue: Catalogue = Catalogue.all,
    weights: list[list[float]] | None = None,
    times: list[list[int]] | None = None,
    query_time: QueryTime | None = None,
) -> Holdout:
    """Return the holdout of these users."""
    return hold_out(sequences_of(users, weights, times), windows, catalogue, maxlen, query_time=query_time)


def random_users(seed: int, users: int = 30, items: int = 20, longest: int = 15) -> list[list[int]]:
    """Return lists of 1 to `longest` items, with repeats; the last one has `longest` items and ends in item `items`."""
    random = np.random.default_rng(seed)
    lists = [random.integers(1, items + 1, random.integers(1, longest + 1)).tolist() for _ in range(users - 1)]
    return [*lists, [*random.integers(1, items + 1, longest - 1).tolist(), items]]


def hourly(users: list[list[int]]) -> list[list[int]]:
    """Return times for these users' items: an hour between neighbors, the same start for all."""
    return [[1_500_000_000 + 3_600 * place for place in range(len(items))] for items in users]


def next_item(maxlen: int, reads_times: bool = False) -> NextItem:
    """Return the objective of SASRec for windows of this length."""
    model = SimpleNamespace(maxlen=maxlen, reads_times=reads_times)
    return NextItem(ObjectiveConfig(ObjectiveName.next_item), model)


def masked_items(maxlen: int, share: float = 0.2, last: float = 0.0, replace: Replace = Replace.mask) -> MaskedItems:
    """Return the objective of BERT4Rec for windows of this length."""
    cfg = ObjectiveConfig(ObjectiveName.masked_items, share, last, replace)
    return MaskedItems(cfg, SimpleNamespace(maxlen=maxlen))


def training_batch(holdout: Holdout, windows: np.ndarray, drawn: np.ndarray | None = None) -> TrainingBatch:
    """Return training windows as SASRec trains on them, with these negatives of each label."""
    inputs, labels = next_item(0).training(holdout, windows, np.random.default_rng(0))
    return TrainingBatch(inputs, labels, None if drawn is None else per_label(drawn, labels))
