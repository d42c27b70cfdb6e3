"""Packed tokens ordered by step, as recurrent layers take them. B sequences, T tokens, L steps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Steps:
    """The tokens of all sequences by step, and within a step by the length of their sequences, longest first.

    So the sequences that have a further token are always the first ones, which is the order of torch's PackedSequence.
    """

    tokens: Tensor  # (tokens in sequences,) the token at each place
    places: Tensor  # (tokens in sequences,) the place of each token
    sizes: Tensor  # (L,) number of sequences with a token at this step, on the CPU
    num_tokens: int  # T, including those of no sequence

    @staticmethod
    def from_offsets(offsets: np.ndarray, num_tokens: int, device: torch.device) -> "Steps":
        """Order the tokens of sequences with these offsets (B + 1,)."""
        lengths = np.diff(offsets)
        order = np.argsort(-lengths, kind="stable")
        has_token = np.arange(lengths.max())[:, None] < lengths[order]  # (L, B)
        steps, ranks = has_token.nonzero()
        tokens = offsets[:-1][order][ranks] + steps
        places = np.empty_like(tokens)
        places[tokens] = np.arange(len(tokens))
        return Steps(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(places).to(device),
            torch.from_numpy(has_token.sum(1)),
            num_tokens,
        )

    def pack(self, x: Tensor) -> PackedSequence:
        """Return the tokens' rows (T, D) by step."""
        return PackedSequence(x.index_select(0, self.tokens), self.sizes)

    def unpack(self, x: PackedSequence) -> Tensor:
        """Return the rows by step as those of the tokens (T, D), zeros after the last sequence."""
        return F.pad(x.data.index_select(0, self.places), (0, 0, 0, self.num_tokens - len(self.places)))
