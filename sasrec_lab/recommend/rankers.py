"""Best items for histories and for items: of an encoder by dot products, of a model without epochs by its weights.

Shapes: U users or R targets of one table, D dim, V items.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.model import ModelConfig, QueryTime
from sasrec_lab.config.schema import MODEL_SCHEMAS
from sasrec_lab.config.training import ObjectiveConfig
from sasrec_lab.data.evaluation_data import MAX_STATE_ELEMENTS, batch_boundaries
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.row_lists import RowScorer
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops import backend
from sasrec_lab.ops.ranking import TopK, merge_top_k, top_k_items
from sasrec_lab.recommend.histories import Histories
from sasrec_lab.run.model_name import model_name
from sasrec_lab.training.saved_encoder import load_encoder, tested_checkpoint

if TYPE_CHECKING:
    from sasrec_lab.model.closed_form import ItemWeights  # imports SciPy, which lists of an encoder do not wait for

USERS_PER_BATCH = 512
SCORES_AT_ONCE = 2**22  # of a model without epochs, 16 MiB

Pairs = tuple[np.ndarray, np.ndarray]  # rows of a table, and items (from 1)


class Ranker(Protocol):
    """A trained model, as the recommender asks it for lists.

    `candidates` are the indices (from 1, ascending) of the items to choose from, None for all; `excluded` are pairs of
    a row and an item that is not in its list, ordered by row.
    """

    @property
    def query_time(self) -> QueryTime | None:
        """Return when the model is asked in evaluation, or None if it reads no times."""

    @property
    def device(self) -> torch.device:
        """Return the device that the lists are made on."""

    @property
    def scorer(self) -> RowScorer:
        """Return the model, which also lists for the rows of evaluation."""

    def for_users(
        self, histories: Histories, users: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None
    ) -> TopK:
        """Return the best items of some users."""

    def for_items(self, items: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None) -> TopK:
        """Return the items most similar to some items (indices from 0)."""


class EncoderRanker:
    """Lists by dot products with a user's newest state, and by the cosine of item vectors."""

    def __init__(self, encoder: Encoder, objective: ObjectiveConfig, model: ModelConfig):
        self.encoder = encoder.eval()
        self.objective = build_objective(objective, model)
        self.query_time = model.asked_at

    @property
    def device(self) -> torch.device:
        """Return the device that the lists are made on."""
        return self.encoder.item_vectors().device

    @property
    def scorer(self) -> RowScorer:
        """Return the model, which also lists for the rows of evaluation."""
        return self.encoder

    def for_users(
        self, histories: Histories, users: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None
    ) -> TopK:
        """Return the best items of some users."""
        with backend.fastest_matmul(self.device):
            states = self.newest_states(histories, users)
            return _find_best(states, self.encoder.item_table, k, candidates, excluded)

    def for_items(self, items: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None) -> TopK:
        """Return the items most similar to some items (indices from 0)."""
        with backend.fastest_matmul(self.device):
            return _find_best(self._vectors[items], self._vectors, k, candidates, excluded)

    @cached_property
    def _vectors(self) -> Tensor:
        return F.normalize(self.encoder.item_vectors().detach(), dim=1)

    @torch.inference_mode()
    def newest_states(self, histories: Histories, users: np.ndarray) -> Tensor:
        """Return the newest state of each user, shape (U, D)."""
        tokens = self.objective.count_tokens(histories.lengths[users])
        order = np.argsort(tokens, kind="stable")  # users with similar lengths pack best
        table = self.encoder.item_table
        states = table.new_empty(len(users), table.shape[1])
        batches = batch_boundaries(tokens[order], USERS_PER_BATCH, MAX_STATE_ELEMENTS // table.shape[1])
        for rows in np.split(order, batches) if len(users) else []:
            starts, ends = histories.offsets[users[rows]], histories.offsets[users[rows] + 1]
            asked = None if histories.asked is None else histories.asked[users[rows]]
            batch = self.objective.inference(histories.items, starts, ends, histories.times, asked)
            states[torch.from_numpy(rows).to(states.device)] = self.encoder.newest(batch.to(states.device))
        return states


class WeightsRanker:
    """Lists by the sum of an item's weights from the distinct items of a history, or by those from one item."""

    query_time = None
    device = torch.device("cpu")

    def __init__(self, weights: "ItemWeights"):
        self.weights = weights

    @property
    def scorer(self) -> RowScorer:
        """Return the model, which also lists for the rows of evaluation."""
        return self.weights

    def for_users(
        self, histories: Histories, users: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None
    ) -> TopK:
        """Return the best items of some users."""
        rows, items = histories.user_item_pairs(users)
        pairs = np.unique(rows * (self.weights.num_items + 1) + items)
        return self._find_best(len(users), np.divmod(pairs, self.weights.num_items + 1), k, candidates, excluded)

    def for_items(self, items: np.ndarray, k: int, candidates: np.ndarray | None, excluded: Pairs | None) -> TopK:
        """Return the items that some items (indices from 0) have the largest weights for."""
        return self._find_best(len(items), (np.arange(len(items)), items + 1), k, candidates, excluded)

    def _find_best(
        self, rows: int, pairs: Pairs, k: int, candidates: np.ndarray | None, excluded: Pairs | None
    ) -> TopK:
        best = TopK(torch.zeros(rows, k, dtype=torch.long), torch.full((rows, k), float("-inf")))
        excluded = excluded or (np.zeros(0, np.int64), np.zeros(0, np.int64))
        omitted = torch.ones(self.weights.num_items, dtype=torch.bool)
        omitted[slice(None) if candidates is None else torch.from_numpy(candidates - 1)] = False
        step = max(1, SCORES_AT_ONCE // self.weights.num_items)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            scores = self.weights.block(part.stop - begin, *_within(pairs, part))
            places, items = _within(excluded, part)
            scores[places, items - 1] = float("-inf")
            scores[:, omitted] = float("-inf")
            merge_top_k(TopK(best.items[part], best.scores[part]), scores, 0)
        return best


def _within(pairs: Pairs, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the pairs of some rows, which count from 0 there."""
    first, last = np.searchsorted(pairs[0], [rows.start, rows.stop])
    own, items = (np.ascontiguousarray(column[first:last], dtype=np.int64) for column in pairs)
    return torch.from_numpy(own - rows.start), torch.from_numpy(items)


@torch.inference_mode()
def _find_best(states: Tensor, table: Tensor, k: int, candidates: np.ndarray | None, excluded: Pairs | None) -> TopK:
    """Return each state's best items in `table` by dot product, without the excluded pairs."""
    rows, items = excluded or (np.zeros(0, np.int64), np.zeros(0, np.int64))
    if candidates is not None:  # from here on an item is its position among the candidates
        positions = np.searchsorted(candidates, items)
        is_candidate = candidates[np.minimum(positions, len(candidates) - 1)] == items
        rows, items = rows[is_candidate], positions[is_candidate] + 1
        table = table[torch.from_numpy(candidates - 1).to(table.device)]
    pairs = (torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(table.device) for x in (rows, items))
    best = top_k_items(states, table, k, *pairs)
    if candidates is None:
        return best
    return TopK(torch.from_numpy(np.append(0, candidates)).to(table.device)[best.items], best.scores)


def load_ranker(
    folder: Path, config: dict[str, Any], results: dict[str, Any], num_items: int, device: str, trust: list[str]
) -> EncoderRanker | WeightsRanker:
    """Return the model of a finished run, from its plain config and its metrics.json."""
    if str(config["model"].get("name")) in MODEL_SCHEMAS:  # of a model without epochs; an encoder has no name
        if device not in ("auto", "cpu"):
            raise InputError(f"device={device}: {model_name(config)} makes its lists on the CPU; use device=cpu")
        from sasrec_lab.training.closed_form import load_weights  # imports SciPy, which lists of an encoder do not need

        return WeightsRanker(load_weights(folder, num_items))
    objective = section_of(config, "objective", ObjectiveConfig, trust)
    encoder, model = load_encoder(tested_checkpoint(folder, results), num_items, trust=trust)
    return EncoderRanker(encoder.to(_find_device(device)), objective, model)


def _find_device(name: str) -> torch.device:
    """Return the device with this name; `auto` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        made = torch.zeros(1, device=name)
        made.item()  # fails on "meta", whose tensors have no values
        return made.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: {str(error).splitlines()[0]}; use device=cpu") from error
