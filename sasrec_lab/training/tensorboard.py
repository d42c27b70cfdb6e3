"""Extra TensorBoard content: hyperparameters, and on request attention maps and item vectors.

T tokens of one user, D dim, H heads.
"""

import re
from math import log, sqrt
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sasrec_lab.config.convert import flatten, is_bookkeeping, known_keys, to_plain
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import Objective, PackedBatch, evaluation_batch
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.model.transformer import TransformerBlock
from sasrec_lab.ops.buckets import bias_scores
from sasrec_lab.ops.rotary import rotate
from sasrec_lab.ops.time_decay import decay_scores

ATTENTION_ITEMS = 20  # newest items of a user in a figure: the labels of more cannot be read
PROJECTOR_ITEMS = 10_000  # most frequent items in the projector: browsers freeze with more

_MRR = re.compile("^mrr")
_NULLABLE_SECTIONS = ("dataset/weight", "dataset/synthetic", "dataset/titles", "dataset/features", "dataset/time_split")
_NOT_SHOWN = (*_NULLABLE_SECTIONS, "dataset/sources")


def hyperparameters(cfg: TrainConfig) -> dict[str, Any]:
    """Return every key that determines how the run was made; the keys are the same for every run."""
    given = {key: value for key, value in flatten(to_plain(cfg)).items() if not is_bookkeeping(key.replace("/", "."))}
    keys = [key.replace(".", "/") for key in known_keys()]
    nullable = [key for key in keys if key.startswith(tuple(f"{section}/" for section in _NULLABLE_SECTIONS))]
    return dict.fromkeys(nullable) | {key: value for key, value in given.items() if key not in _NOT_SHOWN}


def shown_metrics(cfg: TrainConfig, metrics: dict[str, float]) -> dict[str, float]:
    """Return the test metrics, and the validation metric that chose the checkpoint, by the names that trackers show.

    If the test may not be seen, validation metrics take the place of the test's, under `best/`. TensorBoard sorts
    metrics by name, so names put the monitored one first and MRR last.
    """
    monitor = cfg.evaluation.monitor
    group, stage = ("test", "test/") if cfg.evaluation.test else ("best", "val/")
    of_stage = {name.removeprefix(stage): value for name, value in metrics.items() if name.startswith(stage)}
    shown = {f"{group}/{_MRR.sub('~mrr', name)}": value for name, value in of_stage.items()}
    return shown | ({f"{group}/chosen by {monitor}": metrics[monitor]} if monitor in metrics else {})


def write_hyperparameters(writer: SummaryWriter, cfg: TrainConfig, metrics: dict[str, float], epoch: int) -> None:
    """Write the hyperparameters with the test metrics and the validation metric that chose the checkpoint.

    `epoch` is the number of epochs of that checkpoint. This happens once, at the end: of several event files of one
    second TensorBoard may read the newest first. There is no summary of the experiment, which the first run would write
    for all: TensorBoard then collects the keys of all runs, and shows those that differ first.
    """
    shown = shown_metrics(cfg, metrics)
    for name, value in shown.items():
        writer.add_scalar(name, value, epoch)
    keys = {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in hyperparameters(cfg).items()
    }
    for summary in hparams(keys, shown)[1:]:  # start and end of the session
        writer._get_file_writer().add_summary(summary, epoch)


def write_extras(
    writer: SummaryWriter,
    encoder: Encoder,
    holdout: Holdout,
    user_ids: np.ndarray,
    titles: np.ndarray | None,
    cfg: TrainConfig,
) -> None:
    """Write the attention maps and item vectors that `cfg` asks for.

    `user_ids` are the raw ids of all users, `titles` (num_items,) the titles of the items that the model knows.
    """
    ids = holdout.item_ids.astype(str)
    names = ids if titles is None else np.where(titles == "", ids, titles)
    if cfg.tensorboard.attention_users and encoder.blocks:
        rows = pick_users_by_length(holdout, cfg.tensorboard.attention_users)
        users = {row: str(user_ids[holdout.test.users[row]]) for row in rows}
        objective = build_objective(cfg.objective, cfg.model)
        write_attention(writer, encoder, holdout, objective, users, names)
    if cfg.tensorboard.projector:
        write_projector(writer, encoder, holdout, names, ids)


def write_attention(
    writer: SummaryWriter,
    encoder: Encoder,
    holdout: Holdout,
    objective: Objective,
    users: dict[int, str],
    names: np.ndarray,
) -> None:
    """Write one figure per user: the attention among the newest items, in every block and head.

    `users` has rows of `holdout.test` and the labels of their users, `names` (num_items,) the labels of the items.
    """
    for row, user in users.items():
        inputs = evaluation_batch(holdout, np.array([row]), "test", objective, None).inputs
        assert inputs is not None  # pick_users_by_length takes users with known items
        items = inputs.items[: int(inputs.last[-1]) + 1]
        labels = [str(names[item - 1]) if item else "[mask]" for item in items]
        writer.add_figure(f"~attention/user {user}", _figure(attention_weights(encoder, inputs), labels), 0)


