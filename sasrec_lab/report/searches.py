"""Records of searches: their trials, and how much each key matters, as sasrec_lab.search writes them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec_lab.errors import counted
from sasrec_lab.run.folder import SEARCH, read_json


@dataclass(frozen=True)
class Trial:
    """A trial of a search; a pruned one has the value at which it was stopped, if it had one."""

    number: int
    status: str  # finished, pruned, failed, running
    value: float | None


@dataclass(frozen=True)
class SearchRecord:
    """The record of a search's folder."""

    folder: Path
    sampler: str
    pruner: str
    monitor: str  # the validation metric whose values the trials have
    space: dict[str, str]  # key -> how its values were written
    trials: list[Trial]
    importance: dict[str, float]  # share of each key, empty if there are too few trials

    def describe(self) -> str:
        """Return a line on the trials and how they ended."""
        ends = Counter(trial.status for trial in self.trials)
        counts = ", ".join(f"{count} {name}" for name, count in ends.items())
        return (
            f"search: {counted(len(self.trials), 'trial')} ({counts}), sampler {self.sampler}, pruner {self.pruner};"
            f" {self.monitor} over {', '.join(self.space)}"
        )


def read_search(folder: Path) -> SearchRecord:
    """Return the record of a search's folder.

    Raises:
        InputError: it is not one that a search writes.
    """
    record: dict[str, Any] = read_json(folder / SEARCH, "run the search again, which writes it") or {}
    trials = [Trial(each["number"], each["status"], each["value"]) for each in record["trials"]]
    return SearchRecord(
        folder,
        record["sampler"],
        record["pruner"],
        record["monitor"],
        record["space"],
        sorted(trials, key=lambda trial: trial.number),
        record["importance"],
    )
