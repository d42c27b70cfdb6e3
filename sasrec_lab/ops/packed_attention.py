"""Attention over packed tokens in one launch, by two operators of torch: the form for GPUs.

Both have dropout and derivatives. They are private, so their arguments and what they do may change with any version:
`choose` compares the arguments with the operator's schema, and once in a process the results with those of
`bucketed_attention`. B sequences, T tokens, D dim, H heads, E columns of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops.buckets import bucketed_attention
from sasrec_lab.ops.layout import BatchLayout

WIDTH_MULTIPLE = 8  # a head's columns are filled up with zeros to a multiple, for aligned reads
MAX_SEQUENCES = 2**16 - 1  # of one launch
# Relative errors: rounding of the inputs is not among them. TF32 products would be off by 5e-4
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_PROBED_LENGTHS = (1, 17, 150, 3)
_PROBED_DUMMIES = 5
_PROBED_HEADS = 2


@dataclass(frozen=True)
class Operator:
    """An operator of torch that attends within the sequences of a packed batch."""

    function: str  # in torch.ops.aten
    dtypes: tuple[torch.dtype, ...]
    max_width: int  # columns of a head
    arguments: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, bool, float], dict[str, Any]]


def _flash_arguments(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, rate: float, causal: bool, scale: float
) -> dict[str, Any]:
    """Return the arguments of `_flash_attention_forward` by name."""
    lengths = {"cum_seq_q": offsets, "cum_seq_k": offsets, "max_q": longest, "max_k": longest}
    rule = {"dropout_p": rate, "is_causal": causal, "return_debug_mask": False, "scale": scale}
    return {"query": q, "key": k, "value": v} | lengths | rule


def _efficient_arguments(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, rate: float, causal: bool, scale: float
) -> dict[str, Any]:
    """Return the arguments of `_efficient_attention_forward` by name: a batch of one row with all sequences."""
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
    rule = {"dropout_p": rate, "custom_mask_type": int(causal), "scale": scale}
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    inputs = {"query": q[None], "key": k[None], "value": v[None], "bias": None}
    return inputs | lengths | rule | {"compute_log_sumexp": has_gradient}


_HALF = (torch.bfloat16, torch.float16)
OPERATORS = {  # the one that should be faster first
    "flash": Operator("_flash_attention_forward", _HALF, 256, _flash_arguments),
    "efficient": Operator("_efficient_attention_forward", (torch.float32, *_HALF), 1024, _efficient_arguments),
}


@dataclass(frozen=True)
class Choice:
    """The operator to use, or None for buckets, and why those before it were refused."""

    operator: str | None
    refused: str  # empty if none was

    def __str__(self) -> str:
        form = f"in one launch ({self.operator})" if self.operator else "in buckets"
        return f"{form}; {self.refused}" if self.refused else form


@cache
def choose(device: torch.device, dtype: torch.dtype, width: int) -> Choice:
    """Return the first operator that computes attention with heads of `width` columns as the buckets do."""
    refused: list[str] = []
    for name, operator in OPERATORS.items():
        if dtype in operator.dtypes and width <= operator.max_width:
            fault = _fault(name, device, dtype, width)
            if fault is None:
                return Choice(name, "; ".join(refused))
            refused.append(f"{name}: {fault}")
    return Choice(None, "; ".join(refused))


def describe(device: torch.device, width: int, has_bias: bool) -> str:
    """Return how `attend` computes with heads of `width` columns in the present context: dtype, autocast."""
    if has_bias:
        return "in buckets"
    return str(choose(device, computing_dtype(device, torch.get_default_dtype()), width))


def computing_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type that attention of tensors of this type is computed in: under autocast, autocast's."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def operator_for(q: Tensor, layout: BatchLayout, heads: int) -> str | None:
    """Return the name of the operator for queries (T, D), or None if they are not on a GPU or no operator suits."""
    if not q.is_cuda or len(layout.packed_offsets) > MAX_SEQUENCES:
        return None
    return choose(q.device, computing_dtype(q.device, q.dtype), q.shape[1] // heads).operator


def packed_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, heads: int, rate: float, *, causal: bool = True
) -> Tensor:
    """Return attention's output (T, D) as `attend` does without a bias, by the operator of this name."""
    dtype, width = computing_dtype(q.device, q.dtype), q.shape[1] // heads
    q, k, v = (_split_heads(x.to(dtype), heads) for x in (q, k, v))
    longest, scale = max(layout.longest, 1), 1 / sqrt(width)
    arguments = OPERATORS[name].arguments(q, k, v, layout.packed_offsets, longest, float(rate), causal, scale)
    out = _overload(name)(**arguments)[0]  # (T, H, E), of `efficient` (1, T, H, E)
    out = out.view(q.shape)[..., :width].flatten(1)
    return out * layout.is_real if layout.has_dummies else out


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Return the heads (T, H, E) of x (T, D), with zeros after their columns up to a multiple of WIDTH_MULTIPLE.

    The zeros change no score, and `packed_attention` cuts off what is made of them.
    """
    x = x.unflatten(1, (heads, -1))
    return F.pad(x, (0, -x.shape[2] % WIDTH_MULTIPLE)) if x.shape[2] % WIDTH_MULTIPLE else x


def _overload(name: str) -> Any:
    return getattr(torch.ops.aten, OPERATORS[name].function).default


def _fault(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return why an operator cannot be used, or None if it can: it is tried on a small example with gradients."""
    forked = [device] if device.type == "cuda" else []
    try:
        fault = schema_fault(name)
        if fault:
            return fault
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(forked),  # dropout must not move the numbers of the run
        ):
            return _difference(name, device, dtype, width)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # a private operator may raise any of them
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def schema_fault(name: str) -> str | None:
    """Return how the operator's schema differs from the arguments that are passed, or None."""
    empty = torch.empty(0)
    passed = OPERATORS[name].arguments(empty, empty, empty, empty, 1, 0.0, True, 1.0)
    declared = {argument.name: argument for argument in _overload(name)._schema.arguments}
    for argument in passed:
        if argument not in declared:
            return f"torch {torch.__version__} has no argument {argument}"
    for argument, declaration in declared.items():
        if argument not in passed and not declaration.has_default_value():
            return f"torch {torch.__version__} has a new argument {argument}"
    return None


def _difference(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return how outputs or gradients differ from those of `bucketed_attention` in double precision, or None."""
    ends = np.cumsum(_PROBED_LENGTHS)
    layout = BatchLayout(np.append(0, ends), int(ends[-1]) + _PROBED_DUMMIES, device)
    random = torch.Generator().manual_seed(0)
    size = layout.num_tokens, _PROBED_HEADS * width
    q, k, v, grad = (torch.randn(size, generator=random).to(device, dtype).requires_grad_() for _ in range(4))
    for causal in (True, False):
        out = packed_attention(name, q, k, v, layout, _PROBED_HEADS, 0.0, causal=causal)
        exact = bucketed_attention(
            q.double(), k.double(), v.double(), layout.buckets, _PROBED_HEADS, 0.0, causal=causal
        )
        expected = exact, *torch.autograd.grad(exact, (q, k, v), grad.double())
        for one, other in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), expected, strict=True):
            error = (one.double() - other.double()).norm() / other.norm()
            if not error <= MAX_ERROR[dtype]:
                return f"differs from buckets by {float(error.detach()):.0e}"
    out = packed_attention(name, q, k, v, layout, _PROBED_HEADS, 0.5)
    is_finite = all(bool(x.isfinite().all()) for x in (out, *torch.autograd.grad(out, (q, k, v), grad)))
    return None if is_finite else "not finite with dropout"
