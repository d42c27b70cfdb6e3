"""Item vectors that are a table of parameters.

The encoder knows item vectors by two calls, `rows` and `table`, which `FeatureVectors` has too. A table that is divided
among devices would be a third kind (docs/cluster.md).
"""

from torch import Tensor, nn


class ItemEmbedding(nn.Embedding):
    """A vector of parameters for each item. V items, D dim."""

    def rows(self, indices: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the vectors (n, D) of these rows (n,); `vectors` are not needed, as a row costs only its lookup."""
        return self(indices)

    def table(self) -> Tensor:
        """Return the vectors of all items (V, D)."""
        return self.weight
