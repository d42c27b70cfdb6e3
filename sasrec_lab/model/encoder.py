"""The encoder: packed item ids -> one state per token. T tokens, B sequences, D dim, V items, L maxlen."""

from math import log, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import Init, ModelConfig, PosEmb, PositionsFrom
from sasrec_lab.data.batches import MASK, EvaluationBatch, PackedBatch
from sasrec_lab.data.items import ItemFeatures
from sasrec_lab.model.blocks import build_blocks
from sasrec_lab.model.feature_vectors import FeatureVectors
from sasrec_lab.model.fuxi import FuXiBlock
from sasrec_lab.model.head import build_head
from sasrec_lab.model.hstu import HSTUBlock
from sasrec_lab.model.item_embedding import ItemEmbedding
from sasrec_lab.model.transformer import TransformerBlock
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, pick
from sasrec_lab.ops.ranking import Scores, TopK, top_k_items
from sasrec_lab.ops.rotary import rotations


class Encoder(nn.Module):
    """Embeddings, blocks, a last norm, a head. A headed state dotted with an item's vector is the item's score.

    A state describes the user after that token's item, or if the model is not causal, the item in that place. Row i of
    the item tables is item i + 1; padding has no row. Positions are counted from the newest item, as the left-padded
    original's positions amount to, unless the config says oldest. Source: Kang and McAuley 2018 (arXiv 1808.09781) and
    kang205/SASRec; where implementations differ there is a config key.
    """

    sinusoids: Tensor  # (L, D) only if the positions are sinusoidal
    rotations: Tensor  # (L, D / H / 2, 2) only if they are rotary: real and imaginary parts

    def __init__(self, num_items: int, cfg: ModelConfig, features: ItemFeatures | None = None):
        super().__init__()
        self.maxlen = cfg.maxlen
        self.rate, self.token_rate, self.item_rate = cfg.rate_input, cfg.token_dropout, cfg.dropout_items
        self.scale = sqrt(cfg.dim) if cfg.scale_embeddings else 1.0
        self.input_items = FeatureVectors(features, cfg) if features else ItemEmbedding(num_items, cfg.dim)
        self.output_items = self.input_items if cfg.share_items else ItemEmbedding(num_items, cfg.dim)
        self.positions = nn.Embedding(cfg.maxlen, cfg.dim) if cfg.pos_emb is PosEmb.learned else None
        if cfg.pos_emb is PosEmb.sinusoidal:
            self.register_buffer("sinusoids", _sinusoids(cfg.maxlen, cfg.dim), persistent=False)
        if cfg.pos_emb is PosEmb.rope:
            factors = rotations(torch.arange(cfg.maxlen), cfg.dim // cfg.heads)
            self.register_buffer("rotations", torch.view_as_real(factors), persistent=False)
        self.pos_emb, self.positions_from = cfg.pos_emb, cfg.positions_from
        self.embedding_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if cfg.embedding_norm else None
        self.mask = None if cfg.causal else nn.Parameter(torch.empty(1, cfg.dim))  # the vector of MASK
        self.blocks = build_blocks(cfg)
        self.final_norm = nn.LayerNorm(cfg.dim, eps=cfg.final_norm_eps) if cfg.final_norm else nn.Identity()
        self.head = build_head(num_items, cfg)
        self.apply(lambda module: _initialize(module, cfg.init))
        others = (Init.normal, Init.normal_packed, Init.torch, Init.meta)
        if isinstance(self.input_items, FeatureVectors) and cfg.init not in others:
            self.input_items.shrink_categories()
        if self.mask is not None:  # as an item's: in the authors' code and RecTools it is a row of the item table
            self.mask.data.normal_().mul_(self.input_items.table().detach().std(correction=0))
        if cfg.init is Init.xavier_packed:
            self.blocks.apply(_initialize_as_packed)
        if cfg.init is Init.normal_packed:
            self.blocks.apply(_initialize_attention_as_packed)
        if cfg.init is Init.meta:
            self.apply(_initialize_as_meta)

    @property
    def longest_history(self) -> int:
        """Return how many of a history's newest items predict the next one; a mask behind them takes a place."""
        return self.maxlen - (self.mask is not None)

    def item_vectors(self) -> Tensor:
        """Return the items' output vectors (V, D), before the head; row i is item i + 1."""
        return self.output_items.table()

    @property
    def item_table(self) -> Tensor:
        """Return the vectors (V, D) that headed states are compared with; row i is item i + 1."""
        return self.head.item_vectors(self.item_vectors())

    def states_and_table(
        self, batch: PackedBatch, rows: Tensor | None = None, passes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return the headed states of some tokens, as `forward` takes `rows`, and the table to compare them with.

        The states of several passes, which differ by their dropout, are stacked. Item vectors that are made of features
        are made once for all, and so is the mask of `dropout_items`, for inputs, targets and negatives alike.
        """
        vectors = self._dropped(self.item_vectors())
        states = [self(batch, rows, self._input_vectors(vectors)) for _ in range(passes)]
        table = self.head.item_vectors(vectors)
        headed = [self.head(each) for each in states]
        return headed[0] if passes == 1 else torch.stack(headed), table

    def forward(self, batch: PackedBatch, rows: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Return the state (T, D) of each token, before the head; with `rows` (R,) only those of these tokens.

        `vectors` (V, D) are the input vectors, if those of all items have been made.
        """
        x, layout = self._embed(batch, vectors), self.layout(batch)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        x = self.blocks[-1](x, layout, rows=rows) if self.blocks else pick(x, rows)
        return self.final_norm(x)

    def newest(self, batch: PackedBatch, vectors: Tensor | None = None) -> Tensor:
        """Return the headed state (B, D) of each sequence's newest item, for less than half the work of `forward`.

        `vectors` as in `forward`. Not for training, because the last block has no dropout on attention weights.
        """
        x, layout = self._embed(batch, vectors), self.layout(batch)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        x = self.blocks[-1](x, layout, batch.last) if self.blocks else x.index_select(0, batch.last)
        return self.head(self.final_norm(x))

    def scores(self, batch: EvaluationBatch) -> Scores:
        """Return the scores of all items for each row; rows without known items get NaN, the worst rank."""
        vectors = self.item_vectors()
        table = self.head.item_vectors(vectors)
        if batch.inputs is None:
            return Scores(table.new_full((len(batch.users), table.shape[1]), float("nan")), table)
        states = self.newest(batch.inputs, self._input_vectors(vectors)).to(table.dtype)  # (ranked rows, D)
        if len(batch.ranked) < len(batch.users):
            all_states = states.new_full((len(batch.users), states.shape[1]), float("nan"))
            states = all_states.index_copy_(0, batch.ranked, states)
        return Scores(states, table)

    def score_and_list(self, batch: EvaluationBatch, k: int, excluded: tuple[Tensor, Tensor]) -> tuple[Scores, TopK]:
        """Return the scores of the rows of a batch, and their best items without the excluded pairs of row and item."""
        scores = self.scores(batch)
        with torch.autocast(scores.table.device.type, enabled=False):  # scores have the precision of the table
            return scores, top_k_items(scores.states, scores.table, k, *excluded)

    def freeze_vectors(self) -> None:
        """Replace vectors that are made of features by a table of them, for a model that is trained no more."""
        if isinstance(self.input_items, FeatureVectors):
            vectors = self.input_items.eval().table().detach()  # without dropout
            self.input_items = self.output_items = ItemEmbedding.from_pretrained(vectors)

    def _input_vectors(self, vectors: Tensor) -> Tensor | None:
        """Return the output vectors if they are the input's too, else None."""
        return vectors if self.input_items is self.output_items else None

    def _dropped(self, vectors: Tensor) -> Tensor:
        return dropout(vectors, self.item_rate if self.training else 0.0)

    def _embed(self, batch: PackedBatch, vectors: Tensor | None = None) -> Tensor:
        x = self._look_up(batch.items, vectors)  # (T, D)
        if self.training and self.token_rate:
            x = x * (torch.rand(x.shape[0], 1, device=x.device) >= self.token_rate)
        if self.pos_emb in (PosEmb.learned, PosEmb.sinusoidal):  # scaling and addition in one pass
            table = self.sinusoids if self.positions is None else self.positions.weight
            from_oldest = self.positions_from is PositionsFrom.oldest
            positions = batch.positions_from_oldest() if from_oldest else batch.positions
            x = torch.add(F.embedding(positions, table), x, alpha=self.scale)
        else:
            x = x * self.scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return dropout(x, self.rate if self.training else 0.0)

    def _look_up(self, items: Tensor, vectors: Tensor | None) -> Tensor:
        if self.mask is None:
            return self.input_items.rows(items - 1, vectors)
        is_mask = items == MASK
        # a row that the batch looks up anyway, so that no further row gets a gradient
        rows = torch.where(is_mask, items.max().clamp(min=1), items) - 1
        return torch.where(is_mask[:, None], self._dropped(self.mask), self.input_items.rows(rows, vectors))

    def layout(self, batch: PackedBatch) -> BatchLayout:
        """Return what the blocks need to know of the batch."""
        factors = None
        if self.pos_emb is PosEmb.rope:
            factors = torch.view_as_complex(self.rotations.index_select(0, batch.positions))
        # not len(items), which torch.export would fix to the example's length
        tokens, device = batch.items.shape[0], batch.items.device
        known = batch.offsets, tokens, device, batch.positions, self.maxlen, factors
        return BatchLayout(*known, batch.times, batch.query_times, batch.segments)


def _initialize(module: nn.Module, init: Init) -> None:
    """Initialize all matrices alike, and biases with zero (the authors' Glorot is xavier_uniform).

    `torch` leaves what torch has drawn: item vectors and positions N(0, 1), linear layers uniform.
    """
    if init is Init.torch:
        return
    if isinstance(module, (nn.Linear, nn.Embedding)):
        if init in (Init.normal, Init.normal_packed, Init.meta):
            nn.init.normal_(module.weight, std=0.02)
        elif init is Init.xavier_uniform:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.xavier_normal_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _initialize_as_packed(module: nn.Module) -> None:
    """Change a block's initial values to those of torch's MultiheadAttention, and other biases to nn.Linear's.

    MultiheadAttention initializes queries, keys and values as one (3D, D) matrix, which has half the variance; its
    biases are zero.
    """
    if isinstance(module, TransformerBlock):
        for projection in (module.query, module.key, module.value):
            projection.weight.data.mul_(sqrt(0.5))
        attention = (module.query, module.key, module.value, module.output)
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and layer not in attention and layer.bias is not None:
                _draw_bias(layer)
    if isinstance(module, (HSTUBlock, FuXiBlock)):
        _draw_bias(module.output)


def _initialize_attention_as_packed(module: nn.Module) -> None:
    """Draw a block's queries, keys and values as torch's MultiheadAttention does: uniformly, as one (3D, D) matrix."""
    if isinstance(module, TransformerBlock):
        for projection in (module.query, module.key, module.value):
            bound = sqrt(6 / (4 * projection.in_features))
            nn.init.uniform_(projection.weight, -bound, bound)


def _initialize_as_meta(module: nn.Module) -> None:
    """Change initial values to those of HSTU's and FuXi's authors, if an encoder's parts come before the encoder."""
    if isinstance(module, nn.Embedding):
        _draw_truncated(module, 0.02)
    if isinstance(module, (HSTUBlock, FuXiBlock)):
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and layer is not module.projection:
                nn.init.xavier_uniform_(layer.weight)
        _draw_bias(module.output)
    if isinstance(module, Encoder) and module.positions is not None:
        _draw_truncated(module.positions, 1 / sqrt(module.positions.embedding_dim))


def _draw_truncated(table: nn.Embedding, std: float) -> None:
    """Draw a table from a normal distribution, cut off at two standard deviations."""
    nn.init.trunc_normal_(table.weight, std=std, a=-2 * std, b=2 * std)


def _draw_bias(layer: nn.Linear) -> None:
    """Draw a bias as nn.Linear does."""
    nn.init.uniform_(layer.bias, -1 / sqrt(layer.in_features), 1 / sqrt(layer.in_features))


def _sinusoids(maxlen: int, dim: int) -> Tensor:
    """Return the sinusoidal positions (L, D) of Vaswani et al. 2017 (arXiv 1706.03762), 3.5."""
    angles = torch.arange(maxlen)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-log(10000.0) / dim))
    table = torch.zeros(maxlen, dim)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : dim // 2]
    return table


