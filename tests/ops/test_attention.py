"""Attention by the kernel and by torch against a plain loop over sequences and heads."""

import itertools
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec_lab.data.batches import pack
from sasrec_lab.ops import library
from sasrec_lab.ops.attention import attend, attend_newest, attend_newest_to, compiled_attention
from sasrec_lab.ops.backend import round_up_size
from sasrec_lab.ops.buckets import Buckets, bucketed_attention, fused_attention
from sasrec_lab.ops.layout import BatchLayout

LENGTHS = [[1], [6], [200], [3, 1, 7], [17, 2, 33, 16, 1, 64, 5], list(range(1, 60)), [2] * 40]
SIZES = [(12, 1), (50, 1), (64, 1), (64, 2), (10, 5), (24, 3), (128, 1), (3, 1)]
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")


def layout_of(lengths: list[int]) -> tuple[BatchLayout, int]:
    """Return a layout and its number of tokens, with dummies after the last sequence."""
    ends = np.cumsum(lengths)
    batch, _ = pack(ends - lengths, ends, np.arange(1, ends[-1] + 1))
    return BatchLayout(batch.offsets, len(batch.items), batch.items.device), len(batch.items)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    heads: int,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    begin = 0
    for length in lengths:
        for head, columns in enumerate(torch.arange(q.shape[1]).view(heads, -1)):
            for token in range(begin, begin + length):
                seen = slice(begin, token + 1 if causal else begin + length)
                scores = k[seen][:, columns] @ q[token, columns] / sqrt(len(columns))
                if bias is not None:
                    zero = 0 if causal else bias.shape[1] // 2
                    distances = [token - other for other in range(seen.start, seen.stop)]
                    scores = scores + bias[head % len(bias), [zero + distance for distance in distances]]
                out[token, columns] = scores.softmax(0) @ v[seen][:, columns]
        begin += length
    return out


def bias_of(rows: int, reach: int, causal: bool) -> Tensor:
    """Return a bias of a few units for distances below `reach`."""
    random = torch.Generator().manual_seed(4)
    return (2 * torch.randn(rows, reach if causal else 2 * reach - 1, generator=random)).requires_grad_()


def inputs(tokens: int, dim: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, dim, generator=random).requires_grad_() for _ in range(3)]


def gradients(out: Tensor, x: list[Tensor], tokens: int) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out * weights)[:tokens].sum(), x)


@pytest.mark.parametrize(("dim", "heads"), SIZES[:4])
@pytest.mark.parametrize("lengths", LENGTHS[:5], ids=str)
@directions
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_attention_equals_the_plain_loop(lengths, dim, heads, causal, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(library, "supports", lambda *tensors: False)
    layout, tokens = layout_of(lengths)
    x = inputs(tokens, dim)
    out = attend(*x, layout, heads, 0.0, causal=causal)
    expected = plain_attention(*x, lengths, heads, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(out, x, tokens), gradients(expected, x, tokens), rtol=1e-4, atol=1e-4)


@directions
@pytest.mark.parametrize(("dim", "heads", "rows"), [(12, 1, 1), (64, 2, 1), (64, 2, 2), (10, 5, 5)])
@pytest.mark.parametrize("lengths", [[1], [200], *LENGTHS[3:5]], ids=str)
@pytest.mark.parametrize("form", ["bucketed", "fused", pytest.param("compiled", marks=needs_compiler)])
def test_biased_attention_equals_the_plain_loop(lengths, dim, heads, rows, causal, form):
    layout, tokens = layout_of(lengths)
    x = [*inputs(tokens, dim), bias_of(rows, max(lengths) + 3, causal)]
    if form == "compiled":
        out = compiled_attention(*x[:3], layout, heads, 0.0, causal=causal, bias=x[3])
    else:
        function = {"bucketed": bucketed_attention, "fused": fused_attention}[form]
        out = function(*x[:3], layout.buckets, heads, 0.0, causal=causal, bias=x[3])
    expected = plain_attention(*x[:3], lengths, heads, causal=causal, bias=x[3])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(out, x, tokens), gradients(expected, x, tokens), rtol=1e-4, atol=1e-4)


