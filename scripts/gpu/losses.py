"""Compare every loss and its gradients with the plain formula on all scores in double precision.

R labels, D dim, V items, N negatives.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.check import Check, Row, Setting, attempt, relative_error
from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import LossConfig, LossName, SamplerName
from sasrec_lab.data.batches import Labels, Negatives
from sasrec_lab.training.losses import LOSSES, ItemTable

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
CASES = (
    ["loss=softmax"],
    ["loss=sampled_softmax", "loss.negatives=64"],
    ["loss=sampled_softmax_uniform", "loss.negatives=16"],
    ["loss=bce", "loss.negatives=4"],
    ["loss=gbce", "loss.negatives=16"],
    ["loss=bpr", "loss.negatives=4"],
)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the errors of each loss, in float32 and under autocast to bfloat16."""
    for words in CASES:
        cfg = load(words).loss
        for dtype in MAX_ERROR:
            what = f"{' '.join(words)}, {str(dtype).removeprefix('torch.')}"
            yield attempt(what, partial(_errors, cfg, dtype, setting))


def _errors(cfg: LossConfig, dtype: torch.dtype, setting: Setting) -> Row:
    count, items, dim = (40, 200, 16) if setting.tiny else (3000, 20_000, 64)
    random = torch.Generator().manual_seed(0)
    states, table = (0.3 * torch.randn(size, dim, generator=random) for size in (count, items))
    targets = torch.randint(items + 1, (count,), generator=random)
    labels = Labels(targets, np.array([count]), None, torch.rand(count, generator=random))
    negatives = _negatives(cfg, count, items, random)
    x = [y.to(setting.device).requires_grad_() for y in (states, table)]
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        there = negatives and negatives.to(setting.device)
        loss = LOSSES[cfg.name].compute(x[0], ItemTable(x[1]), labels.to(setting.device), there, cfg)
    y = [x.double().requires_grad_() for x in (states, table)]
    exact = _plain(*y, labels, negatives, cfg)
    pairs = zip(torch.autograd.grad(loss, x), torch.autograd.grad(exact, y), strict=True)
    errors = [relative_error(loss, exact), *(relative_error(found, other) for found, other in pairs)]
    measured = {"loss_error": errors[0], "gradient_error": max(errors[1:]), "allowed": MAX_ERROR[dtype]}
    return measured if max(errors) <= MAX_ERROR[dtype] else measured | {"failed": "differs from the plain formula"}


def _negatives(cfg: LossConfig, count: int, items: int, random: torch.Generator) -> Negatives | None:
    if cfg.sampler is SamplerName.none:
        return None
    if cfg.sampler is SamplerName.shared:
        drawn = torch.randperm(items, generator=random)[: cfg.negatives].sort().values + 1
        return Negatives(drawn, torch.randn(cfg.negatives, generator=random))
    return Negatives(torch.randint(1, items + 1, (count, cfg.negatives), generator=random))


def _plain(states: Tensor, table: Tensor, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return the mean over labels with a target, from the scores (R, V) of all items."""
    assert labels.weights is not None
    scores, columns = states @ table.T, labels.targets.clamp(min=1) - 1
    target = scores.gather(1, columns[:, None])  # (R, 1)
    if negatives is None:
        losses = F.cross_entropy(scores, columns, reduction="none")
    else:
        drawn = negatives.items.expand(len(states), -1)
        others = scores.gather(1, drawn - 1)  # (R, N)
        if negatives.log_weights is not None:
            others = others + negatives.log_weights.double()
            others = others.masked_fill(drawn == labels.targets[:, None], float("-inf"))
        losses = _of_negatives(target, others, cfg, len(table))
    has_target = (labels.targets > 0).double()
    return (losses * labels.weights.double() * has_target).sum() / has_target.sum()


def _of_negatives(target: Tensor, others: Tensor, cfg: LossConfig, items: int) -> Tensor:
    """Return each label's loss (R,) from the scores of its target (R, 1) and of its negatives (R, N)."""
    if cfg.name is LossName.sampled_softmax:
        return torch.cat([target, others], 1).logsumexp(1) - target[:, 0]
    if cfg.name is LossName.bpr:
        return F.softplus(others - target).mean(1)
    rate = cfg.negatives / (items - 1)
    beta = 1 - cfg.calibration * (1 - rate) if cfg.name is LossName.gbce else 1.0
    losses = beta * F.softplus(-target[:, 0]) + F.softplus(others).sum(1)
    return losses / (cfg.negatives + 1) if cfg.name is LossName.gbce else losses


CHECK = Check("losses", "the losses against their plain formula", 25, rows)
