"""Time the softmax loss with its gradients, by ours in both forms, by torch's own and by plain logits.

R labels, D dim, V items.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.check import Check, Row, Setting, attempt
from gpu.losses import in_chunks
from gpu.stopwatch import best_seconds, peak_mb
from sasrec_lab.ops.cross_entropy import linear_cross_entropy

LABELS, DIMS, ITEMS = 16_384, (64, 128), (3_416, 28_237, 1_000_000)
MAX_LOGITS = 2**32  # elements, with their gradients and softmax 48 GiB in float32


def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss by ops/cross_entropy.py."""
    weights = torch.full_like(targets, 1 / len(targets), dtype=torch.float32)
    return linear_cross_entropy(states, table, targets, weights)


def chunks(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss by the form in torch, which a GPU has for want of Triton kernels."""
    with in_chunks():
        return ours(states, table, targets)


def torchs(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss by torch's function that stores no logits."""
    return F.linear_cross_entropy(states, table, targets)  # type: ignore[attr-defined, unused-ignore]


def plain(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss by all logits (R, V)."""
    return F.cross_entropy(states @ table.T, targets)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "ours in chunks": chunks,
    "torch": torchs,
    "plain logits": plain,
}


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the milliseconds and memory of each form by dim, items and type."""
    labels, dims, catalogues = (64, (16,), (100, 500)) if setting.tiny else (LABELS, DIMS, ITEMS)
    for items in catalogues:
        for dim in dims:
            for dtype in (torch.float32, torch.bfloat16):
                for name, form in FORMS.items():
                    what = f"{name}, {items:,} items, dim {dim}, {str(dtype).removeprefix('torch.')}"
                    yield attempt(what, partial(_timed, form, labels, items, dim, dtype, setting))


def _timed(
    form: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: int,
    items: int,
    dim: int,
    dtype: torch.dtype,
    setting: Setting,
) -> Row:
    if form is torchs and not hasattr(F, "linear_cross_entropy"):
        return {"skipped": f"torch {torch.__version__} has no linear_cross_entropy"}
    if form is plain and labels * items > MAX_LOGITS:
        return {"skipped": "the logits do not fit"}
    device = setting.device
    states, table = (0.1 * torch.randn(size, dim, device=device) for size in (labels, items))
    targets = torch.randint(items, (labels,), device=device)
    if form is torchs:  # it does not take part in autocast
        states, table = states.to(dtype), table.to(dtype)
    x = states.requires_grad_(), table.requires_grad_()

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
            loss = form(*x, targets)
        torch.autograd.grad(loss, x)

    seconds, memory = best_seconds(step, device, repeats=2 if setting.tiny else 5), peak_mb(step, device)
    return {"ms": 1000 * seconds, "positions_per_s": labels / seconds, "peak_cuda_mb": memory}


CHECK = Check("loss speed", "the softmax loss by dim and items", 35, rows)
