"""Evaluation protocol of a run: everything that two numbers must share to be comparable.

metrics.json records it, and the report compares only runs whose protocols are equal. Its texts therefore never change:
a reworded one would separate new runs from old ones.
"""

from typing import TYPE_CHECKING, Any

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.dataset import Cold, DatasetConfig, HoldoutMode, Target
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.leak import leaked_targets
from sasrec_lab.errors import counted

if TYPE_CHECKING:  # the report reads protocols without torch and pandas
    from sasrec_lab.data.holdout import Holdout
    from sasrec_lab.data.sequences import Sequences

LEAK = "leak"  # follows from the other keys; earlier versions did not record it
LAST_EPOCH = "last epoch"  # selected_by, if no validation chose the checkpoint

_FILTERS = ("min_rating", "since", "until", "repeats", "min_user", "min_item", "until_stable")
_ASKED_AT_TARGET = "the target's own time"  # what a model that reads times knows of the target
_SEEN_EXCLUDED = "left out, a target among them is a miss"
_HOLDOUTS = {
    HoldoutMode.last: "last item: test = last, validation = the one before, of users with 3 interactions or more",
    HoldoutMode.time: "time: validation after one cut, test after another, the same for all users",
    HoldoutMode.none: "none: all is trained on",
}
_TARGETS = {
    Target.first: "first item",
    Target.last: "last item",
    Target.all: "all items",
    Target.successive: "each item",
}


def protocol(cfg: TrainConfig, sequences: "Sequences", holdout: "Holdout") -> dict[str, Any]:
    """Return the protocol of a run as metrics.json records it."""
    dataset, evaluation = to_plain(cfg.dataset), to_plain(cfg.evaluation)
    sampled = {key: evaluation[key] for key in ("sampled", "draw", "seed")} if evaluation["sampled"] else None
    leak = leaked_targets(sequences, holdout) if cfg.dataset.holdout is HoldoutMode.last else None
    by_time: dict[str, Any] = {}
    if (cuts := holdout.time_split) is not None and (split := cfg.dataset.time_split) is not None:
        has_dropped = split.cold_items is Cold.drop and cuts["test"]["cold_interactions"] > 0
        known = " that training knows" * has_dropped
        by_time["tested"] = f"{_TARGETS[split.target]}{known} after {cuts['test']['date']}"
        keys = {"history": "target" if split.reads_to_target else "cut"}
        by_time["time_split"] = dataset["time_split"] | keys | cuts
    return {
        "dataset": dataset["name"],
        "file": sequences.file,
        "sha256": sequences.sha256,
        "users": len(sequences.user_ids),
        "items": len(sequences.item_ids),
        "interactions": len(sequences.items),
        "filters": {key: dataset[key] for key in _FILTERS},
        "order": "rows of a user as in the file" if dataset["time"] is None else "stable by time, ties as in the file",
        "holdout": _holdout(cfg.dataset),
        **by_time,
        **({"query_time": _ASKED_AT_TARGET} if holdout.test.query_times is not None else {}),
        "held_out_users": holdout.test.num_users,
        "training_windows": dataset["windows"],
        "catalogue": dataset["catalogue"],
        "candidates": {"full": holdout.num_items},
        "sampled_candidates": sampled,
        "seen_items": _SEEN_EXCLUDED if evaluation["filter_seen"] else "ranked like the others",
        "ties": "a rank counts every other candidate that does not score below the target",
        "selected_by": evaluation["monitor"] if cfg.has_validation else LAST_EPOCH,
        "validation": _validation(cfg),
        **({} if leak is None else {LEAK: leak}),
    }


def _holdout(dataset: DatasetConfig) -> str:
    text = _HOLDOUTS[dataset.holdout]
    if dataset.val_users is None:
        return text
    return f"{text}; validation of {dataset.val_users} users only, the others are trained on that item"


def _validation(cfg: TrainConfig) -> str:
    part, some = cfg.trainer.get("limit_val_batches", 1.0), cfg.dataset.val_users
    if cfg.dataset.holdout is HoldoutMode.none:
        return "none"
    everyone = "all held-out users" if some is None else f"{some} users"
    if part == 1.0 and isinstance(part, float):
        return everyone
    users = f"those of trainer.limit_val_batches={part}, the shortest histories first"
    return users if cfg.evaluation.test else f"{users}; of the chosen checkpoint, {everyone}"


def describe_test(protocol: dict[str, Any]) -> str:
    """Return a phrase for what the test looks for, and of how many users."""
    asked = f", asked at {protocol['query_time']}" if "query_time" in protocol else ""
    return f"{protocol.get('tested', 'last item')} of {counted(protocol['held_out_users'], 'user')}{asked}"


def describe_candidates(protocol: dict[str, Any], metric: str) -> str:
    """Return a phrase for the items that a metric ranks the target among; `-sampled<n>` in its name means a sample."""
    if sampled := metric.partition("-sampled")[2]:
        return f"the target and {sampled} sampled items (draw={protocol['sampled_candidates']['draw']})"
    is_filtered = protocol["seen_items"] == _SEEN_EXCLUDED
    items = counted(protocol["candidates"]["full"], "item")
    return f"all {items}" + (" except those already seen" if is_filtered else "")
