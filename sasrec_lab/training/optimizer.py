"""An Adam for item tables so large that a batch touches few of their rows. V items, D dim, R rows touched."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor


class RowwiseAdam(torch.optim.Adam):
    """Adam that updates of a parameter with a sparse gradient only the rows in it; other parameters as Adam does.

    As torch.optim.SparseAdam and TensorFlow Addons' LazyAdam: a step that does not touch a row leaves the row and its
    momenta alone, where Adam would let the momenta decay and go on moving the row. The bias correction counts the
    table's steps, not the row's. So it is another optimiser than Adam, with the same first step.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_rows(parameter, group)
                    parameter.grad = None  # Adam passes over it
        super().step()
        return loss

    def _update_rows(self, table: Tensor, group: dict[str, Any]) -> None:
        gradient = table.grad.coalesce()
        rows, gradient = gradient.indices()[0], gradient.values()  # (R,), (R, D)
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        mean = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        size = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        vectors = table.index_select(0, rows).addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**step))
        table.index_copy_(0, rows, vectors)  # index_add_ takes ten times as long


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """Rises linearly to 1 over the warm-up, then falls to 0 on a cosine where `total_steps` says how many there are."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + cos(pi * min(1.0, done)))
