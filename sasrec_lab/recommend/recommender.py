"""The Recommender, which makes top-k lists from a finished run.

recommender = Recommender.from_run("outputs/ml_100k/<time>")
recommender.recommend([1, 2], k=10)         # for users: user_id, item_id, score, rank
recommender.recommend_to_items([50], k=10)  # similar items: target_item_id, item_id, score, rank

Shapes: U users or R targets of one table, D dim, V items.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sasrec_lab.config.convert import completed, section_of
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.foreign import check_trust
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.errors import InputError
from sasrec_lab.files import display_path
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops import backend
from sasrec_lab.ops.ranking import TopK
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.recommend.inputs import (
    check_flag,
    check_k,
    drop_unsupported,
    expand_home,
    find_candidates,
    find_targets,
    warn_empty_lists,
)
from sasrec_lab.recommend.lists import Lists
from sasrec_lab.recommend.query_times import find_query_times
from sasrec_lab.recommend.rankers import EncoderRanker, Ranker, load_ranker
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run.split import load_run_sequences


class Recommender:
    """A trained model with the ids of its items; `from_run` makes one.

    Items with equal scores are listed in the order of their ids.
    """

    def __init__(self, folder: Path, ranker: Ranker, items: Ids, dataset: DatasetConfig):
        self.folder, self.ranker = folder, ranker
        self.items, self.dataset = items, dataset
        self.trust: list[str] = []  # packages of the user's whose code may be imported
        self.titles: np.ndarray | None = None  # (num_items,) text
        self.config: dict[str, Any] = {}  # of the run, plain
        # the data set of the run, for the users' histories
        self.data_dir: str | None = None
        self.is_data_dir_given = False  # if not, run.json names it, and nothing is written there
        self.sha256: str | None = None  # of its file, when the model was trained

    @classmethod
    def from_run(
        cls, folder: str | Path, *, data_dir: str | None = None, device: str = "auto", trust: Sequence[str] = ()
    ) -> "Recommender":
        """Load a finished run with the checkpoint that it was tested with; `data_dir` is where its data set is now.

        `trust` names the packages whose code may be imported, if the run has a block, head or objective of its own.

        Raises:
            InputError: the run does not exist or has not finished, its checkpoint is broken or of another run, or it
                needs code that is not trusted.
        """
        trust = check_trust(trust)
        if not str(folder):
            raise InputError("run is empty; give the folder of a finished run")
        folder = expand_home(folder)
        config, results = run_folder.load_finished(folder)
        config = completed(config)
        arrays = run_folder.read_items(folder)
        items = Ids(arrays["ids"])
        ranker = load_ranker(folder, config, results, len(items), device, trust)
        recommender = cls(folder, ranker, items, section_of(config, "dataset", DatasetConfig))
        recommender.config = config
        recommender.trust = trust
        recommender.titles = arrays.get("titles")
        recommender.is_data_dir_given = bool(data_dir)
        recommender.data_dir = data_dir or config["data_dir"]
        recommender.sha256 = results["protocol"]["sha256"]
        return recommender

    @cached_property
    def sequences(self) -> Sequences:
        """Return the run's data set.

        Raises:
            InputError: the data set is missing or has changed.
        """
        return load_run_sequences(
            self.folder,
            self.dataset,
            self.data_dir,
            self.sha256,
            is_data_dir_given=self.is_data_dir_given,
            fix="restore that file, or pass the histories as interactions",
        )

    @cached_property
    def histories(self) -> Histories:
        """Return the histories of all users in the run's data set, items held out of training included.

        Raises:
            InputError: the data set is missing or has changed.
        """
        return Histories.from_sequences(self.sequences, self.items, self.ranker.query_time is not None)

    @property
    def encoder(self) -> Encoder:
        """Return the encoder, in evaluation mode.

        Raises:
            InputError: the model has weights between items instead.
        """
        return self._encoder_ranker.encoder

    @property
    def _encoder_ranker(self) -> EncoderRanker:
        if not isinstance(self.ranker, EncoderRanker):
            raise InputError(f"{display_path(self.folder)} has no encoder and no vectors, but weights between items")
        return self.ranker

    def item_vectors(self) -> pd.DataFrame:
        """Return the vector of each item, a row each with the raw id as index (`item_id`).

        The dot product with a user's vector is the score in `recommend`: they include an output bias, or are normalized
        for a model that compares by the cosine.

        Raises:
            InputError: the model has weights between items instead.
        """
        return self._to_rows("item_id", self.items.ids, self.encoder.item_table.detach())

    def user_vectors(
        self,
        users: Any,
        interactions: pd.DataFrame | None = None,
        on_unsupported_targets: str = "raise",
        query_time: Any = None,
    ) -> pd.DataFrame:
        """Return the state after the newest items of each user, a row each with the raw id as index (`user_id`).

        The arguments are those of `recommend`.

        Raises:
            InputError: an argument is invalid, the data set is missing or has changed, or the model has weights between
                items instead.
        """
        ranker = self._encoder_ranker
        histories, indices = self._find_users(users, interactions, on_unsupported_targets)
        histories, _ = self._with_query_times(histories, indices, query_time)
        with backend.fastest_matmul(ranker.device):
            states = ranker.newest_states(histories, indices)
        return self._to_rows("user_id", histories.users.ids[indices], states)

    @staticmethod
    def _to_rows(name: str, ids: np.ndarray, vectors: torch.Tensor) -> pd.DataFrame:
        return pd.DataFrame(vectors.cpu().numpy(), index=pd.Index(ids, name=name), copy=False)

    def recommend(
        self,
        users: Any,
        k: int,
        interactions: pd.DataFrame | None = None,
        filter_viewed: bool = True,
        items_to_recommend: Any = None,
        on_unsupported_targets: str = "raise",
        query_time: Any = None,
    ) -> pd.DataFrame:
        """Return the k items with the highest scores for each user: user_id, item_id, score, rank (from 1).

        An encoder scores by the dot product with the state of the user's newest items that it knows, at most
        `model.maxlen` with the mask that BERT4Rec puts behind them; a model without epochs by the sum of the weights
        from all of them, and lists only items that have one. A list is shorter than k if fewer candidates are left, and
        a warning names users for whom none is left.

        Args:
            users: raw ids, or "all"; duplicates are dropped with a warning.
            k: the maximum length of a list.
            interactions: histories to use instead of the data set's, in columns user_id, item_id and datetime, or
                named as in the data set. Without a column of times each user's rows count as in time order. The data
                set's filters are not applied.
            filter_viewed: exclude items that the user has seen.
            items_to_recommend: recommend only these items (raw ids).
            on_unsupported_targets: for unknown users and users without known items: "raise", or skip them with
                ("warn") or without ("ignore") a warning.
            query_time: when users ask, for a model that reads times: a date as text, seconds since 1970, "last" for the
                time of each user's newest item, or a table with a row for each user, in columns user_id and datetime.
                None: "last" for a model with model.query_time=last, or else the newest time of the histories.

        Raises:
            InputError: an argument is invalid, or the data set is missing or has changed.
        """
        options = interactions, filter_viewed, items_to_recommend, on_unsupported_targets, query_time
        return self.lists_of_users(users, k, *options).table()

    def recommend_to_items(
        self,
        items: Any,
        k: int,
        items_to_recommend: Any = None,
        filter_itself: bool = True,
        on_unsupported_targets: str = "raise",
    ) -> pd.DataFrame:
        """Return the k items most similar to each item: target_item_id, item_id, score, rank (from 1).

        The score of a model without epochs is its weight. Of an encoder it is the cosine of the vectors of its output
        table, which differ from the input's with model.share_items=false.

        Args:
            items: raw ids, or "all"; duplicates are dropped with a warning.
            k: the maximum length of a list.
            items_to_recommend: recommend only these items (raw ids).
            filter_itself: exclude an item from its own list.
            on_unsupported_targets: for unknown items: "raise", or skip them with ("warn") or without ("ignore") a
                warning.

        Raises:
            InputError: an argument is invalid.
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
        query_time: Any = None,
    ) -> Lists:
        """Return the lists of `recommend` table by table, for more users than fit in memory."""
        k = check_k(k, len(self.items))
        check_flag("filter_viewed", filter_viewed)
        candidates = find_candidates(self.items, items_to_recommend)
        histories, indices = self._find_users(users, interactions, on_unsupported_targets)
        if filter_viewed:
            seen_all = histories.has_seen_all(indices, self._candidate_mask(candidates))
            hint = "filter_viewed=false keeps seen items"
            warn_empty_lists(histories.users.ids[indices[seen_all]], len(indices), "users", hint)
            indices = indices[~seen_all]
        histories, asked = self._with_query_times(histories, indices, query_time)

        def make_table(part: np.ndarray) -> pd.DataFrame:
            seen = histories.user_item_pairs(part) if filter_viewed else None
            best = self.ranker.for_users(histories, part, k, candidates, seen)
            return self._to_table("user_id", histories.users.ids[part], best)

        return Lists(indices, k, make_table, asked)

    def _find_users(
        self, users: Any, interactions: pd.DataFrame | None, on_unsupported_targets: str
    ) -> tuple[Histories, np.ndarray]:
        """Return the histories of the data set or of a table, and the indices of the users with known items."""
        if interactions is None:
            histories = self.histories
        else:
            reads_times = self.ranker.query_time is not None
            histories = Histories.from_table(interactions, self.dataset, self.items, reads_times)
        indices, raw_ids = find_targets(histories.users, users, "users")
        return histories, drop_unsupported(indices, raw_ids, histories.lengths > 0, on_unsupported_targets, "users")

    def _with_query_times(self, histories: Histories, users: np.ndarray, given: Any) -> tuple[Histories, str]:
        """Return the histories with the times at which users ask, and these in words, if the model reads times."""
        if self.ranker.query_time is not None:
            asked, text = find_query_times(given, histories, users, self.ranker.query_time, self.dataset)
            return replace(histories, asked=asked), text
        if given is not None:
            raise InputError("query_time has no effect, because the model reads no times; remove it")
        return histories, ""

    def lists_of_items(
        self,
        items: Any,
        k: int,
        items_to_recommend: Any = None,
        filter_itself: bool = True,
        on_unsupported_targets: str = "raise",
    ) -> Lists:
        """Return the lists of `recommend_to_items` table by table."""
        k = check_k(k, len(self.items))
        check_flag("filter_itself", filter_itself)
        candidates = find_candidates(self.items, items_to_recommend)
        indices, raw_ids = find_targets(self.items, items, "items")
        indices = drop_unsupported(indices, raw_ids, np.ones(len(self.items), bool), on_unsupported_targets, "items")
        mask = self._candidate_mask(candidates)
        if filter_itself and mask.sum() == 1:
            is_only_candidate = mask[indices + 1]
            hint = "filter_itself=false keeps the item itself"
            warn_empty_lists(self.items.ids[indices[is_only_candidate]], len(indices), "items", hint)
            indices = indices[~is_only_candidate]

        def make_table(part: np.ndarray) -> pd.DataFrame:
            itself = (np.arange(len(part)), part + 1) if filter_itself else None
            best = self.ranker.for_items(part, k, candidates, itself)
            return self._to_table("target_item_id", self.items.ids[part], best)

        return Lists(indices, k, make_table)

    def _candidate_mask(self, candidates: np.ndarray | None) -> np.ndarray:
        """Return whether each item index may be recommended, shape (V + 1,); index 0 may not."""
        indices = np.arange(len(self.items) + 1)
        return indices > 0 if candidates is None else np.isin(indices, candidates)

    def _to_table(self, target: str, targets: np.ndarray, best: TopK) -> pd.DataFrame:
        """Return the lists as a table with raw ids; the `target` column repeats each target for its items."""
        items, scores = best.items.cpu().numpy(), best.scores.cpu().numpy()  # (R, k)
        is_item = items > 0  # a list that is shorter than k ends in zeros
        return pd.DataFrame(
            {
                target: np.repeat(targets, is_item.sum(1)),
                "item_id": self.items.ids[items[is_item] - 1],
                "score": scores[is_item],
                "rank": np.nonzero(is_item)[1] + 1,
            },
            copy=False,
        )
