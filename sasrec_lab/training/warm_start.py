"""Start an encoder from a finished run: weights by their names, rows of item tables by the items' raw ids.

L positions, V items of this run, W of the earlier one.
"""

import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.config.foreign import parts_in
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import InputError, counted
from sasrec_lab.files import display_path
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.model.feature_vectors import FeatureVectors
from sasrec_lab.run.folder import ITEMS, RETRAIN_HINT, read_items
from sasrec_lab.run.initial_run import KEY, find_initial_run
from sasrec_lab.run.record import RunRecord
from sasrec_lab.training.saved_encoder import load_encoder, tested_checkpoint

log = logging.getLogger(__name__)

_ITEM_TABLES = ("input_items.weight", "output_items.weight", "head.bias")  # a row for each item
_IDS, _CATEGORIES = "input_items.ids.weight", "input_items.by_category.weight"  # of vectors that features make
_POSITIONS = ("positions.weight", ".position_bias", ".position_weights")  # (L, D), (L,): of each position or distance
_BIAS = ".relative_bias"  # (H, L), or (H, 2L - 1) if later items are attended to: a column for each distance
# Of a protocol, and of the section `dataset`: what training may have seen
_DATA_KEYS = ("sha256", "filters", "order", "holdout", "time_split")
_COLUMN_KEYS = ("format", "separator", "names", "user", "item", "time", "rating")


@dataclass(frozen=True)
class EarlierRun:
    """The encoder that a finished run was tested with, and the items that it knows."""

    folder: Path
    checkpoint: Path
    encoder: Encoder
    items: Ids
    categories: list[str]  # that its item vectors are made of
    data: dict[str, Any]  # its protocol, with its columns


@dataclass(frozen=True)
class Start:
    """What an encoder has taken from an earlier run."""

    run: str
    sha256: str  # of its checkpoint
    weights: int  # that were taken, of ...
    of_weights: int
    items: int  # of this run that the earlier one knows, of ...
    of_items: int
    new_items: str  # what their vectors are

    def __str__(self) -> str:
        new = self.of_items - self.items
        items = f"{self.items:,} of {counted(self.of_items, 'item')} by id"
        items += f", {new:,} new {self.new_items}" if new else ""
        return f"{self.weights} of {counted(self.of_weights, 'weight table')} of {self.run}; {items}"


def load_earlier(cfg: TrainConfig, previous: dict[str, Any]) -> EarlierRun | None:
    """Return the run that `init_from` names; None without it, or if `previous`, the run that resumes, has started so.

    Raises:
        InputError: it is missing, unfinished or broken, or its weights mean something else in this run's model.
    """
    found = None if KEY in previous else find_initial_run(cfg)
    if found is None:
        return None
    folder, config, results = found
    arrays = read_items(folder)
    items, categories = Ids(arrays["ids"]), [str(name) for name in arrays.get("categories", np.array([])).ravel()]
    checkpoint = tested_checkpoint(folder, results)
    named = [part.module for part in parts_in(cfg.model)]  # by the user: the checkpoint is data, and may name others
    encoder, _ = load_encoder(checkpoint, len(items), frozen=False, trust=named)
    if isinstance(encoder.input_items, FeatureVectors) and len(categories) != len(encoder.input_items.names):
        raise InputError(
            f"{KEY}={cfg.init_from}: {ITEMS} does not have the categories of the checkpoint; {RETRAIN_HINT}"
        )
    data = with_columns(results["protocol"], config["dataset"])
    return EarlierRun(folder, checkpoint, encoder, items, categories, data)


def start_warm(run: RunRecord, earlier: EarlierRun | None, encoder: Encoder, item_ids: np.ndarray) -> None:
    """Copy the weights of an earlier run, if there is one, and record where the initial weights come from."""
    if earlier:
        taken = start_from(earlier, encoder, item_ids)
        other = other_data(earlier.data, with_columns(run.results["protocol"], run.info["config"]["dataset"]))
        run.info["init_from"] = asdict(taken) | {"other_data": other}
        log.info(f"start  {taken}")
        if other:
            log.warning(f"       it was trained on other data ({other}), which may include items held out here")
    if other := run.info.get("init_from", {}).get("other_data"):
        run.results["protocol"]["initial_weights"] = f"of a run on other data ({other})"


