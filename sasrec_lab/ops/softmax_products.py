"""The softmax of items from states, and its products: in chunks by torch, by a kernel on a CPU, by Triton on a GPU.

`softmax_products` and `sampled_softmax_products` return log p(target) (T, 1), p @ table (T, D) and
p' @ (states * weights) (V, D), where p is the softmax of the logits. The logits of one chunk of tokens after another
are made, turned into probabilities and used for both products while they are in the cache. T tokens, D dim, V items, N
negatives, G groups of consecutive tokens.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from math import ceil
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops import library
from sasrec_lab.ops.library import Floats, Integers, check_range, check_shape, kernel

# Limits of one chunk of tokens, by who computes it. Torch's products are at full speed from a few hundred rows on. On
# the CPU 2**22 logits, 16 MiB, fit the last-level cache; the kernel writes and reads them once and needs half of that.
MAX_CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26, "compiled": 2**21, "compiled bfloat16": 2**22}
MAX_CHUNK_TOKENS = {"cpu": 512, "cuda": 2**20, "compiled": 512, "compiled bfloat16": 512}


class Mask(NamedTuple):
    """Rows of the table that do not count for the tokens of a group, except as a token's target."""

    rows: Tensor  # (G, M) int64, -1 for none
    owners: Tensor  # (T,) int64, ascending, always on the CPU: the group of each token

    def apply(self, logits: Tensor, chunk: slice, targets: Tensor) -> Tensor:
        """Set logits (t, V) of a chunk of tokens, whose targets are (t, 1), to -inf if they do not count."""
        owners = self.owners[chunk]
        first, last = owners[[0, -1]].tolist()
        is_masked = logits.new_zeros(last - first + 1, logits.shape[1] + 1, dtype=torch.bool)
        is_masked.scatter_(1, self.rows[first : last + 1] + 1, True)
        target_logits = logits.gather(1, targets)
        rows = (owners - first).to(logits.device, non_blocking=logits.is_cuda)
        logits.masked_fill_(is_masked[:, 1:][rows], float("-inf"))
        return logits.scatter_(1, targets, target_logits)


def describe(device: torch.device, dtype: torch.dtype, dim: int, *, is_sampled: bool, has_mask: bool) -> str:
    """Return in words who computes the products of states (T, D) on a device, for products in `dtype`."""
    states = torch.empty(1, dim, device=device)
    if _is_compiled(dtype, states):
        return "CPU kernel"
    return "Triton kernels" if _triton_form(states, states, dtype, is_sampled, has_mask) else "torch, in chunks"