def test_a_bias_selects_a_distance():
    """Scores are equal but for the bias: each token takes the value of the one two places before, or behind."""
    layout, tokens = layout_of([4, 3])
    q, v = torch.zeros(tokens, 2), torch.arange(2.0 * tokens).view(-1, 2)
    for causal, column, expected in (
        (True, 2, [0.0, 1.0, 0.0, 2.0, 8.0, 9.0, 8.0]),  # the mean of all where there is no such token
        (False, 5, [3.0, 3.0, 0.0, 2.0, 10.0, 10.0, 8.0]),
        (False, 1, [4.0, 6.0, 3.0, 3.0, 12.0, 10.0, 10.0]),
    ):
        bias = torch.zeros(1, 4 if causal else 7)
        bias[0, column] = 100
        out = attend(q, q, v, layout, 1, 0.0, causal=causal, bias=bias)
        assert out[:7, 0].tolist() == pytest.approx(expected)


@needs_compiler
@pytest.mark.parametrize(("rows", "columns"), [(2, 6), (3, 7), (1, 6)])
def test_a_bias_that_does_not_fit_is_an_error(rows, columns):
    layout, tokens = layout_of([7, 2])
    with pytest.raises(ValueError, match=f"bias \\({rows}, {columns}\\) does not fit 2 heads and .* 7 tokens"):
        attend(*inputs(tokens, 8), layout, 2, 0.0, bias=torch.zeros(rows, columns))


@pytest.mark.parametrize(("dim", "heads"), SIZES[:4])
@pytest.mark.parametrize("lengths", LENGTHS[:5], ids=str)
def test_attention_of_the_newest_tokens_equals_the_plain_loop(lengths, dim, heads):
    """With keys and values given, and with the matrices that make them."""
    layout, tokens = layout_of(lengths)
    q, x, _ = (x.detach() for x in inputs(tokens, dim))
    newest = layout.offsets_tensor[1:] - 1
    torch.manual_seed(0)
    key, value = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
    reach = max(lengths) + 3
    biases = [None, bias_of(1, reach, True), bias_of(heads, reach, True), bias_of(heads, reach, False)]
    for causal, bias in zip((True, True, True, False), biases, strict=True):
        kind = {"causal": causal, "bias": bias}
        with torch.no_grad():
            expected = plain_attention(q, key(x), value(x), lengths, heads, **kind)[newest]
            given = attend_newest_to(q[newest], key(x), value(x), layout, heads, **kind)
            made = attend_newest(q[newest], x, key, value, layout, heads, pad_keys=False, **kind)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("dim", "heads"), SIZES)
@directions
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)} of {max(x)}")
def test_compiled_attention_equals_the_bucketed_one(lengths, dim, heads, causal):
    layout, tokens = layout_of(lengths)
    x = inputs(tokens, dim)
    compiled, bucketed = (
        compiled_attention(*x, layout, heads, 0.0, causal=causal),
        bucketed_attention(*x, layout.buckets, heads, 0.0, causal=causal),
    )
    torch.testing.assert_close(compiled, bucketed, rtol=1e-5, atol=1e-5)
    # dummies get a gradient here, which must not reach any token
    weights = torch.randn(compiled.shape)
    for one, other in zip(
        torch.autograd.grad((compiled * weights).sum(), x),
        torch.autograd.grad((bucketed * weights).sum(), x),
        strict=True,
    ):
        assert (one - other).norm() <= 1e-5 * (other.norm() + 1)
    assert not compiled[layout.num_real_tokens :].any()
    with torch.no_grad():  # the kernel stores no weights
        assert torch.equal(compiled, compiled_attention(*x, layout, heads, 0.0, causal=causal))


@needs_compiler
def test_huge_negative_scores_still_give_weights():
    layout, tokens = layout_of([3, 2])
    q, k, v = inputs(tokens, 4)
    q, k = torch.full_like(q, 1e18), torch.full_like(k, -1e18)
    compiled, bucketed = (
        compiled_attention(q, k, v, layout, 1, 0.0),
        bucketed_attention(q, k, v, layout.buckets, 1, 0.0),
    )
    torch.testing.assert_close(compiled, bucketed)
    assert compiled[: layout.num_real_tokens].any(1).all()


