"""Print what a result must be stamped with, as JSON: date, commit, machine, threads, versions."""

import json
import os
from datetime import date

import torch

from sasrec_lab.ops.backend import processor
from sasrec_lab.run.machine import versions
from sasrec_lab.run.provenance import code_version


def main() -> None:
    """Print the stamp."""
    machine = {"cpu": processor(), "cores": os.cpu_count()}
    measured = {"measured": date.today().isoformat(), **code_version(), "machine": machine}
    print(json.dumps(measured | {"threads": torch.get_num_threads(), "versions": versions()}))


if __name__ == "__main__":
    main()
