"""Train whole runs: one on MovieLens-1M for about a minute, and pairs with the same seed, which must be equal."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from gpu.check import Check, Row, Setting, attempt
from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Format
from sasrec_lab.data import source
from sasrec_lab.train import train

SECONDS = 70
FULL = "experiment=quality/sasrec_ml_1m"
TINY = ("dataset=synthetic", "dataset.synthetic.users=80", "dataset.synthetic.items=40", "model=tiny")
SAME_SEED = (  # each with what adds up by index: the table's gradient, sampled negatives, rows of the optimizer
    ("loss=softmax",),
    ("loss=gbce", "loss.negatives=5"),
    ("loss=sampled_softmax", "loss.negatives=32", "optimizer.name=rowwise_adam"),
    ("loss=softmax", "trainer.precision=bf16-mixed"),
    ("loss=softmax", "capture=true"),
)


def full_run(setting: Setting) -> Iterator[Row]:
    """Yield quality and seconds of the preset, or of a few epochs on generated data if tiny."""
    words = [*TINY, "trainer.max_epochs=1"] if setting.tiny else [FULL, f"trainer.max_time=00:00:01:{SECONDS - 60}"]
    words.append(_trainer(setting))
    cfg = load(words)
    if cfg.dataset.format is not Format.synthetic:
        source.find(cfg.dataset, source.data_root(cfg.data_dir))  # nothing is fetched
    yield attempt(" ".join(words), partial(_measured, words))


def same_seed(setting: Setting) -> Iterator[Row]:
    """Yield whether two runs with the same seed have the same weights and metrics, with trainer.deterministic=true."""
    size = (
        TINY if setting.tiny else ("dataset=synthetic", "dataset.synthetic.users=2000", "dataset.synthetic.items=1000")
    )
    for words in SAME_SEED[:1] if setting.tiny else SAME_SEED:
        epochs = "trainer.max_epochs=1" if setting.tiny else "trainer.max_epochs=2"
        every = [*size, *words, epochs, "trainer.deterministic=true", _trainer(setting)]
        yield attempt(" ".join(words), partial(_compared, every))


def _trainer(setting: Setting) -> str:
    return "trainer=gpu" if setting.device.type == "cuda" else "trainer=cpu"


def _measured(words: list[str]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        results = train(load(words), Path(folder))
        seconds = time.perf_counter() - start
    metrics = {name: results["metrics"][f"test/{name}@10"] for name in ("ndcg", "recall")}
    return metrics | {"seconds": seconds, "epochs": results["epochs"]}


def _compared(words: list[str]) -> Row:
    outcomes = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(load(words), Path(folder))["metrics"]
            saved = torch.load(Path(folder) / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")
            outcomes.append((metrics, saved["state_dict"]))
    (metrics, weights), (other_metrics, other_weights) = outcomes
    largest = max(float((weights[name] - other_weights[name]).abs().max()) for name in weights)
    measured = {"equal": largest == 0 and metrics == other_metrics, "largest_difference": largest}
    return measured if measured["equal"] else measured | {"failed": "two runs with the same seed differ"}


FULL_RUN = Check("run", f"a run on MovieLens-1M of at most {SECONDS} s", SECONDS, full_run)
SAME_SEEDS = Check("seed", "the same seed twice", 20, same_seed)
