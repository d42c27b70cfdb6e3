"""BERT4Rec's objective: which items are masked, what is shown in their place, and what inference packs."""

import numpy as np
import pytest
import torch
from any_users import ANY_USERS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import holdout_of, masked_items, random_users

from sasrec_lab.config.dataset import Windows
from sasrec_lab.config.training import Replace
from sasrec_lab.data.batches import MASK, Labels, PackedBatch
from sasrec_lab.ops.backend import round_up_size

few = settings(max_examples=60, deadline=None, derandomize=True)
LONG = holdout_of(random_users(0, users=400, items=50, longest=60), maxlen=40)
ALL = np.arange(len(LONG.window_users))


def masked(holdout, windows, seed=0, **changes) -> tuple[PackedBatch, Labels]:
    return masked_items(**{"maxlen": 40, **changes}).training(holdout, windows, np.random.default_rng(seed))


def labels_of(labels: Labels) -> tuple[list[int], list[int]]:
    """Return the rows and targets that are not there to round their number."""
    real = int(labels.counts.sum())
    assert (labels.targets[real:] == 0).all()
    assert (labels.rows[real:] == labels.rows[real - 1]).all()
    assert len(labels.targets) == len(labels.rows) == round_up_size(real)
    return labels.rows[:real].tolist(), labels.targets[:real].tolist()


