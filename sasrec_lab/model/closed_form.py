"""Models without training epochs, from which users have which items: EASE and item-kNN. U users, V items.

Both are weights W between items: item j scores the sum of W_ij over the distinct items i of a history.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse import csr_array
from torch import Tensor

from sasrec_lab.config.closed_form import ClosedFormConfig, EaseConfig, ItemKnnConfig, Weighting
from sasrec_lab.data.batches import EvaluationBatch
from sasrec_lab.ops.ranking import DenseScores, TopK, merge_top_k
from sasrec_lab.ops.sparse_scores import SparseScores, SparseTable

PRODUCTS_AT_ONCE = 2**24  # of pairs of a user's items, some 200 MiB
BM25_SATURATION, BM25_LENGTH = 1.2, 0.75  # K1 and B, the usual constants


@dataclass(frozen=True)
class ItemWeights:
    """Weights (V, V) in float32, dense or with the entries that are not 0; row i is what item i of a history adds."""

    matrix: np.ndarray | csr_array

    @property
    def num_items(self) -> int:
        """Return V."""
        return int(self.matrix.shape[0])

    @property
    def size(self) -> int:
        """Return the number of weights that are kept."""
        return int(self.matrix.size)

    def scores(self, rows: int, seen_rows: Tensor, seen_items: Tensor) -> DenseScores | SparseScores:
        """Return the scores of all items for rows of histories; pair s says that row `seen_rows[s]` has an item.

        Pairs are distinct and ordered by row.
        """
        if isinstance(self.matrix, np.ndarray):
            return DenseScores(self._dense(rows, seen_rows, seen_items))
        found = self._sparse(rows, seen_rows, seen_items)
        table = SparseTable(
            shared=torch.zeros(self.num_items, dtype=torch.double),
            offsets=torch.from_numpy(found.indptr.astype(np.int64)),
            items=torch.from_numpy(found.indices.astype(np.int64) + 1),
            values=torch.from_numpy(found.data.astype(np.float64)),
        )
        return SparseScores(table, torch.arange(rows))

    def block(self, rows: int, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        """Return the same scores as a matrix (rows, V); an item without a weight from any item of the row has -inf."""
        if isinstance(self.matrix, np.ndarray):
            return self._dense(rows, seen_rows, seen_items)
        found = self._sparse(rows, seen_rows, seen_items)
        scores = torch.full((rows, self.num_items), float("-inf"))
        places = np.repeat(np.arange(rows), np.diff(found.indptr)), found.indices
        scores[tuple(torch.from_numpy(place.astype(np.int64)) for place in places)] = torch.from_numpy(found.data)
        return scores

    def score_and_list(
        self, batch: EvaluationBatch, k: int, excluded: tuple[Tensor, Tensor]
    ) -> tuple[DenseScores | SparseScores, TopK]:
        """Return the scores of the rows of a batch, and their best items without the excluded pairs of row and item."""
        rows, history = len(batch.rows), (batch.seen_rows, batch.seen_items)
        block = self.block(rows, *history)
        block[excluded[0], excluded[1] - 1] = float("-inf")
        best = TopK(torch.zeros(rows, k, dtype=torch.long), torch.full((rows, k), float("-inf")))
        merge_top_k(best, block, 0)
        return self.scores(rows, *history), best

    def _dense(self, rows: int, seen_rows: Tensor, seen_items: Tensor) -> Tensor:
        starts = torch.searchsorted(seen_rows, torch.arange(rows))
        table = torch.from_numpy(self.matrix)
        return torch.nn.functional.embedding_bag(seen_items - 1, table, starts, mode="sum")

    def _sparse(self, rows: int, seen_rows: Tensor, seen_items: Tensor) -> csr_array:
        ones, places = np.ones(len(seen_rows), np.float32), (seen_rows.numpy(), seen_items.numpy() - 1)
        found = csr_array((ones, places), shape=(rows, self.num_items)) @ self.matrix
        found.sort_indices()
        return found


def fit(cfg: ClosedFormConfig, users: np.ndarray, items: np.ndarray, num_items: int) -> ItemWeights:
    """Return the weights of a model, from the training interactions: user and item (1..num_items) of each, (N,)."""
    shape = int(users.max(initial=0)) + 1, num_items
    matrix = csr_array((np.ones(len(users), np.float32), (users, items - 1)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1  # a repeated item counts once
    if isinstance(cfg, EaseConfig):
        return ItemWeights(ease_weights(matrix, cfg.regularization))
    assert isinstance(cfg, ItemKnnConfig)
    return ItemWeights(item_knn_weights(matrix, cfg))


def ease_weights(matrix: csr_array, regularization: float) -> np.ndarray:
    """Return the weights (V, V) of EASE (Steck 2019, equation 8) for a binary matrix (U, V).

    They minimize |X - X B|^2 + regularization |B|^2 with a diagonal of 0: with P the inverse of X'X + regularization I,
    B_ij = -P_ij / P_jj.
    """
    gram = np.zeros((matrix.shape[1],) * 2)
    for begin, end, products in _products(matrix.astype(np.float64)):
        products.toarray(out=gram[begin:end])
    np.fill_diagonal(gram, gram.diagonal() + regularization)
    inverse = linalg.inv(gram.T, overwrite_a=True, check_finite=False, assume_a="pos")
    inverse /= -inverse.diagonal()  # divides column j
    np.fill_diagonal(inverse, 0)
    return np.ascontiguousarray(inverse, dtype=np.float32)


def item_knn_weights(matrix: csr_array, cfg: ItemKnnConfig) -> csr_array:
    """Return each item's similarities with its `neighbors` most similar items, for a binary matrix (U, V).

    The similarity of two items is x_i x_j / (|x_i| |x_j| + shrink) of their columns, weighted first. With bm25 it is
    x_i x_j, as in the library implicit: on binary data its saturation would cancel in a cosine. Of equal similarities
    the lower index stays.
    """
    weighted = _WEIGHTINGS[cfg.weighting](matrix)
    weighted.eliminate_zeros()  # of users with all items but one, whose weight is 0
    norms = np.sqrt(weighted.multiply(weighted).sum(0))
    parts = []
    for begin, end, products in _products(weighted):
        if cfg.weighting is not Weighting.bm25:
            lengths = np.repeat(norms[begin:end], np.diff(products.indptr))
            products.data /= lengths * norms[products.indices] + cfg.shrink
        parts.append(_largest(products, cfg.neighbors, begin))
    return sparse.vstack(parts, format="csr")


def _largest(products: csr_array, count: int, begin: int) -> csr_array:
    """Return the `count` largest entries of each row, the item itself excluded; row 0 is item `begin`."""
    products.sort_indices()
    kept = []
    for row, (start, end) in enumerate(pairwise(products.indptr)):
        entries = start + np.flatnonzero(products.indices[start:end] != begin + row)
        largest = np.argsort(-products.data[entries], kind="stable")[:count]
        kept.append(np.sort(entries[largest]))
    places, offsets = np.concatenate(kept), np.cumsum([0, *map(len, kept)])
    entries = products.data[places].astype(np.float32), products.indices[places], offsets
    return csr_array(entries, shape=products.shape)


def _products(matrix: csr_array) -> Iterator[tuple[int, int, csr_array]]:
    """Yield the rows begin to end of X'X, a part at a time, so that its sum over users takes little memory."""
    columns = matrix.T.tocsr()
    work = columns @ np.diff(matrix.indptr)  # (V,) products that a row of X'X adds up
    part = (np.cumsum(work) - work) // PRODUCTS_AT_ONCE
    ends = np.append(np.flatnonzero(np.diff(part)) + 1, matrix.shape[1])
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        yield begin, end, columns[begin:end] @ matrix


def _unweighted(matrix: csr_array) -> csr_array:
    return matrix.astype(np.float64)


def _tfidf(matrix: csr_array) -> csr_array:
    """Return the matrix with each user's row weighted by log(V / (1 + items of the user)), as implicit does.

    Here V counts the items that occur in training.
    """
    weights = np.log(np.count_nonzero(matrix.sum(0))) - np.log1p(np.diff(matrix.indptr))
    return csr_array(matrix.multiply(weights[:, None]))


def _bm25(matrix: csr_array) -> csr_array:
    """Return the matrix weighted by BM25 as implicit does: items are documents, and their users are the words."""
    lengths = matrix.sum(0)
    norms = 1 - BM25_LENGTH + BM25_LENGTH * lengths / lengths[lengths > 0].mean()
    return csr_array(_tfidf(matrix).multiply((BM25_SATURATION + 1) / (BM25_SATURATION * norms + 1)))


_WEIGHTINGS = {Weighting.none: _unweighted, Weighting.tfidf: _tfidf, Weighting.bm25: _bm25}
