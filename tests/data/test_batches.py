"""Packed batches: sizes, packing, and evaluation batches against a loop."""

from dataclasses import fields, is_dataclass
from itertools import accumulate

import numpy as np
import torch
from any_users import ANY_USERS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import holdout_of, next_item, training_batch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.data.batches import (
    EvaluationBatch,
    Labels,
    Negatives,
    PackedBatch,
    TrainingBatch,
    evaluation_batch,
    in_segments,
    pack,
)
from sasrec_lab.ops.backend import round_up_size

few = settings(max_examples=40, deadline=None, derandomize=True)


def listed(batch: PackedBatch | EvaluationBatch) -> dict:
    """Return the tensors other than the inputs, as lists."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}


# Sizes


def test_rounded_sizes_up_to_64():
    assert sorted({round_up_size(n) for n in range(65)}) == [
        *range(17), 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64,
    ]  # fmt: skip


def test_sizes_are_rounded_up_by_less_than_an_eighth():
    sizes = [round_up_size(n) for n in range(5000)]
    assert all(n <= size and 8 * (size - n) < max(n, 1) for n, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert all(round_up_size(size) == size for size in sizes)
    assert all(sum(n <= size < 2 * n for size in set(sizes)) <= 8 for n in range(1, 2500))


# Packing

ITEMS = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19])


def test_three_sequences_in_one_row_of_tokens():
    batch, places = pack(np.array([4, 0, 8]), np.array([6, 3, 9]), ITEMS)
    assert listed(batch) == {
        "items": [15, 16, 11, 12, 13, 19],
        "positions": [1, 0, 2, 1, 0, 0],
        "last": [1, 4, 5],
    }
    assert batch.offsets.tolist() == [0, 2, 5, 6]
    assert places.tolist() == [4, 5, 0, 1, 2, 8]
    assert all(tensor.dtype == torch.int64 for tensor in (batch.items, batch.positions, batch.last))


def test_dummy_tokens_round_the_size_and_are_in_no_sequence():
    holdout = holdout_of([list(range(1, 19)), list(range(1, 7))], maxlen=20, weights=[[2.0] * 18, [3.0] * 6])
    negatives = np.arange(2, 68).reshape(33, 2)
    batch = training_batch(holdout, np.array([1, 1, 0, 1, 1, 1, 1]), negatives)  # 15 + 6 * 3 tokens
    assert len(batch.inputs.items) == round_up_size(33) == 36
    assert batch.inputs.items[33:].tolist() == 3 * batch.inputs.items[32:33].tolist()
    assert batch.inputs.positions[33:].tolist() == [0, 0, 0]
    assert batch.labels.targets[33:].tolist() == [0, 0, 0]
    assert batch.labels.weights[33:].tolist() == [0, 0, 0]
    assert batch.negatives.items[33:].tolist() == [[66, 67]] * 3
    assert batch.labels.targets[:33].min() > 0
    assert batch.negatives.items[:33].tolist() == negatives.tolist()
    assert batch.inputs.offsets[-1] == 33


@few
@given(
    ANY_USERS,
    st.sampled_from(Windows),
    st.integers(1, 8),
    st.integers(1, 30),
    st.sampled_from([None, 1, 3]),
)
def test_a_training_batch_is_its_windows(users, windows, maxlen, size, count):
    weights = [[100 * user + place for place in range(len(items))] for user, items in enumerate(users)]
    holdout = holdout_of(users, maxlen=maxlen, windows=windows, weights=weights)
    chosen = np.random.default_rng(size).integers(0, len(holdout.window_users), size)
    spans = [range(holdout.window_starts[window], holdout.window_ends[window]) for window in chosen]
    tokens = [place for span in spans for place in span[:-1]]  # each place in the holdout's items
    dummies = [0] * (round_up_size(len(tokens)) - len(tokens))
    drawn = None if count is None else np.arange(1, count * len(tokens) + 1).reshape(-1, count)
    batch = training_batch(holdout, chosen, drawn)
    inputs = [int(holdout.items[place]) for place in tokens]
    assert batch.inputs.items.tolist() == inputs + [inputs[-1]] * len(dummies)
    assert batch.labels.targets.tolist() == [int(holdout.items[place + 1]) for place in tokens] + dummies
    assert batch.inputs.positions.tolist() == [age for span in spans for age in range(len(span) - 2, -1, -1)] + dummies
    assert batch.labels.weights.tolist() == [float(holdout.weights[place + 1]) for place in tokens] + dummies
    assert batch.labels.weights.dtype == torch.float32
    assert batch.inputs.offsets.tolist() == [0, *accumulate(len(span) - 1 for span in spans)]
    assert batch.inputs.last.tolist() == [offset - 1 for offset in batch.inputs.offsets[1:]]
    if drawn is None:
        assert batch.negatives is None
    else:
        assert batch.negatives.items.tolist() == drawn.tolist() + [drawn[-1].tolist()] * len(dummies)


# Segments


def packed(lengths: list[int]) -> tuple[PackedBatch, Labels]:
    """Return sequences of the items 1, 2, ..., each of which is its own target."""
    ends = np.cumsum(lengths)
    inputs, _ = pack(np.append(0, ends[:-1]), ends, np.arange(1, ends[-1] + 1))
    targets = torch.where(torch.arange(len(inputs.items)) < ends[-1], inputs.items, 0)
    return inputs, Labels(targets, np.array(lengths), weights=(targets > 0).float())


def test_segments_are_the_sequences_and_then_dummies():
    inputs, labels = in_segments(*packed([2, 3, 12]), maxlen=12)
    assert inputs.items.tolist() == [*range(1, 18), 17]
    assert inputs.positions.tolist()[-2:] == [0, 0]
    assert (labels.targets.tolist()[-2:], labels.weights.tolist()[-2:]) == ([17, 0], [1, 0])
    segments = inputs.segments
    assert (segments.offsets.tolist(), segments.sequences, segments.longest) == ([0, 2, 5, 17, 18], 3, 12)
    assert segments.offsets.dtype == torch.int32


@few
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(0, 200))
def test_the_number_of_segments_follows_from_the_shape(lengths, more):
    maxlen = max(lengths) + more
    before, labels = packed(lengths)
    inputs, labels = in_segments(before, labels, maxlen)
    sizes, real = inputs.segments.offsets.diff(), sum(lengths)
    assert inputs.segments.offsets[-1] == len(inputs.items) == len(labels.targets) == len(labels.weights)
    assert sizes[: len(lengths)].tolist() == lengths
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= inputs.segments.longest <= max(maxlen, 2)
    assert len(inputs.items) == round_up_size(len(inputs.items)) <= max(real + 3, 1.4 * real)
    assert torch.equal(inputs.positions_from_oldest()[: len(before.items)], before.positions_from_oldest())
    assert not inputs.positions_from_oldest()[real:].any()
    assert not labels.targets[real:].any()
    # the same for other sequences with the same sum, and for the largest and the least that have this size
    for tokens in {real, real - 1, len(inputs.items) - len(sizes) + len(lengths)} - {0}:
        others = [maxlen] * (tokens // maxlen) + [tokens % maxlen] * (tokens % maxlen > 0)
        other, _ = in_segments(*packed(others), maxlen)
        if len(other.items) == len(inputs.items):
            assert len(other.segments.offsets) - len(others) == len(sizes) + 1 - len(lengths)


# Evaluation

USERS = [
    [1, 2, 1, 3, 4, 5],  # training 1, 2, 1, 3
    [6, 5],  # not held out
    [7, 7, 2, 7],
]


def test_what_validation_and_test_read():
    holdout = holdout_of(USERS)
    rows = np.array([1, 0])  # the second held-out user first
    candidates = np.array([[1, 2], [3, 4]])
    val = evaluation_batch(holdout, rows, "val", next_item(3), candidates)
    assert listed(val) == {
        "ranked": [0, 1],
        "rows": [1, 0],
        "users": [2, 0],
        "target_rows": [0, 1],
        "targets": [2, 4],
        "seen_rows": [0, 1, 1, 1],  # each pair once, also items older than maxlen
        "seen_items": [7, 1, 2, 3],
        "candidates": [[1, 2], [3, 4]],
    }
    assert val.inputs.items.tolist() == [7, 7, 2, 1, 3]  # the newest is an input: nothing is shifted
    assert val.inputs.positions.tolist() == [1, 0, 2, 1, 0]
    assert val.inputs.last.tolist() == [1, 4]

    test = evaluation_batch(holdout, rows, "test", next_item(3), None)
    assert listed(test) == {
        "ranked": [0, 1],
        "rows": [1, 0],
        "users": [2, 0],
        "target_rows": [0, 1],
        "targets": [7, 5],
        "seen_rows": [0, 0, 1, 1, 1, 1],
        "seen_items": [2, 7, 1, 2, 3, 4],
    }
    assert test.inputs.items.tolist() == [7, 7, 2, 1, 3, 4]
    assert test.inputs.positions.tolist() == [2, 1, 0, 2, 1, 0]


def test_users_without_a_known_item():
    holdout = holdout_of(
        [[9, 1, 2], [1, 2, 3, 1, 2], [8, 7, 1], [2, 3]], maxlen=2, catalogue=Catalogue.train
    )  # 7, 8 and 9 are in no window
    val = evaluation_batch(holdout, np.arange(3), "val", next_item(2), None)
    assert val.ranked.tolist() == [1]
    assert val.users.tolist() == [0, 1, 2]
    assert val.targets.tolist() == [1, 1, 0]
    assert val.inputs.items.tolist() == [2, 3]
    assert val.seen_rows.tolist() == [1, 1, 1]
    assert val.seen_items.tolist() == [1, 2, 3]
    test = evaluation_batch(holdout, np.arange(3), "test", next_item(2), None)
    assert test.ranked.tolist() == [0, 1]
    assert test.inputs.items.tolist() == [1, 3, 1]
    nobody = evaluation_batch(holdout, np.array([0, 2]), "val", next_item(2), None)
    assert nobody.inputs is None
    assert nobody.ranked.tolist() == nobody.seen_rows.tolist() == nobody.seen_items.tolist() == []
    assert nobody.users.tolist() == [0, 2]


@few
@given(
    ANY_USERS,
    st.sampled_from(["val", "test"]),
    st.sampled_from(Catalogue),
    st.integers(1, 6),
    st.lists(st.integers(0, 99), min_size=1, max_size=8),
)
def test_an_evaluation_batch_against_a_loop(users, stage, catalogue, maxlen, rows):
    holdout = holdout_of(users, maxlen=maxlen, catalogue=catalogue)
    number = {raw_id // 10: place + 1 for place, raw_id in enumerate(holdout.item_ids.tolist())}
    rows = np.array(rows) % len(holdout.test)
    batch = evaluation_batch(holdout, rows, stage, next_item(maxlen), None)
    targets, pairs, inputs, ranked = [], [], [], []
    for place, user in enumerate(holdout.test.users[rows]):
        *history, target = users[user][:-1] if stage == "val" else users[user]
        known = [number[item] for item in history if item in number]
        targets.append(number.get(target, 0))
        pairs += [(place, item) for item in sorted(set(known))]
        inputs += [known[-maxlen:]] if known else []
        ranked += [place] if known else []
    assert batch.users.tolist() == holdout.test.users[rows].tolist()
    assert batch.targets.tolist() == targets
    assert sorted(zip(batch.seen_rows.tolist(), batch.seen_items.tolist(), strict=True)) == pairs
    assert batch.seen_rows.tolist() == [row for row, _ in pairs]
    assert batch.ranked.tolist() == ranked
    if not ranked:
        assert batch.inputs is None
        return
    tokens = [item for items in inputs for item in items]
    assert batch.inputs.items[: len(tokens)].tolist() == tokens
    assert batch.inputs.positions[: len(tokens)].tolist() == [
        age for items in inputs for age in range(len(items) - 1, -1, -1)
    ]
    assert batch.inputs.offsets.tolist() == [0, *accumulate(map(len, inputs))]


# Moving


def tensors(batch: PackedBatch | EvaluationBatch) -> list[Tensor]:
    found = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if is_dataclass(value):
            found += tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def test_the_loader_pins_every_tensor_of_a_training_batch(monkeypatch):
    inputs, labels = in_segments(*packed([2, 3]), maxlen=3)
    batch = TrainingBatch(inputs, labels, Negatives(torch.tensor([1, 2]), torch.zeros(2)))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *device: -tensor)
    pinned = pin_memory(batch)
    expected = [inputs.items, inputs.positions, inputs.last, inputs.segments.offsets, labels.targets, labels.weights]
    assert [x.tolist() for x in pinned.tensors()[:6]] == [(-x).tolist() for x in expected]
    assert len(pinned.tensors()) == 8
    assert pinned.inputs.offsets is inputs.offsets


def test_to_moves_every_tensor():
    holdout = holdout_of(USERS, weights=[[1.0] * len(items) for items in USERS])
    training = training_batch(holdout, np.arange(3), np.ones((5, 2), dtype=int))
    evaluation = evaluation_batch(holdout, np.arange(2), "test", next_item(3), np.ones((2, 4), dtype=int))
    for batch, count in ((training, 6), (evaluation, 11)):
        moved = tensors(batch.to("meta"))
        assert len(moved) == count
        assert {tensor.device.type for tensor in moved} == {"meta"}
        assert [tensor.shape for tensor in moved] == [tensor.shape for tensor in tensors(batch)]
    assert training.to("meta").inputs.last.device.type == "meta"
