"""The optimizer and its learning-rate schedule, as a config asks for them. D dim, R rows touched."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sasrec_lab.config.training import OptimizerConfig, OptimizerName, Schedule
from sasrec_lab.model.encoder import Encoder

IS_MATRICES = "is_matrices"  # key of a group of parameters that Muon updates


def build_optimizer(encoder: Encoder, cfg: OptimizerConfig, trainer_flags: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the optimizer of the config, fused if Lightning allows it."""
    is_mixed = "mixed" in str(trainer_flags.get("precision"))
    # Lightning cannot clip gradients of a fused optimizer under mixed precision
    fused = not (is_mixed and trainer_flags.get("gradient_clip_val"))
    groups = parameter_groups(encoder, cfg)
    return OPTIMIZERS[cfg.name](groups, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay, fused=fused)


def parameter_groups(encoder: Encoder, cfg: OptimizerConfig) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return all parameters, in groups if they are treated differently: item tables, matrices of blocks, and the rest.

    The rest comes first, so that its learning rate is the one that is logged, and the matrices last.
    """
    tables: list[nn.Parameter] = []
    if cfg.lr_items is not None:
        tables = list(dict.fromkeys([*encoder.input_items.parameters(), *encoder.output_items.parameters()]))
    matrices: list[Tensor] = []
    if cfg.name is OptimizerName.muon:
        matrices = [layer.weight for layer in encoder.blocks.modules() if isinstance(layer, nn.Linear)]
    if not tables and not matrices:
        return list(encoder.parameters())
    special = {id(parameter) for parameter in (*tables, *matrices)}
    groups: list[dict[str, Any]] = [{"params": [x for x in encoder.parameters() if id(x) not in special]}]
    groups += [{"params": tables, "lr": cfg.lr_items}] if tables else []
    groups += [{"params": matrices, IS_MATRICES: True}] if matrices else []
    return groups


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, total_steps: float | None) -> LambdaLR:
    """Return warm-up and schedule; `total_steps` is None for a constant rate."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, cfg.warmup_steps, total_steps, cfg.schedule))


def learning_rate_factor(
    step: int, warmup_steps: int, total_steps: float | None, schedule: Schedule = Schedule.cosine
) -> float:
    """Return a factor that rises linearly to 1 in warm-up, then falls to 0 if `total_steps` is given."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return _FALLS[schedule](done)


# By schedule: the factor of the learning rate after a part of the steps, from 0 to 1
_FALLS: dict[Schedule, Callable[[float], float]] = {
    Schedule.constant: lambda done: 1.0,
    Schedule.cosine: lambda done: 0.5 * (1 + cos(pi * done)),
    Schedule.linear: lambda done: 1 - done,
    Schedule.flat_linear: lambda done: min(1.0, 3 * (1 - done)),
}


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


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with `is_matrices`, AdamW for the others, as one optimizer, because Lightning takes one.

    Muon follows a momentum whose singular values are made nearly equal (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks"). Its steps are scaled to the size of AdamW's, so that both share learning rate
    and weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982, eq. (4)).
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float, fused: bool
    ):
        others = [group for group in groups if IS_MATRICES not in group]
        matrices = [group for group in groups if IS_MATRICES in group]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*self.adamw.param_groups, *self.muon.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; a closure, if given, computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # what the schedule has set, or a checkpoint
        self.adamw.param_groups = [group for group in self.param_groups if IS_MATRICES not in group]
        self.muon.param_groups = [group for group in self.param_groups if IS_MATRICES in group]
        for part in (self.adamw, self.muon):
            part.state = self.state
            part.step()
        return loss


OPTIMIZERS = {
    OptimizerName.adam: torch.optim.Adam,
    OptimizerName.adamw: torch.optim.AdamW,
    OptimizerName.rowwise_adam: RowwiseAdam,
    OptimizerName.muon: MuonAdamW,
}
