"""The transformer block of SASRec, over packed tokens. B sequences, T tokens, D dim, W width of the feed-forward."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import Activation, ModelConfig, Norm, PosEmb, TimeBias
from sasrec_lab.ops.attention import attend, attend_newest, attend_newest_to, attend_with_padding
from sasrec_lab.ops.block import BlockLayers, apply_block
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, pick
from sasrec_lab.ops.rotary import rotate

TIME_DECAY = (0.1, 0.5)  # initial c and b: half the weight after 48 days


class TransformerBlock(nn.Module):
    """Self-attention, then a position-wise feed-forward network. Kang and McAuley 2018, III-B, eq. (2) to (5).

    norm=sasrec follows the authors' code, which differs from the paper: only queries are normalized, and residuals are
    added to the *normalized* input. pos_emb=relative adds to the scores of each head a learned bias by distance, as T5
    does for ranges of distances (Raffel et al. 2020, arXiv 1910.10683, 2.1). time_bias=decay adds -c t^b, for t days
    from an item to when the item after another is asked for: weights are multiplied by exp(-c t^b), FuXi-gamma's map.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm, self.residual, self.heads = cfg.norm, cfg.residual, cfg.heads
        self.attention_rate, self.output_rate = cfg.rate_attention, cfg.dropout_output or 0.0
        self.pad_keys, self.causal = cfg.pad_keys, cfg.causal
        is_relative = cfg.pos_emb is PosEmb.relative
        self.relative_bias = nn.Parameter(torch.zeros(cfg.heads, cfg.num_distances)) if is_relative else None
        has_decay = cfg.time_bias is TimeBias.decay  # c and b are the softplus of these numbers
        self.time_decay = nn.Parameter(torch.tensor(TIME_DECAY).expm1().log()) if has_decay else None
        self.attention_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.query = nn.Linear(cfg.dim, cfg.dim)
        self.key = nn.Linear(cfg.dim, cfg.dim)
        self.value = nn.Linear(cfg.dim, cfg.dim)
        self.output = nn.Linear(cfg.dim, cfg.dim) if cfg.output_projection else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.feed_forward = (SwiGLU if cfg.activation is Activation.swiglu else FeedForward)(cfg)
        self.has_kernel = isinstance(self.feed_forward, FeedForward)

    def forward(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return the states (T, D) after this block for those before it.

        Of a last block few states may be needed: with `newest` (B,) it returns only those of these tokens, the newest
        of each sequence, without dropout on attention weights; with `rows` (R,) only those of these tokens.
        """
        if self.has_kernel and rows is None:
            return apply_block(self, x, layout, newest)
        return self.transform(x, layout, newest, rows)

    def transform(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return what `forward` returns, layer by layer."""
        at = pick(x, newest)
        if self.norm is Norm.post:
            at = self.attention_norm(self._add(pick(at, rows), self._attend(at, x, layout, newest, rows)))
            return self.feed_forward_norm(self._add(at, self.feed_forward(at)))
        if self.norm is Norm.pre:
            normed = self.attention_norm(x)
            at = self._add(pick(at, rows), self._attend(pick(normed, newest), normed, layout, newest, rows))
            return self._add(at, self.feed_forward(self.feed_forward_norm(at)))
        normed = self.attention_norm(at)
        at = self.feed_forward_norm(self._add(pick(normed, rows), self._attend(normed, x, layout, newest, rows)))
        return self._add(at, self.feed_forward(at))

    def _attend(
        self, queries: Tensor, others: Tensor, layout: BatchLayout, newest: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """Return attention's output for the newest tokens' queries (B, D), or for all tokens' (T, D) or some rows."""
        q = self.query(queries)
        found = pick(self._all(q, others, layout), rows) if newest is None else self._newest(q, others, layout)
        return dropout(self.output(found), self.output_rate if self.training else 0.0)

    def _all(self, q: Tensor, x: Tensor, layout: BatchLayout) -> Tensor:
        k, v = self.key(x), self.value(x)
        if layout.rotations is not None:
            q, k = rotate(q, layout.rotations, self.heads), rotate(k, layout.rotations, self.heads)
        rate = self.attention_rate if self.training else 0.0
        if self.pad_keys:
            pads = self.key.bias, self.value.bias
            return attend_with_padding(q, k, v, layout, self.heads, rate, *pads)
        bias, decay = self.relative_bias, self.decay()
        return attend(q, k, v, layout, self.heads, rate, causal=self.causal, bias=bias, decay=decay)

    def _newest(self, q: Tensor, x: Tensor, layout: BatchLayout) -> Tensor:
        if layout.rotations is not None:  # the newest token is at position 0, which leaves its query as it is
            k = rotate(self.key(x), layout.rotations, self.heads)
            return attend_newest_to(q, k, self.value(x), layout, self.heads, decay=self.decay())
        return attend_newest(
            q,
            x,
            self.key,
            self.value,
            layout,
            self.heads,
            self.pad_keys,
            causal=self.causal,
            bias=self.relative_bias,
            decay=self.decay(),
        )

    def decay(self) -> Tensor | None:
        """Return c and b of the time decay (2,), or None without one."""
        return None if self.time_decay is None else F.softplus(self.time_decay)

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change if self.residual else change

    def layers(self) -> BlockLayers:
        """Return the layers and how they are put together, for ops/block.py."""
        assert isinstance(self.feed_forward, FeedForward)
        return BlockLayers(
            norm=self.norm.name,
            has_residual=self.residual,
            heads=self.heads,
            pad_keys=self.pad_keys,
            causal=self.causal,
            has_bias=self.relative_bias is not None or self.time_decay is not None,
            is_relu=self.feed_forward.activation is F.relu,
            attention_norm=self.attention_norm,
            query=self.query,
            key=self.key,
            value=self.value,
            output=self.output if isinstance(self.output, nn.Linear) else None,
            feed_forward_norm=self.feed_forward_norm,
            inner=self.feed_forward.inner,
            outer=self.feed_forward.outer,
        )


class FeedForward(nn.Module):
    """Two linear layers, with dropout after the activation and after the second layer, as in the authors' code."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.inner_rate, self.rate = cfg.rate_inner, cfg.dropout
        self.activation = F.relu if cfg.activation is Activation.relu else F.gelu
        self.inner = nn.Linear(cfg.dim, cfg.feed_forward_width)
        self.outer = nn.Linear(cfg.feed_forward_width, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output (T, D)."""
        inner_rate, rate = (self.inner_rate, self.rate) if self.training else (0.0, 0.0)
        return dropout(self.outer(dropout(self.activation(self.inner(x)), inner_rate)), rate)


class SwiGLU(nn.Module):
    """A gated feed-forward network without biases: W2 (SiLU(W1 x) * W3 x). Shazeer 2020 (arXiv 2002.05202), eq. (6).

    Dropout is where FeedForward has it: on what W2 multiplies, and on the output.
    """

    def __init__(self, cfg: ModelConfig, has_dropout: bool = True):
        super().__init__()
        self.inner_rate, self.rate = (cfg.rate_inner, cfg.dropout) if has_dropout else (0.0, 0.0)
        self.gate = nn.Linear(cfg.dim, cfg.feed_forward_width, bias=False)  # W1
        self.inner = nn.Linear(cfg.dim, cfg.feed_forward_width, bias=False)  # W3
        self.outer = nn.Linear(cfg.feed_forward_width, cfg.dim, bias=False)  # W2

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output (T, D)."""
        inner_rate, rate = (self.inner_rate, self.rate) if self.training else (0.0, 0.0)
        return dropout(self.outer(dropout(F.silu(self.gate(x)) * self.inner(x), inner_rate)), rate)
