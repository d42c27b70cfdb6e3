"""Self-attention over packed tokens, causal or bidirectional. B sequences, T tokens, D dim, H heads."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.ops import library
from sasrec_lab.ops.buckets import bucketed_attention, by_offset, fused_attention, newest_attention, past_of
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.library import ROW_MULTIPLE, Floats, Integers, check_shape, kernel
from sasrec_lab.ops.packed_attention import operator_for, packed_attention
from sasrec_lab.ops.time_decay import decay_scores


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    rate: float,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k' / sqrt(D / H) + bias + decay) v within each sequence.

    A token attends to itself and earlier ones if `causal`, else to all tokens of its sequence. `rate` is the dropout on
    the weights. Dummy tokens after the last sequence get zeros.

    Column i - j of `bias` (H or 1, n) is added to the scores of query i and key j if `causal`, else column
    i - j + n - 1 of `bias` (H or 1, 2n - 1). A single row is for all heads. No sequence may be longer than n.

    With `decay` (2,), c and beta above 0, the scores of all heads get - c days**beta, where days is the time from key j
    to the query time of i, zero if that is earlier. The layout has the times.
    """  # all (T, D)
    if torch.compiler.is_exporting():
        decays = None if decay is None else decay_scores(layout.gaps(slice(None), slice(None)), decay)
        return attend_single_sequence(q, k, v, heads, causal=causal, bias=bias, decays=decays)
    if q.is_cuda:
        operator = None if bias is not None or decay is not None else operator_for(q, layout, heads)
        if operator:
            return packed_attention(operator, q, k, v, layout, heads, rate, causal=causal)
        return fused_attention(q, k, v, layout.buckets, heads, rate, causal=causal, bias=bias, decay=decay)
    if q.dtype == torch.bfloat16:  # under autocast: float32 is faster here and has a kernel
        q, k, v = q.float(), k.float(), v.float()
    if library.supports(q):
        return compiled_attention(q, k, v, layout, heads, rate, causal=causal, bias=bias, decay=decay)
    return bucketed_attention(q, k, v, layout.buckets, heads, rate, causal=causal, bias=bias, decay=decay)


def attend_with_padding(
    q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, heads: int, rate: float, pad_key: Tensor, pad_value: Tensor
) -> Tensor:
    """Return causal `attend` in left-padded rows, whose padding has this key (D,) and value (D,) and is attended to."""
    rows = layout.padded_rows
    q, k, v = rows.fill(q, torch.zeros_like(pad_key)), rows.fill(k, pad_key), rows.fill(v, pad_value)
    return rows.take(attend(q, k, v, rows.layout, heads, rate))


