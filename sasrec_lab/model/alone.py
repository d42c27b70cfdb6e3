"""One history alone, for export. L items, V items of the catalogue."""

import torch
from torch import Tensor, nn

from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.model.encoder import Encoder


class ScoresOfOne(nn.Module):
    """The scores of all items after one history, the most recent item last."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, history: Tensor) -> Tensor:  # (L,) int64 -> (V,)
        places = torch.arange(history.shape[0])
        # an exported program knows no offsets: all tokens are one sequence's
        batch = PackedBatch(items=history, positions=places.flip(0), last=places[-1:], offsets=None)
        return (self.encoder.newest(batch) @ self.encoder.item_table.T).squeeze(0)