@torch.no_grad()
def start_from(earlier: EarlierRun, encoder: Encoder, item_ids: np.ndarray) -> Start:
    """Copy the earlier run's weights into an encoder whose items have these raw ids (V,).

    A new item gets the mean vector of the earlier run's items or, if features make its vector, none of its id. A
    category is known by its name. Positions and distances beyond the earlier maxlen get the weights of its last one.
    What the earlier run lacks, such as a further block, stays as it is.

    Raises:
        InputError: the earlier run has none of the items, or given vectors of another size.
    """
    rows = torch.from_numpy(earlier.items.indices(item_ids, "items"))  # (V,) -1: new
    if not (rows >= 0).any():
        raise InputError(
            f"{KEY}={display_path(earlier.folder)} has none of the {counted(len(rows), 'item')} of this data set;"
            " choose a run on the same items"
        )
    known = dict(earlier.encoder.named_parameters())
    taken = 0
    for name, weights in encoder.named_parameters():
        if name in known:
            weights.copy_(_fitted(name, known[name], weights, rows, earlier.encoder.mask is None))
            taken += 1
    if isinstance(encoder.input_items, FeatureVectors):
        _copy_categories(earlier, encoder.input_items)
    with earlier.checkpoint.open("rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
    has_features = isinstance(encoder.input_items, FeatureVectors)
    new_items = "made of their features" if has_features else "at the mean of its items"
    of_weights = sum(1 for _ in encoder.parameters())
    return Start(display_path(earlier.folder), sha256, taken, of_weights, int((rows >= 0).sum()), len(rows), new_items)


def _fitted(name: str, saved: Tensor, weights: Tensor, rows: Tensor, causal: bool) -> Tensor:
    """Return the saved weights with a row for each of this run's items or positions."""
    if name in _ITEM_TABLES:
        return torch.cat([saved, saved.mean(0, keepdim=True)])[rows]  # row -1 is the mean
    if name == _IDS:
        rows = rows[: len(weights)]
        rows = torch.where(rows < len(saved), rows, -1)  # those that training did not have are new
        return torch.cat([saved, torch.zeros_like(saved[:1])])[rows]
    if name == _CATEGORIES:
        return weights  # by name, below
    if name.endswith(_POSITIONS):
        return saved[torch.arange(len(weights)).clamp(max=len(saved) - 1)]
    if name.endswith(_BIAS):
        return saved[:, _columns(weights.shape[1], saved.shape[1], causal)]
    if saved.shape != weights.shape:  # of given vectors, which no key of the model describes
        raise InputError(
            f"{KEY}: {name} has the shape {tuple(saved.shape)}, not {tuple(weights.shape)}; use the same"
            " vectors in dataset.features"
        )
    return saved


def _copy_categories(earlier: EarlierRun, vectors: FeatureVectors) -> None:
    """Copy the vectors of categories that the earlier run has, by their names."""
    saved = earlier.encoder.input_items
    if not isinstance(saved, FeatureVectors) or saved.by_category is None or vectors.by_category is None:
        return
    places = {name: row for row, name in enumerate(earlier.categories)}
    pairs = [(row, places[name]) for row, name in enumerate(vectors.names) if name in places]
    own, theirs = (list(side) for side in zip(*pairs, strict=True)) if pairs else ([], [])
    vectors.by_category.weight[own] = saved.by_category.weight[theirs]


def _columns(columns: int, saved: int, causal: bool) -> Tensor:
    """Return the saved column of each distance, that of the nearest one for a distance that was not saved."""
    if causal:
        return torch.arange(columns).clamp(max=saved - 1)
    reach = saved // 2
    return (torch.arange(columns) - columns // 2).clamp(-reach, reach) + reach


def with_columns(protocol: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """Return a protocol with the keys of `dataset` that say what a row of the file is."""
    return protocol | {"columns": {key: dataset.get(key) for key in _COLUMN_KEYS}}


def other_data(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return in which keys an earlier run's protocol differs so that it may have trained on this run's test items.

    `initial_weights` is one if the earlier run itself started from such a run. None if it cannot have: both hold out
    the same, or both the last items and the earlier run read the same file, but only up to an earlier time. The latter
    is not so if rare items are dropped: a user may then have kept two interactions, which are trained on, of which the
    second is the test item of a run that knows more.
    """
    differing = [key for key in (*_DATA_KEYS, "columns") if before.get(key) != now.get(key)]
    if "initial_weights" in before:
        differing.append("initial_weights")
    if differing == ["filters"] and now["holdout"].startswith("last item"):
        filters = before["filters"] if isinstance(before.get("filters"), dict) else {}
        others = [key for key in now["filters"] if filters.get(key, "") != now["filters"][key]]
        keeps_all = now["filters"].get("min_item", 0) <= 1 or now["filters"].get("min_user", 0) >= 3
        if others == ["until"] and keeps_all and _is_earlier(filters.get("until"), now["filters"]["until"]):
            return None
    return ", ".join(differing) or None


def _is_earlier(before: Any, now: Any) -> bool:
    """Return whether one value of dataset.until is known to be before another one; null means any time."""
    if not isinstance(before, str) or not isinstance(now, str):
        return isinstance(before, str) and now is None
    with suppress(ValueError):
        return float(before) <= float(now)
    return len(before) == len(now) and before <= now  # dates of one form
