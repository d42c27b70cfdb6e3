"""Attention whose scores decay with time, by the kernel and by torch against a plain loop over sequences and heads."""

from math import exp, sqrt

import numpy as np
import pytest
import torch
from timed_layouts import layout_of
from torch import Tensor

from sasrec_lab.ops import library
from sasrec_lab.ops.attention import attend, attend_newest, attend_newest_to, compiled_attention
from sasrec_lab.ops.buckets import bucketed_attention, fused_attention
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.time_decay import decay_scores

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DAY = 86400
LENGTHS = [[1], [130], [17, 2, 33, 16, 1, 64, 5]]
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")


def inputs(tokens: int, dim: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries, keys, values, a bias by distance, and a decay that halves a weight within hours."""
    random = torch.Generator().manual_seed(1)
    shapes = (tokens, dim), (tokens, dim), (tokens, dim), (rows, columns)
    x = [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]
    return [one.requires_grad_() for one in (*x, torch.tensor([1.3, 0.6], dtype=dtype))]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    decay: Tensor,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    for begin, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        for head, columns in enumerate(torch.arange(q.shape[1]).view(heads, -1)):
            for token in range(begin, end):
                seen = range(begin, token + 1 if causal else end)
                scores = k[seen][:, columns] @ q[token, columns] / sqrt(len(columns))
                if bias is not None:
                    zero = 0 if causal else bias.shape[1] // 2
                    scores = scores + bias[head % len(bias), [zero + token - other for other in seen]]
                seconds = [max(0, int(layout.query_times[token]) - int(layout.times[other])) for other in seen]
                days = torch.tensor(seconds, dtype=q.dtype) / DAY
                scores = scores - torch.where(days > 0, decay[0] * days.clamp(min=1e-9) ** decay[1], 0)
                out[token, columns] = scores.softmax(0) @ v[seen][:, columns]
    return out


def gradients(out: Tensor, x: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out * weights).sum(), x, allow_unused=True, materialize_grads=True)


@directions
@pytest.mark.parametrize(("dim", "heads", "rows"), [(12, 1, 0), (50, 1, 1), (64, 2, 0), (6, 3, 3)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decayed_attention_equals_the_plain_loop(lengths, dim, heads, rows, causal):
    layout = layout_of(lengths)
    reach = max(lengths) + 3
    *x, bias, decay = inputs(layout.num_tokens, dim, max(rows, 1), reach if causal else 2 * reach - 1)
    kind = {"causal": causal, "bias": bias if rows else None}
    expected = plain_attention(*x, layout, heads, decay, **kind)
    by_loop = gradients(expected, [*x, bias, decay])
    forms = [(bucketed_attention, layout.buckets), (fused_attention, layout.buckets), (compiled_attention, layout)]
    if library.library() is None:
        forms.pop()
    for function, place in forms:
        out = function(*x, place, heads, 0.0, **kind, decay=decay)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(out, [*x, bias, decay]), by_loop, rtol=1e-4, atol=1e-4)


def test_the_decay_of_two_keys_by_hand():
    """Keys of 4 days and of no time before the query: c days**beta is 0.5 * 2 for the older one."""
    times = torch.tensor([0, 4 * DAY])
    layout = BatchLayout(np.array([0, 2]), 2, CPU, times=times, query_times=times)
    q, v = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    out = attend(q, q, v, layout, 1, 0.0, decay=torch.tensor([0.5, 0.5]))
    assert float(out[1, 0]) == pytest.approx(exp(-1) / (1 + exp(-1)))


def test_the_gaps_of_two_sequences():
    times, query_times = torch.tensor([5, 9, 20, 0]), torch.tensor([9, 30, 18, 0])
    layout = BatchLayout(np.array([0, 2, 3]), 4, CPU, times=times, query_times=query_times)
    assert layout.newest_gaps.tolist() == [25, 21, -2, 0]
    assert layout.gaps(slice(2), slice(2)).tolist() == [[4, 0], [25, 21]]
    (gaps,) = (layout.buckets.gaps(i, slice(2), slice(2)) for i in range(len(layout.buckets.sizes)))
    assert gaps[0].tolist() == [[4, 0], [25, 21]]
    assert gaps[1, :1, :1].tolist() == [[-2]]


def test_a_gap_below_zero_does_not_decay():
    scores = decay_scores(torch.tensor([-5, 0, 9 * DAY]), torch.tensor([2.0, 0.5]))
    assert scores.tolist() == [0, 0, -6]


@directions
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_attention_of_the_newest_tokens_equals_the_plain_loop(causal, rows):
    lengths, heads = [17, 2, 33, 1, 64], 2
    layout = layout_of(lengths)
    q, x, _, bias, decay = (x.detach() for x in inputs(layout.num_tokens, 12, max(rows, 1), 70 if causal else 139))
    newest = layout.offsets_tensor[1:] - 1
    torch.manual_seed(0)
    key, value = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
    kind = {"causal": causal, "bias": bias if rows else None, "decay": decay}
    with torch.no_grad():
        expected = plain_attention(q, key(x), value(x), layout, heads, **kind)[newest]
        given = attend_newest_to(q[newest], key(x), value(x), layout, heads, **kind)
        made = attend_newest(q[newest], x, key, value, layout, heads, pad_keys=False, **kind)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@directions
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_the_gradients_of_torchs_forms_are_their_derivatives(causal, rows):
    layout = layout_of([3, 1, 6], dummies=1)
    *x, bias, decay = inputs(layout.num_tokens, 4, max(rows, 1), 6 if causal else 11, torch.float64)
    for function, place in ((attend, layout), (fused_attention, layout.buckets)):

        def attended(*x: Tensor, function=function, place=place) -> Tensor:
            return function(*x[:3], place, 2, 0.0, causal=causal, bias=x[4] if rows else None, decay=x[3])

        assert torch.autograd.gradcheck(attended, [*x, decay, *[bias] * bool(rows)])


@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sequence_is_not_changed_by_others_or_its_place(causal, dtype):
    lengths = [19, 6, 33]
    layout = layout_of(lengths, dummies=0)
    *x, _, decay = inputs(sum(lengths), 12, 1, 1, dtype)
    parts = [one.detach().split(lengths) for one in (*x, layout.times, layout.query_times)]

    def last_of(order: list[int], dummies: int) -> list[Tensor]:
        """Return the outputs and gradients of sequence 2."""
        offsets = np.append(0, np.cumsum([lengths[i] for i in order]))
        given = [torch.cat([*(part[i] for i in order), torch.ones_like(part[2][:dummies])]) for part in parts]
        moved = BatchLayout(offsets, int(offsets[-1]) + dummies, CPU, times=given[3], query_times=given[4])
        given = [one.requires_grad_() for one in given[:3]]
        out = attend(*given, moved, 2, 0.0, causal=causal, decay=decay)
        begin = offsets[order.index(2)]
        return [one[begin : begin + lengths[2]] for one in (out, *torch.autograd.grad(out.square().sum(), given))]

    expected = last_of([0, 1, 2], 0)
    for order, dummies in (([2, 0, 1], 0), ([2], 0), ([1, 2], 5), ([2, 2], 1)):
        for one, other in zip(last_of(order, dummies), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Exported(torch.nn.Module):
    """All forms of attention of a single sequence: all tokens, and the newest with its keys given and made."""

    def __init__(self, causal: bool, bias: Tensor | None, decay: Tensor):
        super().__init__()
        self.key, self.value = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        self.kind = causal, bias, decay

    def forward(self, q: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        layout = BatchLayout(None, x.shape[0], x.device, times=times, query_times=times + DAY)
        k, v, kind = self.key(x), self.value(x), dict(zip(("causal", "bias", "decay"), self.kind, strict=True))
        newest = attend_newest(q[-1:], x, self.key, self.value, layout, 2, pad_keys=False, **kind)
        return attend(q, k, v, layout, 2, 0.0, **kind), newest, attend_newest_to(q[-1:], k, v, layout, 2, **kind)


@directions
@pytest.mark.parametrize("rows", [0, 2])
def test_an_export_attends_within_its_one_sequence(causal, rows):
    torch.manual_seed(0)
    q, x, _, bias, decay = (x.detach() for x in inputs(9, 12, max(rows, 1), 9 if causal else 17))
    times = layout_of([9], dummies=0).times
    module = Exported(causal, bias if rows else None, decay)
    tokens = {0: torch.export.Dim("tokens", min=1, max=9)}
    exported = torch.export.export(module, (q[:5], x[:5], times[:5]), dynamic_shapes=(tokens,) * 3).module()
    for count in (1, 7, 9):
        own = times[:count]
        layout = BatchLayout(np.array([0, count]), count, CPU, times=own, query_times=own + DAY)
        with torch.no_grad():
            states, *newest = exported(q[:count], x[:count], own)
            keys, values = module.key(x[:count]), module.value(x[:count])
            kind = {"causal": causal, "bias": module.kind[1]}
            expected = plain_attention(q[:count], keys, values, layout, 2, decay, **kind)
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        for one in newest:
            torch.testing.assert_close(one, expected[-1:], rtol=1e-5, atol=1e-5)


# The kernel


@needs_compiler
@directions
def test_one_and_two_threads_give_the_same_bits(causal):
    layout, found = layout_of(LENGTHS[2]), []
    for count in (1, 2):
        torch.set_num_threads(count)  # the fixture sets it back
        torch.manual_seed(0)
        *x, bias, decay = inputs(layout.num_tokens, 24, 1, 64 if causal else 127)
        out = attend(*x, layout, 3, 0.2, causal=causal, bias=bias, decay=decay)
        found.append((out, *gradients(out, [*x, bias, decay])))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_compiler
def test_dropout_with_decay_has_the_gradients_of_its_mask():
    """By differences of c and beta: the same seed drops the same weights."""
    layout = layout_of([9, 4, 21])
    *x, _, decay = inputs(layout.num_tokens, 8, 1, 1)
    weights = torch.randn(layout.num_tokens, 8, generator=torch.Generator().manual_seed(9)).double()

    def total(decay: Tensor) -> Tensor:
        torch.manual_seed(5)
        return (attend(*x, layout, 1, 0.3, decay=decay) * weights).sum()

    (found,) = torch.autograd.grad(total(decay), decay)
    for place in range(2):
        step = torch.zeros(2)
        step[place] = 1 / 64
        with torch.no_grad():
            slope = (total(decay + step) - total(decay - step)) * 32
        assert float(found[place]) == pytest.approx(float(slope), rel=1e-2)


@needs_compiler
def test_a_decay_of_any_size_leaves_finite_numbers():
    times = torch.tensor([0, 10**9, 10**9 + 1, 0, 10**9])
    layout = BatchLayout(np.array([0, 3, 5]), 5, CPU, times=times, query_times=times + 1)
    q, k, v, _, _ = inputs(5, 4, 1, 1)
    for values in ([1e-30, 1e-30], [30.0, 1.0], [1e3, 40.0]):
        decay = torch.tensor(values, requires_grad=True)
        out = compiled_attention(q, k, v, layout, 1, 0.0, decay=decay)
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.square().sum(), (q, k, v, decay))))


@needs_compiler
def test_the_kernels_logarithms_of_days_are_right():
    times = torch.zeros(40, dtype=torch.int64)
    seconds = torch.cat([torch.arange(-3, 5), 3 ** torch.arange(1, 33)])
    layout = BatchLayout(np.array([0, 40]), 40, CPU, times=times, query_times=seconds)
    found = layout.pair_logarithms.view(40, 48)
    expected = (seconds.double() / DAY).log()[4:, None].expand(-1, 40)
    torch.testing.assert_close(found[4:, :40].double(), expected, rtol=2e-7, atol=2e-7)
    assert (found[:4] == -1e30).all()
    assert (found[:, 40:] == -1e30).all()
