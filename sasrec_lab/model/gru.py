"""The block of GRU4Rec: a recurrent layer over packed tokens. B sequences, T tokens, D dim, L maxlen."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.config.model import ModelConfig
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, pick
from sasrec_lab.ops.recurrence import run_gru


class GRULayer(nn.Module):
    """torch's GRU, from dim to dim, with dropout on its input.

    Source: Hidasi et al. 2016 (arXiv 1511.06939), in the form of "Turning Dross Into Gold Loss" (arXiv 2309.07602):
    trained on whole sequences, one item table for input and output, no layer between states and items.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.rate, self.maxlen = cfg.dropout, cfg.maxlen
        self.gru = nn.GRU(cfg.dim, cfg.dim)

    def forward(
        self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Return the states (T, D) after this layer for those before it, or only those of the given tokens.

        Every state depends on all earlier ones, so this saves nothing.
        """
        x = dropout(x, self.rate if self.training else 0.0)
        if torch.compiler.is_exporting():
            states = self._single_sequence(x)
        else:
            states = run_gru(self.gru, x, layout.steps)
        return pick(states, rows if newest is None else newest)

    def _single_sequence(self, x: Tensor) -> Tensor:
        """Return the states of a single sequence's tokens, for an export.

        An exported GRU has a fixed number of steps, so it takes L of them: those after the sequence do not change what
        came before. The function is called instead of the module, whose list of weights an export cannot contain.
        """
        steps = F.pad(x, (0, 0, 0, self.maxlen - x.shape[0]))[:, None]  # (L, 1, D)
        start = x.new_zeros(1, 1, x.shape[1])
        states, _ = torch.gru(steps, start, list(self.gru.parameters()), True, 1, 0.0, False, False, False)
        return states[: x.shape[0], 0]
