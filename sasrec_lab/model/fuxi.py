"""The block of FuXi-alpha: three maps of attention, then a feed-forward. B sequences, T tokens, D dim, L maxlen."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import ModelConfig, TimeBias
from sasrec_lab.model.transformer import SwiGLU
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, pick
from sasrec_lab.ops.pointwise import attend_pointwise, attend_pointwise_newest
from sasrec_lab.ops.relative_sums import relative_sums, relative_sums_newest
from sasrec_lab.ops.time_buckets import NUM_BUCKETS


class FuXiBlock(nn.Module):
    """y + SwiGLU(norm(y)) with y = x + W (u * norm(sums)), where SiLU of one projection of norm(x) gives u, q, v and k.

    HSTU's sum of an item's v and those before it is three: with weights learned by the distance of two items, by the
    time from the one to when the item after the other is asked for, and with SiLU(q k) / L. Heads share the first two
    kinds of weights, and each has its three sums next to each other. A norm is x / sqrt(mean(x^2)). Source: Ye et al.
    2025 (arXiv 2502.03036), as in the authors' code, which has dropout before W and before the feed-forward.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        qk_dim, v_dim = cfg.head_widths
        self.heads, self.rate, self.eps = cfg.heads, cfg.dropout, cfg.norm_eps
        self.divisor = cfg.divisor or float(cfg.maxlen)
        # of u and q, v and k, each ordered by head
        self.widths = [cfg.num_maps * cfg.heads * v_dim, *(cfg.heads * width for width in (qk_dim, v_dim, qk_dim))]
        self.projection = nn.Linear(cfg.dim, sum(self.widths), bias=False)
        self.position_weights = self.time_weights = None
        if cfg.position_bias:
            self.position_weights = nn.Parameter(torch.randn(cfg.maxlen) * 0.02)  # by distance, 0 first
        if cfg.time_bias is TimeBias.buckets:
            self.time_weights = nn.Parameter(torch.randn(NUM_BUCKETS) * 0.02)
        self.output = nn.Linear(self.widths[0], cfg.dim)
        self.feed_forward = SwiGLU(cfg, has_dropout=False)

    def forward(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return the states (T, D) after this block for those before it.

        With `newest` (B,) only those of these tokens, the newest of each sequence, whose gates and queries are all that
        is computed; with `rows` (R,) only those of these tokens.
        """
        normed, at = self._norm(x), pick(pick(x, newest), rows)
        u, sums = self._all(normed, layout) if newest is None else self._newest(normed, layout, newest)
        by_head = torch.cat([pick(own, rows).unflatten(1, (self.heads, -1)) for own in sums], 2)
        rate = self.rate if self.training else 0.0
        at = at + self.output(dropout(pick(u, rows) * self._norm(by_head.flatten(1)), rate))
        return at + self.feed_forward(dropout(self._norm(at), rate))

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[1:], eps=self.eps)

    def _all(self, normed: Tensor, layout: BatchLayout) -> tuple[Tensor, list[Tensor]]:
        """Return the gates and the sums of all tokens."""
        u, q, v, k = F.silu(self.projection(normed)).split(self.widths, 1)
        sums = relative_sums(v, layout, self.position_weights, self.time_weights)
        return u, [*sums, attend_pointwise(q, k, v, layout, self.heads, self.divisor)]

    def _newest(self, normed: Tensor, layout: BatchLayout, newest: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gates and the sums of the newest tokens."""
        of_queries, of_keys = self.projection.weight.split([sum(self.widths[:2]), sum(self.widths[2:])])
        u, q = F.silu(F.linear(normed.index_select(0, newest), of_queries)).split(self.widths[:2], 1)
        v, k = F.silu(F.linear(normed, of_keys)).split(self.widths[2:], 1)
        sums = relative_sums_newest(v, layout, self.position_weights, self.time_weights)
        return u, [*sums, attend_pointwise_newest(q, k, v, layout, self.heads, self.divisor)]
