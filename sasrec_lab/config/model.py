"""Schema of the section `model` for encoders: their keys, and what follows from these."""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import MISSING

from sasrec_lab.config import foreign
from sasrec_lab.config.checks import check_above_0, check_at_least, check_rate
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.errors import InputError

# Choices; a user writes the name of a member.
BlockName = Enum("BlockName", ["transformer", "ligr", "gru", "hstu", "fuxi"])
PosEmb = Enum("PosEmb", ["learned", "sinusoidal", "rope", "relative", "none"])
PositionsFrom = Enum("PositionsFrom", ["newest", "oldest"])
Norm = Enum("Norm", ["sasrec", "pre", "post"])
Activation = Enum("Activation", ["relu", "gelu", "swiglu"])
Init = Enum("Init", ["xavier_normal", "xavier_uniform", "xavier_packed", "normal", "normal_packed", "torch", "meta"])
TimeBias = Enum("TimeBias", ["none", "decay", "buckets"])
QueryTime = Enum("QueryTime", ["target", "last"])
ItemVectors = Enum("ItemVectors", ["ids", "features", "both"])
Similarity = Enum("Similarity", ["dot", "cosine"])

POINTWISE = BlockName.hstu, BlockName.fuxi  # their attention has no softmax


@dataclass
class ModelSection:
    """Section `model`. Each kind of model has a subclass with its keys; its file in conf/model/ names the schema."""


@dataclass
class ModelConfig(ModelSection):
    """Keys of `model` for an encoder: its architecture. A key with a default here is one that older runs lack.

    Each value is checked here, and the keys that must go together by `model_rules.check_model`.
    """

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
    dropout_output: Optional[float] = None
    dropout_inner: Optional[float] = None
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
        for key in ("heads", "dim", "maxlen"):
            check_at_least(f"model.{key}", getattr(self, key), 1)
        for key in ("norm_eps", "final_norm_eps", "temperature"):
            check_above_0(f"model.{key}", getattr(self, key))
        for key in ("dropout", "dropout_items", "id_dropout", "token_dropout"):
            check_rate(f"model.{key}", getattr(self, key))

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
    def rate_inner(self) -> float:
        """Return the dropout rate inside the feed-forward, on what its second layer reads."""
        return self.dropout if self.dropout_inner is None else self.dropout_inner

    @property
    def has_dropout(self) -> bool:
        """Return whether two passes over a batch differ, as far as is known of a block or a head of the user's.

        The mask of `dropout_items` is one for both.
        """
        in_blocks = (
            max(self.dropout, self.rate_attention, self.rate_inner, self.dropout_output or 0.0) if self.blocks else 0.0
        )
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
