"""The jobs: data, sizes and how much of them is timed. Neither torch nor NumPy here: see child.py."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("outputs/bench")
SIZES = ("model.blocks=2", "model.heads=1", "model.dropout=0.2", "batch_size=128")


@dataclass(frozen=True)
class Job:
    letter: str
    name: str
    about: str
    dataset: tuple[str, ...]
    settings: tuple[str, ...] = ()
    made_up: str | None = None  # the file of made_up.py that it reads
    steps: int = 0  # training steps timed, about ten seconds of them on two cores
    ranked_users: int = 1_000_000  # at most so many are ranked
    peers_ranked_users: int = 20_000  # and so many by peers, which take longer


JOBS = {
    job.letter: job
    for job in (
        Job(
            letter="a",
            name="ml1m",
            about="the SASRec paper's MovieLens-1M, dim 64, maxlen 200",
            dataset=("dataset=sasrec_ml_1m",),
            settings=("model.dim=64", "model.maxlen=200"),
            steps=94,  # two epochs
        ),
        Job(
            letter="b",
            name="sparse",
            about="Amazon Home 5-core through dataset=csv, dim 64, maxlen 50",
            dataset=("dataset=csv", "dataset.path=home-5core/interactions.csv"),
            settings=("model.dim=64", "model.maxlen=50"),
            steps=250,
            peers_ranked_users=4_000,
        ),
        Job(
            letter="c",
            name="kion-like",
            about="300,000 made-up users, 15,700 items, dim 128, maxlen 32",
            dataset=("dataset=csv", "dataset.path=kion_like/interactions.csv", "dataset.time=null"),
            settings=("model.dim=128", "model.maxlen=32"),
            made_up="kion_like",
            steps=200,
            peers_ranked_users=300_000,  # all
        ),
        Job(
            letter="d",
            name="million",
            about="a million items, 200,000 made-up users, 4,096 negatives shared in a batch, dim 64, maxlen 50",
            dataset=("dataset=csv", "dataset.path=million/interactions.csv", "dataset.time=null"),
            settings=(
                "model.dim=64",
                "model.maxlen=50",
                "loss=sampled_softmax",
                "loss.negatives=4096",
                "optimizer.name=rowwise_adam",
            ),
            made_up="million",
            steps=150,
            ranked_users=4_000,
        ),
        Job(
            letter="e",
            name="loading",
            about="a CSV of KION's schema, 5.9 million made-up rows, to arrays and from the cache",
            dataset=("dataset=kion",),
            made_up="kion",
        ),
    )
}
LOADING = JOBS["e"]


def made_up_folder(small: bool) -> Path:
    """A data root of its own, so that made-up files and their cache never lie among the user's."""
    return FOLDER / ("made_up_small" if small else "made_up")


def job_overrides(job: Job, given: list[str], folder: Path) -> list[str]:
    """The job as words for the train command. What is given replaces the job's; another data set replaces all of it."""
    keys = {override.partition("=")[0] for override in given}
    dataset = () if "dataset" in keys else job.dataset
    own = [override for override in (*dataset, *SIZES, *job.settings) if override.partition("=")[0] not in keys]
    root = [f"data_dir={folder}"] if job.made_up and dataset else []
    return own + given + root