@needs_compiler
def test_of_distant_scores_the_largest_gets_all_weight():
    layout, tokens = layout_of([20, 7])
    q, k, v = inputs(tokens, 20)
    compiled, bucketed = (
        compiled_attention(q * 1e9, k * 1e9, v, layout, 1, 0.0),
        bucketed_attention(q * 1e9, k * 1e9, v, layout.buckets, 1, 0.0),
    )
    torch.testing.assert_close(compiled, bucketed)


@directions
@pytest.mark.parametrize(("dim", "heads"), SIZES[:4])
def test_fused_attention_equals_the_bucketed_one(dim, heads, causal):
    layout, tokens = layout_of(LENGTHS[4])
    x = inputs(tokens, dim)
    forms = fused_attention, bucketed_attention
    fused, bucketed = (form(*x, layout.buckets, heads, 0.0, causal=causal) for form in forms)
    torch.testing.assert_close(fused, bucketed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(fused, x, tokens), gradients(bucketed, x, tokens), rtol=1e-4, atol=1e-4)


class Exported(torch.nn.Module):
    """All forms of attention of a single sequence: all tokens, and the newest with its keys given and made."""

    def __init__(self, causal: bool, bias: Tensor | None):
        super().__init__()
        self.key, self.value, self.kind = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12), (causal, bias)

    def forward(self, q: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        layout = BatchLayout(None, x.shape[0], x.device)
        k, v, kind = self.key(x), self.value(x), dict(zip(("causal", "bias"), self.kind, strict=True))
        newest = attend_newest(q[-1:], x, self.key, self.value, layout, 2, pad_keys=False, **kind)
        return attend(q, k, v, layout, 2, 0.0, **kind), newest, attend_newest_to(q[-1:], k, v, layout, 2, **kind)


@directions
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_an_export_attends_within_its_one_sequence(causal, rows):
    torch.manual_seed(0)
    bias = bias_of(rows, 9, causal).detach() if rows else None
    module, (q, x, _) = Exported(causal, bias), (x.detach() for x in inputs(9, 12))
    tokens = {0: torch.export.Dim("tokens", min=1, max=9)}
    exported = torch.export.export(module, (q[:5], x[:5]), dynamic_shapes=(tokens, tokens)).module()
    for count in (1, 7, 9):
        with torch.no_grad():
            states, *newest = exported(q[:count], x[:count])
            expected = plain_attention(
                q[:count], module.key(x[:count]), module.value(x[:count]), [count], 2, causal=causal, bias=bias
            )
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        for one in newest:
            torch.testing.assert_close(one, expected[-1:], rtol=1e-5, atol=1e-5)


@directions
def test_under_autocast_the_sums_are_in_full_precision(causal):
    layout, tokens = layout_of([30, 7])
    x = [one.detach().bfloat16() for one in inputs(tokens, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*x, layout, 2, 0.0, causal=causal)
        biased = attend(*x, layout, 2, 0.0, causal=causal, bias=bias_of(1, 30, causal))
    x = [one.float() for one in x]
    expected = plain_attention(*x, [30, 7], heads=2, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    expected = plain_attention(*x, [30, 7], heads=2, causal=causal, bias=bias_of(1, 30, causal))
    torch.testing.assert_close(biased, expected, rtol=1e-5, atol=1e-5)


FORMS = pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_compiler)], ids=str)


@directions
@pytest.mark.parametrize("heads", [1, 2])
def test_the_gradients_of_torchs_forms_are_their_derivatives(heads, causal):
    layout, tokens = layout_of([3, 1, 6])
    x = [one.detach().double().requires_grad_() for one in inputs(tokens, 4)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, layout, heads, 0.0, causal=causal), x)
    for rows in {1, heads}:
        bias = bias_of(rows, 6, causal).detach().double().requires_grad_()
        for function in (
            lambda *x: attend(*x[:3], layout, heads, 0.0, causal=causal, bias=x[3]),
            lambda *x: fused_attention(*x[:3], layout.buckets, heads, 0.0, causal=causal, bias=x[3]),
        ):
            assert torch.autograd.gradcheck(function, [*x, bias])