def softmax_products(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    matmul_dtype: torch.dtype,
    mask: Mask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of the softmax over the table; `target_vectors` (T, D) are the table's rows `targets`."""
    masked = None if mask is None else (mask.rows, mask.owners, targets)
    if _is_compiled(matmul_dtype, states, table, target_vectors, weights):
        return _softmax_products_compiled(states, table, target_vectors, weights, matmul_dtype, masked=masked)
    if triton := _triton_form(states, table, matmul_dtype, is_sampled=False, has_mask=mask is not None):
        return triton.softmax_products(states, table, target_vectors, weights, matmul_dtype, masked=masked)

    def logits(h: Tensor, columns: Tensor, chunk: slice, out: Tensor) -> Tensor:
        out = write_product(h, columns, out)
        return out if mask is None else mask.apply(out, chunk, targets[chunk, None])

    return _softmax_products_torch(states, table, targets, weights, logits, matmul_dtype)


def sampled_softmax_products(
    states: Tensor,
    negatives: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    matmul_dtype: torch.dtype,
    shared: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of the softmax over the negatives and the target, whose logit is one more, last column.

    `shared` is (log weights (N,) to add to the negatives' logits, the column (T,) that does not count for each token).
    """
    tensors = states, target_vectors, negatives, weights, *(shared or ())[:1]
    if _is_compiled(matmul_dtype, *tensors):
        sampled = shared or (None, None)
        return _softmax_products_compiled(states, negatives, target_vectors, weights, matmul_dtype, sampled)
    if triton := _triton_form(states, negatives, matmul_dtype, is_sampled=True, has_mask=False):
        return triton.softmax_products(states, negatives, target_vectors, weights, matmul_dtype, shared or (None, None))
    target_logits = (states * target_vectors).sum(1)  # (T,)

    def logits(h: Tensor, columns: Tensor, chunk: slice, out: Tensor) -> Tensor:
        out = write_product(h, columns, out)
        if shared:
            out.add_(F.pad(shared[0], (0, 1))).scatter_(1, shared[1][chunk, None], float("-inf"))
        out[:, -1] = target_logits[chunk]
        return out

    table, targets = F.pad(negatives, (0, 0, 0, 1)), torch.full((len(states),), len(negatives), device=states.device)
    log_p, expected, table_grad = _softmax_products_torch(states, table, targets, weights, logits, matmul_dtype)
    return log_p, expected, table_grad[: len(negatives)]


def _is_compiled(matmul_dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Return whether a CPU kernel makes the products of these tensors."""
    if matmul_dtype == torch.bfloat16:
        return library.supports(*tensors) and has_bf16_products()
    return matmul_dtype == torch.float32 and library.supports(*tensors)


@cache
def has_bf16_products() -> bool:
    """Return whether the CPU has products of bfloat16 (AMX or AVX-512 BF16) that this process may use."""
    return library.library() is not None and _has_bf16_products_kernel() == 1


@kernel
def _has_bf16_products_kernel() -> int:  # type: ignore[empty-body]
    """Return 1 or 0."""


def _triton_form(
    states: Tensor, table: Tensor, matmul_dtype: torch.dtype, is_sampled: bool, has_mask: bool
) -> ModuleType | None:
    """Return the module of the kernels for a GPU, None if they cannot take these tensors."""
    triton = _import_triton_form() if states.is_cuda else None
    return triton if triton and triton.supports(states, table, matmul_dtype, is_sampled, has_mask) else None


@cache
def _import_triton_form() -> ModuleType | None:
    """Import the kernels on first use, because Triton takes long to import; None if it is not installed."""
    try:
        return import_module("sasrec_lab.ops.triton_softmax_products")
    except ImportError:
        return None


def _softmax_products_torch(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    weights: Tensor,
    logits: Callable[[Tensor, Tensor, slice, Tensor], Tensor],
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of the softmax of `logits(h, columns, chunk, out)`."""
    grad_dtype, table = table.dtype, table.detach().to(matmul_dtype)
    columns = table.T.contiguous()  # (D, V), because products are faster with table and gradient transposed
    columns_grad = torch.zeros_like(columns, dtype=grad_dtype)
    expected = torch.empty_like(states, dtype=matmul_dtype)
    precise = torch.promote_types(matmul_dtype, torch.float32)
    log_p = torch.empty_like(weights, dtype=precise)
    rows = chunk_tokens(len(states), len(table), "cuda" if states.is_cuda else "cpu")
    buffer = table.new_empty(rows, len(table), dtype=precise)  # one for all chunks, so that it stays in the cache
    for start in range(0, len(states), rows):
        chunk = slice(start, start + rows)
        h, target, weight = states[chunk].to(matmul_dtype), targets[chunk, None].contiguous(), weights[chunk]
        p = logits(h, columns, chunk, buffer[: len(h)])  # (rows, V)
        log_p[chunk] = softmax_and_log_p(p, target)
        p = p.to(matmul_dtype)
        torch.mm(p, table, out=expected[chunk])
        add_product(columns_grad, (h * weight.to(matmul_dtype)).T, p)
    return log_p, expected, columns_grad.T.contiguous()


def _softmax_products_compiled(
    states: Tensor,
    table: Tensor,
    target_vectors: Tensor,
    weights: Tensor,
    matmul_dtype: torch.dtype,
    sampled: tuple[Tensor | None, Tensor | None] | None = None,
    masked: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of the softmax over the table, by the kernel.

    `sampled` says that the table holds negatives: it is (log weights (N,), excluded columns (T,)) or two None, and the
    target is one more column. `masked` is a mask's rows and owners, and the targets (T,). Tokens of weight 0, dummies
    among them, are skipped.
    """
    (every, dim), items = states.shape, len(table)
    biases, excluded = sampled or (None, None)
    masked_rows, owners, targets = masked or (None, None, None)
    check_shape("table", table, items, dim)
    check_shape("target_vectors", target_vectors, every, dim)
    check_shape("weights", weights, every, 1)
    if biases is not None and excluded is not None:
        check_shape("log_weights", biases, items)
        check_shape("excluded_columns", excluded, every)
    if masked_rows is not None and owners is not None and targets is not None:
        check_shape("owners", owners, every)
        check_shape("targets", targets, every)
        check_range("owners", owners, 0, len(masked_rows) - 1)
    real = weights[:, 0].nonzero().squeeze(1)
    tokens = len(real)
    if tokens < every:
        states, target_vectors, weights = states[real], target_vectors[real], weights[real]
        excluded, owners, targets = (None if x is None else x[real] for x in (excluded, owners, targets))
    log_p, expected, table_grad = torch.empty_like(weights), torch.empty_like(states), torch.empty_like(table)
    if tokens:
        width = 0 if masked_rows is None else masked_rows.shape[1]
        scored = states, tokens, dim, table, items, biases, excluded, target_vectors, int(sampled is not None)
        inputs = *scored, masked_rows, owners, targets, width, weights
        outputs = log_p, expected, table_grad
        if matmul_dtype == torch.bfloat16:
            rows = ceil(chunk_tokens(tokens, items, "compiled bfloat16") / 32) * 32  # whole blocks
            _softmax_products_bf16_kernel(*inputs, rows, *outputs)
        else:
            rows = ceil(chunk_tokens(tokens, items, "compiled") / 16) * 16  # whole registers
            _softmax_products_kernel(*inputs, rows, *outputs)
    else:
        table_grad.zero_()
    if tokens < every:
        log_p, expected = (x.new_zeros(every, x.shape[1]).index_copy_(0, real, x) for x in (log_p, expected))
    return log_p, expected, table_grad


@kernel
def _softmax_products_kernel(
    states: Floats,
    tokens: int,
    dim: int,
    table: Floats,
    items: int,
    biases: Floats | None,
    excluded: Integers | None,
    target_vectors: Floats,
    has_target_column: int,
    masked: Integers | None,
    owners: Integers | None,
    targets: Integers | None,
    width: int,
    weights: Floats,
    rows: int,
    log_p: Floats,
    expected: Floats,
    table_grad: Floats,
) -> None:
    """Write the three products, computing `rows` tokens at a time."""


@kernel
def _softmax_products_bf16_kernel(
    states: Floats,
    tokens: int,
    dim: int,
    table: Floats,
    items: int,
    biases: Floats | None,
    excluded: Integers | None,
    target_vectors: Floats,
    has_target_column: int,
    masked: Integers | None,
    owners: Integers | None,
    targets: Integers | None,
    width: int,
    weights: Floats,
    rows: int,
    log_p: Floats,
    expected: Floats,
    table_grad: Floats,
) -> None:
    """Write the three products, each of numbers rounded to bfloat16, computing `rows` tokens at a time."""


def softmax_and_log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (R, V) into probabilities in place; return log p (R, 1) of the targets (R, 1), however small p is.

    In single precision `_softmax_products_compiled` replaces this; the kernel here serves float32 logits of products in
    lower precision.
    """
    return (_softmax_and_log_p_compiled if library.supports(logits) else _softmax_and_log_p_torch)(logits, targets)


def _softmax_and_log_p_compiled(logits: Tensor, targets: Tensor) -> Tensor:
    check_shape("targets", targets, len(logits), 1)
    log_p = logits.new_empty(len(logits), 1)
    _softmax_and_log_p_kernel(logits, *logits.shape, targets, log_p)
    return log_p


def _softmax_and_log_p_torch(logits: Tensor, targets: Tensor) -> Tensor:
    target_logits, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    p = torch.softmax(logits, 1, out=logits)
    return target_logits - largest + p.amax(1, keepdim=True).log()


@kernel
def _softmax_and_log_p_kernel(logits: Floats, rows: int, columns: int, targets: Integers, log_p: Floats) -> None:
    """Overwrite the logits with their softmax, and write log p of the targets."""


def write_product(states: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Write a chunk's logits, states @ columns, to `out`, which may be of a wider type."""
    return torch.mm(states, columns, out=out) if out.dtype == states.dtype else out.copy_(states @ columns)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def chunk_tokens(tokens: int, items: int, form: str) -> int:
    """Return the tokens per chunk; all chunks have about as many, which keeps tensor shapes few."""
    most = min(max(16, MAX_CHUNK_LOGITS[form] // items), MAX_CHUNK_TOKENS[form])
    return ceil(tokens / ceil(tokens / most))
