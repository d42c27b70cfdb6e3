"""A sweep of tiny jobs, and how they ended."""

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
    return {
        file.parent.name.partition("-")[0]: json.loads(file.read_text())["status"]
        for file in sweep.glob("*/metrics.json")
    }
