"""Time from a file, or from the cache, to arrays: python -m benchmark.loading dataset=kion data_dir=..."""

import json
import resource
import sys
import time

from sasrec_lab.command_line import load
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError


def main() -> None:
    try:
        cfg = load(sys.argv[1:])
        start = time.perf_counter()
        sequences = load_sequences(cfg.dataset, cfg.data_dir)
        seconds = time.perf_counter() - start
    except InputError as error:
        sys.exit(f"error: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"rows": len(sequences.items), "seconds": seconds, "peak_rss_mb": peak}))


if __name__ == "__main__":
    main()
