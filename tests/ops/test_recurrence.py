"""The GRU on packed tokens against torch's own, on a PackedSequence that torch makes of padded rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from sasrec_lab.ops.recurrence import Steps, run_gru

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def layer_and_tokens(lengths: list[int], dummies: int, dtype: torch.dtype) -> tuple[nn.GRU, Tensor, Steps]:
    torch.manual_seed(len(lengths))
    layer = nn.GRU(4, 4).to(dtype)
    offsets = np.append(0, np.cumsum(lengths))
    x = torch.randn(offsets[-1] + dummies, 4, dtype=dtype, requires_grad=True)
    return layer, x, Steps.from_offsets(offsets, len(x), CPU)


def by_torch(layer: nn.GRU, x: Tensor, lengths: list[int]) -> Tensor:
    sequences = x[: sum(lengths)].split(lengths)
    states, _ = layer(pack_sequence(sequences, enforce_sorted=False))
    return torch.cat(unpack_sequence(states))


def test_tokens_are_ordered_by_step_and_length():
    steps = Steps.from_offsets(np.array([0, 1, 4, 4, 6, 9]), 10, CPU)
    assert steps.sizes.tolist() == [4, 3, 2]
    assert steps.tokens.tolist() == [1, 6, 4, 0, 2, 7, 5, 3, 8]
    assert steps.places[steps.tokens].tolist() == list(range(9))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 2))
def test_states_and_gradients_equal_torchs(lengths, dummies):
    layer, x, steps = layer_and_tokens(lengths, dummies, torch.double)
    states, expected = run_gru(layer, x, steps), by_torch(layer, x, lengths)
    torch.testing.assert_close(states[: sum(lengths)], expected, rtol=0, atol=1e-12)
    assert not states[sum(lengths) :].any()
    weights, inputs = torch.randn_like(expected), [x, *layer.parameters()]
    ours = torch.autograd.grad((states[: sum(lengths)] * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_single_precision_equals_torchs_within_a_millionth():
    lengths = [50, 1, 30, 50, 7]
    layer, x, steps = layer_and_tokens(lengths, 0, torch.float)
    with torch.no_grad():
        torch.testing.assert_close(run_gru(layer, x, steps), by_torch(layer, x, lengths), rtol=0, atol=1e-6)


def test_autocast_leaves_the_states_in_float32():
    layer, x, steps = layer_and_tokens([3, 5], 0, torch.float)
    with torch.no_grad():
        expected = run_gru(layer, x, steps)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run_gru(layer, x, steps), expected)
