"""Time the benchmark's jobs in each form of attention, and compare a step with the floor of the card."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from bench import generate
from benchmark import roofline
from benchmark.jobs import JOBS, Job, generated_folder, job_overrides
from benchmark.recommending import measure as measure_lists
from benchmark.recommending import untrained
from benchmark.training import measure
from torch.profiler import ProfilerActivity, profile

from gpu.attention import forced
from gpu.check import Check, Row, Setting, attempt
from gpu.stopwatch import Card
from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Format
from sasrec_lab.data import source
from sasrec_lab.errors import InputError
from sasrec_lab.ops.packed_attention import OPERATORS

NAMES = ("ml1m", "sparse", "kion-like", "million")  # a to d
STEPS, RANKED_USERS = 200, 20_000
PROFILED_STEP = 20  # while training warms up, when most sizes of batches have been captured
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
OPTIMIZER_BYTES = 4 * 8  # of a parameter and step: gradient written and read; Adam reads and writes three tensors
TINY = (
    "dataset=synthetic",
    "dataset.synthetic.users=60",
    "dataset.synthetic.items=40",
    "model.dim=8",
    "model.maxlen=8",
)


class LaunchCount(pl.Callback):
    """Count the launches of one training step on a GPU; None on a CPU."""

    def __init__(self) -> None:
        self.launches: int | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the profiler before its step."""
        if trainer.global_step == PROFILED_STEP and module.device.type == "cuda":
            self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the profiler after its step."""
        if trainer.global_step == PROFILED_STEP + 1 and module.device.type == "cuda":
            self.profiler.__exit__(None, None, None)
            events = self.profiler.key_averages()
            kinds = ("LaunchKernel", "GraphLaunch")
            self.launches = sum(event.count for event in events if any(kind in event.key for kind in kinds))


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the speeds of each job, precision and form of attention, captured too, then of its lists."""
    card = Card.measured(setting.device, tiny=setting.tiny)
    yield {"what": "card", "gb_per_s": card.bytes_per_s / 1e9, "us_per_launch": 1e6 * card.seconds_per_launch}
    for job in (JOBS[name] for name in (NAMES[::3] if setting.tiny else NAMES)):
        overrides = _overrides(job, setting)
        if missing := missing_data(overrides):
            yield {"what": job.name, "skipped": missing}
            continue
        for precision, dtype in list(PRECISIONS.items())[: 1 if setting.tiny else None]:
            for form in _forms(setting, dtype):
                what = f"{job.name}, {precision}, attention {form}"
                words = [*overrides, f"trainer.precision={precision}"]
                yield attempt(what, partial(_trained, words, form, setting, card))
                if form != "buckets":
                    yield _captured(f"{what}, captured", [*words, "capture=true"], form, setting, card)
        yield attempt(f"{job.name}, lists of ten", partial(_listed, overrides, setting))


def _overrides(job: Job, setting: Setting) -> list[str]:
    if setting.tiny:
        negatives = ["loss.negatives=16"] if "loss=sampled_softmax" in job.settings else []
        return job_overrides(job, [*TINY, *negatives, "trainer=cpu"], Path())
    generate(job, small=False)
    return job_overrides(job, ["trainer=gpu"], generated_folder(False))


def missing_data(overrides: list[str]) -> str | None:
    """Return why a job's data set cannot be read; nothing is fetched."""
    cfg = load(overrides)
    if cfg.dataset.format is not Format.synthetic:
        try:
            source.find(cfg.dataset, source.data_root(cfg.data_dir))
        except InputError as error:
            return str(error)
    return None


def _forms(setting: Setting, dtype: torch.dtype) -> list[str]:
    names = [name for name, operator in OPERATORS.items() if dtype in operator.dtypes]
    return ["buckets", *names] if setting.device.type == "cuda" else ["compiled"]


def _captured(what: str, words: list[str], form: str, setting: Setting, card: Card) -> Row:
    """Return the speed of captured steps, or the reason why capture failed, after which training continues without."""
    if setting.device.type != "cuda":
        return {"what": what, "skipped": "no CUDA"}
    row = attempt(what, partial(_trained, words, form, setting, card))
    return row | {"failed": row["capture"]} if row.get("capture", "").startswith("failed") else row


def _trained(overrides: list[str], form: str, setting: Setting, card: Card) -> Row:
    steps, users = (2, 20) if setting.tiny else (STEPS, RANKED_USERS)
    launches = LaunchCount()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    square = {"cpu": 64} if setting.tiny else {}
    with tempfile.TemporaryDirectory() as folder, forced(form), patch.dict(roofline.SQUARES, square):
        found = measure(overrides, steps, users, Path(folder), [launches])
    kept = ("positions_per_s", "step_ms", "users_per_s", "peak_cuda_mb", "matrix_gflops", "items", "capture")
    row = {name: found[name] for name in kept} | {"steps_per_s": 1000 / found["step_ms"], "launches": launches.launches}
    return row | _floor(found, launches.launches, card)


def _floor(found: dict[str, Any], launches: int | None, card: Card) -> Row:
    """Return the least milliseconds of a step, what they are spent on, and the fraction of a step that they are.

    Products at the measured rate; the bytes that the optimizer moves for dense parameters at the measured bandwidth;
    the launches one after the other. The largest of the three is the floor.
    """
    positions = found["positions_per_s"] * found["step_ms"] / 1000  # of a step
    floors = {
        "products": found["flops_per_position"] * positions / (1e9 * found["matrix_gflops"]),
        "memory": OPTIMIZER_BYTES * found["dense_parameters"] / card.bytes_per_s,
        "launches": (launches or 0) * card.seconds_per_launch,
    }
    largest = max(floors, key=floors.__getitem__)
    milliseconds = 1000 * floors[largest]
    return {"floor_ms": milliseconds, "bound_by": largest, "fraction_of_floor": milliseconds / found["step_ms"]}


def _listed(overrides: list[str], setting: Setting) -> Row:
    recommender = untrained(overrides, setting.device.type)
    found = measure_lists(recommender, 20 if setting.tiny else RANKED_USERS)
    return {"lists_per_s": found["lists_per_s"], "lists": found["lists"]}


CHECK = Check("training", "the benchmark's jobs a to d", 90, rows)
