"""Packed batches: the tokens of several users one after the other, without padding. B sequences, T tokens, N negatives.

Everything in the model is per token; only attention has to know where a sequence begins.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.data.holdout import Holdout
from sasrec_lab.ops.backend import round_up_size


@dataclass(frozen=True)
class PackedBatch:
    """Sequences in one row of tokens. A few dummy tokens at the end round T up to one of few sizes, because the matrix
    library builds a kernel for each new shape; no sequence holds them and no loss sees them."""

    items: Tensor  # (T,) int64, 1..num_items
    positions: Tensor  # (T,) int64, counted from the sequence's newest item, which is 0
    last: Tensor  # (B,) token of each sequence's newest item
    offsets: np.ndarray  # (B + 1,) int64, always on the CPU: sequence s has the tokens offsets[s] to offsets[s + 1] - 1
    targets: Tensor | None = None  # (T,) int64: the next item, 0 for none
    weights: Tensor | None = None  # (T,) float32: of the target's interaction
    negatives: Tensor | None = None  # (T, N) int64; or (N,), shared by all tokens and in order
    log_weights: Tensor | None = None  # (N,) float32: of shared negatives, what to add to their logits

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class EvaluationBatch:
    """Users to rank the catalogue for."""

    inputs: PackedBatch | None  # None where no user of the batch has an item that the model knows
    ranked: Tensor  # (B,) which of the users the inputs belong to, in order: those with a known item
    users: Tensor  # (U,) int64, internal user numbers
    targets: Tensor  # (U,) int64, 0 for an item outside the catalogue
    seen_rows: Tensor  # (S,) int64, in order: which user of the batch ...
    seen_items: Tensor  # (S,) int64: ... has had which item before the target, each pair once
    candidates: Tensor | None = None  # (U, N) int64: sampled items to rank the target among

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EvaluationBatch":
        return _moved(self, device, non_blocking)


def pack(starts: np.ndarray, ends: np.ndarray, items: np.ndarray) -> tuple[PackedBatch, np.ndarray]:
    """Pack items[start:end] of each sequence, none empty; also gives the place in `items` of each real token."""
    lengths = ends - starts  # (B,)
    offsets = np.append(0, np.cumsum(lengths))
    tokens = offsets[-1]
    places = np.arange(tokens) + np.repeat(starts - offsets[:-1], lengths)  # (T,) in `items`
    in_all = round_up_size(tokens)
    numbers = np.empty(in_all, dtype=np.int64)
    numbers[:tokens] = items[places]
    numbers[tokens:] = numbers[tokens - 1]  # no row of the table but the batch's
    positions = np.zeros(in_all, dtype=np.int64)
    np.subtract(np.repeat(ends - 1, lengths), places, out=positions[:tokens])
    batch = PackedBatch(
        items=torch.from_numpy(numbers),
        positions=torch.from_numpy(positions),
        last=_tensor(offsets[1:] - 1),
        offsets=offsets,
    )
    return batch, places


def training_batch(
    holdout: Holdout, windows: np.ndarray, negatives: np.ndarray | None = None, log_weights: np.ndarray | None = None
) -> PackedBatch:
    """The windows' items but the last as inputs, and behind each its next item as target."""
    batch, places = pack(holdout.window_starts[windows], holdout.window_ends[windows] - 1, holdout.items)
    dummies = len(batch.items) - len(places)
    return replace(
        batch,
        targets=_tensor(np.pad(holdout.items[places + 1], (0, dummies))),
        weights=None
        if holdout.weights is None
        else torch.from_numpy(np.pad(holdout.weights[places + 1], (0, dummies)).astype(np.float32)),
        negatives=None
        if negatives is None
        else _tensor(negatives if negatives.ndim == 1 else np.pad(negatives, ((0, dummies), (0, 0)), mode="edge")),
        log_weights=None if log_weights is None else torch.from_numpy(log_weights.astype(np.float32)),
    )


def evaluation_batch(
    holdout: Holdout, rows: np.ndarray, stage: str, maxlen: int, candidates: np.ndarray | None
) -> EvaluationBatch:
    """The `maxlen` newest known items of the held-out users number `rows` as inputs, without a shift.

    `stage` is "val" or "test"; the test reads the validation item too.
    """
    users = holdout.users[rows]
    ends = (holdout.train_ends if stage == "val" else holdout.val_ends)[users]
    starts = holdout.starts[users]
    targets = (holdout.val_targets if stage == "val" else holdout.test_targets)[rows]
    ranked = np.flatnonzero(ends > starts)
    lengths = ends - starts
    seen_rows = np.repeat(np.arange(len(users)), lengths)
    seen_items = holdout.items[np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())]
    if holdout.repeats:  # a pair counts once, however often it occurred
        pairs = np.unique(seen_rows * (holdout.num_items + 1) + seen_items)
        seen_rows, seen_items = np.divmod(pairs, holdout.num_items + 1)
    inputs = None
    if len(ranked):
        newest = np.maximum(starts[ranked], ends[ranked] - maxlen)
        inputs, _ = pack(newest, ends[ranked], holdout.items)
    return EvaluationBatch(
        inputs=inputs,
        ranked=_tensor(ranked),
        users=_tensor(users),
        targets=_tensor(targets),
        seen_rows=_tensor(seen_rows),
        seen_items=_tensor(seen_items),
        candidates=None if candidates is None else _tensor(candidates),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _moved(batch, device: torch.device | str, non_blocking: bool):
    """The same batch with every tensor in it on `device`."""
    there = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, (Tensor, PackedBatch)):
            there[field.name] = value.to(device, non_blocking=non_blocking)
    return replace(batch, **there)
