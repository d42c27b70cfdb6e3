"""Inference through a transformer block, by a compiled kernel if there is one for this kind of block. D dim."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sasrec_lab.ops import library
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.library import ROW_MULTIPLE, Floats, Integers, check_shape, kernel

NORMS = ("sasrec", "pre", "post")  # in the order of cpp/block.cpp


@dataclass(frozen=True)
class BlockLayers:
    """The layers of a transformer block, and how they are put together."""

    norm: str  # one of NORMS: where the two layer norms are, as in model/transformer.py
    has_residual: bool
    heads: int
    pad_keys: bool  # whether the padding of short sequences is attended to
    is_relu: bool  # the feed-forward's activation
    attention_norm: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear | None  # after attention
    feed_forward_norm: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    causal: bool = True  # False: a token also attends to later ones
    has_bias: bool = False  # whether scores have a bias by distance or time


class KernelBlock(Protocol):
    """A block as a kernel sees it: its layers, and its plain form."""

    training: bool

    def layers(self) -> BlockLayers:
        """Return the layers, and how they are put together."""

    def transform(self, x: Tensor, layout: BatchLayout, newest: Tensor | None = None) -> Tensor:
        """Return the states of all tokens (T, D), or of each sequence's `newest` one (B, D)."""


def apply_block(block: KernelBlock, x: Tensor, layout: BatchLayout, newest: Tensor | None = None) -> Tensor:
    """Return `block.transform(x, layout, newest)`, by the kernel if it can; `block.layers()` gives its BlockLayers."""
    if not (block.training or torch.is_grad_enabled() or torch.compiler.is_exporting()):
        layers = block.layers()
        has_kernel = layers.heads == 1 and layers.is_relu and layers.causal
        has_kernel &= not layers.pad_keys and not layers.has_bias and layout.rotations is None
        if has_kernel and library.supports(x, layers.query.weight):
            return _block_compiled(layers, x, layout, newest is not None)
    return block.transform(x, layout, newest)


def _block_compiled(layers: BlockLayers, x: Tensor, layout: BatchLayout, only_newest: bool) -> Tensor:
    """Run some sequences at a time through the whole block in a core's own cache."""
    dim, width, sequences = x.shape[1], layers.inner.out_features, layout.num_sequences
    check_shape("x", x, layout.num_tokens, dim)
    out = x.new_empty(sequences if only_newest else layout.num_tokens, dim)
    if not only_newest:
        out[layout.num_real_tokens :] = 0
    kind = NORMS.index(layers.norm), int(layers.has_residual), float(layers.attention_norm.eps)
    with torch.autocast("cpu", enabled=False):
        parameters = _fold(layers)
    inputs_and_outputs = (1, dim), (dim, dim), (dim, dim), (1, dim), (dim, width), (width, dim)
    for rows, (inputs, outputs) in zip(parameters, inputs_and_outputs, strict=True):
        check_shape("parameters", rows, inputs + 1, outputs + -outputs % ROW_MULTIPLE)
    _block_kernel(x, layout.offsets_tensor, sequences, dim, width, *kind, *parameters, int(only_newest), out)
    return out


def _fold(layers: BlockLayers) -> list[Tensor]:
    """Return each layer's matrix (in, out) with its bias as the last row, in the order in which a token meets them.

    As in `attend_newest` the tokens themselves are compared and averaged, which saves a product for each token: the
    query's matrix includes the key's, and the value's includes the output's.
    """
    value = layers.value.weight.T, layers.value.bias
    if layers.output is not None:
        value = value[0] @ layers.output.weight.T, layers.output(value[1])
    matrices = [
        (layers.attention_norm.weight[None], layers.attention_norm.bias),
        (layers.query.weight.T @ layers.key.weight, layers.query.bias @ layers.key.weight),
        value,
        (layers.feed_forward_norm.weight[None], layers.feed_forward_norm.bias),
        (layers.inner.weight.T, layers.inner.bias),
        (layers.outer.weight.T, layers.outer.bias),
    ]
    rows = [torch.cat([matrix, bias[None]]) for matrix, bias in matrices]
    return [F.pad(x, (0, -x.shape[1] % ROW_MULTIPLE)) for x in rows]


@kernel
def _block_kernel(
    x: Floats,
    offsets: Integers,
    sequences: int,
    dim: int,
    width: int,
    norm: int,
    has_residual: int,
    eps: float,
    attention_norm: Floats,
    query: Floats,
    value: Floats,
    feed_forward_norm: Floats,
    inner: Floats,
    outer: Floats,
    only_newest: int,
    out: Floats,
) -> None:
    """Write the block's states, of all tokens or of each sequence's newest one, to `out`."""
