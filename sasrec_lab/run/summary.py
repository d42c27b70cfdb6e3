"""What a run says in words: its protocol, the two lines it opens with and the table it closes with."""

import shlex
import sys
from pathlib import Path
from typing import Any

from sasrec_lab.config.dataset import HoldoutMode
from sasrec_lab.config.schema import OptimizerName, TrainConfig
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.files import display_path
from sasrec_lab.run.protocol import describe_candidates


def data_line(sequences: Sequences, holdout: Holdout) -> str:
    lengths = sequences.lengths
    known = "" if holdout.num_items == len(sequences.item_ids) else f"; {holdout.num_items:,} items known to the model"
    return (
        f"data   {sequences.file}: {len(lengths):,} users, {len(sequences.item_ids):,} items,"
        f" {len(sequences.items):,} interactions\n"
        f"       a user has {lengths.mean():.1f} (median {sorted(lengths)[len(lengths) // 2]:,}, longest"
        f" {lengths.max():,}); {len(holdout.users):,} users held out{known}"
    )


def model_line(cfg: TrainConfig, loss: str, facts: dict[str, Any]) -> str:
    model, optimizer = cfg.model, cfg.optimizer.name
    by = "" if optimizer is OptimizerName.adam else f" by {optimizer.name}"
    hint = f"\n       not at full speed: no kernels ({facts['no_kernels']})" if "no_kernels" in facts else ""
    return (
        f"model  {_count(model.blocks, 'block')}, {_count(model.heads, 'head')}, dim {model.dim}, maxlen"
        f" {model.maxlen}, loss {loss}{by}; {facts['parameters']:,} parameters\n"
        f"       {facts['device']}, {facts['matmul']}{hint}"
    )


def kernel_change_warning(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What to say where a resumed run goes on with other kernels: they round otherwise, and torch's dropout draws other
    masks."""
    if now["kernels"].startswith(before.get("kernels") or ""):  # earlier versions wrote "compiled" alone
        return None
    return (
        f"the run began with kernels that are {before['kernels']} and goes on with {now['kernels']}: numbers differ"
        " from those of a run in one go"
    )


def results_table(results: dict[str, Any], cfg: TrainConfig, folder: Path) -> str:
    """NDCG, recall and MRR on the test items, of model and popularity, for a reader who is new to the project."""
    cut = 10 if 10 in cfg.evaluation.k else cfg.evaluation.k[0]
    endings = ["", f"-sampled{cfg.evaluation.sampled}"] if cfg.evaluation.sampled else [""]
    if cfg.dataset.holdout is HoldoutMode.none:
        endings = []
    rows = {"SASRec": results["metrics"], "popularity": results["baselines"].get("popularity", {})}
    lines = [] if endings else ["", "Nothing was held out, so nothing is measured."]
    for ending in endings:
        candidates = describe_candidates(results["protocol"], ending)
        lines += [
            "",
            f"Test: last item of {results['protocol']['held_out_users']:,} users, ranked among {candidates}",
        ]
        names = {f"NDCG@{cut}": f"ndcg@{cut}", f"recall@{cut}": f"recall@{cut}", "MRR": "mrr"}
        lines.append(" " * 14 + "".join(f"{title:>12}" for title in names))
        for row, metrics in rows.items():
            cells = (metrics.get(f"test/{name}{ending}") for name in names.values())
            lines.append(f"  {row:<12}" + "".join(f"{'-' if cell is None else f'{cell:.4f}':>12}" for cell in cells))
    board = Path(sys.executable).with_name("tensorboard")
    best = results["best_epoch"]
    chosen = f"epoch {best} of {results['epochs']}, the best on validation" if best is not None else "the last epoch"
    lines += [
        "",
        f"checkpoint   {chosen}",
        f"run folder   {display_path(folder)}",
        f"TensorBoard  {shlex.join([display_path(board), '--logdir', display_path(folder / 'tb')])}",
    ]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
