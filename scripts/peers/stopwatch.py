"""Measure a peer in its own process, as benchmark/training.py measures this project."""

import resource
import sys
import time


class Stopwatch:
    """Count useful positions and seconds of the training steps after the first `warm_up`."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.steps = 0
        self.positions = 0

    def step_ended(self, positions: int) -> None:
        """Record the end of a training step."""
        self.steps += 1
        self.now = time.perf_counter()
        if self.steps <= self.warm_up:
            self.start = self.now
        else:
            self.positions += positions

    @property
    def positions_per_s(self) -> float:
        """Return useful positions per second."""
        return self.positions / (self.now - self.start)


def peak_rss_mb() -> int:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
