"""Sums by distance and by time, of the kernel and of torch, against a plain loop over sequences and pairs."""

import numpy as np
import pytest
import torch
from timed_layouts import layout_of
from torch import Tensor

from sasrec_lab.ops import library
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.relative_sums import bucketed_sums, compiled_sums, relative_sums, relative_sums_newest
from sasrec_lab.ops.time_buckets import NUM_BUCKETS, time_buckets

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LENGTHS = [[1], [6], [140], [3, 1, 7], [17, 2, 33, 16, 1, 64, 5]]
needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
kinds = pytest.mark.parametrize(("distance", "time"), [(True, False), (False, True), (True, True)])


def inputs(tokens: int, dim: int, reach: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return values, and weights by distance and time."""
    random = torch.Generator().manual_seed(1)
    shapes = (tokens, dim), (reach,), (NUM_BUCKETS,)
    return [torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


def plain_sums(v: Tensor, layout: BatchLayout, by_distance: Tensor | None, by_time: Tensor | None) -> list[Tensor]:
    found = []
    for table in (by_distance, by_time):
        out = []
        for begin, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
            for i in range(begin, end):
                total = torch.zeros_like(v[i])
                for j in range(begin, i + 1):
                    gap = layout.query_times[i] - layout.times[j]
                    place = i - j if table is by_distance else int(time_buckets(gap))
                    total = total + (0 if table is None else table[place]) * v[j]
                out.append(total)
        if table is not None:
            found.append(torch.cat([torch.stack(out), v.new_zeros(layout.num_tokens - len(out), v.shape[1])]))
    return found


def gradients(out: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
    """Return those of the inputs, zeros for unused ones; dummies get a gradient, which must not reach any token."""
    both = torch.cat(out, 1)
    weights = torch.randn(both.shape, generator=torch.Generator().manual_seed(9), dtype=torch.double).to(both.dtype)
    return torch.autograd.grad((both * weights).sum(), x, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("lengths", [[1], [6], [40], [3, 1, 7]], ids=str)
@kinds
def test_sums_and_gradients_equal_the_plain_loop(lengths, distance, time):
    layout = layout_of(lengths)
    x = inputs(layout.num_tokens, 5, max(lengths) + 3, torch.float64)
    tables = x[1] if distance else None, x[2] if time else None
    out, expected = relative_sums(x[0], layout, *tables), plain_sums(x[0], layout, *tables)
    assert len(out) == distance + time
    for found, of_loop in zip([*out, *gradients(out, x)], [*expected, *gradients(expected, x)], strict=True):
        torch.testing.assert_close(found, of_loop)
    assert not any(found[layout.num_real_tokens :].any() for found in out)
    with torch.no_grad():
        newest = layout.offsets_tensor[1:] - 1
        for found, of_loop in zip(relative_sums_newest(x[0], layout, *tables), expected, strict=True):
            torch.testing.assert_close(found, of_loop[newest])


def test_a_pair_by_hand():
    """Two tokens, one sequence: weights .5 and .25 by distance 1 and 0, 2 and -1 for 60 s and 1 s."""
    layout = BatchLayout(np.array([0, 2]), 2, CPU, times=torch.tensor([40, 99]), query_times=torch.tensor([99, 100]))
    by_time = torch.zeros(NUM_BUCKETS)
    by_time[13], by_time[0] = 2.0, -1.0
    found = relative_sums(torch.tensor([[10.0], [20.0]]), layout, torch.tensor([0.25, 0.5]), by_time)
    assert [float(sums[1]) for sums in found] == [0.5 * 10 + 0.25 * 20, 2 * 10 - 20]


@kinds
def test_the_gradients_of_torchs_form_are_its_derivatives(distance, time):
    layout = layout_of([3, 1, 6], dummies=1)
    x = inputs(layout.num_tokens, 2, 6, torch.float64)

    def sums(v: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        return tuple(relative_sums(v, layout, tables[0] if distance else None, tables[-1] if time else None))

    assert torch.autograd.gradcheck(sums, [x[0], *[x[1]] * distance, *[x[2]] * time])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sequence_is_not_changed_by_others_or_its_place(dtype):
    """The last of three sequences, moved, without the others and with dummies, has the same outputs and gradients."""
    lengths = [19, 6, 33]
    layout = layout_of(lengths, dummies=0)
    v, *tables = inputs(sum(lengths), 10, 40, dtype)
    parts = [one.detach().split(lengths) for one in (v, layout.times, layout.query_times)]

    def last_of(order: list[int], dummies: int) -> list[Tensor]:
        """Return the outputs and the gradient of sequence 2."""
        offsets = np.append(0, np.cumsum([lengths[i] for i in order]))
        given = [torch.cat([*(part[i] for i in order), torch.ones_like(part[2][:dummies])]) for part in parts]
        moved = BatchLayout(offsets, int(offsets[-1]) + dummies, CPU, times=given[1], query_times=given[2])
        own = given[0].requires_grad_()
        out = relative_sums(own, moved, *tables)
        grads = torch.autograd.grad(torch.stack(out).square().sum(), own)
        begin = offsets[order.index(2)]
        return [one[begin : begin + lengths[2]] for one in (*out, *grads)]

    expected = last_of([0, 1, 2], 0)
    for order, dummies in (([2, 0, 1], 0), ([2], 0), ([1, 2], 5), ([2, 2], 1)):
        for one, other in zip(last_of(order, dummies), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_changes_only_later_ones_of_its_sequence(dtype):
    layout = layout_of([7, 9, 4])
    v, *tables = (one.detach() for one in inputs(layout.num_tokens, 8, 9, dtype))
    before = relative_sums(v, layout, *tables)
    v[7 + 5] += 1
    for found, other in zip(relative_sums(v, layout, *tables), before, strict=True):
        assert (found != other).any(1).nonzero()[:, 0].tolist() == list(range(7 + 5, 7 + 9))


def test_under_autocast_it_computes_in_full_precision():
    layout = layout_of([30, 7])
    v, *tables = (one.detach() for one in inputs(layout.num_tokens, 16, 30))
    v = v.bfloat16()
    newest = layout.offsets_tensor[1:] - 1
    with torch.autocast("cpu", torch.bfloat16):
        out, of_newest = relative_sums(v, layout, *tables), relative_sums_newest(v, layout, *tables)
    for found, last, expected in zip(out, of_newest, plain_sums(v.float(), layout, *tables), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, expected[newest], rtol=1e-5, atol=1e-5)


class Exported(torch.nn.Module):
    """Both forms of the sums of a single sequence."""

    def __init__(self, tables: list[Tensor]):
        super().__init__()
        self.tables = torch.nn.ParameterList(tables)

    def forward(self, v: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        layout = BatchLayout(None, v.shape[0], v.device, times=times, query_times=times + 1)
        return *relative_sums(v, layout, *self.tables), *relative_sums_newest(v, layout, *self.tables)


def test_an_export_sums_within_its_one_sequence():
    tokens = {0: torch.export.Dim("tokens", min=1, max=9)}
    times = layout_of([9], dummies=0).times
    v, *tables = (one.detach() for one in inputs(9, 12, 9))
    exported = torch.export.export(Exported(tables), (v[:5], times[:5]), dynamic_shapes=(tokens, tokens)).module()
    for count in (1, 7, 9):
        layout = BatchLayout(np.array([0, count]), count, CPU, times=times[:count], query_times=times[:count] + 1)
        expected = plain_sums(v[:count], layout, *tables)
        found = exported(v[:count], times[:count])
        for one, other in zip(found, [*expected, *(sums[-1:] for sums in expected)], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# The kernel


@needs_compiler
@pytest.mark.parametrize("dim", [3, 16, 50, 129])
@pytest.mark.parametrize("lengths", [*LENGTHS, list(range(1, 60))], ids=lambda x: f"{len(x)} of {max(x)}")
@kinds
def test_the_kernel_equals_torchs_form(lengths, dim, distance, time):
    layout = layout_of(lengths)
    x = inputs(layout.num_tokens, dim, max(lengths) + 3)
    tables = x[1] if distance else None, x[2] if time else None
    found, expected = compiled_sums(x[0], layout, *tables), bucketed_sums(x[0], layout.buckets, *tables)
    for one, other in zip([*found, *gradients(found, x)], [*expected, *gradients(expected, x)], strict=True):
        assert (one - other).norm() <= 1e-5 * (other.norm() + 1)
    assert not any(one[layout.num_real_tokens :].any() for one in found)
    with torch.no_grad():
        for one, other in zip(found, compiled_sums(x[0], layout, *tables), strict=True):
            assert torch.equal(one, other)


@needs_compiler
def test_one_and_two_threads_give_the_same_bits():
    layout, found = layout_of(LENGTHS[4]), []
    for count in (1, 2):
        torch.set_num_threads(count)  # the fixture sets it back
        x = inputs(layout.num_tokens, 30, 64)
        out = relative_sums(x[0], layout, *x[1:])
        found.append((*out, *gradients(out, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_compiler
def test_parts_of_a_larger_tensor_take_the_kernel(monkeypatch):
    layout = layout_of([30, 7])
    v, *tables = inputs(layout.num_tokens, 36, 30)
    expected = bucketed_sums(v[:, 12:24], layout.buckets, *tables)
    monkeypatch.setattr("sasrec_lab.ops.relative_sums.bucketed_sums", None)
    for one, other in zip(relative_sums(v[:, 12:24], layout, *tables), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_sums_that_are_not_used_need_no_gradient():
    layout = layout_of([30, 7])
    x = inputs(layout.num_tokens, 8, 30)
    for kind in (0, 1):
        found = gradients(relative_sums(x[0], layout, *x[1:])[kind : kind + 1], x)
        expected = gradients(bucketed_sums(x[0], layout.buckets, *x[1:])[kind : kind + 1], x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_nan_stays_in_its_sequence():
    layout = layout_of([3, 20, 2])
    v, *tables = (one.detach() for one in inputs(layout.num_tokens, 8, 20))
    v[5] = float("nan")
    for sums in compiled_sums(v, layout, *tables):
        changed = sums.isnan().any(1).nonzero()[:, 0].tolist()  # also of tokens that a tile computes with the first
        assert set(range(5, 23)) <= set(changed) <= set(range(3, 23))


@needs_compiler
def test_weights_by_distance_that_do_not_fit_are_an_error():
    layout = layout_of([7, 2])
    v, by_distance, _ = inputs(layout.num_tokens, 8, 6)
    with pytest.raises(ValueError, match="weights \\(6,\\) by distance do not fit sequences of 7 tokens"):
        relative_sums(v, layout, by_distance)
