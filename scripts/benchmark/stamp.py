"""Print what a result must be stamped with, as JSON: date, commit, machine with any GPU, threads, versions."""

import json
import os
import subprocess
from datetime import date

import torch

from sasrec_lab.ops.backend import processor
from sasrec_lab.run.machine import versions
from sasrec_lab.run.provenance import code_version


def main() -> None:
    """Print the stamp."""
    machine = {"cpu": processor(), "cores": os.cpu_count(), **gpu()}
    measured = {"measured": date.today().isoformat(), **code_version(), "machine": machine}
    print(json.dumps(measured | {"threads": torch.get_num_threads(), "versions": versions()}))


def gpu() -> dict[str, str]:
    """Return the name and the driver of the GPU; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # a container may be without the command
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(), "driver": driver}


if __name__ == "__main__":
    main()
