"""A sweep of tiny jobs, and the status of each."""

import json
from pathlib import Path

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=100",
    "dataset.synthetic.items=40",
    "model=tiny",
    "trainer=fast",
    "hydra.sweep.dir=sweep",
]


def ends(sweep: Path) -> dict[str, str]:
    """Return the status of each job by its number."""
    return {
        file.parent.name.partition("-")[0]: json.loads(file.read_text())["status"]
        for file in sweep.glob("*/metrics.json")
    }
