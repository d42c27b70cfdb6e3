"""The head, between states and item vectors and their dot products, which are the scores. D dim, V items."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.model import ModelConfig, Similarity


class Head(nn.Module):
    """Change states and item vectors so that the dot product of both is the score, for every loss and every ranking.

    A bias is one more element: 1 in each state, the item's bias in its vector. A cosine is the product of vectors of
    length 1. The transform is that of BERT4Rec (Sun et al. 2019, arXiv 1904.06690, and FeiSun/BERT4Rec).
    """

    def __init__(self, num_items: int, cfg: ModelConfig):
        super().__init__()
        self.is_cosine, self.temperature = cfg.similarity is Similarity.cosine, cfg.temperature
        self.transform = self.bias = None
        if cfg.head_transform:
            norm = nn.LayerNorm(cfg.dim, eps=cfg.final_norm_eps)
            self.transform = nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.GELU(), norm)
        if cfg.output_bias:
            self.bias = nn.Parameter(torch.zeros(num_items))

    def forward(self, states: Tensor) -> Tensor:
        """Return the states to compare with `item_vectors`, shape (n, D), or (n, D + 1) with a bias."""
        if self.transform is not None:
            states = self.transform(states)
        if self.is_cosine:
            states = F.normalize(states, dim=1)
        if self.temperature != 1:
            states = states / self.temperature
        return states if self.bias is None else F.pad(states, (0, 1), value=1.0)

    def item_vectors(self, table: Tensor) -> Tensor:
        """Return the vectors to compare states with, shape (V, D), or (V, D + 1) with a bias."""
        if self.is_cosine:
            table = F.normalize(table, dim=1)
        return table if self.bias is None else torch.cat([table, self.bias[:, None].to(table.dtype)], 1)


def build_head(num_items: int, cfg: ModelConfig) -> Head:
    """Return the head that a config names, which may be of a class of the user's."""
    head: Head = (Head if cfg.head is None else load(cfg.head))(num_items, cfg)
    return head
