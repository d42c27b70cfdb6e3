"""Compare every form of attention with the plain formula in double precision, and its dropout with the rate.

T tokens, D dim, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import sqrt
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from gpu.check import Check, Row, Setting, attempt, relative_error
from sasrec_lab.ops import attention, library
from sasrec_lab.ops.attention import compiled_attention
from sasrec_lab.ops.buckets import bucketed_attention, fused_attention
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.packed_attention import MAX_ERROR, OPERATORS, packed_attention

SIZES = ((64, 1), (64, 2), (50, 1), (128, 2))  # dim, heads
DUMMIES = 9
RATE = 0.2
WIDTH = 64  # tokens of a sequence, and columns, of the measurement of dropout

Form = Callable[..., Tensor]


def forms(device: torch.device) -> dict[str, tuple[Form, tuple[torch.dtype, ...]]]:
    """Return each form of attention that a device may have, and the types that it is for."""
    every = torch.float32, torch.bfloat16
    found: dict[str, tuple[Form, tuple[torch.dtype, ...]]] = {
        "buckets": (partial(_in_buckets, fused_attention), every),
        "buckets by products": (partial(_in_buckets, bucketed_attention), every),
    }
    if device.type == "cuda":
        for name, operator in OPERATORS.items():
            found[name] = partial(packed_attention, name), tuple(x for x in every if x in operator.dtypes)
    elif library.library() is not None:
        found["compiled"] = compiled_attention, (torch.float32,)
    return found


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Make `attend` use the operator of this name on a GPU; "buckets" is not one."""
    with patch.object(attention, "operator_for", lambda *inputs: name if name in OPERATORS else None):
        yield


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the largest errors of each form and type, with a bias too, then what its dropout keeps and scales by."""
    lengths = (1, 3, 30) if setting.tiny else (1, 200, 3, 17, 64, 150, 33)
    for name, (form, dtypes) in forms(setting.device).items():
        for dtype in dtypes:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield attempt(what, partial(_errors, form, dtype, lengths, setting.device))
            if name not in OPERATORS:
                biased = partial(_errors, form, dtype, lengths, setting.device, has_bias=True)
                yield attempt(f"{what}, with a bias", biased)
            yield attempt(f"{what}, dropout {RATE}", partial(_dropout, form, dtype, setting))


def _in_buckets(
    function: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    rate: float,
    *,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    return function(q, k, v, layout.buckets, heads, rate, causal=causal, bias=bias)


def _errors(
    form: Form, dtype: torch.dtype, lengths: tuple[int, ...], device: torch.device, *, has_bias: bool = False
) -> Row:
    layout = BatchLayout(np.append(0, np.cumsum(lengths)), sum(lengths) + DUMMIES, device)
    outputs, gradients = [0.0], [0.0]
    random = torch.Generator().manual_seed(0)
    for dim, heads in SIZES:
        size = layout.num_tokens, dim
        *x, grad = (torch.randn(size, generator=random).to(device, dtype).requires_grad_() for _ in range(4))
        for causal in (True, False):
            bias, tensors = {}, x
            if has_bias:
                distances = layout.longest if causal else 2 * layout.longest - 1
                bias = {"bias": torch.randn(heads, distances, generator=random).to(device).requires_grad_()}
                tensors = [*x, bias["bias"]]
            out = form(*x, layout, heads, 0.0, causal=causal, **bias)
            exact = _plain(*(each.double() for each in x), layout, heads, causal, **bias)
            outputs.append(relative_error(out, exact))
            pairs = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(exact, tensors, grad.double())
            gradients += [relative_error(found, other.double()) for found, other in zip(*pairs, strict=True)]
    measured = {"output_error": max(outputs), "gradient_error": max(gradients), "allowed": MAX_ERROR[dtype]}
    is_right = max(*outputs, *gradients) <= MAX_ERROR[dtype]
    return measured if is_right else measured | {"failed": "differs from the plain formula"}


def _plain(
    q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, heads: int, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """Return attention by the full (H, T, T) scores; dummies get zeros. `bias` is as in `attend`."""
    real, tokens = layout.num_real_tokens, torch.arange(layout.num_tokens)
    owner = torch.searchsorted(layout.offsets_tensor, tokens, right=True).to(q.device)  # (T,)
    visible = (owner[:, None] == owner).tril() if causal else owner[:, None] == owner
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (H, T, D / H)
    scores = q @ k.mT / sqrt(q.shape[2])
    if bias is not None:
        distances = (tokens[:, None] - tokens + (0 if causal else bias.shape[1] // 2)).clamp(0, bias.shape[1] - 1)
        scores = scores + bias.double()[:, distances.to(q.device)]  # those of other sequences are not visible
    scores = scores.masked_fill(~visible, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out * (tokens < real).to(out)[:, None]


def _dropout(form: Form, dtype: torch.dtype, setting: Setting) -> Row:
    """Measure with equal scores and the identity as values: each output is a weight, 1 / WIDTH if nothing drops it."""
    sequences = 64 if setting.tiny else 512
    tokens = WIDTH * sequences
    layout = BatchLayout(np.arange(0, tokens + 1, WIDTH), tokens, setting.device)
    values = torch.eye(WIDTH, device=setting.device, dtype=dtype).repeat(sequences, 1)
    torch.manual_seed(0)
    out = form(torch.zeros_like(values), values, values, layout, 1, RATE, causal=False).float()
    kept = out[out > 0]
    rate, scale = len(kept) / out.numel(), float(kept.mean()) * WIDTH
    noise = 6 * sqrt(RATE * (1 - RATE) / out.numel())
    rounding = 2**-9  # in the form for CPUs a random byte decides, so that its rates are multiples of 1 / 256
    is_right = abs(rate - (1 - RATE)) < noise + rounding and abs(scale * (1 - RATE) - 1) < 0.01
    measured = {"kept": rate, "scaled_by": scale}
    return measured if is_right else measured | {"failed": f"keeps {rate:.4f} and scales by {scale:.4f}"}


CHECK = Check("attention", "attention against the plain formula", 25, rows)
