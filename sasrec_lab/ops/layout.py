"""The layout of a packed batch: where each sequence is. B sequences, T tokens, D dim, H heads."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.buckets import Buckets
from sasrec_lab.ops.library import ROW_MULTIPLE, check_shape
from sasrec_lab.ops.recurrence import Steps
from sasrec_lab.ops.time_buckets import pair_buckets
from sasrec_lab.ops.time_decay import pair_logarithms


@dataclass(frozen=True)
class Segments:
    """A packed batch divided into segments, as many for every batch of a shape: its sequences, then dummies.

    They are on the device: a step that needs nothing else of the layout can be repeated for another batch.
    """

    offsets: Tensor  # (S + 1,) int32 from 0 to T; no segment is empty
    sequences: int  # B: the first segments
    longest: int  # at least the number of tokens of the longest segment

    def is_real(self, tokens: Tensor) -> Tensor:
        """Return whether each of some tokens, given by their indices, belongs to a sequence."""
        return tokens < self.offsets[self.sequences]

    def places(self, tokens: Tensor) -> Tensor:
        """Return how many tokens of the same sequence are before each of these int32 indices; 0 for dummies."""
        segments = torch.searchsorted(self.offsets, tokens, right=True) - 1
        return torch.where(self.is_real(tokens), tokens - self.offsets[segments], 0)


@dataclass(frozen=True)
class BatchLayout:
    """Layout of a packed batch for attention and recurrence, computed once and shared by all blocks.

    Sequence s has the tokens offsets[s] to offsets[s + 1] - 1. In an export, offsets are None and all tokens are one
    sequence; in a captured step they are None, because only `segments` are those of the batch.
    """

    offsets: np.ndarray | None  # (B + 1,) int64
    num_tokens: int  # T, including dummies after the last sequence
    device: torch.device  # of the tokens
    positions: Tensor | None = None  # (T,) counted from each sequence's newest token; only for `padded_rows`
    maxlen: int | None = None  # only for `padded_rows`
    rotations: Tensor | None = None  # (T, D / H / 2) of the tokens, by ops/rotary.py; None if not rotary
    times: Tensor | None = None  # (T,) int64 seconds; those of dummies are of no account
    query_times: Tensor | None = None  # (T,) int64 seconds, at which each token's prediction is asked for
    segments: Segments | None = None  # only for captured steps

    def __post_init__(self) -> None:
        offsets = self.offsets
        if offsets is not None and (offsets[0] != 0 or offsets[-1] > self.num_tokens or (np.diff(offsets) < 0).any()):
            raise ValueError(f"offsets must rise from 0 to at most the {self.num_tokens} tokens")
        for name, x in (("times", self.times), ("query_times", self.query_times)):
            if x is not None and offsets is not None:
                check_shape(name, x, self.num_tokens)

    @property
    def _known_offsets(self) -> np.ndarray:
        assert self.offsets is not None, "exports and captured steps have no offsets"
        return self.offsets

    @cached_property
    def offsets_tensor(self) -> Tensor:
        """Return the offsets (B + 1,) as a tensor on the CPU."""
        return torch.from_numpy(self._known_offsets)

    @cached_property
    def num_sequences(self) -> int:
        """Return B."""
        return len(self._known_offsets) - 1

    @cached_property
    def num_real_tokens(self) -> int:
        """Return the number of tokens that belong to a sequence."""
        return int(self._known_offsets[-1])

    @cached_property
    def longest(self) -> int:
        """Return the number of tokens of the longest sequence, or with `segments` at least that."""
        if self.segments is not None:
            return self.segments.longest
        return int(np.diff(self._known_offsets).max())

    @cached_property
    def packed_offsets(self) -> Tensor:
        """Return the offsets (S + 1,) int32, on the device, of S sequences that have all tokens; none is empty.

        Dummies after the last sequence are sequences of their own, not longer than the longest one.
        """
        if self.segments is not None:
            return self.segments.offsets
        real, longest = self.num_real_tokens, max(self.longest, 1)
        dummies = np.arange(real, self.num_tokens, longest)
        ends = np.unique(np.concatenate([self._known_offsets, dummies, [self.num_tokens]]))
        return torch.from_numpy(ends.astype(np.int32)).to(self.device, non_blocking=True)

    @property
    def has_dummies(self) -> bool:
        """Return whether there are tokens of no sequence."""
        return self.segments is not None or self.num_real_tokens < self.num_tokens

    @cached_property
    def is_real(self) -> Tensor:
        """Return whether each token belongs to a sequence, (T, 1), on the device."""
        tokens = torch.arange(self.num_tokens, device=self.device)[:, None]
        return tokens < self.num_real_tokens if self.segments is None else self.segments.is_real(tokens)

    @cached_property
    def buckets(self) -> Buckets:
        """Return the sequences in buckets of similar length."""
        buckets = Buckets.from_offsets(self._known_offsets, self.num_tokens, self.device)
        if self.times is None or self.query_times is None:
            return buckets
        return buckets.with_times(self.times, self.query_times)

    @property
    def _known_times(self) -> tuple[Tensor, Tensor]:
        assert self.times is not None, "the layout has no times"
        assert self.query_times is not None, "the layout has no query times"
        return self.times, self.query_times

    def gaps(self, queries: slice, keys: slice) -> Tensor:
        """Return the seconds (queries, keys) from the keys' times to the query times, of these tokens."""
        times, query_times = self._known_times
        return query_times[queries, None] - times[keys]

    @cached_property
    def newest_gaps(self) -> Tensor:
        """Return the seconds (T,) from each token to its sequence's last query time, and zeros for dummies."""
        times, query_times = self._known_times
        if self.offsets is None:
            return query_times[-1] - times
        newest = np.repeat(self.offsets[1:] - 1, np.diff(self.offsets))  # of each token's sequence
        gaps = query_times[torch.from_numpy(newest).to(self.device)] - times[: len(newest)]
        return F.pad(gaps, (0, self.num_tokens - len(newest)))

    @cached_property
    def pair_buckets(self) -> Tensor:
        """Return the time buckets of all pairs of tokens, for the kernel of pointwise attention."""
        return pair_buckets(*self._known_times, self.offsets_tensor, self._num_pairs)

    @cached_property
    def pair_logarithms(self) -> Tensor:
        """Return the logarithms of the days between all pairs of tokens, for the kernel of attention."""
        return pair_logarithms(*self._known_times, self.offsets_tensor, self._num_pairs)

    @property
    def _num_pairs(self) -> int:
        """Return the number of pairs in rows that are padded as in cpp/gaps.h."""
        lengths = np.diff(self._known_offsets)
        return int((lengths * (lengths + -lengths % ROW_MULTIPLE)).sum())

    @cached_property
    def steps(self) -> Steps:
        """Return the tokens ordered by step, for recurrent layers."""
        return Steps.from_offsets(self._known_offsets, self.num_tokens, self.device)

    @cached_property
    def padded_rows(self) -> "PaddedRows":
        """Return the sequences in left-padded rows of `maxlen` cells."""
        return PaddedRows(self)


