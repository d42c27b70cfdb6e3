"""A transformer block over packed tokens. T tokens, D dim."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.schema import Activation, ModelConfig, Norm
from sasrec_lab.ops import library as kernels
from sasrec_lab.ops.attention import BatchLayout, attend, attend_newest
from sasrec_lab.ops.dropout import dropout

REGISTERS = 16  # numbers: a whole number of registers on any processor


class Block(nn.Module):
    """Self-attention, then a point-wise feed-forward. Paper: III-B, eq. (2) to (5); with `norm: sasrec` as the authors'
    code, which differs from the paper: only queries are normalised, and residuals are added to the *normalised* input.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm, self.residual, self.heads, self.rate = cfg.norm, cfg.residual, cfg.heads, cfg.dropout
        self.pad_keys = cfg.pad_keys
        self.attention_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.query = nn.Linear(cfg.dim, cfg.dim)
        self.key = nn.Linear(cfg.dim, cfg.dim)
        self.value = nn.Linear(cfg.dim, cfg.dim)
        self.output = nn.Linear(cfg.dim, cfg.dim) if cfg.output_projection else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: Tensor, plan: BatchLayout, newest: Tensor | None = None) -> Tensor:  # (T, D) -> (T, D)
        """With `newest` (B,) the states of these tokens alone, (B, D): all that a ranking wants of the last block."""
        if self._has_kernel(x):
            return self._compiled(x, plan, newest is not None)
        at = x if newest is None else x.index_select(0, newest)
        if self.norm is Norm.post:
            at = self.attention_norm(self._add(at, self._attend(at, x, plan, newest)))
            return self.feed_forward_norm(self._add(at, self.feed_forward(at)))
        if self.norm is Norm.pre:
            normed = self.attention_norm(x)
            queries = normed if newest is None else normed.index_select(0, newest)
            at = self._add(at, self._attend(queries, normed, plan, newest))
            return self._add(at, self.feed_forward(self.feed_forward_norm(at)))
        normed = self.attention_norm(at)
        normed = self.feed_forward_norm(self._add(normed, self._attend(normed, x, plan, newest)))
        return self._add(normed, self.feed_forward(normed))

    def _attend(self, queries: Tensor, others: Tensor, plan: BatchLayout, newest: Tensor | None) -> Tensor:
        if newest is not None:
            return self.output(self._attend_newest(queries, others, plan))
        q, k, v = self.query(queries), self.key(others), self.value(others)
        rate = self.rate if self.training else 0.0
        if self.pad_keys:
            rows, plan = plan.rows, plan.rows.plan
            k, v = rows.fill(k, self.key.bias), rows.fill(v, self.value.bias)
            out = rows.take(attend(rows.fill(q, torch.zeros_like(self.query.bias)), k, v, plan, self.heads, rate))
        else:
            out = attend(q, k, v, plan, self.heads, rate)
        return self.output(out)

    def _attend_newest(self, queries: Tensor, others: Tensor, plan: BatchLayout) -> Tensor:  # (B, D), (T, D) -> (B, D)
        """As keys and values are linear in the tokens' states, the states themselves are compared and averaged, and
        keys' and values' matrices applied to the query and to the average: two products less for each token.

        A key's bias adds the same to all scores of a query, which the softmax does not see.
        """
        if self.pad_keys:
            others, plan = plan.rows.fill(others, torch.zeros_like(others[0])), plan.rows.plan
        heads = (self.heads, queries.shape[1] // self.heads)
        q = self.query(queries).unflatten(1, heads)  # (B, H, D / H)
        q = torch.einsum("bhd,hde->bhe", q, self.key.weight.unflatten(0, heads))  # (B, H, D)
        mean = attend_newest(q.contiguous(), others.to(q.dtype), plan, 1 / sqrt(heads[1]))  # (B, H, D)
        values = torch.einsum("bhe,hde->bhd", mean, self.value.weight.unflatten(0, heads))  # (B, H, D / H)
        return values.flatten(1) + self.value.bias

    def _has_kernel(self, x: Tensor) -> bool:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        known = self.heads == 1 and self.feed_forward.activation is F.relu and not self.pad_keys
        return known and kernels.supports(x, self.query.weight)

    def _compiled(self, x: Tensor, plan: BatchLayout, only_newest: bool) -> Tensor:
        """Some sequences at a time go through the whole block in a core's own cache.

        Ranking on MovieLens-1M is 1.5 times as fast as by torch's functions, each of which reads and writes all states.
        """
        tokens, dim = x.shape
        sequences, width = len(plan.offsets) - 1, self.feed_forward.inner.out_features
        kind = list(Norm).index(self.norm), int(self.residual), self.attention_norm.eps
        out = x.new_empty(sequences if only_newest else tokens, dim)
        if not only_newest:
            out[plan.tokens :] = 0
        layers = self._folded()
        kernels.call("block", x, plan.offsets, sequences, dim, width, *kind, *layers, int(only_newest), out)
        return out

    @torch.autocast("cpu", enabled=False)
    def _folded(self) -> list[Tensor]:
        """Each layer's matrix (in, out) and below it its bias, in the order in which a token meets them.

        As in `_attend_newest` the tokens themselves are compared and averaged: the key's matrix is part of the query's,
        the output's of the value's. A product less for each token.
        """
        value = self.value.weight.T, self.value.bias
        if isinstance(self.output, nn.Linear):
            value = value[0] @ self.output.weight.T, self.output(value[1])
        inner, outer = self.feed_forward.inner, self.feed_forward.outer
        layers = [
            (self.attention_norm.weight[None], self.attention_norm.bias),
            (self.query.weight.T @ self.key.weight, self.query.bias @ self.key.weight),
            value,
            (self.feed_forward_norm.weight[None], self.feed_forward_norm.bias),
            (inner.weight.T, inner.bias),
            (outer.weight.T, outer.bias),
        ]
        rows = [torch.cat([matrix, bias[None]]) for matrix, bias in layers]
        return [F.pad(x, (0, -x.shape[1] % REGISTERS)) for x in rows]

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change if self.residual else change


class FeedForward(nn.Module):
    """Two linear layers, dropout behind the activation and behind the second, as the authors'."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.rate = cfg.dropout
        self.activation = F.relu if cfg.activation is Activation.relu else F.gelu
        self.inner = nn.Linear(cfg.dim, cfg.ff_dim or cfg.dim)
        self.outer = nn.Linear(cfg.ff_dim or cfg.dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate if self.training else 0.0
        return dropout(self.outer(dropout(self.activation(self.inner(x)), rate)), rate)
