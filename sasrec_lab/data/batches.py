"""Packed batches: the tokens of several users one after the other, without padding.

Everything in the model is per token; only attention needs to know where a sequence begins. B sequences, T tokens, R
labels, N negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.training import ObjectiveConfig
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import concatenate_ranges
from sasrec_lab.ops.backend import round_up_size
from sasrec_lab.ops.layout import Segments

MASK = 0  # in the place of an item in a packed batch: a model that predicts masked items has a vector for it

_Batch = TypeVar("_Batch", bound="PackedBatch | Labels | Negatives | TrainingBatch | EvaluationBatch | Segments")


@dataclass(frozen=True)
class PackedBatch:
    """Sequences in one row of tokens, with a few dummy tokens at the end.

    The dummies round T up to one of few sizes, because the matrix library builds a kernel for each new shape. They
    belong to no sequence and have no target, so neither attention nor a loss sees them.
    """

    items: Tensor  # (T,) int64, 1..num_items, or MASK
    positions: Tensor  # (T,) int64, counted from the sequence's newest item, which is 0
    last: Tensor  # (B,) token of each sequence's newest item, or the mask behind it
    offsets: np.ndarray | None  # (B + 1,) int64, always on the CPU: sequence s has the tokens offsets[s] to
    # offsets[s + 1] - 1; None in an export, where all tokens are one sequence, and in a captured step
    segments: Segments | None = None  # the same on the device, for captured steps
    times: Tensor | None = None  # (T,) int64 seconds since 1970, if the model reads times: of each item, ...
    query_times: Tensor | None = None  # (T,) ... and when the one after it is asked for

    def positions_from_oldest(self) -> Tensor:
        """Return the positions (T,) counted from the sequence's oldest item in the batch, which is 0."""
        if self.segments is not None:
            tokens = torch.arange(len(self.items), dtype=torch.int32, device=self.items.device)
            return self.segments.places(tokens).long()
        if self.offsets is None:
            return self.last - self.positions
        places = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        dummies = len(self.positions) - len(places)
        on_cpu = torch.from_numpy(np.pad(places, (0, dummies)))
        return on_cpu.to(self.positions.device, non_blocking=self.positions.is_cuda)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on `device`; Lightning calls this."""
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class Labels:
    """The items that states are to predict, with a few labels without a target at the end, as dummy tokens have."""

    targets: Tensor  # (R,) int64, 0 for none
    counts: np.ndarray  # (B,) int64, always on the CPU: labels of each sequence, one sequence after the other
    rows: Tensor | None = None  # (R,) token whose state predicts each target; None: token i predicts target i
    weights: Tensor | None = None  # (R,) float32: weight of the target's interaction
    excluded: Tensor | None = None  # (B, M) int64, 0 for none: items of a sequence that count as a target only

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the labels on `device`."""
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class Negatives:
    """Items to compare with the targets."""

    items: (
        Tensor  # (R, N) int64, each label's own; or (B, N), of each sequence's labels, with 0 for none at the end; or
    )
    # (N,), shared by all labels, in ascending order
    log_weights: Tensor | None = None  # (N,) float32: what to add to the logits of shared negatives

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the negatives on `device`."""
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class TrainingBatch:
    """Sequences, what their states are to predict, and the negatives that the loss asked for."""

    inputs: PackedBatch
    labels: Labels
    negatives: Negatives | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on `device`; Lightning calls this."""
        return _moved(self, device, non_blocking)

    def pin_memory(self) -> Self:
        """Return the batch in memory that a GPU copies from while the program continues; torch's loader calls this."""
        return mapped(self, Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, in the same order for every batch."""
        found: list[Tensor] = []

        def add(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        mapped(self, add)
        return found


class Objective(Protocol):
    """A way to make labels of a window, and to ask the trained model for the item after a history (objectives.py)."""

    def __init__(self, cfg: ObjectiveConfig, model: ModelConfig): ...

    def training(self, holdout: Holdout, windows: np.ndarray, rng: np.random.Generator) -> tuple[PackedBatch, Labels]:
        """Return inputs and labels of training windows, given by their indices."""

    def inference(
        self,
        items: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        times: np.ndarray | None = None,
        query_times: np.ndarray | None = None,
    ) -> PackedBatch:
        """Return inputs whose newest states predict the item after each history items[start:end], none empty.

        For a model that reads times, `times` (N,) are those of the items, and `query_times` (B,) when the item after
        each history is asked for; without these it is asked for at the time of the newest item.
        """

    def count_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many tokens `inference` packs for a history of each length."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows to rank the catalogue for: U rows with G targets, at least one per row."""

    inputs: PackedBatch | None  # None if no row of the batch has an item that the model knows
    ranked: Tensor  # (B,) index in the batch of each row of `inputs`, ascending: those with a known item
    rows: Tensor  # (U,) int64, index among the stage's rows
    users: Tensor  # (U,) int64, user indices
    target_rows: Tensor  # (G,) int64, ascending: index in the batch of a row ...
    targets: Tensor  # (G,) int64: ... that has this target, 0 for an item outside the catalogue
    seen_rows: Tensor  # (S,) int64, ascending: index in the batch of a row ...
    seen_items: Tensor  # (S,) int64: ... whose user has seen this item before the target, each pair once
    candidates: Tensor | None = None  # (U, N) int64: sampled items to rank the target among

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on `device`; Lightning calls this."""
        return _moved(self, device, non_blocking)


def pack(starts: np.ndarray, ends: np.ndarray, items: np.ndarray) -> tuple[PackedBatch, np.ndarray]:
    """Pack items[start:end] of each sequence, none empty; return also each real token's place in `items`."""
    lengths = ends - starts  # (B,)
    offsets = np.append(0, np.cumsum(lengths))
    tokens = offsets[-1]
    places = concatenate_ranges(starts, ends)  # (tokens,) in `items`
    size = round_up_size(tokens)
    indices = np.empty(size, dtype=np.int64)
    indices[:tokens] = items[places]
    indices[tokens:] = indices[tokens - 1]  # dummies repeat the last item, so they touch no further table row
    positions = np.zeros(size, dtype=np.int64)
    np.subtract(np.repeat(ends - 1, lengths), places, out=positions[:tokens])
    batch = PackedBatch(
        items=torch.from_numpy(indices),
        positions=torch.from_numpy(positions),
        last=as_tensor(offsets[1:] - 1),
        offsets=offsets,
    )
    return batch, places


def in_segments(inputs: PackedBatch, labels: Labels, maxlen: int) -> tuple[PackedBatch, Labels]:
    """Return inputs and labels with `segments`, whose number follows from B and T, and with dummies for them.

    Sequences have at most `maxlen` tokens, and none is empty. The dummies are divided evenly into as many segments as
    the most dummies of such a batch need, so there are a few more of them than segments.
    """
    assert inputs.offsets is not None
    offsets, size = inputs.offsets, len(inputs.items)
    tokens, longest = int(offsets[-1]), max(maxlen, 2)
    while size - tokens < _dummy_segments(size, longest):
        size = round_up_size(size + 1)
    count, dummies = _dummy_segments(size, longest), size - tokens
    ends = tokens + np.arange(1, count + 1) * dummies // count
    segments = torch.from_numpy(np.append(offsets, ends).astype(np.int32))
    more = size - len(inputs.items)
    inputs = replace(
        inputs,
        items=torch.cat([inputs.items, inputs.items[-1:].expand(more)]),
        positions=F.pad(inputs.positions, (0, more)),
        segments=Segments(segments, len(offsets) - 1, longest),
    )
    if labels.rows is None:  # token i predicts target i
        weights = None if labels.weights is None else F.pad(labels.weights, (0, more))
        labels = replace(labels, targets=F.pad(labels.targets, (0, more)), weights=weights)
    return inputs, labels


def _dummy_segments(size: int, longest: int) -> int:
    """Return how many segments of at most `longest` tokens hold all dummies of a batch of `size` tokens.

    Before `in_segments` there are fewer dummies than sizes are apart, an eighth of the power of two below; it adds as
    many at most.
    """
    apart = max(1, 2 ** (size.bit_length() - 1) // 8)
    return -(-2 * apart // longest)


def with_times(batch: PackedBatch, times: np.ndarray, query_times: np.ndarray) -> PackedBatch:
    """Return the batch with the times of its real tokens; dummies repeat those of the last one."""
    dummies = (0, len(batch.items) - len(times))
    own, asked = (as_tensor(np.pad(values, dummies, mode="edge")) for values in (times, query_times))
    return replace(batch, times=own, query_times=asked)


def evaluation_batch(
    holdout: Holdout, rows: np.ndarray, stage: str, objective: Objective, candidates: np.ndarray | None
) -> EvaluationBatch:
    """Pack the newest known items of some rows of "val" or "test" to predict from, with what ranking needs."""
    stage_rows = holdout.rows(stage)
    starts, ends = stage_rows.starts[rows], stage_rows.ends[rows]
    targets, target_rows = stage_rows.targets_of(rows)
    ranked = np.flatnonzero(ends > starts)
    seen_rows, seen_items = _seen(holdout, starts, ends)
    inputs = None
    if len(ranked):
        asked = None if stage_rows.query_times is None else stage_rows.query_times[rows][ranked]
        inputs = objective.inference(holdout.items, starts[ranked], ends[ranked], holdout.times, asked)
    return EvaluationBatch(
        inputs=inputs,
        ranked=as_tensor(ranked),
        rows=as_tensor(rows),
        users=as_tensor(stage_rows.users[rows]),
        target_rows=as_tensor(target_rows),
        targets=as_tensor(targets),
        seen_rows=as_tensor(seen_rows),
        seen_items=as_tensor(seen_items),
        candidates=None if candidates is None else as_tensor(candidates),
    )


def _seen(holdout: Holdout, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and item of each item in items[start:end] of the rows, ordered by row, each pair once."""
    rows = np.repeat(np.arange(len(starts)), ends - starts)
    items = holdout.items[concatenate_ranges(starts, ends)]
    if holdout.has_repeats:
        pairs = np.unique(rows * (holdout.num_items + 1) + items)
        rows, items = np.divmod(pairs, holdout.num_items + 1)
    return rows, items


def as_tensor(array: np.ndarray) -> Tensor:
    """Return integers as an int64 tensor, which shares their memory if it can."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def mapped(batch: _Batch, function: Callable[[Tensor], Tensor]) -> _Batch:
    """Return the same batch with every tensor in it replaced by the function of it."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, (PackedBatch, Labels, Negatives, Segments)):
            changed[field.name] = mapped(value, function)
    return replace(batch, **changed)


def _moved(batch: _Batch, device: torch.device | str, non_blocking: bool) -> _Batch:
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))
