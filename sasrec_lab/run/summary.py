"""Human-readable output of a run: the opening lines on data and model, and the final table."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.dataset import HoldoutMode
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.model import BlockName
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import OptimizerName
from sasrec_lab.data.cleaning import describe_span, time_unit
from sasrec_lab.data.holdout import Holdout
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.errors import counted, printable
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import WEIGHTS
from sasrec_lab.run.model_name import model_name
from sasrec_lab.run.protocol import describe_candidates, describe_test

# The parts of a model in the opening lines
_PARTS = {
    BlockName.transformer: "block",
    BlockName.ligr: "LiGR block",
    BlockName.gru: "GRU layer",
    BlockName.hstu: "HSTU layer",
    BlockName.fuxi: "FuXi layer",
}


def data_line(sequences: Sequences, holdout: Holdout) -> str:
    """Return the counts of the data set and of the held-out users."""
    lengths = sequences.lengths
    is_known = holdout.num_items == len(sequences.item_ids)
    known = "" if is_known else f"; {counted(holdout.num_items, 'item')} known to the model"
    users, items = counted(len(lengths), "user"), counted(len(sequences.item_ids), "item")
    return (
        f"data   {printable(sequences.file)}: {users}, {items}, {counted(len(sequences.items), 'interaction')}\n"
        f"       interactions per user: mean {lengths.mean():.1f}, median {_median(lengths)}, max {lengths.max():,};"
        f" {counted(holdout.test.num_users, 'user')} held out{_validated(holdout)}{known}{_unit_line(sequences.times)}"
        + "".join(f"\n       {line}" for line in _time_split_lines(holdout.time_split or {}))
    )


def _validated(holdout: Holdout) -> str:
    """Return how many users have a validation item, if only some do."""
    some = holdout.val.num_users
    return "" if holdout.time_split or some == holdout.test.num_users else f", {some:,} of them in validation"


def _time_split_lines(record: dict[str, Any]) -> list[str]:
    """Return a line on training, validation and test of a split by time: what each has, and what is cold."""
    if not record:
        return []
    train, dates = record["train"], {stage: record[stage]["date"] for stage in ("val", "test")}
    sizes = [counted(train[name], name.removesuffix("s")) for name in ("users", "items", "interactions")]
    lines = [f"training up to {dates['val']}: {', '.join(sizes)}"]
    for name, stage in ((f"validation up to {dates['test']}", "val"), (f"test after {dates['test']}", "test")):
        counts = record[stage]
        new = f" ({counts['new_users']:,} not in training)" if counts["new_users"] else ""
        lines.append(f"{name}: {counted(counts['users'], 'user')}{new}, {counted(counts['targets'], 'target')}")
        cold: dict[str, list[str]] = {"excluded": [], "kept": []}
        for kind, number, noun, text in (
            ("users", counts["cold_rows"], "row", "without an item of training in the history"),
            ("items", counts["cold_interactions"], "interaction", "with a new item"),
        ):
            if number:
                fate = "excluded" if record[f"cold_{kind}"] == "drop" else "kept"
                cold[fate].append(f"{counted(number, noun)} {text}")
        lines[-1] += "".join(f"; {fate}: {' and '.join(parts)}" for fate, parts in cold.items() if parts)
    return lines


def _median(lengths: np.ndarray) -> str:
    median = float(np.median(lengths))
    return f"{median:,.0f}" if median.is_integer() else f"{median:,.1f}"


def _unit_line(times: np.ndarray | None) -> str:
    """Return a line on times that are not in seconds, or nothing."""
    if times is None or (unit := time_unit(times)) == "seconds":
        return ""
    return f"\n       times in {unit}, {describe_span(times, unit)}"


def model_line(cfg: TrainConfig, loss: str, info: dict[str, Any]) -> str:
    """Return the model's sizes, its loss in words, its optimizer unless it is Adam, and the machine of run.json."""
    model, optimizer = cfg.model, cfg.optimizer.name
    by = "" if optimizer is OptimizerName.adam else f" by {optimizer.name}"
    hint = f"\n       slower torch path: no compiled kernels ({info['no_kernels']})" if "no_kernels" in info else ""
    if "attention" in info:
        hint = f"\n       attention {info['attention']}"
    if "softmax" in info and info["device"].startswith("cuda"):
        hint += f"\n       softmax by {info['softmax']}"
    if "capture" in info:
        hint += f"\n       capture: {info['capture']}"
    part = f"{model.block.title} block" if isinstance(model.block, Foreign) else _PARTS[model.block]
    heads = (
        "" if model.block is BlockName.gru or isinstance(model.block, Foreign) else f"{counted(model.heads, 'head')}, "
    )
    return (
        f"model  {counted(model.blocks, part)}, {heads}dim {model.dim}, maxlen"
        f" {model.maxlen}, loss {loss}{by}; {info['parameters']:,} parameters\n"
        f"       {info['device']}, {info['matmul']}{hint}"
    )