@few
@given(
    ANY_USERS,
    st.sampled_from(Windows),
    st.integers(2, 8),
    st.integers(1, 20),
    st.sampled_from([0.01, 0.3, 0.99]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(Replace),
)
def test_labels_are_the_items_that_were_masked(users, windows, maxlen, size, share, last, kind):
    weights = [[100 * user + place for place in range(len(items))] for user, items in enumerate(users)]
    holdout = holdout_of(users, maxlen=maxlen, windows=windows, weights=weights)
    chosen = np.random.default_rng(size).integers(0, len(holdout.window_users), size)
    inputs, labels = masked(holdout, chosen, maxlen=maxlen, share=share, last=last, replace=kind)
    rows, targets = labels_of(labels)
    spans = [range(holdout.window_starts[w], holdout.window_ends[w])[-maxlen:] for w in chosen]
    places = [place for span in spans for place in span]
    assert inputs.positions[: len(places)].tolist() == [age for span in spans for age in range(len(span))[::-1]]
    assert rows == sorted(set(rows))
    assert targets == [int(holdout.items[places[row]]) for row in rows]
    assert labels.weights[: len(rows)].tolist() == [float(holdout.weights[places[row]]) for row in rows]
    assert (labels.weights[len(rows) :] == 0).all()
    sequence = np.searchsorted(inputs.offsets, rows, side="right") - 1
    assert labels.counts.tolist() == np.bincount(sequence, minlength=size).tolist()
    assert rows
    if last == 1:
        assert rows == inputs.last.tolist()
    shown = inputs.items[: len(places)].tolist()
    assert [shown[i] for i in range(len(places)) if i not in rows] == [
        int(holdout.items[place]) for i, place in enumerate(places) if i not in rows
    ]
    if kind is Replace.mask:
        assert [shown[row] for row in rows] == [MASK] * len(rows)
    assert 0 <= inputs.items.min() <= inputs.items.max() <= holdout.num_items


def test_items_of_all_windows_are_inputs_once():
    users = [list(range(1, 12)), list(range(1, 8))]  # 9 and 5 training items; windows of at most 4 + 1
    holdout = holdout_of(users, maxlen=4, windows=Windows.all)
    inputs, labels = masked(holdout, np.arange(len(holdout.window_users)), maxlen=4, share=1e-9)
    assert inputs.offsets.tolist() == [0, 4, 8, 12]
    rows, targets = labels_of(labels)
    assert rows == inputs.last.tolist()
    assert targets == [9, 5, 5]
    inputs.items[rows] = torch.tensor(targets)
    assert inputs.items[:12].tolist() == [6, 7, 8, 9, 2, 3, 4, 5, 2, 3, 4, 5]


def test_a_window_may_have_no_label():
    holdout = holdout_of([list(range(1, 6))] * 1000)  # 3 training items each
    _, labels = masked(holdout, np.arange(1000), share=0.2)
    without = float((labels.counts == 0).mean())
    assert abs(without - 0.8**3) < 4 * np.sqrt(0.8**3 * (1 - 0.8**3) / 1000)


def test_a_batch_without_a_mask_gets_the_newest_items():
    inputs, labels = masked(LONG, ALL, share=1e-9)
    assert labels_of(labels)[0] == inputs.last.tolist()


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_share_of_masked_items(share):
    inputs, labels = masked(LONG, ALL, share=share)
    lengths = np.diff(inputs.offsets)
    assert abs(labels.counts.sum() - share * lengths.sum()) < 4 * np.sqrt(share * (1 - share) * lengths.sum())


def test_the_share_of_windows_with_only_the_last_item_masked():
    inputs, labels = masked(LONG, np.repeat(ALL, 5), share=0.5, last=0.3)
    is_long = np.diff(inputs.offsets) > 15  # these rarely have a single mask by chance
    only_last = labels.counts[is_long] == 1
    assert abs(only_last.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / is_long.sum())


def test_mixed_shows_the_mask_a_random_item_or_the_item_itself():
    holdout = holdout_of([[1] * 60 for _ in range(200)] + [list(range(1, 51))], maxlen=40)
    inputs, labels = masked(holdout, np.arange(200), share=0.5, replace=Replace.mixed)
    rows, targets = labels_of(labels)
    assert set(targets) == {1}
    shown = inputs.items[rows]
    own, count = 0.1 + 0.1 / 50, len(rows)  # a random item may be the item itself
    for is_kind, share in ((shown == MASK, 0.8), (shown == 1, own), (shown > 1, 0.2 - own)):
        assert abs(float(is_kind.double().mean()) - share) < 4 * np.sqrt(share * (1 - share) / count)
    assert shown.unique().tolist() == list(range(51))


def test_masks_depend_on_the_seed_only():
    for changes in ({}, {"replace": Replace.mixed, "last": 0.2}):
        first, again, other = (masked(LONG, ALL[:50], seed, **changes) for seed in (3, 3, 4))
        assert first[0].items.tolist() == again[0].items.tolist()
        assert labels_of(first[1]) == labels_of(again[1])
        assert labels_of(first[1])[0] != labels_of(other[1])[0]


def test_inference_puts_a_mask_behind_the_newest_items():
    items = np.array([11, 12, 13, 14, 15, 16], dtype=np.int32)
    starts, ends = np.array([0, 5, 1]), np.array([6, 6, 3])
    objective = masked_items(4)
    batch = objective.inference(items, starts, ends)
    assert batch.items.tolist() == [14, 15, 16, MASK, 16, MASK, 12, 13, MASK]
    assert batch.positions.tolist() == [3, 2, 1, 0, 1, 0, 2, 1, 0]
    assert batch.offsets.tolist() == [0, 4, 6, 9]
    assert batch.last.tolist() == [3, 5, 8]
    assert objective.count_tokens(ends - starts).tolist() == np.diff(batch.offsets).tolist()
    assert items.tolist() == [11, 12, 13, 14, 15, 16]


@few
@given(st.lists(st.integers(1, 90), min_size=1, max_size=9), st.integers(2, 40))
def test_inference_counts_its_tokens(lengths, maxlen):
    ends = np.cumsum(lengths)
    objective = masked_items(maxlen)
    batch = objective.inference(np.arange(1, ends[-1] + 1), ends - lengths, ends)
    tokens = objective.count_tokens(np.array(lengths))
    assert np.diff(batch.offsets).tolist() == tokens.tolist()
    assert tokens.max() <= maxlen
    assert (batch.items[batch.last] == MASK).all()
    assert (batch.items == MASK).sum() == len(lengths) + len(batch.items) - batch.offsets[-1]  # dummies repeat it
