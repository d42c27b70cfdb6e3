"""Metrics of lists on held-out rows: accuracy from the ranks of the targets, and what the lists show."""

import numpy as np
import torch

from sasrec_lab.config.dataset import Target
from sasrec_lab.config.evaluation import BY_USER
from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import counted
from sasrec_lab.evaluate.held_out import HeldOut
from sasrec_lab.evaluate.listed_rows import ListedRows
from sasrec_lab.evaluation.list_metrics import ItemCategories, TopLists, list_metrics
from sasrec_lab.evaluation.ranks import metrics_from_counts
from sasrec_lab.evaluation.row_metrics import mean_over_rows

ACCURACY = ("ndcg", "recall", "map", "mrr", "precision", "hit_rate")


def measure(
    listed: ListedRows, held_out: HeldOut, categories: ItemCategories | None, k: list[int]
) -> tuple[dict[str, float], list[str]]:
    """Return all metrics by name, such as `ndcg@10`, and lines on what a reader of them should know."""
    shown = Ids(held_out.holdout.item_ids).indices(listed.raw_items, "item_id") + 1
    lists = TopLists(listed.rows, shown, listed.ranks)
    values = accuracy(listed.ranks_of_targets(held_out), held_out, k)
    return values | list_metrics(lists, held_out.counts, categories, k), _notes(lists, held_out, max(k))


def accuracy(ranks: np.ndarray, held_out: HeldOut, k: list[int]) -> dict[str, float]:
    """Return the metrics of the ranks (G,) of all targets, 0 for a target that is not in its list.

    They are computed as those in metrics.json, to the last digit. A row without a list is a miss.
    """
    rows, target = held_out.rows, held_out.dataset.target
    owners = np.repeat(np.arange(len(rows)), np.diff(rows.target_offsets))
    names = [f"{metric}@{cut}" for metric in ACCURACY for cut in k]
    names += [f"{name}{BY_USER}" for name in names if target is Target.successive]
    values = mean_over_rows(names, owners, rows.users[owners], ranks)
    if target in (Target.first, Target.last):
        within = np.where(ranks > max(k), 0, ranks)  # a rank may be any number, and 0 is none
        counts = torch.bincount(torch.from_numpy(within), minlength=max(k) + 1).double()
        values |= {name: value for name, value in metrics_from_counts(counts, k).items() if name in values}
    return values


def _notes(lists: TopLists, held_out: HeldOut, k: int) -> list[str]:
    lengths = np.bincount(lists.lists, minlength=len(held_out.rows))
    notes = []
    if missing := int((lengths == 0).sum()):
        notes.append(f"{missing:,} of {counted(len(lengths), 'row')} have no list, and count as misses")
    if short := int(((lengths > 0) & (lengths < k)).sum()):
        notes.append(f"{short:,} of {counted(lists.num_lists, 'list')} have fewer than {k} items")
    if others := int((lists.items == 0).sum()):
        notes.append(
            f"{others:,} of {counted(len(lists.items), 'entry')} are items outside the"
            f" catalogue of {counted(held_out.holdout.num_items, 'item')}"
        )
    return notes