def closed_form_line(cfg: TrainConfig, info: dict[str, Any]) -> str:
    """Return the keys of a model without epochs, which keys it does not use, and the machine of run.json."""
    keys = ", ".join(f"{key} {value}" for key, value in to_plain(cfg.model).items() if key != "name")
    return (
        f"model  {model_name(to_plain(cfg))} in closed form, {keys}; {counted(info['parameters'], 'weight')}\n"
        f"       {info['device']}; unused: objective, loss, optimizer, batch_size, trainer, dataset.weight,"
        " dataset.windows"
    )


def kernel_change_warning(previous: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return a warning if a run resumes with other kernels than it had, given both contents of run.json.

    Other kernels round differently, and draw other masks for dropout.
    """
    changes = []
    if not now["kernels"].startswith(previous.get("kernels") or ""):  # earlier versions wrote just "compiled"
        changes.append(f"kernels were {previous['kernels']} and are now {now['kernels']}")
    if previous and "attention" in now:  # earlier versions had buckets only
        had, has = (run.get("attention", "in buckets").partition(";")[0] for run in (previous, now))
        if had != has:
            changes.append(f"attention was {had} and is now {has}")
    return f"{', '.join(changes)}: numbers will differ from those of an uninterrupted run" if changes else None


def results_table(results: dict[str, Any], cfg: TrainConfig, folder: Path) -> str:
    """Return NDCG, recall and MRR of model and baselines, and where the files are; `results` is of metrics.json."""
    if cfg.dataset.holdout is HoldoutMode.none:
        lines = ["", "No holdout (dataset.holdout=none), so there are no test metrics."]
    else:
        suffixes = ["", f"-sampled{cfg.evaluation.sampled}"] if cfg.evaluation.sampled else [""]
        lines = [line for suffix in suffixes for line in _test_lines(results, cfg, suffix)]
    tensorboard_path = display_path(Path(sys.executable).with_name("tensorboard"))
    lines += [
        "",
        f"checkpoint   {_describe_checkpoint(results)}" if results["epochs"] else f"weights      {WEIGHTS}",
        f"run folder   {display_path(folder)}",
    ]
    if cfg.logger.tensorboard is not None:
        lines.append(f"TensorBoard  {shlex.join([tensorboard_path, '--logdir', display_path(folder / 'tb')])}")
    return "\n".join(lines)


def job_line(results: dict[str, Any], cfg: TrainConfig, folder: Path) -> str:
    """Return one line on a finished job of a sweep; the end of the sweep compares the jobs."""
    metric = f"{cfg.evaluation.final_stage}/ndcg@{_cutoff(cfg)}"
    measured = [f"{metric} {results['metrics'][metric]:.4f}"] if metric in results["metrics"] else []
    for name, values in results["baselines"].items():
        measured += [f"{name} {values[metric]:.4f}"] if metric in values else []
    measured += [_describe_checkpoint(results)] if results["epochs"] else []
    return printable(f"job {folder.name}: {', '.join(measured)}")


def _describe_checkpoint(results: dict[str, Any]) -> str:
    best = results["best_epoch"]
    return "last epoch" if best is None else f"epoch {best + 1} of {results['epochs']} (best on validation)"


def _cutoff(cfg: TrainConfig) -> int:
    """Return the cutoff of the metrics shown: 10, or the first one."""
    return 10 if 10 in cfg.evaluation.k else cfg.evaluation.k[0]


def _test_lines(results: dict[str, Any], cfg: TrainConfig, suffix: str) -> list[str]:
    """Return the table of the metrics whose names end in `suffix`, empty or `-sampled<n>`."""
    protocol = results["protocol"]
    cut = _cutoff(cfg)
    columns = {f"NDCG@{cut}": f"ndcg@{cut}", f"recall@{cut}": f"recall@{cut}", "MRR": "mrr"}
    columns |= {f"{name}@{cut}": f"{name}@{cut}" for name in cfg.evaluation.metrics}
    rows = {model_name(to_plain(cfg)): results["metrics"], **results["baselines"]}
    width = max(12, *map(len, rows))
    candidates = describe_candidates(protocol, suffix)
    stage = cfg.evaluation.final_stage
    described = {"test": f"Test: {describe_test(protocol)}", "val": "Validation (evaluation.test=false)"}[stage]
    lines = [
        "",
        f"{described}, ranked among {candidates}",
        " " * (width + 2) + "".join(f"{title:>12}" for title in columns),
    ]
    for row, metrics in rows.items():
        cells = (metrics.get(f"{stage}/{name}{suffix}") for name in columns.values())
        lines.append(f"  {row:<{width}}" + "".join(f"{'-' if cell is None else f'{cell:.4f}':>12}" for cell in cells))
    return lines
