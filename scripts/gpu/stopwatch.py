"""Time a function on a device, and measure the device: rate of products, bandwidth, launches."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark.roofline import synchronize

LAUNCHES = 1000


@dataclass(frozen=True)
class Card:
    """The measured speed of a device, apart from products, which benchmark/roofline.py measures for each job."""

    bytes_per_s: float
    seconds_per_launch: float

    @staticmethod
    def measured(device: torch.device, *, tiny: bool) -> "Card":
        """Return the speed of this device; a copy reads and writes."""
        size = 2**20 if tiny else 2**30
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copying = best_seconds(lambda: target.copy_(source), device, repeats=5)
        number = torch.zeros(1, device=device)

        def launch() -> None:
            for _ in range(LAUNCHES):
                number.add_(1)

        return Card(2 * size / copying, best_seconds(launch, device, repeats=3) / LAUNCHES)


def best_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the shortest time of some calls, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def peak_mb(function: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of a GPU during a call, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) // 2**20
