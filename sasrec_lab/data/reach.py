"""Targets that no model can rank, which count as misses: their number and reasons, reported before training."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sasrec_lab.config.dataset import Catalogue, Repeats
from sasrec_lab.config.evaluation import LOSS
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.evaluation_rows import EvaluationRows
from sasrec_lab.data.holdout import PAIRS_PER_CHUNK, Holdout
from sasrec_lab.data.sequences import concatenate_ranges
from sasrec_lab.errors import InputError, counted

Unreachable = dict[str, dict[str, int]]  # by stage, then by reason: outside_catalogue, seen_before


def count_unreachable(holdout: Holdout, filter_seen: bool, stages: Sequence[str] = ("val", "test")) -> Unreachable:
    """Return by stage how many targets are outside the catalogue, and how many their users have seen."""
    counts = {}
    for stage in stages:
        rows = holdout.rows(stage)
        seen = _is_seen(holdout, rows).sum() if filter_seen else 0
        counts[stage] = {"outside_catalogue": int((rows.targets == 0).sum()), "seen_before": int(seen)}
    return counts


def _is_seen(holdout: Holdout, stage_rows: EvaluationRows) -> np.ndarray:
    """Return whether each target is among the items of its row's history, shape (G,) bool."""
    targets, row_of_target = stage_rows.targets_of(np.arange(len(stage_rows)))
    starts, ends = stage_rows.starts[row_of_target], stage_rows.ends[row_of_target]
    lengths, seen = ends - starts, np.zeros(len(targets), dtype=bool)
    places = np.append(0, np.cumsum(lengths))
    cuts = np.unique(np.searchsorted(places, np.arange(0, places[-1] + 1, PAIRS_PER_CHUNK), side="right") - 1)
    for first, last in pairwise([0, *cuts, len(targets)]):  # in chunks, to save memory
        rows = np.repeat(np.arange(first, last), lengths[first:last])
        items = holdout.items[concatenate_ranges(starts[first:last], ends[first:last])]
        seen[rows[items == targets[rows]]] = True
    return seen


def describe_unreachable(unreachable: Unreachable, targets: dict[str, int], cfg: TrainConfig) -> str | None:
    """Return a line on the test targets that count as misses, and on validation if it has no others; or None.

    `targets` is their number by stage. If the test may not be seen, the validation targets take its place.

    Raises:
        InputError: all test targets are out of reach, and no metric on sampled candidates ranks them; or validation
            has no target for the loss that chooses the checkpoint.
    """
    final = cfg.evaluation.final_stage
    noun = {"test": "test target", "val": "validation target"}[final]
    lost = {stage: sum(counts.values()) for stage, counts in unreachable.items()}
    if not any(lost.values()):
        return None
    reasons = _reasons(unreachable[final if lost[final] else "val"], cfg)
    are_out = unreachable[final]["outside_catalogue"] == targets[final]
    if lost[final] == targets[final] and (not cfg.evaluation.sampled or are_out):
        raise InputError(f"every {noun} would be a miss (of {counted(targets[final], 'target')}): {reasons}")
    parts = [f"{lost[final]:,} of {counted(targets[final], noun)} cannot be ranked and are misses"] * (lost[final] > 0)
    is_val_out = unreachable["val"]["outside_catalogue"] == targets["val"]
    if cfg.evaluation.monitor == f"val/{LOSS}" and is_val_out:
        raise InputError(
            f"evaluation.monitor=val/{LOSS} cannot choose a checkpoint, because every validation target is out of"
            f" reach: {_reasons(unreachable['val'], cfg)}"
        )
    if lost["val"] == targets["val"] and (is_val_out or "-sampled" not in cfg.evaluation.monitor):
        parts.append("no validation target can be ranked, so validation cannot choose a checkpoint")
    return f"{'; '.join(parts)}: {reasons}" if parts else None


def _reasons(counts: dict[str, int], cfg: TrainConfig) -> str:
    """Return why targets are out of reach, each reason with the key that changes it."""
    reasons = []
    if number := counts["outside_catalogue"]:
        drop = "dataset.time_split.cold_items=drop or " if cfg.dataset.time_split else ""
        fix = f" (set {drop}dataset.catalogue=all)" if cfg.dataset.catalogue is Catalogue.train else ""
        reasons.append(f"{number:,} outside the catalogue{fix}")
    if number := counts["seen_before"]:
        drop = "dataset.repeats=drop or " if cfg.dataset.repeats is Repeats.keep else ""
        reasons.append(f"{number:,} already seen by the user (set {drop}evaluation.filter_seen=false)")
    return ", ".join(reasons)
