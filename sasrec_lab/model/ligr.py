"""The block of eSASRec: LiGR layers, over packed tokens. B sequences, T tokens, D dim."""

from torch import Tensor, nn

from sasrec_lab.config.model import ModelConfig
from sasrec_lab.model.transformer import TransformerBlock
from sasrec_lab.ops.layout import BatchLayout, pick


class LiGRBlock(TransformerBlock):
    """A pre-norm transformer block with a gate on each residual branch: x + sigmoid(G x) * branch(LayerNorm(x)).

    The gate reads the state before its branch, without the norm. Attention's output has dropout, too, if
    `model.dropout_output` is null. Source: RecTools' LiGRLayer, the block of eSASRec (arXiv 2508.06450), after LiGR
    (arXiv 2502.03417).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.output_rate = cfg.dropout if cfg.dropout_output is None else cfg.dropout_output
        self.attention_gate = nn.Linear(cfg.dim, cfg.dim)
        self.feed_forward_gate = nn.Linear(cfg.dim, cfg.dim)
        self.has_kernel = False

    def transform(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return what `forward` returns, layer by layer."""
        normed, at = self.attention_norm(x), pick(pick(x, newest), rows)
        attended = self._attend(pick(normed, newest), normed, layout, newest, rows)
        at = self._add(at, self.attention_gate(at).sigmoid() * attended)
        return self._add(at, self.feed_forward_gate(at).sigmoid() * self.feed_forward(self.feed_forward_norm(at)))
