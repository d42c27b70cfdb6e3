"""SASRec: packed item ids -> one state a token. T tokens, B sequences, D dim, V items."""

from math import log, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.schema import Init, ModelConfig, PosEmb
from sasrec_lab.data.batches import PackedBatch
from sasrec_lab.model.blocks import Block
from sasrec_lab.ops.attention import BatchLayout
from sasrec_lab.ops.dropout import dropout


class Encoder(nn.Module):
    """The state of a token stands for the user after that item; its dot product with an item's vector is the score.

    Row i of the item tables is item i + 1: there is no pad item. Positions are counted from the newest item, which
    is what the left-padded original's learned positions amount to.
    Source: Kang and McAuley 2018 (arXiv 1808.09781) and kang205/SASRec; where implementations differ there is a key.
    """

    def __init__(self, num_items: int, cfg: ModelConfig):
        super().__init__()
        self.rate, self.maxlen = cfg.dropout, cfg.maxlen
        self.scale = sqrt(cfg.dim) if cfg.scale_embeddings else 1.0
        self.input_items = nn.Embedding(num_items, cfg.dim)
        self.output_items = self.input_items if cfg.share_items else nn.Embedding(num_items, cfg.dim)
        self.positions = nn.Embedding(cfg.maxlen, cfg.dim) if cfg.pos_emb is PosEmb.learned else None
        if cfg.pos_emb is PosEmb.sinusoidal:
            self.register_buffer("sinusoids", _sinusoids(cfg.maxlen, cfg.dim), persistent=False)
        self.pos_emb = cfg.pos_emb
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.blocks))
        self.final_norm = nn.LayerNorm(cfg.dim, eps=cfg.final_norm_eps) if cfg.final_norm else nn.Identity()
        self.apply(lambda module: _initialise(module, cfg.init))
        if cfg.init is Init.xavier_packed:
            self.blocks.apply(_as_packed)

    @property
    def item_table(self) -> Tensor:
        """Vectors that states are compared with; row i is item i + 1."""
        return self.output_items.weight  # (V, D)

    def forward(self, batch: PackedBatch) -> Tensor:
        x, plan = self._embed(batch), BatchLayout(batch, self.maxlen)
        for block in self.blocks:
            x = block(x, plan)
        return self.final_norm(x)  # (T, D)

    def newest(self, batch: PackedBatch) -> Tensor:
        """The state of each sequence's newest item: what `forward` gives there, for less than half the work.

        Not for training: there is no dropout in the last block.
        """
        x, plan = self._embed(batch), BatchLayout(batch, self.maxlen)
        for block in self.blocks[:-1]:
            x = block(x, plan)
        x = self.blocks[-1](x, plan, batch.last) if self.blocks else x.index_select(0, batch.last)
        return self.final_norm(x)  # (B, D)

    def _embed(self, batch: PackedBatch) -> Tensor:
        x = self.input_items(batch.items - 1)  # (T, D)
        if self.pos_emb is PosEmb.none:
            x = x * self.scale
        else:  # in one pass
            table = self.positions.weight if self.pos_emb is PosEmb.learned else self.sinusoids
            x = torch.add(F.embedding(batch.positions, table), x, alpha=self.scale)
        return dropout(x, self.rate if self.training else 0.0)


def _initialise(module: nn.Module, init: Init) -> None:
    """All matrices alike, biases zero (the authors' Glorot is xavier_uniform)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        if init is Init.normal:
            nn.init.normal_(module.weight, std=0.02)
        elif init is Init.xavier_uniform:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _as_packed(module: nn.Module) -> None:
    """As of torch's MultiheadAttention, whose (3D, D) matrix has half the variance; feed-forward biases are torch's."""
    if isinstance(module, Block):
        for projection in (module.query, module.key, module.value):
            projection.weight.data.mul_(sqrt(0.5))
        for layer in (module.feed_forward.inner, module.feed_forward.outer):
            nn.init.uniform_(layer.bias, -1 / sqrt(layer.in_features), 1 / sqrt(layer.in_features))


def _sinusoids(maxlen: int, dim: int) -> Tensor:
    """Vaswani et al. 2017 (arXiv 1706.03762), 3.5."""
    angles = torch.arange(maxlen)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-log(10000.0) / dim))
    table = torch.zeros(maxlen, dim)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : dim // 2]
    return table  # (L, D)


class SingleHistoryScores(nn.Module):
    """The scores of all items after one history, the most recent item last."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, history: Tensor) -> Tensor:  # (L,) int64 -> (V,)
        places = torch.arange(history.shape[0])
        # an exported program knows no offsets: all tokens are one sequence's
        batch = PackedBatch(items=history, positions=places.flip(0), last=places[-1:], offsets=None)
        return (self.encoder.newest(batch) @ self.encoder.item_table.T).squeeze(0)
