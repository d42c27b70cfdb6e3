"""Top-k lists from a finished run, in Python.

recommender = Recommender.from_run("outputs/ml_100k/<time>")
recommender.recommend([1, 2], k=10)         # of users: user_id, item_id, score, rank
recommender.recommend_to_items([50], k=10)  # of items: target_item_id, item_id, score, rank
"""

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.schema import ModelConfig
from sasrec_lab.data.batches import pack
from sasrec_lab.data.datamodule import MAX_STATE_ELEMENTS, batch_boundaries
from sasrec_lab.data.ids import Ids, as_id_array, some
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError, InputWarning
from sasrec_lab.files import display_path
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops import backend as machine
from sasrec_lab.ops.ranking import TopK, top_k_items
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.inputs import _check_flag, _supported, _targets, _tell_empty
from sasrec_lab.recommend.lists import Lists
from sasrec_lab.run import folder as run_folder
from sasrec_lab.training import checkpoints

USERS_A_BATCH = 512


class Recommender:
    """A trained encoder with the ids of its items; made by `from_run`.

    Of equal scores the item that comes first in the order of ids leads.
    """

    def __init__(self, folder: Path, encoder: Encoder, items: Ids, model: ModelConfig, dataset: DatasetConfig):
        self.folder = folder
        self.encoder = encoder.eval()
        self.items = items
        self.maxlen = model.maxlen
        self.dataset = dataset
        self.titles: np.ndarray | None = None  # (num_items,) text
        self.data_dir: str | None = None
        self.sha256: str | None = None  # of the data set's file when it was trained on

    @classmethod
    def from_run(cls, folder: str | Path, *, data_dir: str | None = None, device: str = "auto") -> "Recommender":
        """With the best checkpoint of a finished run. `data_dir` says where its data set lies now.

        Raises:
            InputError: the run is not there or has not finished, or its checkpoint is broken or not its own.
        """
        if not str(folder):
            raise InputError("run is empty; give the folder of a finished run")
        folder = Path(os.path.expanduser(folder))
        config, results = run_folder.load_finished(folder)
        known = run_folder.read_items(folder)
        items = Ids(known["ids"])
        encoder, model = checkpoints.load_encoder(checkpoints.tested_checkpoint(folder, results), len(items))
        self = cls(folder, encoder.to(_device(device)), items, model, section_of(config, "dataset", DatasetConfig))
        self.titles = known.get("titles")
        self.data_dir, self.sha256 = data_dir or config["data_dir"], results["protocol"]["sha256"]
        return self

    @property
    def device(self) -> torch.device:
        return self.encoder.item_table.device

    @cached_property
    def histories(self) -> Histories:
        """All that the run's data set knows of its users, what was held out of training among it.

        Raises:
            InputError: the data set is gone, or is another one now.
        """
        sequences = load_sequences(self.dataset, self.data_dir)
        if sequences.sha256 != self.sha256:
            raise InputError(
                f"{sequences.file} has sha256 {sequences.sha256}, but {display_path(self.folder)} was trained on"
                f" {self.sha256}; put that file back, or give the histories as interactions"
            )
        return Histories.of_sequences(sequences, self.items)

    def recommend(
        self,
        users: Any,
        k: int,
        interactions: pd.DataFrame | None = None,
        filter_viewed: bool = True,
        items_to_recommend: Any = None,
        on_unsupported_targets: str = "raise",
    ) -> pd.DataFrame:
        """The k best items of each user by dot product: columns user_id, item_id, score, rank (from 1).

        A list is made from the `maxlen` newest items of a user that the model knows; it is shorter than k where fewer
        are left to recommend, and a warning names users who have none left.

        Args:
            users: external ids, or "all"; of one that stands there twice there is one list.
            interactions: histories in the place of the data set's. Columns user_id and item_id, or as the data set
                names them; the time in datetime, or as the data set names it, else a user's rows stand in order. They
                are taken as they are: the data set's filters are not applied.
            filter_viewed: leave out what a user has had.
            items_to_recommend: nothing else is recommended.
            on_unsupported_targets: what becomes of users who are unknown or have no item that the model knows:
                "raise", or leave them out and "warn", or "ignore" them.

        Raises:
            InputError: one line that says what is wrong.
        """
        options = interactions, filter_viewed, items_to_recommend, on_unsupported_targets
        return self.lists_of_users(users, k, *options).table()

    def recommend_to_items(
        self,
        items: Any,
        k: int,
        items_to_recommend: Any = None,
        filter_itself: bool = True,
        on_unsupported_targets: str = "raise",
    ) -> pd.DataFrame:
        """The k items most like each item by the cosine of their vectors: target_item_id, item_id, score, rank.

        The vectors are those that users' states are compared with (with model.share_items=false: not the input's).

        Args:
            items: external ids, or "all"; of one that stands there twice there is one list.
            items_to_recommend: nothing else is recommended.
            filter_itself: leave an item out of its own list.
            on_unsupported_targets: what becomes of items that the model does not know: "raise", "warn" or "ignore".

        Raises:
            InputError: one line that says what is wrong.
        """
        return self.lists_of_items(items, k, items_to_recommend, filter_itself, on_unsupported_targets).table()

    def lists_of_users(
        self,
        users: Any,
        k: int,
        interactions: pd.DataFrame | None = None,
        filter_viewed: bool = True,
        items_to_recommend: Any = None,
        on_unsupported_targets: str = "raise",
    ) -> Lists:
        """What `recommend` gives, table by table, for more users than fit in memory."""
        k = self._checked(k)
        _check_flag("filter_viewed", filter_viewed)
        candidates = self._candidates(items_to_recommend)
        if interactions is None:
            histories = self.histories
        else:
            histories = Histories.of_table(interactions, self.dataset, self.items)
        has_items = histories.lengths > 0
        rows = _supported(*_targets(histories.users, users, "users"), has_items, on_unsupported_targets, "users")
        if filter_viewed:
            had_all = histories.had_all(rows, self._wanted(candidates))
            _tell_empty(histories.users.ids[rows[had_all]], len(rows), "users", "filter_viewed")
            rows = rows[~had_all]

        def make(block: np.ndarray) -> pd.DataFrame:
            seen = histories.places(block) if filter_viewed else None
            with machine.fastest_matmul(self.device):
                best = self._best(self._states(histories, block), self.encoder.item_table, k, candidates, seen)
            return self._table("user_id", histories.users.ids[block], best)

        return Lists(rows, k, make)

    def lists_of_items(
        self,
        items: Any,
        k: int,
        items_to_recommend: Any = None,
        filter_itself: bool = True,
        on_unsupported_targets: str = "raise",
    ) -> Lists:
        """What `recommend_to_items` gives, table by table."""
        k = self._checked(k)
        _check_flag("filter_itself", filter_itself)
        candidates = self._candidates(items_to_recommend)
        known = np.ones(len(self.items), bool)
        rows = _supported(*_targets(self.items, items, "items"), known, on_unsupported_targets, "items")
        wanted = self._wanted(candidates)
        if filter_itself and wanted.sum() == 1:
            alone = wanted[rows + 1]
            _tell_empty(self.items.ids[rows[alone]], len(rows), "items", "filter_itself")
            rows = rows[~alone]
        vectors = F.normalize(self.encoder.item_table.detach(), dim=1)

        def make(block: np.ndarray) -> pd.DataFrame:
            itself = (np.arange(len(block)), block + 1) if filter_itself else None
            with machine.fastest_matmul(self.device):
                best = self._best(vectors[block], vectors, k, candidates, itself)
            return self._table("target_item_id", self.items.ids[block], best)

        return Lists(rows, k, make)

    def _checked(self, k: int) -> int:
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
            raise InputError(f"k={k!r} is no whole number")
        if not 1 <= k <= len(self.items):
            raise InputError(f"k={k} must be from 1 to {len(self.items)}, the number of items that the model knows")
        return int(k)

    def _candidates(self, allowed: Any) -> np.ndarray | None:
        """Item numbers from 1, in order; None for all."""
        if allowed is None:
            return None
        numbers = self.items.numbers(allowed, "items_to_recommend")
        unknown = as_id_array(allowed, "items_to_recommend")[numbers < 0]
        if len(unknown) == len(numbers):
            why = "is empty; name at least one item"
            if len(numbers):
                why = f"has no item that the model knows ({some(unknown)}); give some that it does"
            raise InputError(f"items_to_recommend {why}, or leave it out for all")
        if len(unknown):
            warnings.warn(
                f"items_to_recommend: {len(unknown)} of {len(numbers)} are unknown to the model and not recommended:"
                f" {some(unknown)}",
                InputWarning,
                stacklevel=4,
            )
        return np.unique(numbers[numbers >= 0]) + 1

    def _wanted(self, candidates: np.ndarray | None) -> np.ndarray:
        """(num_items + 1,) of each item number whether it may be recommended."""
        numbers = np.arange(len(self.items) + 1)
        return numbers > 0 if candidates is None else np.isin(numbers, candidates)

    @torch.inference_mode()
    def _states(self, histories: Histories, users: np.ndarray) -> Tensor:
        """Users of like history lengths together, which packs them best."""
        lengths = np.minimum(histories.lengths[users], self.maxlen)
        order = np.argsort(lengths, kind="stable")
        dim = self.encoder.item_table.shape[1]
        states = self.encoder.item_table.new_empty(len(users), dim)
        batches = batch_boundaries(lengths[order], USERS_A_BATCH, MAX_STATE_ELEMENTS // dim)
        for rows in np.split(order, batches) if len(users) else []:
            ends = histories.offsets[users[rows] + 1]
            batch, _ = pack(ends - lengths[rows], ends, histories.items)
            states[torch.from_numpy(rows).to(states.device)] = self.encoder.newest(batch.to(states.device))
        return states  # (len(users), D)

    @torch.inference_mode()
    def _best(
        self,
        states: Tensor,
        table: Tensor,
        k: int,
        candidates: np.ndarray | None,
        seen: tuple[np.ndarray, np.ndarray] | None,
    ) -> TopK:
        rows, items = seen or (np.zeros(0, np.int64), np.zeros(0, np.int64))
        if candidates is not None:  # from here on an item's number is its place among the candidates
            places = np.searchsorted(candidates, items)
            among = candidates[np.minimum(places, len(candidates) - 1)] == items
            rows, items = rows[among], places[among] + 1
            table = table[torch.from_numpy(candidates - 1).to(table.device)]
        rows, items = (torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(table.device) for x in (rows, items))
        best = top_k_items(states, table, k, rows, items)
        if candidates is None:
            return best
        return TopK(torch.from_numpy(np.append(0, candidates)).to(table.device)[best.items], best.scores)

    def _table(self, target: str, targets: np.ndarray, best: TopK) -> pd.DataFrame:
        items, scores = best.items.cpu().numpy(), best.scores.cpu().numpy()  # (targets, k)
        there = items > 0
        return pd.DataFrame(
            {
                target: np.repeat(targets, there.sum(1)),
                "item_id": self.items.ids[items[there] - 1],
                "score": scores[there],
                "rank": np.nonzero(there)[1] + 1,
            },
            copy=False,
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        made = torch.zeros(1, device=name)
        made.item()  # "meta" makes tensors without numbers
        return made.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: {str(error).splitlines()[0]}; use device=cpu") from error
