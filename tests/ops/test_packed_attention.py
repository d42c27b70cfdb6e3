"""Attention by torch's packed operators: their arguments, their use, and when buckets are used instead.

On a CPU other functions replace them; they run in tests/ops/test_cuda.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sasrec_lab.ops import attention, packed_attention
from sasrec_lab.ops.buckets import bucketed_attention
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.packed_attention import OPERATORS, Choice, choose, describe, schema_fault

CPU = torch.device("cpu")
OVERLOADS = {name: packed_attention._overload(name) for name in OPERATORS}
names = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True)
def fresh_choice():
    choose.cache_clear()
    yield
    choose.cache_clear()


def layout_of(lengths: list[int], dummies: int = 3, device: torch.device = CPU) -> BatchLayout:
    offsets = np.append(0, np.cumsum(lengths))
    return BatchLayout(offsets, int(offsets[-1]) + dummies, device)


def attended(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, rate: float, causal: bool, scale: float) -> Tensor:
    """Return attention within sequences for (T, H, E), one at a time; rows of no sequence are NaN, as in new memory."""
    out = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = scale * torch.einsum("ihe,jhe->hij", q[begin:end], k[begin:end])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        weights = torch.nn.functional.dropout(scores.softmax(-1), rate)
        out.append(torch.einsum("hij,jhe->ihe", weights, v[begin:end]))
    out.append(q.new_full((len(q) - int(offsets[-1]), *q.shape[1:]), float("nan")))
    return torch.cat(out)


def flash(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None
) -> tuple[Tensor, ...]:
    """Return what `_flash_attention_forward` does on a GPU."""
    check(cum_seq_q, cum_seq_k, max_q, max_k, query.shape[0])
    assert (query.shape[-1] % 8, return_debug_mask) == (0, False)
    return attended(query, key, value, cum_seq_q, dropout_p, is_causal, scale), torch.empty(0)


def efficient(
    query,
    key,
    value,
    bias,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    custom_mask_type,
    compute_log_sumexp=False,
    *,
    scale=None,
) -> tuple[Tensor, ...]:
    """Return what `_efficient_attention_forward` does on a GPU."""
    check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query.shape[1])
    assert (bias, query.shape[0], compute_log_sumexp) == (None, 1, query.requires_grad)
    out = attended(query[0], key[0], value[0], cu_seqlens_q, dropout_p, {0: False, 1: True}[custom_mask_type], scale)
    return out[None], torch.empty(0)


def check(q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int, tokens: int) -> None:
    assert (q_offsets.dtype, q_offsets.is_contiguous()) == (torch.int32, True)
    lengths = q_offsets.diff()
    assert q_offsets is k_offsets
    assert q_longest == k_longest <= tokens
    assert 0 < int(lengths.min()) <= int(lengths.max()) <= q_longest


FOR_CPU = {"flash": flash, "efficient": efficient}


def replace_operators(monkeypatch: pytest.MonkeyPatch, functions: dict[str, Callable[..., Any]]) -> None:
    def overload(name: str) -> Any:
        function = functions.get(name, OVERLOADS[name])
        replaced = SimpleNamespace(_schema=OVERLOADS[name]._schema)
        return type("Overload", (), {"__call__": lambda _, **x: function(**x), "_schema": replaced._schema})()

    monkeypatch.setattr(packed_attention, "_overload", overload)


@names
def test_the_installed_torch_has_the_arguments(name):
    assert schema_fault(name) is None


@names
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda x: x[:-1] if x[-1].name == "scale" else [a for a in x if a.name != "scale"], "has no argument scale"),
        (lambda x: [*x, SimpleNamespace(name="new", has_default_value=lambda: True)], None),
        (lambda x: [*x, SimpleNamespace(name="new", has_default_value=lambda: False)], "has a new argument new"),
    ],
    ids=["removed", "optional", "required"],
)
def test_other_arguments_are_noticed(name, change, fault, monkeypatch):
    schema = SimpleNamespace(arguments=change(list(OVERLOADS[name]._schema.arguments)))
    monkeypatch.setattr(packed_attention, "_overload", lambda name: SimpleNamespace(_schema=schema))
    assert schema_fault(name) == (fault and f"torch {torch.__version__} {fault}")


@names
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (64, 2), (50, 1), (10, 5)])
@pytest.mark.parametrize(
    ("lengths", "dummies"), [([1], 0), ([3, 1, 7], 3), ([0, 4, 0, 0, 2, 0], 1), ([2, 3], 11)], ids=str
)
def test_packed_attention_equals_the_bucketed_one(name, causal, dim, heads, lengths, dummies, monkeypatch):
    """Including empty sequences, more dummies than any sequence has tokens, and heads that are filled up."""
    replace_operators(monkeypatch, FOR_CPU)
    layout = layout_of(lengths, dummies)
    x = list(torch.randn(3, layout.num_tokens, dim, generator=torch.Generator().manual_seed(0)).requires_grad_())
    out = packed_attention.packed_attention(name, *x, layout, heads, 0.0, causal=causal)
    buckets = layout_of([length for length in lengths if length], dummies).buckets
    expected = bucketed_attention(*x, buckets, heads, 0.0, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert not out[layout.num_real_tokens :].any()
    grad = torch.randn(out.shape)
    pairs = zip(torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad), strict=True)
    for found, other in pairs:
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
        assert not found[layout.num_real_tokens :].any()


def test_offsets_include_dummies_and_no_empty_sequence():
    layout = layout_of([0, 3, 0, 2, 0], dummies=7)
    assert layout.packed_offsets.tolist() == [0, 3, 5, 8, 11, 12]
    assert layout.packed_offsets is layout.packed_offsets
    assert layout.is_real[:, 0].tolist() == [True] * 5 + [False] * 7
    assert layout_of([2, 2], dummies=0).packed_offsets.tolist() == [0, 2, 4]


def graph_of(node: Any) -> set[str]:
    """Return the names of the functions that autograd will differentiate."""
    if node is None:
        return set()
    return {type(node).__name__}.union(*(graph_of(earlier) for earlier, _ in node.next_functions))


@names
@pytest.mark.parametrize("width", [32, 50])
def test_operators_accept_the_arguments_of_a_gpu(name, width, monkeypatch):
    """By their meta kernels, as far as those of torch 2.13 accept autograd's own arguments: shapes without numbers."""
    monkeypatch.setattr(packed_attention, "computing_dtype", lambda device, dtype: dtype)  # meta has no autocast
    layout = layout_of([3, 1, 7])
    for tensor in ("packed_offsets", "is_real"):
        monkeypatch.setitem(layout.__dict__, tensor, getattr(layout, tensor).to("meta"))
    x = [torch.empty(14, 2 * width, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = packed_attention.packed_attention(name, *x, layout, 2, 0.2)
    assert f"{name.title()}AttentionBackward0" in graph_of(out.grad_fn)
    for found in (out, *(torch.autograd.grad(out, x, out) if name == "flash" else ())):
        assert (found.shape, found.dtype) == ((14, 2 * width), torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "first"),
    [(torch.float32, "efficient"), (torch.float16, "flash"), (torch.bfloat16, "flash"), (torch.float64, None)],
    ids=str,
)
def test_a_right_operator_is_chosen_by_type(dtype, first, monkeypatch):
    replace_operators(monkeypatch, FOR_CPU)
    assert choose(CPU, dtype, 25) == Choice(first, "")
    assert choose(CPU, dtype, 1025).operator is None


def raising(**arguments: Any) -> tuple[Tensor, ...]:
    raise RuntimeError("no kernel image\nmore lines")


def anti_causal(**arguments: Any) -> tuple[Tensor, ...]:
    return flash(**arguments | {"is_causal": not arguments["is_causal"]})


def without_gradient(**arguments: Any) -> tuple[Tensor, ...]:
    out, _ = flash(**arguments)
    return out + (arguments["query"] - arguments["query"].detach()), _


def not_finite_with_dropout(**arguments: Any) -> tuple[Tensor, ...]:
    out, _ = flash(**arguments)
    return out * (float("nan") if arguments["dropout_p"] else 1), _


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (raising, "flash: no kernel image"),
        (anti_causal, "flash: differs from buckets by "),
        (without_gradient, "flash: differs from buckets by "),
        (not_finite_with_dropout, "flash: not finite with dropout"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_wrong_operator_is_refused(wrong, reason, monkeypatch):
    replace_operators(monkeypatch, FOR_CPU | {"flash": wrong})
    found = choose(CPU, torch.bfloat16, 32)
    assert found.operator == "efficient"
    assert found.refused.startswith(reason)
    assert "\n" not in str(found)
    assert str(found).startswith(f"in one launch (efficient); {reason}")


def test_without_any_operator_buckets_remain(monkeypatch):
    replace_operators(monkeypatch, {"flash": raising, "efficient": raising})
    assert str(choose(CPU, torch.float16, 8)) == "in buckets; flash: no kernel image; efficient: no kernel image"
    monkeypatch.setattr(packed_attention, "_overload", lambda name: torch.ops.aten.no_such_operator.default)
    assert choose(CPU, torch.float32, 8).operator is None


def test_the_installed_operators_are_refused_on_a_cpu():
    assert choose(CPU, torch.float32, 8).operator is None


def test_the_choice_is_made_once_and_keeps_the_seed(monkeypatch):
    calls = []

    def counted(**arguments: Any) -> tuple[Tensor, ...]:
        calls.append(arguments["dropout_p"])
        return efficient(**arguments)

    replace_operators(monkeypatch, {"efficient": counted})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.inference_mode():  # as in a first validation
        for _ in range(2):
            assert choose(CPU, torch.float32, 8).operator == "efficient"
    assert torch.equal(torch.rand(4), expected)
    assert calls == [0.0, 0.0, 0.5]


def test_autocast_decides_the_type(monkeypatch):
    replace_operators(monkeypatch, FOR_CPU)
    layout = layout_of([3, 2])
    x = torch.randn(3, layout.num_tokens, 16).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention.packed_attention("flash", *x, layout, 1, 0.0).dtype is torch.bfloat16
        assert describe(CPU, 16, has_bias=False) == "in one launch (flash)"
    assert describe(CPU, 16, has_bias=False) == "in one launch (efficient)"
    assert describe(CPU, 16, has_bias=True) == "in buckets"


def test_attend_uses_the_operator_unless_there_is_a_bias(monkeypatch):
    class OnGpu(Tensor):
        """A tensor of the CPU that says it is on a GPU."""

        is_cuda = True

    replace_operators(monkeypatch, FOR_CPU)
    used = []

    def spy(name: str, *inputs: Any, causal: bool) -> Tensor:
        used.append(name)
        return real(name, *inputs, causal=causal)

    real = packed_attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", spy)
    layout = layout_of([3, 2])
    q, k, v = torch.randn(3, layout.num_tokens, 16).unbind()
    for bias in (None, torch.zeros(1, 3)):
        found = attention.attend(q.as_subclass(OnGpu), k, v, layout, 2, 0.0, bias=bias)
        expected = bucketed_attention(q, k, v, layout.buckets, 2, 0.0, bias=bias)
        torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=1e-5, atol=1e-6)
    assert used == ["efficient"]


def test_too_many_sequences_for_a_launch_are_left_to_buckets(monkeypatch):
    monkeypatch.setattr(packed_attention, "MAX_SEQUENCES", 2)
    monkeypatch.setattr(packed_attention, "choose", lambda *x: Choice("flash", ""))
    q = SimpleNamespace(is_cuda=True, device=CPU, dtype=torch.float32, shape=(5, 8))
    assert packed_attention.operator_for(q, layout_of([5], dummies=0), 1) == "flash"
    assert packed_attention.operator_for(q, layout_of([3, 2, 4]), 1) is None
