"""A reference implementation of SASRec on left-padded rows, which the packed encoder must equal.

B rows of L item ids, the newest on the right, 0 as padding. D dim, H heads. It shares no code with sasrec_lab/model;
parameters have the same names, so that they can be copied and gradients compared.
"""

from collections.abc import Callable
from math import cos, sin, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import Activation, ModelConfig, Norm, PosEmb, PositionsFrom


def no_dropout(x: Tensor) -> Tensor:
    """Return x."""
    return x


class PaddedSASRec(nn.Module):
    """The whole encoder. Item 0 is the padding, a vector of zeros."""

    def __init__(self, num_items: int, cfg: ModelConfig, dropout: Callable[[Tensor], Tensor] = no_dropout):
        super().__init__()
        self.cfg = cfg
        self.dropout = dropout
        self.input_items = nn.Embedding(num_items + 1, cfg.dim, padding_idx=0)
        if not cfg.share_items:
            self.output_items = nn.Embedding(num_items + 1, cfg.dim, padding_idx=0)
        if cfg.pos_emb is PosEmb.learned:
            self.positions = nn.Embedding(cfg.maxlen, cfg.dim)
        self.blocks = nn.ModuleList(PaddedBlock(cfg, dropout) for _ in range(cfg.blocks))
        if cfg.embedding_norm:
            self.embedding_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        if cfg.final_norm:
            self.final_norm = nn.LayerNorm(cfg.dim, eps=cfg.final_norm_eps)

    def forward(self, rows: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        real = rows > 0
        x = self.input_items(rows)
        if self.cfg.scale_embeddings:
            x = x * sqrt(self.cfg.dim)
        if self.cfg.pos_emb in (PosEmb.learned, PosEmb.sinusoidal):
            x = x + self.position_vectors(real)
        if self.cfg.embedding_norm:
            x = self.embedding_norm(x)
        x = self.dropout(x) * real[..., None]
        for block in self.blocks:
            x = block(x, real) * real[..., None]
        return self.final_norm(x) if self.cfg.final_norm else x

    def position_vectors(self, real: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        places = torch.arange(real.shape[1]).expand_as(real)
        from_newest = real.shape[1] - 1 - places
        padding = (~real).sum(1, keepdim=True)
        numbers = from_newest if self.cfg.positions_from is PositionsFrom.newest else (places - padding).clamp(min=0)
        if self.cfg.pos_emb is PosEmb.learned:
            return self.positions(numbers)
        vectors = [[sinusoid(number, self.cfg.dim) for number in row] for row in numbers.tolist()]
        return torch.tensor(vectors, dtype=self.input_items.weight.dtype)

    def scores(self, states: Tensor) -> Tensor:  # (..., D) -> (..., V), column i is item i + 1
        return states @ (self.input_items if self.cfg.share_items else self.output_items).weight[1:].T


class PaddedBlock(nn.Module):
    """One transformer block."""

    def __init__(self, cfg: ModelConfig, dropout: Callable[[Tensor], Tensor]):
        super().__init__()
        self.cfg = cfg
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        if cfg.pos_emb is PosEmb.relative:
            reach = cfg.maxlen if cfg.causal else 2 * cfg.maxlen - 1
            self.relative_bias = nn.Parameter(torch.zeros(cfg.heads, reach))
        self.query, self.key, self.value = (nn.Linear(cfg.dim, cfg.dim) for _ in range(3))
        if cfg.output_projection:
            self.output = nn.Linear(cfg.dim, cfg.dim)
        self.feed_forward_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        inner = cfg.feed_forward_width
        self.feed_forward = nn.ModuleDict({"inner": nn.Linear(cfg.dim, inner), "outer": nn.Linear(inner, cfg.dim)})

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        keep = 1 if self.cfg.residual else 0
        if self.cfg.norm is Norm.sasrec:
            q = self.attention_norm(x)
            x = q * keep + self.attention(q, x, real)
            x = self.feed_forward_norm(x)
            return x * keep + self.point_wise(x)
        if self.cfg.norm is Norm.pre:
            q = self.attention_norm(x)
            x = x * keep + self.attention(q, q, real)
            return x * keep + self.point_wise(self.feed_forward_norm(x))
        x = self.attention_norm(x * keep + self.attention(x, x, real))
        return self.feed_forward_norm(x * keep + self.point_wise(x))

    def attention(self, queries: Tensor, others: Tensor, real: Tensor) -> Tensor:
        length = queries.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool)
        visible = visible.tril() if self.cfg.causal else visible
        visible = visible if self.cfg.pad_keys else visible & real[:, None, :]  # (L, L) or (B, L, L)
        heads = []
        projected = [self.query(queries), self.key(others), self.value(others)]
        for head, (q, k, v) in enumerate(zip(*(x.chunk(self.cfg.heads, -1) for x in projected), strict=True)):
            # each (B, L, D / H)
            if self.cfg.pos_emb is PosEmb.rope:
                q, k = rotated(q), rotated(k)
            scores = torch.einsum("bqd,bkd->bqk", q, k) / sqrt(self.cfg.dim // self.cfg.heads)
            if self.cfg.pos_emb is PosEmb.relative:
                scores = scores + self.biases(length)[head]
            weights = F.softmax(scores.masked_fill(~visible, -(2.0**32) + 1), -1)  # the padding's own row is uniform
            heads.append(torch.einsum("bqk,bkd->bqd", self.dropout(weights), v))
        out = torch.cat(heads, -1)
        out = self.output(out) if self.cfg.output_projection else out
        return self.dropout(out) if self.cfg.dropout_output else out

    def biases(self, length: int) -> Tensor:  # (H, L, L)
        first = 0 if self.cfg.causal else 1 - self.cfg.maxlen  # the distance of column 0
        rows = [[max(i - j - first, 0) for j in range(length)] for i in range(length)]  # later items are not visible
        return self.relative_bias[:, torch.tensor(rows)]

    def point_wise(self, x: Tensor) -> Tensor:
        activation = {Activation.relu: F.relu, Activation.gelu: F.gelu}[self.cfg.activation]
        inner = activation(self.feed_forward["inner"](x))
        inner = inner if self.cfg.dropout_inner == 0 else self.dropout(inner)
        return self.dropout(self.feed_forward["outer"](inner))


def rotated(x: Tensor) -> Tensor:
    """Return the rows (B, L, W) with each pair of neighboring columns rotated by an angle that rises with the place."""
    columns = []
    for pair in range(x.shape[2] // 2):
        angles = torch.arange(x.shape[1], dtype=x.dtype) / 10000 ** (2 * pair / x.shape[2])
        one, other = x[:, :, 2 * pair], x[:, :, 2 * pair + 1]
        columns += [one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()]
    return torch.stack(columns, 2)


def sinusoid(position: int, dim: int) -> list[float]:
    angles = [position / 10000 ** (2 * (i // 2) / dim) for i in range(dim)]
    return [sin(angle) if i % 2 == 0 else cos(angle) for i, angle in enumerate(angles)]


def left_padded(users: list[list[int]], maxlen: int) -> Tensor:
    """Return the `maxlen` newest items of each user, with zeros in front."""
    return torch.tensor([[0] * (maxlen - len(items)) + items for items in (items[-maxlen:] for items in users)])


def to_padded(name: str, value: Tensor) -> Tensor:
    """Return a parameter of the packed encoder, or its gradient, in the reference model's form."""
    return F.pad(value, (0, 0, 1, 0)) if name.endswith("items.weight") else value  # the padding's row


def reference_of(
    encoder: nn.Module, cfg: ModelConfig, dropout: Callable[[Tensor], Tensor] = no_dropout
) -> PaddedSASRec:
    """Return the reference model with the encoder's parameters, without a vector for masks."""
    reference = PaddedSASRec(len(encoder.item_table), cfg, dropout).to(encoder.item_table.dtype)
    parameters = [(name, p.detach().clone()) for name, p in encoder.named_parameters() if name != "mask"]
    reference.load_state_dict({name: to_padded(name, p) for name, p in parameters})
    return reference
