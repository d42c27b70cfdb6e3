"""TODO."""

from typing import Any

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.dataset import HoldoutMode
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import Sequences

_FILTERS = ("min_rating", "since", "until", "repeats", "min_user", "min_item", "until_stable")


def protocol(cfg: TrainConfig, sequences: Sequences, holdout: Holdout) -> dict[str, Any]:
    """Everything that makes two numbers comparable."""
    dataset, evaluation = to_plain(cfg.dataset), to_plain(cfg.evaluation)
    part = cfg.trainer.get("limit_val_batches", 1.0)
    last = "last item: test = last, validation = the one before, of users with 3 interactions or more"
    return {
        "dataset": dataset["name"],
        "file": sequences.file,
        "sha256": sequences.sha256,
        "users": len(sequences.user_ids),
        "items": len(sequences.item_ids),
        "interactions": len(sequences.items),
        "filters": {key: dataset[key] for key in _FILTERS},
        "order": "rows of a user as in the file" if dataset["time"] is None else "stable by time, ties as in the file",
        "holdout": "none: all is trained on" if cfg.dataset.holdout is HoldoutMode.none else last,
        "held_out_users": len(holdout.users),
        "training_windows": dataset["windows"],
        "catalogue": dataset["catalogue"],
        "candidates": {"full": holdout.num_items},
        "sampled_candidates": {key: evaluation[key] for key in ("sampled", "draw", "seed")}
        if evaluation["sampled"]
        else None,
        "seen_items": "left out, a target among them is a miss"
        if evaluation["filter_seen"]
        else "ranked like the others",
        "ties": "a rank counts every other candidate that does not score below the target",
        "selected_by": evaluation["monitor"] if cfg.validates else "last epoch",
        "validation": "none"
        if cfg.dataset.holdout is HoldoutMode.none
        else "all held-out users"
        if part == 1.0 and isinstance(part, float)
        else f"those of trainer.limit_val_batches={part}, the shortest histories first",
    }


def _all_items(protocol: dict[str, Any]) -> str:
    unseen = protocol["seen_items"].startswith("left out")
    return f"all {protocol['candidates']['full']:,} items" + (" but those the user had before" if unseen else "")
