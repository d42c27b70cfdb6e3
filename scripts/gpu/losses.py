"""Compare every loss and its gradients with the plain formula on all scores in double precision.

R labels, D dim, V items, N negatives.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.check import Check, Row, Setting, attempt, relative_error
from sasrec_lab.config.composition import load
from sasrec_lab.config.training import Exclude, LossConfig, LossName, SamplerName
from sasrec_lab.data.batches import Labels, Negatives
from sasrec_lab.ops import library, softmax_products
from sasrec_lab.training.losses import LOSSES, ItemTable

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
CASES = (
    ["loss=softmax"],
    ["loss=softmax", "loss.exclude=history"],
    ["loss=sampled_softmax", "loss.negatives=64"],
    ["loss=sampled_softmax", "loss.negatives=64", "loss.sampler=sequence"],
    ["loss=sampled_softmax_uniform", "loss.negatives=16"],
    ["loss=bce", "loss.negatives=4"],
    ["loss=gbce", "loss.negatives=16"],
    ["loss=bpr", "loss.negatives=4"],
)


IN_CHUNKS = CASES[:3]  # of which kernels have a form too
SEQUENCES = 20  # with as many labels each


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the errors of each loss, in float32 and under autocast to bfloat16."""
    cases = [(words, False) for words in CASES] + [(words, True) for words in IN_CHUNKS]
    for words, is_in_chunks in cases:
        cfg = load(words).loss
        for dtype in MAX_ERROR:
            form = " in chunks by torch," if is_in_chunks else ""
            what = f"{' '.join(words)},{form} {str(dtype).removeprefix('torch.')}"
            yield attempt(what, partial(_errors, cfg, dtype, setting, is_in_chunks=is_in_chunks))


@contextmanager
def in_chunks() -> Iterator[None]:
    """Have torch compute the softmax, although there are kernels for it."""
    by_torch = patch.object(softmax_products, "_triton_form", lambda *tensors, is_sampled, has_mask: None)
    with by_torch, patch.object(library, "supports", lambda *tensors: False):
        yield


def _errors(cfg: LossConfig, dtype: torch.dtype, setting: Setting, *, is_in_chunks: bool) -> Row:
    count, items, dim = (40, 200, 16) if setting.tiny else (3000, 20_000, 64)
    random = torch.Generator().manual_seed(0)
    states, table = (0.3 * torch.randn(size, dim, generator=random) for size in (count, items))
    labels = _labels(cfg, count, items, random)
    negatives = _negatives(cfg, count, items, random)
    x = [y.to(setting.device).requires_grad_() for y in (states, table)]
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)
    with autocast, in_chunks() if is_in_chunks else nullcontext():
        there = negatives and negatives.to(setting.device)
        loss = LOSSES[cfg.name].compute(x[0], ItemTable(x[1]), labels.to(setting.device), there, cfg)
    y = [x.double().requires_grad_() for x in (states, table)]
    exact = _plain(*y, labels, negatives, cfg)
    pairs = zip(torch.autograd.grad(loss, x), torch.autograd.grad(exact, y), strict=True)
    errors = [relative_error(loss, exact), *(relative_error(found, other) for found, other in pairs)]
    measured = {"loss_error": errors[0], "gradient_error": max(errors[1:]), "allowed": MAX_ERROR[dtype]}
    return measured if max(errors) <= MAX_ERROR[dtype] else measured | {"failed": "differs from the plain formula"}


def _labels(cfg: LossConfig, count: int, items: int, random: torch.Generator) -> Labels:
    """Return labels of sequences; if negatives are drawn for a sequence, its targets are of the first half only."""
    most = items // 2 if cfg.sampler is SamplerName.sequence else items
    targets, counts = torch.randint(most + 1, (count,), generator=random), np.full(SEQUENCES, count // SEQUENCES)
    excluded = None
    if cfg.exclude is Exclude.history:
        excluded = torch.randint(items + 1, (SEQUENCES, 30), generator=random)
        excluded[:, 0] = targets[:: count // SEQUENCES]  # a target among them counts
    return Labels(targets, counts, None, torch.rand(count, generator=random), excluded)


def _negatives(cfg: LossConfig, count: int, items: int, random: torch.Generator) -> Negatives | None:
    if cfg.sampler is SamplerName.none:
        return None
    if cfg.sampler is SamplerName.shared:
        drawn = torch.randperm(items, generator=random)[: cfg.negatives].sort().values + 1
        return Negatives(drawn, torch.randn(cfg.negatives, generator=random))
    if cfg.sampler is SamplerName.sequence:
        drawn = torch.stack([torch.randperm(items // 2, generator=random)[: cfg.negatives] for _ in range(SEQUENCES)])
        drawn = drawn + items // 2 + 1
        drawn[1::2, -5:] = 0  # a sequence with fewer items outside it
        return Negatives(drawn)
    return Negatives(torch.randint(1, items + 1, (count, cfg.negatives), generator=random))


def _plain(states: Tensor, table: Tensor, labels: Labels, negatives: Negatives | None, cfg: LossConfig) -> Tensor:
    """Return the mean over labels with a target, from the scores (R, V) of all items."""
    assert labels.weights is not None
    scores, columns = states @ table.T, labels.targets.clamp(min=1) - 1
    target = scores.gather(1, columns[:, None])  # (R, 1)
    if negatives is None:
        if labels.excluded is not None:
            is_excluded = torch.zeros(len(scores), len(table) + 1, dtype=torch.bool)
            is_excluded = is_excluded.scatter(1, _of_labels(labels.excluded, labels), True)[:, 1:]
            scores = scores.masked_fill(is_excluded.scatter(1, columns[:, None], False), float("-inf"))
        losses = F.cross_entropy(scores, columns, reduction="none")
    else:
        drawn = _of_labels(negatives.items, labels) if cfg.sampler is SamplerName.sequence else negatives.items
        drawn = drawn.expand(len(states), -1)
        others = scores.gather(1, (drawn - 1).clamp(min=0)).masked_fill(drawn == 0, float("-inf"))  # (R, N)
        if negatives.log_weights is not None:
            others = others + negatives.log_weights.double()
            others = others.masked_fill(drawn == labels.targets[:, None], float("-inf"))
        losses = _of_negatives(target, others, cfg, len(table))
    has_target = (labels.targets > 0).double()
    return (losses * labels.weights.double() * has_target).sum() / has_target.sum()


def _of_labels(items: Tensor, labels: Labels) -> Tensor:
    """Return the row of items of each label's sequence."""
    return items.repeat_interleave(torch.from_numpy(labels.counts), 0)


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
