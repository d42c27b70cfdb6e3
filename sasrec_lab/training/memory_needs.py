"""The memory that a run cannot do without, estimated from its config before anything is allocated.

Estimates are lower bounds, so that nothing is refused that would fit. D dim, L maxlen, V items, N negatives, T tokens.
"""

from typing import Any

import torch

from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.model import Activation, BlockName, ItemVectors, ModelConfig, PosEmb
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import LossName, OptimizerName
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.negatives import draws_per
from sasrec_lab.ops.memory import Need, check_memory
from sasrec_lab.ops.time_buckets import NUM_BUCKETS

_FLOAT, _INT = 4, 8  # bytes


def check_run_fits(cfg: TrainConfig, holdout: Holdout, device: torch.device, processes: int) -> None:
    """Raise InputError if the run needs more memory than there is on its device, or on the CPU, which draws samples."""
    on_device = [*model_needs(cfg, holdout.num_items), *batch_needs(cfg, holdout, processes)]
    on_cpu = sampling_needs(cfg, holdout)
    if device.type == "cpu":
        check_memory([*on_device, *on_cpu], str(device))
    else:
        check_memory(on_device, str(device))
        check_memory(on_cpu, "cpu")


def model_needs(cfg: TrainConfig, num_items: int) -> list[Need]:
    """Return the memory of parameters with their gradients, the optimizer's moments, and the averaged weights."""
    model, dim = cfg.model, _key(cfg, "model.dim")
    copies = 4 + (cfg.optimizer.ema is not None)
    # rows that no batch touches have no gradient
    item_copies = copies - (cfg.optimizer.name is OptimizerName.rowwise_adam)
    block_copies = copies - (cfg.optimizer.name is OptimizerName.muon)  # matrices have one moment, the few vectors two
    per_position = {
        PosEmb.learned: copies * model.dim,
        PosEmb.sinusoidal: model.dim,
        PosEmb.rope: model.dim // model.heads,
    }
    tables = 1 if model.share_items else 2
    if model.items is ItemVectors.features:
        item_copies = 2  # the vectors that a step makes, and their gradient
    blocks = (dim, _key(cfg, "model.blocks"), *([_key(cfg, "model.ff_dim")] if model.ff_dim else []))
    return [
        Need(f"the vectors of {num_items:,} items", (dim,), item_copies * tables * num_items * model.dim * _FLOAT),
        Need("positions", (_key(cfg, "model.maxlen"), dim), per_position.get(model.pos_emb, 0) * model.maxlen * _FLOAT),
        Need("blocks", blocks, block_copies * model.blocks * block_parameters(model) * _FLOAT),
    ]


def block_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of one block, 0 for one of the user's, which is not known before it is built."""
    if isinstance(model.block, Foreign):
        return 0
    dim, width = model.dim, model.feed_forward_width
    linear = (dim + 1) * dim
    if model.block is BlockName.gru:
        return 3 * 2 * linear  # two gates and the new state, each of input and state
    if model.block in (BlockName.hstu, BlockName.fuxi):
        sums = model.num_maps * model.heads * model.head_widths[1]
        norms = 2 * (dim + sums) if model.norm_affine else 0
        biases = model.maxlen * model.position_bias + NUM_BUCKETS * model.reads_times
        feed_forward = 3 * dim * width if model.block is BlockName.fuxi else 0
        return norms + dim * _projection_width(model) + (sums + 1) * dim + biases + feed_forward
    projections = 4 if model.output_projection else 3
    gates = 2 if model.block is BlockName.ligr else 0
    is_gated = model.activation is Activation.swiglu
    feed_forward = 3 * dim * width if is_gated else (dim + 1) * width + (width + 1) * dim
    biases = model.heads * model.num_distances if model.pos_emb is PosEmb.relative else 0
    biases += 2 * model.reads_times
    return biases + 4 * dim + (projections + gates) * linear + feed_forward


def _projection_width(model: ModelConfig) -> int:
    """Return the width of gates, values, queries and keys of a block of HSTU or FuXi together."""
    qk_dim, v_dim = model.head_widths
    return model.heads * ((model.num_maps + 1) * v_dim + 2 * qk_dim)


def batch_needs(cfg: TrainConfig, holdout: Holdout, processes: int) -> list[Need]:
    """Return the memory of a batch of mean length: what its backward pass needs, and its negatives unless shared."""
    model, size = cfg.model, _key(cfg, "batch_size")
    windows = len(holdout.window_users)
    in_batch = max(1, min(cfg.batch_size, windows) // processes)
    tokens = int((holdout.window_ends - holdout.window_starts - 1).sum()) * in_batch // windows
    # the embedding, and each block's queries, keys, values and normed input, or gates
    kept = model.dim + model.blocks * _kept_width(model)
    number = 2 if "mixed" in str(cfg.trainer.get("precision")) else _FLOAT
    keys = (size, *(_key(cfg, f"model.{name}") for name in ("maxlen", "dim", "blocks")))
    keys += (_key(cfg, "loss.rdrop"),) if cfg.loss.rdrop else ()
    needs = [Need("the states of a batch", keys, cfg.loss.passes * tokens * kept * number)]
    each = 2 * _INT + (model.dim * _FLOAT if cfg.loss.name is LossName.bpr else 0)
    outside = max(0, holdout.num_items - model.maxlen - 1)  # at least as many items are outside a window
    drawn = {
        "position": int(tokens * (cfg.objective.mask_share or 1)) * cfg.loss.negatives,
        "sequence": in_batch * min(cfg.loss.negatives, outside),
    }.get(draws_per(cfg.loss), 0)
    if drawn:
        needs.append(Need("the negatives of a batch", (_key(cfg, "loss.negatives"), size), drawn * each))
    return needs


def _kept_width(model: ModelConfig) -> int:
    """Return how many numbers of a token a block keeps for its backward pass; of one of the user's its output."""
    if isinstance(model.block, Foreign):
        return model.dim
    return 4 * model.dim if model.has_softmax or model.block is BlockName.gru else _projection_width(model)


def sampling_needs(cfg: TrainConfig, holdout: Holdout) -> list[Need]:
    """Return the memory of negatives that a batch shares, and of the candidates of all rows to rank."""
    shared = cfg.loss.negatives if draws_per(cfg.loss) == "batch" else 0
    rows = max(len(holdout.val), len(holdout.test))
    candidates = rows * cfg.evaluation.sampled
    each = 3 * _INT + 4  # user, item and place while the second of two sets is drawn, next to the first set
    return [
        Need("the negatives of a batch", (_key(cfg, "loss.negatives"),), 2 * _INT * shared),
        Need(f"the candidates of {rows:,} rows", (_key(cfg, "evaluation.sampled"),), each * candidates),
    ]


def _key(cfg: TrainConfig, name: str) -> str:
    """Return a key with its value, as a user writes it."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return f"{name}={value}"
