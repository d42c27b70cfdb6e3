"""The block of HSTU: attention without a softmax, over packed tokens. B sequences, T tokens, D dim, L maxlen."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import ModelConfig, TimeBias
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, pick
from sasrec_lab.ops.pointwise import attend_pointwise, attend_pointwise_newest
from sasrec_lab.ops.time_buckets import NUM_BUCKETS


class HSTUBlock(nn.Module):
    """x + W (u * LayerNorm(attention)), where SiLU of one projection of LayerNorm(x) gives u, q, v and k.

    The weight of an item in another's sum is SiLU(q k + biases) / L. The biases, shared by the heads, are learned by
    the distance of the two items, and by the time from the one to when the item after the other is asked for. Source:
    Zhai et al. 2024 (arXiv 2402.17152), 3.1 and 3.2, as in RecTools; the authors' code differs in config keys.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        qk_dim, v_dim = cfg.head_widths
        self.heads, self.rate, self.divisor = cfg.heads, cfg.dropout, cfg.divisor or float(cfg.maxlen)
        self.widths = [cfg.heads * v_dim, cfg.heads * qk_dim] * 2  # of u and q, v and k, each ordered by head
        self.input_norm = nn.LayerNorm(cfg.dim, cfg.norm_eps, elementwise_affine=cfg.norm_affine)
        self.projection = nn.Linear(cfg.dim, sum(self.widths), bias=False)
        self.position_bias = self.time_bias = None
        if cfg.position_bias:
            self.position_bias = nn.Parameter(torch.randn(cfg.maxlen) * 0.02)  # by distance, 0 first
        if cfg.time_bias is TimeBias.buckets:
            self.time_bias = nn.Parameter(torch.randn(NUM_BUCKETS) * 0.02)
        self.output_norm = nn.LayerNorm(cfg.heads * v_dim, cfg.norm_eps, elementwise_affine=cfg.norm_affine)
        self.output = nn.Linear(cfg.heads * v_dim, cfg.dim)

    def forward(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return the states (T, D) after this block for those before it.

        With `newest` (B,) only those of these tokens, the newest of each sequence, whose gates and queries are all that
        is computed; with `rows` (R,) only those of these tokens.
        """
        normed, at = self.input_norm(x), pick(pick(x, newest), rows)
        if newest is None:
            u, q, v, k = F.silu(self.projection(normed)).split(self.widths, 1)
            attended = attend_pointwise(q, k, v, layout, self.heads, self.divisor, *self._biases)
        else:
            of_queries, of_keys = self.projection.weight.chunk(2)
            u, q = F.silu(F.linear(normed.index_select(0, newest), of_queries)).split(self.widths[:2], 1)
            v, k = F.silu(F.linear(normed, of_keys)).split(self.widths[2:], 1)
            attended = attend_pointwise_newest(q, k, v, layout, self.heads, self.divisor, *self._biases)
        gated = pick(u, rows) * self.output_norm(pick(attended, rows))
        return at + self.output(dropout(gated, self.rate if self.training else 0.0))

    @property
    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        return self.position_bias, self.time_bias