class PaddedRows:
    """The tokens in left-padded rows: `maxlen` cells for each sequence, its newest token in the last one.

    For `pad_keys`. In RecTools a block's input is zero in the padding, so that the padding's keys are the bias of the
    keys and its values that of the values. C = B maxlen cells.
    """

    def __init__(self, layout: BatchLayout):
        maxlen, positions = layout.maxlen, layout.positions
        assert maxlen is not None
        assert positions is not None
        if torch.compiler.is_exporting():  # one sequence
            self.cells, self.num_dummies = maxlen - 1 - positions, 0
            self.layout = BatchLayout(None, maxlen, layout.device)
            return
        every_end, lengths = np.arange(1, layout.num_sequences + 1) * maxlen, np.diff(layout._known_offsets)  # (B,)
        ends = torch.from_numpy(np.repeat(every_end, lengths)).to(layout.device)
        self.cells = ends - 1 - positions[: len(ends)]  # (tokens in sequences,)
        self.num_dummies = layout.num_tokens - len(ends)
        offsets = np.arange(layout.num_sequences + 1) * maxlen  # every sequence has `maxlen` tokens
        self.layout = BatchLayout(offsets, int(offsets[-1]), layout.device)

    def fill(self, x: Tensor, pad: Tensor) -> Tensor:
        """Return the cells (C, D) of x (T, D), with `pad` (D,) in the padding."""
        cells = pad.to(x.dtype).expand(self.layout.num_tokens, -1)
        return cells.index_copy(0, self.cells, x[: self.cells.shape[0]])

    def take(self, cells: Tensor) -> Tensor:
        """Return the tokens' rows (T, D) of the cells (C, D), zeros after the last sequence."""
        return F.pad(cells.index_select(0, self.cells), (0, 0, 0, self.num_dummies))


def pick(states: Tensor, rows: Tensor | None) -> Tensor:
    """Return the states (T, D), or those of some tokens (R, D)."""
    return states if rows is None else states.index_select(0, rows)
