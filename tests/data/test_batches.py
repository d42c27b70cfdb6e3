"""Packed batches: sizes, packing, and evaluation batches against a loop."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from small_data import holdout_of, random_users
from torch import Tensor

from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.data.batches import EvaluationBatch, PackedBatch, evaluation_batch, pack, training_batch
from sasrec_lab.data.negatives import Negatives
from sasrec_lab.ops.backend import round_up_size


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
    batch = training_batch(holdout, np.array([1, 1, 0, 1, 1, 1, 1]), Negatives(negatives))  # 15 + 6 * 3 tokens
    assert len(batch.items) == round_up_size(33) == 36
    assert batch.items[33:].tolist() == 3 * batch.items[32:33].tolist()
    assert batch.positions[33:].tolist() == [0, 0, 0]
    assert batch.targets[33:].tolist() == [0, 0, 0]
    assert batch.weights[33:].tolist() == [0, 0, 0]
    assert batch.negatives[33:].tolist() == [[66, 67]] * 3
    assert batch.targets[:33].min() > 0
    assert batch.negatives[:33].tolist() == negatives.tolist()
    assert batch.offsets[-1] == 33


@pytest.mark.parametrize("windows", list(Windows))
@pytest.mark.parametrize("maxlen", [1, 3, 8])
def test_a_training_batch_is_its_windows(windows, maxlen):
    users = random_users(maxlen, users=40)
    weights = [[100 * user + place for place in range(len(items))] for user, items in enumerate(users)]
    holdout = holdout_of(users, maxlen=maxlen, windows=windows, weights=weights)
    chosen = np.random.default_rng(0).permutation(len(holdout.window_users))[:17]
    batch = training_batch(holdout, chosen, None)
    assert batch.negatives is None
    assert batch.weights.dtype == torch.float32
    token = 0
    for row, window in enumerate(chosen):
        start, end = holdout.window_starts[window], holdout.window_ends[window]
        items = holdout.items[start:end].tolist()
        tokens = slice(token, token + len(items) - 1)
        assert batch.items[tokens].tolist() == items[:-1]
        assert batch.targets[tokens].tolist() == items[1:]
        assert batch.positions[tokens].tolist() == list(range(len(items) - 2, -1, -1))
        assert batch.weights[tokens].tolist() == holdout.weights[start + 1 : end].tolist()
        token += len(items) - 1
        assert batch.last[row] == token - 1
    assert len(batch.items) == round_up_size(token)


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
    val = evaluation_batch(holdout, rows, "val", 3, candidates)
    assert listed(val) == {
        "ranked": [0, 1],
        "users": [2, 0],
        "targets": [2, 4],
        "seen_rows": [0, 1, 1, 1],  # each pair once, also items older than maxlen
        "seen_items": [7, 1, 2, 3],
        "candidates": [[1, 2], [3, 4]],
    }
    assert val.inputs.items.tolist() == [7, 7, 2, 1, 3]  # the newest is an input: nothing is shifted
    assert val.inputs.positions.tolist() == [1, 0, 2, 1, 0]
    assert val.inputs.last.tolist() == [1, 4]
    assert type(val.inputs) is PackedBatch  # without targets

    test = evaluation_batch(holdout, rows, "test", 3, None)
    assert listed(test) == {
        "ranked": [0, 1],
        "users": [2, 0],
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
    val = evaluation_batch(holdout, np.arange(3), "val", 2, None)
    assert val.ranked.tolist() == [1]
    assert val.users.tolist() == [0, 1, 2]
    assert val.targets.tolist() == [1, 1, 0]
    assert val.inputs.items.tolist() == [2, 3]
    assert val.seen_rows.tolist() == [1, 1, 1]
    assert val.seen_items.tolist() == [1, 2, 3]
    test = evaluation_batch(holdout, np.arange(3), "test", 2, None)
    assert test.ranked.tolist() == [0, 1]
    assert test.inputs.items.tolist() == [1, 3, 1]
    nobody = evaluation_batch(holdout, np.array([0, 2]), "val", 2, None)
    assert nobody.inputs is None
    assert nobody.ranked.tolist() == nobody.seen_rows.tolist() == nobody.seen_items.tolist() == []
    assert nobody.users.tolist() == [0, 2]


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("catalogue", list(Catalogue))
def test_an_evaluation_batch_against_a_loop(stage, catalogue):
    users = random_users(3, users=50, items=40)
    holdout = holdout_of(users, maxlen=4, catalogue=catalogue)
    number = {raw_id // 10: place + 1 for place, raw_id in enumerate(holdout.item_ids.tolist())}
    rows = np.random.default_rng(1).permutation(len(holdout.users))
    batch = evaluation_batch(holdout, rows, stage, 4, None)
    pairs, inputs, ranked = [], [], []
    for place, user in enumerate(holdout.users[rows]):
        items = users[user]
        history = [number[item] for item in (items[:-2] if stage == "val" else items[:-1]) if item in number]
        assert batch.targets[place] == number.get(items[-2] if stage == "val" else items[-1], 0)
        pairs += [(place, item) for item in sorted(set(history))]
        inputs += history[-4:]
        ranked += [place] * bool(history)
    assert list(zip(batch.seen_rows.tolist(), batch.seen_items.tolist(), strict=True)) == pairs
    assert batch.inputs.items[: len(inputs)].tolist() == inputs
    assert batch.ranked.tolist() == ranked
    assert len(batch.inputs.last) == len(ranked)


# Moving


def tensors(batch: PackedBatch | EvaluationBatch) -> list[Tensor]:
    found = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, PackedBatch):
            found += tensors(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def test_to_moves_every_tensor():
    holdout = holdout_of(USERS, weights=[[1.0] * len(items) for items in USERS])
    training = training_batch(holdout, np.arange(3), Negatives(np.ones((5, 2), dtype=int)))
    evaluation = evaluation_batch(holdout, np.arange(2), "test", 3, np.ones((2, 4), dtype=int))
    for batch, count in ((training, 6), (evaluation, 9)):
        moved = tensors(batch.to("meta"))
        assert len(moved) == count
        assert {tensor.device.type for tensor in moved} == {"meta"}
        assert [tensor.shape for tensor in moved] == [tensor.shape for tensor in tensors(batch)]
    assert training.to("meta").last.device.type == "meta"