@directions
@FORMS
def test_a_sequence_is_not_changed_by_others_or_its_place(causal, dtype):
    """The last of three sequences, moved, without the others and with dummies, has the same outputs and gradients."""
    lengths = [19, 6, 33]
    x = [one.detach().to(dtype) for one in inputs(sum(lengths), 12)]
    parts = list(zip(*(one.split(lengths) for one in x), strict=True))
    bias = bias_of(2, 40, causal).detach().to(dtype)

    def last_of(order: list[int], dummies: int) -> list[Tensor]:
        """Return the outputs and gradients of sequence 2."""
        offsets = np.append(0, np.cumsum([lengths[i] for i in order]))
        layout = BatchLayout(offsets, int(offsets[-1]) + dummies, torch.device("cpu"))
        given = [torch.cat([*(parts[i][n] for i in order), torch.ones(dummies, 12, dtype=dtype)]) for n in range(3)]
        given = [one.requires_grad_() for one in given]
        out = attend(*given, layout, 2, 0.0, causal=causal, bias=bias)
        begin = offsets[order.index(2)]
        return [one[begin : begin + lengths[2]] for one in (out, *torch.autograd.grad(out.square().sum(), given))]

    expected = last_of([0, 1, 2], 0)
    for order, dummies in (([2, 0, 1], 0), ([2], 0), ([1, 2], 5), ([2, 2], 1)):
        for one, other in zip(last_of(order, dummies), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@directions
@FORMS
def test_who_attends_to_a_changed_token(causal, dtype):
    layout, tokens = layout_of([7, 9, 4])
    x = [one.detach().to(dtype) for one in inputs(tokens, 8)]
    before = attend(*x, layout, 2, 0.0, causal=causal)
    for one in x[1:]:  # key and value of the second sequence's token 5
        one[7 + 5] += 1
    changed = (attend(*x, layout, 2, 0.0, causal=causal) != before).any(1).nonzero()[:, 0].tolist()
    assert changed == list(range(7 + 5 if causal else 7, 7 + 9))


@needs_compiler
@directions
def test_one_and_two_threads_give_the_same_bits(causal):
    layout, tokens = layout_of(LENGTHS[4])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            x = [*inputs(tokens, 24), bias_of(1, 64, causal)]
            out = attend(*x[:3], layout, 3, 0.2, causal=causal, bias=x[3])
            found.append((out, *gradients(out, x, tokens)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_compiler
@directions
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_compiled_dropout_has_its_rate_and_follows_the_seed(rate, causal):
    lengths = [150] * 20
    layout, tokens = layout_of(lengths)
    q = k = torch.zeros(tokens, 32)  # all weights of a token are equal
    v = torch.ones(tokens, 32)
    torch.manual_seed(0)
    first, second = (attend(q, k, v, layout, 2, rate, causal=causal) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(attend(q, k, v, layout, 2, rate, causal=causal), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:150], first[150:300])  # sequences and heads have different masks
    assert not torch.equal(first[:, :16], first[:, 16:])
    share_kept = first[:3000, ::16] * (1 - rate)  # of the token's n weights
    n = torch.arange(1, 151).repeat(20)[:, None] if causal else torch.full((3000, 1), 150)
    kept = (share_kept * n).round()
    torch.testing.assert_close(share_kept * n, kept, rtol=1e-4, atol=1e-3)  # numbers of weights are integers
    draws = 2 * int(n.sum())
    assert abs(kept.sum() / draws - (1 - rate)) < 5 * sqrt(rate * (1 - rate) / draws)


@needs_compiler
@pytest.mark.parametrize("heads", [1, 2])
def test_masks_of_sequences_and_heads_are_independent(heads):
    """Also when one is shifted, because neighboring random generators may be shifted copies of each other."""
    length, count = 64, 6
    layout, _ = layout_of([length] * count)
    q = torch.zeros(length * count, length * heads)
    v = torch.eye(length).repeat(count, heads)  # the output is the weights that were used
    torch.manual_seed(0)
    kept = (attend(q, q, v, layout, heads, 0.5) > 0).view(count, length, heads, length).transpose(1, 2).flatten(0, 1)
    rows = torch.arange(48, length)  # whose first 48 weights are all drawn
    for one, other in itertools.combinations(range(len(kept)), 2):
        for lag in range(-16, 17):
            a, b = kept[one][rows, 16:32], kept[other][rows, 16 + lag : 32 + lag]
            assert abs((a == b).double().mean() - 0.5) < 5 * sqrt(0.25 / a.numel()), (one, other, lag)


@needs_compiler
@directions
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_compiled_dropout_has_the_gradients_of_its_mask(causal, biased):
    """The identity as v reveals the mask, with which a plain form in double precision is differentiated."""
    lengths, rate = [9, 4, 21], 0.3
    layout, tokens = layout_of(lengths)
    x = [*inputs(tokens, 8), bias_of(1, 21, causal)]
    bias = x[3] if biased else None
    torch.manual_seed(5)
    found = gradients(attend(*x[:3], layout, 1, rate, causal=causal, bias=bias), x[: 3 + biased], tokens)
    torch.manual_seed(5)
    eye = torch.zeros(tokens, tokens)
    eye[: layout.num_real_tokens, : layout.num_real_tokens] = torch.eye(layout.num_real_tokens)
    columns = []
    for part in eye.split(8, dim=1):  # the output is the used weights, a few columns at a time
        torch.manual_seed(5)
        values = torch.nn.functional.pad(part, (0, 8 - part.shape[1]))
        columns.append(attend(x[0], x[1], values, layout, 1, rate, causal=causal, bias=bias))
    used = torch.cat(columns, 1)[:, :tokens].detach()
    q, k, v, table = (one.detach().double().requires_grad_() for one in x)
    places = torch.arange(tokens)
    distances = places[:, None] - places + (0 if causal else 20)
    scores = q @ k.T / sqrt(8) + biased * table[0, distances.clamp(0, table.shape[1] - 1)]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for begin, end in zip(layout.offsets_tensor[:-1], layout.offsets_tensor[1:], strict=True):
        ones = torch.ones(end - begin, end - begin, dtype=torch.bool)
        seen[begin:end, begin:end] = ones.tril() if causal else ones
    weights = scores.masked_fill(~seen, -1e30).softmax(1) * seen
    expected = gradients((weights * (used > 0) / (1 - rate)) @ v, [q, k, v, table][: 3 + biased], tokens)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


# The buckets


@pytest.mark.parametrize(
    ("count", "longest"), [(1, 1), (1, 200), (2, 3), (7, 40), (33, 5), (64, 200), (129, 17), (500, 60)]
)
def test_cells_and_places_are_inverse(count, longest):
    lengths = np.random.default_rng(count).integers(1, longest + 1, count)
    offsets = np.append(0, np.cumsum(lengths))
    buckets = Buckets.from_offsets(offsets, offsets[-1], torch.device("cpu"))
    cells, places = buckets.cells.numpy(), buckets.places.numpy()
    assert len(cells) == sum(n * width for n, width in buckets.sizes)
    np.testing.assert_array_equal(cells[places], np.arange(lengths.sum()))
    assert len(np.unique(places)) == len(places)
    empty = np.ones(len(cells), dtype=bool)
    empty[places] = False
    assert not cells[empty].any()  # token 0 fills the remaining cells
    assert sorted(np.concatenate(buckets.members)) == list(range(count))
    begin = 0  # each sequence has its own row, oldest token first
    for (n, width), members, own in zip(buckets.sizes, buckets.members, buckets.lengths, strict=True):
        for row, (sequence, length) in enumerate(zip(members.tolist(), own.tolist(), strict=True)):
            assert length == lengths[sequence] <= width
            tokens = places[offsets[sequence] : offsets[sequence] + length]
            assert tokens.tolist() == list(range(begin + row * width, begin + row * width + length))
        assert len(members) <= n == round_up_size(n, steps_per_octave=2)
        begin += n * width


def test_the_buckets_of_three_sequences():
    buckets = Buckets.from_offsets(np.array([0, 2, 19, 21]), 21, torch.device("cpu"))
    assert buckets.sizes == [(2, 16), (1, 32)]
    assert buckets.cells.tolist() == [0, 1, *[0] * 14, 19, 20, *[0] * 14, *range(2, 19), *[0] * 15]
    assert buckets.places.tolist() == [0, 1, *range(32, 49), 16, 17]