class SingleHistoryVector(nn.Module):
    """The vector of one history, whose dot product with an item's is the item's score: a module that export/ saves."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, history: Tensor, times: Tensor | None = None, query_time: Tensor | None = None) -> Tensor:
        """Return the vector (D,) of a history of at most `longest_history` item indices, the newest last.

        A model that reads times also gets that of each item (L,) and when the next one is asked for (1,), in seconds.
        """
        query_times = None
        if times is not None and query_time is not None:
            query_times = torch.cat([times, query_time])[1:]
        if self.encoder.mask is not None:
            history = F.pad(history, (0, 1), value=MASK)
        places = torch.arange(history.shape[0])
        # all tokens are one sequence, which needs no offsets
        positions, last = places.flip(0), places[-1:]
        batch = PackedBatch(history, positions, last, offsets=None, times=times, query_times=query_times)
        return self.encoder.newest(batch).squeeze(0)


class SingleHistoryScores(SingleHistoryVector):
    """The scores of all items after one history: a module that export/ saves."""

    def forward(self, history: Tensor, times: Tensor | None = None, query_time: Tensor | None = None) -> Tensor:
        """Return the scores (V,) after a history, which is given as to `SingleHistoryVector`."""
        return super().forward(history, times, query_time) @ self.encoder.item_table.T