def attend_newest(
    q: Tensor,
    x: Tensor,
    key: nn.Linear,
    value: nn.Linear,
    layout: BatchLayout,
    heads: int,
    pad_keys: bool,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return what `attend` gives each sequence's newest token, for its query q (B, D), k = key(x) and v = value(x).

    As keys and values are linear in the tokens' states x (T, D), the states themselves are compared and averaged, and
    the two matrices applied to the query and to the average: two products less for each token. The key's bias adds the
    same to all scores of a query, which the softmax ignores. The newest token attends to all others, so `causal` only
    tells what the columns of `bias` are. With `pad_keys` as in `attend_with_padding`, where the padding's states are
    zero; it has no times. Without dropout.
    """  # (B, D)
    if pad_keys:
        x, layout = layout.padded_rows.fill(x, torch.zeros_like(x[0])), layout.padded_rows.layout
    shape = (heads, q.shape[1] // heads)
    q = q.unflatten(1, shape)  # (B, H, D / H)
    q = torch.einsum("bhd,hde->bhe", q, key.weight.unflatten(0, shape))  # (B, H, D)
    x = x.to(q.dtype)
    past = None if bias is None else past_of(bias, causal)
    mean = _attend_newest(q.contiguous()[:, None], x, x, layout, 1 / sqrt(shape[1]), past, decay)[:, 0]  # (B, H, D)
    values = torch.einsum("bhe,hde->bhd", mean, value.weight.unflatten(0, shape))  # (B, H, D / H)
    return values.flatten(1) + value.bias


def attend_newest_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return what `attend` gives each sequence's newest token, for its query q (B, D), keys and values (T, D).

    For keys that `attend_newest` cannot make from the states, such as rotated ones. Without dropout.
    """  # (B, D)
    q = q.unflatten(1, (heads, 1, -1))  # (B, H, 1, D / H)
    past = None if bias is None else past_of(bias, causal)
    return _attend_newest(q, k.to(q.dtype), v.to(q.dtype), layout, 1 / sqrt(q.shape[-1]), past, decay).flatten(1)


def _attend_newest(
    q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, scale: float, past: Tensor | None, decay: Tensor | None
) -> Tensor:
    """Return `newest_attention`, in an export for the tokens of a single sequence."""
    decays = None if decay is None else decay_scores(layout.newest_gaps, decay)  # (T,)
    if torch.compiler.is_exporting():
        k, v = (x.unflatten(1, (q.shape[1], -1)).transpose(0, 1) for x in (k, v))  # (G, T, E)
        biases = None if decays is None else decays[None]  # (1, T)
        if past is not None:
            ages = torch.arange(k.shape[1], device=q.device).flip(0)
            biases = past.index_select(1, ages).expand(q.shape[1] * q.shape[2], -1).unflatten(0, q.shape[1:3])
            biases = biases if decays is None else biases + decays
        return F.scaled_dot_product_attention(q, k[None], v[None], biases, scale=scale)
    return newest_attention(q, k, v, layout.buckets, scale, past, decays)


def attend_single_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decays: Tensor | None = None,
) -> Tensor:
    """Return `attend` for tokens of a single sequence, by torch's own function, which an export can write to a file.

    `decays` (T, T) are added to the scores.
    """
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))  # (H, T, D / H)
    places = torch.arange(q.shape[1], device=q.device)
    distances = places[:, None] - places  # (T, T)
    biases = decays
    if bias is not None:
        biases = bias[:, distances.clamp(min=0) if causal else distances + bias.shape[1] // 2]
        biases = biases if decays is None else biases + decays
    if biases is not None and causal:
        biases = biases.masked_fill(distances < 0, float("-inf"))
    # ONNX takes a batch of sequences only
    batch = F.scaled_dot_product_attention(q[None], k[None], v[None], biases, is_causal=causal and biases is None)
    return batch[0].transpose(0, 1).flatten(1)


# The kernel, for float32 on the CPU


def compiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    heads: int,
    rate: float,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """Return `attend` by the kernel: one sequence and head at a time in a core's own cache.

    Nothing is computed for tokens that a token does not attend to, and nothing is copied into another shape. Reference:
    `bucketed_attention`.
    """
    biases = None if bias is None else _bias_rows(bias, causal, layout.longest, heads, sqrt(q.shape[1] // heads))
    return _CompiledAttention.apply(q, k, v, layout, heads, rate, causal, biases, decay)


def _bias_rows(bias: Tensor, causal: bool, longest: int, heads: int, unit: float) -> Tensor:
    """Return the rows (H, columns) that cpp/attention.cpp reads, for a bias as in `attend`, times `unit`."""
    width = bias.shape[1] if causal else (bias.shape[1] + 1) // 2
    if longest > width or bias.shape[0] not in (1, heads):
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit {heads} heads and sequences of {longest} tokens")
    rows = by_offset(bias.float() * unit, causal, width)
    return F.pad(rows, (0, ROW_MULTIPLE)).expand(heads, -1).contiguous()  # the kernel reads a register beyond the last


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BatchLayout,
        heads: int,
        rate: float,
        causal: bool,
        biases: Tensor | None,
        decay: Tensor | None,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_shape(name, x, layout.num_tokens, q.shape[1])
        offsets, sequences = layout.offsets_tensor, layout.num_sequences
        ctx.layout = layout
        ctx.sizes = sequences, q.shape[1], heads, int(causal), 1 / sqrt(q.shape[1] // heads), float(rate)
        ctx.bias_sizes = (0, 0) if biases is None else (biases.shape[1], (biases.shape[1] - ROW_MULTIPLE) // 2)
        ctx.decay = (None, 0.0, 0.0) if decay is None else (layout.pair_logarithms, *decay.tolist())
        out = torch.empty_like(q)
        out[layout.num_real_tokens :] = 0
        weights = None  # only a backward pass uses them
        if any(ctx.needs_input_grad):
            weights = q.new_empty(heads * _weights_size_kernel(offsets, sequences))
        seed = int(torch.randint(2**62, ())) if rate else 0  # follows torch's own seed
        _attention_kernel(q, k, v, offsets, *ctx.sizes, biases, *ctx.bias_sizes, *ctx.decay, seed, out, weights)
        ctx.save_for_backward(q, k, v, out, weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, weights = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for x in grads:
            x[ctx.layout.num_real_tokens :] = 0
        heads, scale, columns = ctx.sizes[2], ctx.sizes[4], ctx.bias_sizes[0]
        biases = q.new_zeros(heads, columns) if columns else None
        decay = None if ctx.decay[0] is None else q.new_empty(2)
        offsets, grad = ctx.layout.offsets_tensor, grad.contiguous()
        added = biases, *ctx.bias_sizes, *ctx.decay
        _attention_backward_kernel(q, k, v, out, grad, weights, offsets, *ctx.sizes, *added, *grads, decay)
        return *grads, None, None, None, None, None if biases is None else biases.mul_(scale), decay


@kernel
def _weights_size_kernel(offsets: Integers, sequences: int) -> int:  # type: ignore[empty-body]
    """Return the number of floats that `weights` has for each head."""


@kernel
def _attention_kernel(
    q: Floats,
    k: Floats,
    v: Floats,
    offsets: Integers,
    sequences: int,
    dim: int,
    heads: int,
    causal: int,
    scale: float,
    rate: float,
    biases: Floats | None,
    columns: int,
    reach: int,
    logarithms: Floats | None,
    c: float,
    beta: float,
    seed: int,
    out: Floats,
    weights: Floats | None,
) -> None:
    """Write attention's output to `out` and, if given, the softmax to `weights`."""


@kernel
def _attention_backward_kernel(
    q: Floats,
    k: Floats,
    v: Floats,
    out: Floats,
    grad: Floats,
    weights: Floats,
    offsets: Integers,
    sequences: int,
    dim: int,
    heads: int,
    causal: int,
    scale: float,
    rate: float,
    biases_grad: Floats | None,
    columns: int,
    reach: int,
    logarithms: Floats | None,
    c: float,
    beta: float,
    q_grad: Floats,
    k_grad: Floats,
    v_grad: Floats,
    decay_grad: Floats | None,
) -> None:
    """Write the gradients of q, k and v and of the decay, and add those of the biases."""
