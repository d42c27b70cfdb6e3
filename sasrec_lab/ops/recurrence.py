"""A recurrent layer over packed tokens, which it takes by step. B sequences, T tokens, D dim, L steps.

N is the number of tokens in sequences, without dummies.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Steps:
    """The tokens of all sequences by step, and within a step by the length of their sequences, longest first.

    So the sequences that have a further token are always the first ones, which is the order of torch's PackedSequence.
    """

    tokens: Tensor  # (N,) the token at each place
    places: Tensor  # (N,) the place of each token
    sizes: Tensor  # (L,) number of sequences with a token at this step, on the CPU
    num_tokens: int  # T, including those of no sequence

    @staticmethod
    def from_offsets(offsets: np.ndarray, num_tokens: int, device: torch.device) -> "Steps":
        """Order the tokens of sequences with these offsets (B + 1,)."""
        lengths = np.diff(offsets)
        order = np.argsort(-lengths, kind="stable")
        has_token = np.arange(lengths.max())[:, None] < lengths[order]  # (L, B)
        steps, ranks = has_token.nonzero()
        tokens = offsets[:-1][order][ranks] + steps
        places = np.empty_like(tokens)
        places[tokens] = np.arange(len(tokens))
        return Steps(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(places).to(device),
            torch.from_numpy(has_token.sum(1)),
            num_tokens,
        )


def run_gru(layer: nn.GRU, x: Tensor, steps: Steps) -> Tensor:
    """Return the states (T, D) of a GRU of one layer for the tokens x (T, D), zeros after the last sequence.

    A GPU runs it by cuDNN. On a CPU the backward pass of torch's own GRU fills a gradient of all tokens at every step,
    which makes its time proportional to tokens times steps; `_GRU` does not.
    """
    rows = x.index_select(0, steps.tokens)  # (N, D)
    if x.is_cuda:
        states = layer(PackedSequence(rows, steps.sizes))[0].data
    else:
        with torch.autocast(x.device.type, enabled=False):
            states = _GRU.apply(rows, *layer.parameters(), steps.sizes.tolist())
    return F.pad(states.index_select(0, steps.places), (0, 0, 0, steps.num_tokens - len(rows)))


class _GRU(torch.autograd.Function):
    """torch's GRU (its documentation has the equations) on tokens by step; gates are in torch's order r, z, n."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_weight: Tensor, weight: Tensor, input_bias: Tensor, bias: Tensor, sizes: list[int]
    ) -> Tensor:
        dim = weight.shape[1]
        inputs = torch.addmm(input_bias, x, input_weight.T)  # (N, 3D)
        gates, states = torch.empty_like(inputs), inputs.new_empty(len(x), dim)
        previous = torch.empty_like(states)  # the state before each token
        candidates = torch.empty_like(states)  # that state's part of n, before r
        state = inputs.new_zeros(sizes[0], dim)
        for rows, size in _slices(sizes):
            previous[rows] = state[:size]
            own = torch.addmm(bias, state[:size], weight.T)
            r_z, n = gates[rows, : 2 * dim], gates[rows, 2 * dim :]
            torch.add(inputs[rows, : 2 * dim], own[:, : 2 * dim], out=r_z).sigmoid_()
            candidates[rows] = own[:, 2 * dim :]
            torch.addcmul(inputs[rows, 2 * dim :], r_z[:, :dim], candidates[rows], out=n).tanh_()
            state = torch.lerp(n, state[:size], r_z[:, dim:], out=states[rows])
        ctx.sizes = sizes
        ctx.save_for_backward(x, input_weight, weight, gates, candidates, previous)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, input_weight, weight, gates, candidates, previous = ctx.saved_tensors
        dim = weight.shape[1]
        input_grads, own_grads = torch.empty_like(gates), torch.empty_like(gates)
        later = previous.new_zeros(ctx.sizes[0], dim)  # the gradient of a step's states from the next step
        for rows, size in reversed(_slices(ctx.sizes)):
            r_z, n = gates[rows, : 2 * dim], gates[rows, 2 * dim :]
            r, z = r_z[:, :dim], r_z[:, dim:]
            state_grad = grad[rows] + later[:size]
            n_grad = torch.ops.aten.tanh_backward(state_grad * (1 - z), n)
            r_z_grad = torch.cat([n_grad * candidates[rows], state_grad * (previous[rows] - n)], 1)
            r_z_grad = torch.ops.aten.sigmoid_backward(r_z_grad, r_z)
            torch.cat([r_z_grad, n_grad], 1, out=input_grads[rows])
            torch.cat([r_z_grad, n_grad * r], 1, out=own_grads[rows])
            later[:size] = torch.addmm(state_grad * z, own_grads[rows], weight)
        return (
            input_grads @ input_weight,
            input_grads.T @ x,
            own_grads.T @ previous,
            input_grads.sum(0),
            own_grads.sum(0),
            None,
        )


def _slices(sizes: list[int]) -> list[tuple[slice, int]]:
    """Return the places of each step, and their number."""
    ends = np.cumsum(sizes).tolist()
    return [(slice(end - size, end), size) for end, size in zip(ends, sizes, strict=True)]
