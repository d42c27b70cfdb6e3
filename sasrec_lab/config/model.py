"""Schema of the section `model` for encoders: their keys, and checks across them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from sasrec_lab.config import foreign
from sasrec_lab.config.checks import check_at_least, check_finite, typed_form
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.errors import InputError

_MOST_HEADS = 1024  # that a message suggests

# Choices; a user writes the name of a member.
BlockName = Enum("BlockName", ["transformer", "ligr", "gru", "hstu", "fuxi"])
PosEmb = Enum("PosEmb", ["learned", "sinusoidal", "rope", "relative", "none"])
PositionsFrom = Enum("PositionsFrom", ["newest", "oldest"])
Norm = Enum("Norm", ["sasrec", "pre", "post"])
Activation = Enum("Activation", ["relu", "gelu", "swiglu"])
Init = Enum("Init", ["xavier_normal", "xavier_uniform", "xavier_packed", "normal", "torch", "meta"])
TimeBias = Enum("TimeBias", ["none", "decay", "buckets"])
QueryTime = Enum("QueryTime", ["target", "last"])
ItemVectors = Enum("ItemVectors", ["ids", "features", "both"])
Similarity = Enum("Similarity", ["dot", "cosine"])

# Keys that a block does not have, or in one form only, with the value that they must have there
_FIXED: dict[BlockName | Foreign, dict[str, Any]] = {
    BlockName.gru: {
        "heads": 1,
        "norm": Norm.sasrec,
        "norm_eps": 1e-8,
        "residual": True,
        "ff_dim": None,
        "activation": Activation.relu,
        "output_projection": False,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
        "dropout_input": None,
    },
    BlockName.hstu: {
        "norm": Norm.pre,
        "residual": True,
        "ff_dim": None,
        "activation": Activation.relu,
        "output_projection": True,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
    },
    BlockName.fuxi: {
        "norm": Norm.pre,
        "norm_affine": False,
        "residual": True,
        "activation": Activation.swiglu,
        "output_projection": True,
        "pad_keys": False,
        "causal": True,
        "dropout_attention": None,
    },
}
_POINTWISE = BlockName.hstu, BlockName.fuxi  # their attention has no softmax
# Keys of these blocks, with the value that they must have for the others
_OF_POINTWISE: dict[str, Any] = {
    "position_bias": False,
    "norm_affine": True,
    "divisor": None,
    "qk_dim": None,
    "v_dim": None,
}


@dataclass
class ModelSection:
    """Section `model`. Each kind of model has a subclass with its keys; its file in conf/model/ names the schema."""


@dataclass
class ModelConfig(ModelSection):
    """Keys of `model` for an encoder: its architecture. A key with a default here is one that older runs lack."""

    if TYPE_CHECKING:
        block: BlockName | Foreign = BlockName.transformer
    else:
        block: Any = "transformer"
    blocks: int = MISSING
    heads: int = MISSING
    dim: int = MISSING
    maxlen: int = MISSING
    dropout: float = MISSING
    pos_emb: PosEmb = MISSING
    positions_from: PositionsFrom = PositionsFrom.newest
    causal: bool = True
    norm: Norm = MISSING
    norm_eps: float = MISSING
    final_norm: bool = MISSING
    final_norm_eps: float = MISSING
    residual: bool = MISSING
    ff_dim: Optional[int] = MISSING
    activation: Activation = MISSING
    output_projection: bool = MISSING
    scale_embeddings: bool = MISSING
    pad_keys: bool = MISSING
    share_items: bool = MISSING
    init: Init = MISSING
    # defaults for the records of older runs, which lack these keys
    head_transform: bool = False
    output_bias: bool = False
    similarity: Similarity = Similarity.dot
    temperature: float = 1.0
    items: ItemVectors = ItemVectors.ids
    id_dropout: float = 0.0
    time_bias: TimeBias = TimeBias.none
    query_time: QueryTime = QueryTime.target
    position_bias: bool = False
    norm_affine: bool = True
    divisor: Optional[float] = None
    qk_dim: Optional[int] = None
    v_dim: Optional[int] = None
    dropout_attention: Optional[float] = None
    dropout_input: Optional[float] = None
    dropout_items: float = 0.0
    token_dropout: float = 0.0
    embedding_norm: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of a block of the user's
    if TYPE_CHECKING:
        head: Optional[Foreign] = None
    else:
        head: Any = None
    head_options: dict[str, Any] = field(default_factory=dict)  # of a head of the user's

    def __post_init__(self) -> None:
        self.block = foreign.choose("model.block", self.block, BlockName, foreign.BLOCK, self.options)
        if isinstance(self.head, int):
            raise InputError(f"model.head={self.head} must be package.module:Name; did you mean model.heads?")
        if self.head is not None:
            self.head = foreign.foreign("model.head", self.head, foreign.HEAD, self.head_options)
        elif self.head_options:
            raise InputError(
                f"model.head_options has {', '.join(self.head_options)}, but only a head of your own has options; set"
                " model.head=package.module:Name, or remove them"
            )
        check_at_least("model.blocks", self.blocks, 0)
        check_at_least("model.heads", self.heads, 1)
        check_at_least("model.dim", self.dim, 1)
        check_at_least("model.maxlen", self.maxlen, 1)
        for key, eps in (("norm_eps", self.norm_eps), ("final_norm_eps", self.final_norm_eps)):
            check_finite(f"model.{key}", eps)
            if not eps > 0:
                raise InputError(f"model.{key}={eps} must be above 0")
        if self.pad_keys:
            self._check_pad_keys()
        if self.block is BlockName.ligr and self.norm is not Norm.pre:
            raise InputError(f"model.norm={self.norm.name} must be pre for model.block=ligr; set it to pre")
        self._check_block()
        if self.ff_dim is not None:
            check_at_least("model.ff_dim", self.ff_dim, 1)
        self._check_dropout()
        if self.dim % self.heads and None in (self.qk_dim, self.v_dim):
            fits = [str(heads) for heads in range(1, min(self.dim, _MOST_HEADS) + 1) if self.dim % heads == 0]
            widths = " or set model.qk_dim and model.v_dim" if self.block in _POINTWISE else ""
            heads = f"model.heads={self.heads}; use heads {', '.join(fits)}{widths}"
            raise InputError(f"model.dim={self.dim} is not a multiple of {heads}")
        check_finite("model.temperature", self.temperature)
        if not self.temperature > 0:
            raise InputError(f"model.temperature={self.temperature} must be above 0")
        self._check_positions()
        self._check_times()
        self._check_items()

    def _check_dropout(self) -> None:
        for key in ("dropout", "dropout_attention", "dropout_input", "dropout_items", "token_dropout"):
            rate = getattr(self, key)
            if rate is not None and not 0 <= rate < 1:
                raise InputError(f"model.{key}={rate} must be at least 0 and below 1")
        if self.dropout_items and not self.share_items:
            raise InputError(
                f"model.dropout_items={self.dropout_items} is one mask for inputs and outputs, but"
                " model.share_items=false has two tables; set it to 0, or model.share_items=true"
            )
        if self.token_dropout and not self.causal:
            raise InputError(
                f"model.token_dropout={self.token_dropout} would hide items next to those that objective=masked_items"
                " hides; set it to 0 for model.causal=false, or raise objective.mask_share"
            )

    def _check_items(self) -> None:
        if self.items is not ItemVectors.ids and not self.share_items:
            raise InputError(
                f"model.share_items=false does not go with model.items={self.items.name}, whose vectors are both input"
                " and output; set model.share_items=true"
            )
        if not 0 <= self.id_dropout < 1:
            raise InputError(f"model.id_dropout={self.id_dropout} must be at least 0 and below 1")
        if self.id_dropout and self.items is not ItemVectors.both:
            raise InputError(
                f"model.id_dropout={self.id_dropout} only applies to model.items=both, where features remain without"
                f" the id; set it to 0 for model.items={self.items.name}"
            )

    def _check_pad_keys(self) -> None:
        for key, refused in (("block=ligr", self.block is BlockName.ligr), ("causal=false", not self.causal)):
            if refused:
                raise InputError(f"model.pad_keys=true does not go with model.{key}; set model.pad_keys=false")
        if self.block is BlockName.transformer and self.norm is not Norm.sasrec:
            raise InputError(
                f"model.pad_keys=true requires model.norm=sasrec (as in RecTools), not {self.norm.name}; set"
                " model.pad_keys=false"
            )

    def _check_positions(self) -> None:
        if self.pos_emb in (PosEmb.rope, PosEmb.relative):
            if self.block is BlockName.gru:
                raise InputError(
                    f"model.pos_emb={self.pos_emb.name} is a part of attention, which model.block=gru does not have;"
                    " set it to none"
                )
            if self.block in _POINTWISE:
                raise InputError(
                    f"model.pos_emb={self.pos_emb.name} does not go with model.block={self.block.name}; set it to"
                    " learned, sinusoidal or none: the bias by distance is model.position_bias=true there"
                )
            if self.pad_keys:
                raise InputError(
                    f"model.pos_emb={self.pos_emb.name} does not go with model.pad_keys=true; set model.pad_keys=false,"
                    " or model.pos_emb=learned"
                )
        if self.pos_emb is PosEmb.rope and self.dim // self.heads % 2:
            sizes = f"model.dim={self.dim} / model.heads={self.heads}"
            raise InputError(f"model.pos_emb=rope rotates pairs of columns, so {sizes} must be even")
        if self.positions_from is PositionsFrom.oldest:
            if self.pos_emb not in (PosEmb.learned, PosEmb.sinusoidal):
                raise InputError(
                    "model.positions_from=oldest only applies to pos_emb=learned and sinusoidal; set it to newest for"
                    f" pos_emb={self.pos_emb.name}"
                )
            if self.pad_keys:
                raise InputError("model.positions_from=oldest requires model.pad_keys=false")

    def _check_block(self) -> None:
        if self.block is BlockName.gru and self.blocks < 1:
            raise InputError(f"model.blocks={self.blocks} must be at least 1 for model.block=gru")
        for key, value in _FIXED.get(self.block, {}).items():
            if (given := getattr(self, key)) != value:
                raise InputError(
                    f"model.{key}={typed_form(given)} does not apply to model.block={self.block.name}; set it to"
                    f" {typed_form(value)}"
                )
        if self.block in _POINTWISE:
            self._check_pointwise()
            return
        if isinstance(self.block, Foreign):  # which of the keys it uses is its own matter
            return
        for key, value in _OF_POINTWISE.items():
            if (given := getattr(self, key)) != value:
                raise InputError(
                    f"model.{key}={typed_form(given)} only applies to model.block=hstu and fuxi; set it to"
                    f" {typed_form(value)}" + (", or use model.pos_emb=relative" if key == "position_bias" else "")
                )
        if self.init is Init.meta:
            raise InputError("model.init=meta only applies to model.block=hstu and fuxi; set it to normal")

    def _check_pointwise(self) -> None:
        for key in ("qk_dim", "v_dim"):
            if (width := getattr(self, key)) is not None:
                check_at_least(f"model.{key}", width, 1)
        if self.divisor is not None:
            check_finite("model.divisor", self.divisor)
            if not self.divisor > 0:
                raise InputError(f"model.divisor={self.divisor} must be above 0; null: maxlen")

    def _check_times(self) -> None:
        bias, block = self.time_bias, self.block.name
        if bias is TimeBias.none:
            return  # query_time is of no account, so that a sweep may have models without times
        blocks = {
            TimeBias.decay: (BlockName.transformer, BlockName.ligr),
            TimeBias.buckets: _POINTWISE,
        }[bias]
        if self.block not in blocks and not isinstance(self.block, Foreign):
            others: dict[BlockName, str] = {BlockName.gru: "none"} | dict.fromkeys(_POINTWISE, "buckets or none")
            fitting = others.get(self.block, "decay or none")
            raise InputError(f"model.time_bias={bias.name} does not go with model.block={block}; use {fitting}")
        for key, value in (("causal", True), ("pad_keys", False)):
            if getattr(self, key) is not value:
                raise InputError(
                    f"model.time_bias={bias.name} requires model.{key}={typed_form(value)}; set that, or"
                    " model.time_bias=none"
                )

    @property
    def rate_attention(self) -> float:
        """Return the dropout rate on attention weights."""
        return self.dropout if self.dropout_attention is None else self.dropout_attention

    @property
    def rate_input(self) -> float:
        """Return the dropout rate on the input of the first block, which a GRU layer has itself."""
        if self.block is BlockName.gru:
            return 0.0
        return self.dropout if self.dropout_input is None else self.dropout_input

    @property
    def has_dropout(self) -> bool:
        """Return whether two passes over a batch differ, as far as is known of a block or a head of the user's.

        The mask of `dropout_items` is one for both.
        """
        in_blocks = max(self.dropout, self.rate_attention) if self.blocks else 0.0
        is_known = not isinstance(self.block, Foreign) and self.head is None
        return not is_known or max(in_blocks, self.rate_input, self.token_dropout) > 0

    @property
    def num_distances(self) -> int:
        """Return the number of distances from an item to one that it attends to."""
        return self.maxlen if self.causal else 2 * self.maxlen - 1

    @property
    def reads_times(self) -> bool:
        """Return whether the model reads when items were taken, and when the next one is asked for."""
        return self.time_bias is not TimeBias.none and self.blocks > 0

    @property
    def asked_at(self) -> Optional[QueryTime]:
        """Return the query time of the newest item in evaluation, or None for a model that reads no times."""
        return self.query_time if self.reads_times else None

    @property
    def has_softmax(self) -> bool:
        """Return whether the blocks weight items by a softmax of attention, as far as is known."""
        return self.block in (BlockName.transformer, BlockName.ligr)

    @property
    def head_widths(self) -> tuple[int, int]:
        """Return the width of queries and keys, and of gates and values, in a head of block=hstu and fuxi."""
        return self.qk_dim or self.dim // self.heads, self.v_dim or self.dim // self.heads

    @property
    def num_maps(self) -> int:
        """Return how many sums over the values a block has: FuXi has one for each bias that HSTU adds to its scores."""
        return 1 + (self.position_bias + self.reads_times if self.block is BlockName.fuxi else 0)

    @property
    def feed_forward_width(self) -> int:
        """Return the inner width of the feed-forward; unless it is set, a multiple of dim as in the model's source."""
        return self.ff_dim or self.dim * (4 if self.block is BlockName.ligr or not self.causal else 1)


if TYPE_CHECKING:
    AnyModel = ModelConfig  # of any kind; code that is not for encoders checks which one it has
else:
    AnyModel = ModelSection
