"""Item vectors made of features. V items, D dim, F categories, n numbers of a given vector."""

from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import ItemVectors, ModelConfig
from sasrec_lab.data.items import ItemFeatures


class FeatureVectors(nn.Module):
    """Item vectors: the sum of a vector for each category, the given vector through a linear layer, and one of the id.

    The latter is there with items=both, unless training lacks the item. As RecTools' SumOfEmbeddingsConstructor with
    its nets of ids and categories, without the dropout of each; `model.dropout_items` is on the sum. In a training step
    a share `id_dropout` of the items has no vector of its id, so that features learn to describe an item without it (as
    in DropoutNet: Volkovs et al. 2017).
    """

    offsets: Tensor  # (V + 1,) int64
    categories: Tensor  # int64: those of item i + 1 are categories[offsets[i]:offsets[i + 1]]
    given: Tensor  # (V, n), n = 0 without given vectors

    def __init__(self, features: ItemFeatures, cfg: ModelConfig):
        super().__init__()
        given = np.zeros((len(features.offsets) - 1, 0), np.float32) if features.vectors is None else features.vectors
        self.register_buffer("offsets", torch.from_numpy(features.offsets))
        self.register_buffer("categories", torch.from_numpy(features.categories))
        self.register_buffer("given", torch.from_numpy(given))
        self.names, self.id_dropout = features.names, cfg.id_dropout
        self.ids = nn.Embedding(features.num_trained, cfg.dim) if cfg.items is ItemVectors.both else None
        self.by_category = nn.Embedding(len(features.names), cfg.dim) if features.names else None
        self.projection = nn.Linear(given.shape[1], cfg.dim, bias=False) if given.shape[1] else None

    @torch.no_grad()
    def shrink_categories(self) -> None:
        """Scale the categories' initial vectors to those of a table of all items: Xavier's are larger in a small table.

        Without it categories would hide the ids, and items without a vector of their id would differ from all others.
        """
        if self.by_category is not None:
            rows, dim = self.by_category.weight.shape
            self.by_category.weight.mul_(sqrt((rows + dim) / (len(self.given) + dim)))

    def rows(self, indices: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the vectors (n, D) of these rows (n,), from `vectors` (V, D) if those of all items have been made."""
        return F.embedding(indices, self.table() if vectors is None else vectors)

    def table(self) -> Tensor:
        """Return the vectors of all items (V, D)."""
        parts = []
        if self.ids is not None:
            table = self.ids.weight
            if self.training and self.id_dropout:
                is_kept = torch.rand(len(table), 1, device=table.device) >= self.id_dropout
                table = table * is_kept
            parts.append(F.pad(table, (0, 0, 0, len(self.offsets) - 1 - len(table))))
        if self.by_category is not None:
            bags = self.categories, self.by_category.weight, self.offsets
            parts.append(F.embedding_bag(*bags, mode="sum", include_last_offset=True))
        if self.projection is not None:
            parts.append(self.projection(self.given))
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