def write_projector(
    writer: SummaryWriter, encoder: Encoder, holdout: Holdout, names: np.ndarray, ids: np.ndarray
) -> None:
    """Write the vectors of the most frequent items, with name, raw id and number of interactions."""
    counts = np.bincount(holdout.items, minlength=holdout.num_items + 1)[1:]
    chosen = np.argsort(-counts, kind="stable")[:PROJECTOR_ITEMS]
    rows = [[" ".join(str(names[i]).split()), ids[i], counts[i]] for i in chosen]
    training = encoder.training
    vectors = encoder.eval().item_vectors()[torch.from_numpy(chosen)]
    encoder.train(training)
    writer.add_embedding(vectors, rows, tag="items", metadata_header=["item", "id", "interactions"])


def pick_users_by_length(holdout: Holdout, count: int) -> list[int]:
    """Return test rows of users from short to long histories, the same for every run on the data."""
    users, lengths = holdout.test.users, holdout.test.ends - holdout.test.starts
    rows = np.flatnonzero((np.diff(users, append=-1) != 0) & (lengths >= 2))  # one item attends to itself
    order = rows[np.argsort(lengths[rows], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return order[places].tolist()


@torch.enable_grad()  # without gradients a block may run as one kernel, which calls no query and key layers
def attention_weights(encoder: Encoder, batch: PackedBatch) -> list[Tensor]:
    """Return each block's attention weights (H, T, T), a row per attending token; `batch` has one user."""
    tokens, seen = int(batch.last[-1]) + 1, list[Tensor]()
    blocks = cast(list[TransformerBlock], list(encoder.blocks))
    layers = [layer for block in blocks for layer in (block.query, block.key)]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(out[:tokens])) for layer in layers]
    training, batch = encoder.training, batch.to(encoder.item_table.device)
    encoder.eval()
    try:
        encoder(batch)
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    rotations = encoder.layout(batch).rotations
    factors = None if rotations is None else rotations[:tokens]
    gaps = None  # (T, T) from each item to when the one after another is asked for
    if batch.times is not None and batch.query_times is not None:
        gaps = batch.query_times[:tokens, None] - batch.times[:tokens]
    return [
        _weights(q.detach().float(), k.detach().float(), block, factors, gaps, encoder.maxlen - tokens)
        for q, k, block in zip(seen[::2], seen[1::2], blocks, strict=True)
    ]


def _weights(
    q: Tensor, k: Tensor, block: TransformerBlock, rotations: Tensor | None, gaps: Tensor | None, pads: int
) -> Tensor:
    """Return the weights (H, T, T) of queries and keys (T, D); with pad_keys without those of the padding."""
    if rotations is not None:
        q, k = rotate(q, rotations, block.heads), rotate(k, rotations, block.heads)
    q, k = (x.unflatten(1, (block.heads, -1)).transpose(0, 1) for x in (q, k))  # (T, D) -> (H, T, D / H)
    scores = q @ k.mT / sqrt(q.shape[-1])
    if block.relative_bias is not None:
        every = slice(q.shape[1])
        scores = scores + bias_scores(block.relative_bias.detach(), block.causal, every, every)
    if gaps is not None and (decay := block.decay()) is not None:
        scores = scores + decay_scores(gaps, decay.detach().float())
    if block.causal:
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if block.pad_keys and pads:
        pad = block.key.bias.detach().float().view(block.heads, -1, 1)  # (H, D / H, 1): the key of an empty position
        scores = torch.cat([scores, q @ pad / sqrt(q.shape[-1]) + log(pads)], -1)
    return scores.softmax(-1)[..., : q.shape[1]].cpu()


def _figure(blocks: list[Tensor], items: list[str]) -> Any:
    """Draw a row of maps per block and a column per head; the newest item is at the bottom and on the right."""
    from matplotlib.figure import Figure  # slow to import, and most runs do not need it

    tokens, shown, heads = len(items), min(len(items), ATTENTION_ITEMS), len(blocks[0])
    labels = [label if len(label) <= 30 else f"{label[:29]}…" for label in items[-shown:]]
    side = 2 + 0.22 * shown  # inches
    figure = Figure(figsize=(side * heads + 2, (side + 1) * len(blocks)), layout="constrained")
    figure.suptitle(f"the {shown} newest of {tokens} items" if shown < tokens else f"all {tokens} items")
    for number, row in enumerate(zip(blocks, figure.subplots(len(blocks), heads, squeeze=False), strict=True)):
        for head, (weights, axes) in enumerate(zip(*row, strict=True)):
            image = axes.imshow(weights[-shown:, -shown:].numpy(), cmap="viridis", vmin=0)
            axes.set_title(f"block {number + 1}, head {head + 1}")
            axes.set_xticks(range(shown), labels, rotation=90, fontsize=7)
            axes.set_yticks(range(shown), labels if head == 0 else [], fontsize=7)
            axes.set_xlabel("attends to")
            figure.colorbar(image, ax=axes, shrink=0.7)
    return figure
