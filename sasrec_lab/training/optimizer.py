"""The optimizer and its learning-rate schedule, as a config asks for them. D dim, R rows touched."""

from collections.abc import Callable, Iterable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sasrec_lab.config.training import OptimizerConfig, OptimizerName


def build_optimizer(
    parameters: Iterable[nn.Parameter], cfg: OptimizerConfig, trainer_flags: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer of the config, fused if Lightning allows it."""
    is_mixed = "mixed" in str(trainer_flags.get("precision"))
    # Lightning cannot clip gradients of a fused optimizer under mixed precision
    fused = not (is_mixed and trainer_flags.get("gradient_clip_val"))
    return OPTIMIZERS[cfg.name](
        parameters, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay, fused=fused
    )


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, total_steps: float | None) -> LambdaLR:
    """Return the schedule of warm-up and cosine; `total_steps` is None without a cosine."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, cfg.warmup_steps, total_steps))


def learning_rate_factor(step: int, warmup_steps: int, total_steps: float | None) -> float:
    """Return a factor that rises linearly to 1 in warm-up, then falls to 0 on a cosine if `total_steps` is given."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + cos(pi * min(1.0, done)))


class RowwiseAdam(torch.optim.Adam):
    """Row-wise Adam for item tables of which a batch touches few rows.

    Of a parameter with a sparse gradient it updates only the rows in the gradient; other parameters are updated as by
    Adam. As in torch.optim.SparseAdam and TensorFlow Addons' LazyAdam, a step leaves untouched rows and their moments
    unchanged, whereas Adam would let the moments decay and keep moving the rows. The bias correction counts the steps
    of the table, not of the row. It is therefore not Adam, although the first step is the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; a closure, if given, computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_rows(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None  # so that Adam skips it
        super().step()
        return loss

    def _update_rows(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rows, gradient = grad.indices()[0], grad.values()  # (R,), (R, D)
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
        table.index_copy_(0, rows, vectors)  # much faster than index_add_


OPTIMIZERS = {
    OptimizerName.adam: torch.optim.Adam,
    OptimizerName.adamw: torch.optim.AdamW,
    OptimizerName.rowwise_adam: RowwiseAdam,
}
