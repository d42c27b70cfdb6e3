"""Item vectors that are a table of parameters.

The encoder knows item vectors by two calls, `rows` and `table`, which `FeatureVectors` has too. A table that is divided
among devices would be a third kind (docs/cluster.md).
"""

from torch import Tensor, nn
from torch.nn import functional as F


class ItemEmbedding(nn.Embedding):
    """A vector of parameters for each item. V items, D dim."""

    def rows(self, indices: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the vectors (n, D) of these rows (n,), from `vectors` (V, D) if they are not the parameters."""
        return F.embedding(indices, self.weight if vectors is None else vectors, sparse=self.sparse)

    def table(self) -> Tensor:
        """Return the vectors of all items (V, D)."""
        return self.weight
