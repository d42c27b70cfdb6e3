"""Pointwise attention by the kernel and by torch against a plain loop over sequences and pairs."""

import numpy as np
import pytest
import torch
from timed_layouts import layout_of
from torch import Tensor

from sasrec_lab.ops import library
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.pointwise import attend_pointwise, attend_pointwise_newest, bucketed_pointwise, compiled_pointwise
from sasrec_lab.ops.time_buckets import NUM_BUCKETS, time_buckets

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LENGTHS = [[1], [6], [140], [3, 1, 7], [17, 2, 33, 16, 1, 64, 5]]
SIZES = [(12, 12, 1), (64, 64, 2), (10, 15, 5), (6, 2, 2)]  # of queries and keys, of values; heads
DIVISOR = 7.0
needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
biases = pytest.mark.parametrize(("position", "time"), [(False, False), (True, False), (False, True), (True, True)])


def inputs(tokens: int, dim: int, dim_v: int, reach: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries, keys and values, and biases by distance and time."""
    random = torch.Generator().manual_seed(1)
    shapes = (tokens, dim), (tokens, dim), (tokens, dim_v), (reach,), (NUM_BUCKETS,)
    return [torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    layout: BatchLayout,
    heads: int,
) -> Tensor:
    out = []
    for begin, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        for i in range(begin, end):
            seen = range(begin, i + 1)
            scores = (q[i].view(heads, 1, -1) * k[begin : i + 1].unflatten(1, (heads, -1)).transpose(0, 1)).sum(-1)
            if position_bias is not None:
                scores = scores + position_bias[[i - j for j in seen]]
            if time_bias is not None:
                gaps = torch.tensor([int(layout.query_times[i]) - int(layout.times[j]) for j in seen])
                scores = scores + time_bias[time_buckets(gaps)]
            weights = scores / (1 + (-scores).exp()) / DIVISOR  # (H, seen)
            values = v[begin : i + 1].unflatten(1, (heads, -1))
            out.append((weights.T[..., None] * values).sum(0).flatten())
    return torch.cat([torch.stack(out), v.new_zeros(layout.num_tokens - len(out), v.shape[1])])


def gradients(out: Tensor, x: list[Tensor]) -> tuple[Tensor, ...]:
    """Return those of the inputs, zeros for unused ones; dummies get a gradient, which must not reach any token."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.double).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), x, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("dim", "dim_v", "heads"), SIZES)
@pytest.mark.parametrize("lengths", LENGTHS[:4], ids=str)
@biases
def test_attention_and_gradients_equal_the_plain_loop(lengths, dim, dim_v, heads, position, time):
    layout = layout_of(lengths)
    x = inputs(layout.num_tokens, dim, dim_v, max(lengths) + 3, torch.float64)
    tables = x[3] if position else None, x[4] if time else None
    out = attend_pointwise(*x[:3], layout, heads, DIVISOR, *tables)
    expected = plain_attention(*x[:3], *tables, layout, heads)
    torch.testing.assert_close(out, expected)
    assert not out[layout.num_real_tokens :].any()
    for found, of_loop in zip(gradients(out, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(found, of_loop)
    with torch.no_grad():
        newest = layout.offsets_tensor[1:] - 1
        found = attend_pointwise_newest(x[0][newest], *x[1:3], layout, heads, DIVISOR, *tables)
    torch.testing.assert_close(found, expected[newest])


def test_a_pair_by_hand():
    """Two tokens, one sequence: (1/4) (SiLU(2 + .5 + 1) 10 + SiLU(1 + .25 - 1) 20), the older key 60 s before."""
    layout = BatchLayout(np.array([0, 2]), 2, CPU, times=torch.tensor([40, 99]), query_times=torch.tensor([99, 100]))
    time_bias = torch.zeros(NUM_BUCKETS)
    time_bias[13], time_bias[0] = 1.0, -1.0  # 60 s and 1 s
    q, k, v = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([[10.0], [20.0]])
    out = attend_pointwise(q, k, v, layout, 1, 4.0, torch.tensor([0.25, 0.5]), time_bias)
    silu = torch.nn.functional.silu(torch.tensor([3.5, 0.25]))
    assert float(out[1, 0]) == pytest.approx(float(silu[0] * 10 + silu[1] * 20) / 4)


@biases
def test_the_gradients_of_torchs_form_are_its_derivatives(position, time):
    layout = layout_of([3, 1, 6], dummies=1)
    x = inputs(layout.num_tokens, 4, 2, 6, torch.float64)
    used = [*x[:3], *[x[3]] * position, *[x[4]] * time]

    def attended(*x: Tensor) -> Tensor:
        return attend_pointwise(*x[:3], layout, 2, DIVISOR, x[3] if position else None, x[-1] if time else None)

    assert torch.autograd.gradcheck(attended, used)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sequence_is_not_changed_by_others_or_its_place(dtype):
    """The last of three sequences, moved, without the others and with dummies, has the same outputs and gradients."""
    lengths = [19, 6, 33]
    layout = layout_of(lengths, dummies=0)
    *x, position_bias, time_bias = inputs(sum(lengths), 12, 10, 40, dtype)
    parts = [one.detach().split(lengths) for one in (*x, layout.times, layout.query_times)]

    def last_of(order: list[int], dummies: int) -> list[Tensor]:
        """Return the outputs and gradients of sequence 2."""
        offsets = np.append(0, np.cumsum([lengths[i] for i in order]))
        given = [torch.cat([*(part[i] for i in order), torch.ones_like(part[2][:dummies])]) for part in parts]
        moved = BatchLayout(offsets, int(offsets[-1]) + dummies, CPU, times=given[3], query_times=given[4])
        given = [one.requires_grad_() for one in given[:3]]
        out = attend_pointwise(*given, moved, 2, DIVISOR, position_bias, time_bias)
        begin = offsets[order.index(2)]
        return [one[begin : begin + lengths[2]] for one in (out, *torch.autograd.grad(out.square().sum(), given))]

    expected = last_of([0, 1, 2], 0)
    for order, dummies in (([2, 0, 1], 0), ([2], 0), ([1, 2], 5), ([2, 2], 1)):
        for one, other in zip(last_of(order, dummies), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_changes_only_later_ones_of_its_sequence(dtype):
    layout = layout_of([7, 9, 4])
    x = [one.detach() for one in inputs(layout.num_tokens, 8, 8, 9, dtype)]
    before = attend_pointwise(*x[:3], layout, 2, DIVISOR, *x[3:])
    for one in x[1:3]:  # key and value of the second sequence's token 5
        one[7 + 5] += 1
    changed = attend_pointwise(*x[:3], layout, 2, DIVISOR, *x[3:]) != before
    assert changed.any(1).nonzero()[:, 0].tolist() == list(range(7 + 5, 7 + 9))


def test_under_autocast_it_computes_in_full_precision():
    layout = layout_of([30, 7])
    x = [one.detach() for one in inputs(layout.num_tokens, 16, 16, 30)]
    q, k, v = (one.bfloat16() for one in x[:3])
    newest = layout.offsets_tensor[1:] - 1
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_pointwise(q, k, v, layout, 2, DIVISOR, *x[3:])
        of_newest = attend_pointwise_newest(q[newest], k, v, layout, 2, DIVISOR, *x[3:])
    expected = plain_attention(q.float(), k.float(), v.float(), *x[3:], layout, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_newest, expected[newest], rtol=1e-5, atol=1e-5)


class Exported(torch.nn.Module):
    """Both forms of attention of a single sequence, with biases or without."""

    def __init__(self, tables: list[Tensor]):
        super().__init__()
        self.tables = torch.nn.ParameterList(tables)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        layout = BatchLayout(None, q.shape[0], q.device, times=times, query_times=times + 1)
        return (
            attend_pointwise(q, k, v, layout, 2, DIVISOR, *self.tables),
            attend_pointwise_newest(q[-1:], k, v, layout, 2, DIVISOR, *self.tables),
        )


@pytest.mark.parametrize("has_biases", [False, True])
def test_an_export_attends_within_its_one_sequence(has_biases):
    tokens = {0: torch.export.Dim("tokens", min=1, max=9)}
    times = layout_of([9], dummies=0).times
    *x, position_bias, time_bias = (one.detach() for one in inputs(9, 12, 6, 9))
    tables = [position_bias, time_bias] if has_biases else []
    example = tuple(one[:5] for one in (*x, times))
    exported = torch.export.export(Exported(tables), example, dynamic_shapes=(tokens,) * 4).module()
    for count in (1, 7, 9):
        layout = BatchLayout(np.array([0, count]), count, CPU, times=times[:count], query_times=times[:count] + 1)
        expected = plain_attention(*(one[:count] for one in x), *(tables or (None, None)), layout, 2)
        states, newest = exported(*(one[:count] for one in (*x, times)))
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(newest, expected[-1:], rtol=1e-5, atol=1e-5)


# The kernel


@needs_compiler
@pytest.mark.parametrize(("dim", "dim_v", "heads"), [*SIZES, (50, 50, 1), (3, 129, 1)])
@pytest.mark.parametrize("lengths", [*LENGTHS, list(range(1, 60))], ids=lambda x: f"{len(x)} of {max(x)}")
@biases
def test_the_kernel_equals_torchs_form(lengths, dim, dim_v, heads, position, time):
    layout = layout_of(lengths)
    x = inputs(layout.num_tokens, dim, dim_v, max(lengths) + 3)
    tables = x[3] if position else None, x[4] if time else None
    found = compiled_pointwise(*x[:3], layout, heads, DIVISOR, *tables)
    expected = bucketed_pointwise(*x[:3], layout.buckets, heads, DIVISOR, *tables)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not found[layout.num_real_tokens :].any()
    for one, other in zip(gradients(found, x), gradients(expected, x), strict=True):
        assert (one - other).norm() <= 1e-5 * (other.norm() + 1)
    with torch.no_grad():
        assert torch.equal(found, compiled_pointwise(*x[:3], layout, heads, DIVISOR, *tables))


@needs_compiler
def test_parts_of_a_larger_tensor_take_the_kernel(monkeypatch):
    layout = layout_of([30, 7])
    x = torch.randn(layout.num_tokens, 36)
    expected = bucketed_pointwise(*x.split(12, dim=1), layout.buckets, 2, DIVISOR)
    monkeypatch.setattr("sasrec_lab.ops.pointwise.bucketed_pointwise", None)
    torch.testing.assert_close(attend_pointwise(*x.split(12, dim=1), layout, 2, DIVISOR), expected)


@needs_compiler
def test_one_and_two_threads_give_the_same_bits():
    layout, found = layout_of(LENGTHS[4]), []
    for count in (1, 2):
        torch.set_num_threads(count)  # the fixture sets it back
        x = inputs(layout.num_tokens, 24, 30, 64)
        out = attend_pointwise(*x[:3], layout, 3, DIVISOR, *x[3:])
        found.append((out, *gradients(out, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_compiler
def test_the_kernel_takes_scores_of_any_size():
    """SiLU is the score itself or zero; the exponential inside neither overflows nor loses the sign."""
    layout = BatchLayout(np.arange(8), 7, CPU)
    scores = torch.tensor([1e30, 300.0, 88.5, 0.0, -88.5, -300.0, -1e30])
    q = scores[:, None].clone().requires_grad_()
    k = v = torch.ones(7, 1)
    out = compiled_pointwise(q, k, v, layout, 1, 1.0)
    torch.testing.assert_close(out[:, 0], torch.nn.functional.silu(scores))
    (slopes,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(slopes[:, 0], torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]))


@needs_compiler
def test_nan_stays_in_its_sequence():
    layout = layout_of([3, 20, 2])
    x = [one.detach() for one in inputs(layout.num_tokens, 8, 8, 20)]
    x[1][5] = float("nan")
    out = compiled_pointwise(*x[:3], layout, 1, DIVISOR, *x[3:])
    assert out.isnan().any(1).nonzero()[:, 0].tolist() == list(range(5, 23))


@needs_compiler
def test_a_position_bias_that_does_not_fit_is_an_error():
    layout = layout_of([7, 2])
    x = inputs(layout.num_tokens, 8, 8, 6)
    with pytest.raises(ValueError, match="a position bias \\(6,\\) does not fit sequences of 7 tokens"):
        attend_pointwise(*x[:3], layout, 2, DIVISOR, x[3])


@needs_compiler
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)} of {max(x)}")
def test_the_kernels_buckets_of_pairs_equal_torchs(lengths):
    layout = layout_of(lengths)
    rows, begin = layout.pair_buckets, 0
    for first, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        length, width = end - first, -(-(end - first) // 16) * 16
        found = rows[begin : begin + length * width].view(length, width)
        expected = time_buckets(layout.gaps(slice(first, end), slice(first, end))).tril()
        assert torch.equal(found[:, :length].long(), expected)
        assert not found[:, length:].any()
        begin += length * width
    assert begin == len(rows)
