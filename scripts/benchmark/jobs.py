"""Benchmark jobs: data, sizes and how much is timed. Imports neither torch nor NumPy; subprocesses.py says why."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("outputs/bench")
SIZES = ("model.blocks=2", "model.heads=1", "model.dropout=0.2", "batch_size=128")


@dataclass(frozen=True)
class Job:
    """A configuration to measure, and how much of it."""

    name: str
    about: str
    dataset: tuple[str, ...]
    settings: tuple[str, ...] = ()
    generated: str | None = None  # the file of generated_data.py that it reads
    steps: int = 0  # training steps that are timed, about ten seconds on two cores
    ranked_users: int = 1_000_000  # maximum
    peers_ranked_users: int = 20_000  # maximum for peers, which take longer


JOBS = {
    job.name: job
    for job in (
        Job(
            name="ml1m",
            about="MovieLens-1M, dim 64, maxlen 200",
            dataset=("dataset=sasrec_ml_1m",),
            settings=("model.dim=64", "model.maxlen=200"),
            steps=94,  # two epochs
        ),
        Job(
            name="sparse",
            about="Amazon Home 5-core, dim 64, maxlen 50",
            dataset=("dataset=csv", "dataset.path=home-5core/interactions.csv"),
            settings=("model.dim=64", "model.maxlen=50"),
            steps=250,
            peers_ranked_users=4_000,
        ),
        Job(
            name="kion-like",
            about="like KION: 300,000 generated users, 15,700 items, dim 128, maxlen 32",
            dataset=("dataset=csv", "dataset.path=kion_like/interactions.csv", "dataset.time=null"),
            settings=("model.dim=128", "model.maxlen=32"),
            generated="kion_like",
            steps=200,
            peers_ranked_users=300_000,  # all
        ),
        Job(
            name="million",
            about="a million items, 200,000 generated users, 4,096 negatives shared in a batch, dim 64, maxlen 50",
            dataset=("dataset=csv", "dataset.path=million/interactions.csv", "dataset.time=null"),
            settings=(
                "model.dim=64",
                "model.maxlen=50",
                "loss=sampled_softmax",
                "loss.negatives=4096",
                "optimizer.name=rowwise_adam",
            ),
            generated="million",
            steps=150,
            ranked_users=4_000,
        ),
        Job(
            name="loading",
            about="a CSV with KION's columns, 5.9 million generated rows, to arrays and from the cache",
            dataset=("dataset=kion",),
            generated="kion",
        ),
        Job(
            name="ligr",
            about="LiGR on MovieLens-1M, dim 64, maxlen 200",
            dataset=("dataset=sasrec_ml_1m",),
            settings=("model=ligr", "model.dim=64", "model.maxlen=200"),
            steps=94,
        ),
        Job(
            name="bert4rec",
            about="BERT4Rec on MovieLens-1M, dim 64, 2 heads, maxlen 200, a fifth of the items masked",
            dataset=("dataset=sasrec_ml_1m",),
            settings=("model=bert4rec", "model.dim=64", "model.heads=2", "model.maxlen=200"),
            steps=94,
        ),
        Job(
            name="hstu",
            about="HSTU with both biases on MovieLens latest-small, dim 64, maxlen 200",
            dataset=("dataset=ml_latest_small",),
            settings=("model=hstu", "loss=softmax", "model.dim=64", "model.maxlen=200"),
            steps=100,
        ),
    )
}
LETTERS = dict(zip("abcdefg", JOBS.values(), strict=False))  # the earlier names of the first jobs, still accepted
LOADING = JOBS["loading"]


def generated_folder(small: bool) -> Path:
    """Return a data root for generated files and their cache, separate from the user's."""
    return FOLDER / ("generated_small" if small else "generated")


def job_overrides(job: Job, given: list[str], folder: Path) -> list[str]:
    """Return a job as overrides of the train command, replaced by those given; another data set replaces the job's."""
    keys = {override.partition("=")[0] for override in given}
    dataset = () if "dataset" in keys else job.dataset
    chosen = {override.partition("=")[0]: override for override in (*dataset, *SIZES, *job.settings)}
    own = [override for key, override in chosen.items() if key not in keys]
    root = [f"data_dir={folder}"] if job.generated and dataset else []
    return own + given + root
