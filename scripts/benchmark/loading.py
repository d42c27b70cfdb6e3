"""Time loading from a file, or from the cache, to arrays: python -m benchmark.loading [--cache FOLDER] dataset=kion ...

With --cache the cache is in that folder, and the data root's own stays unchanged.
"""

import argparse
import json
import os.path
import resource
import sys
import time
from pathlib import Path

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, Format
from sasrec_lab.data import source
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError


def main() -> None:
    """Print rows, seconds and peak memory as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    try:
        cfg = load(args.overrides)
        fetch_missing(cfg.dataset, cfg.data_dir)
        root = cfg.data_dir if args.cache is None else str(root_of_links(args.cache, cfg.dataset, cfg.data_dir))
        start = time.perf_counter()
        sequences = load_sequences(cfg.dataset, root)
        seconds = time.perf_counter() - start
    except InputError as error:
        sys.exit(f"error: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"rows": len(sequences.items), "seconds": seconds, "peak_rss_mb": peak}))


def root_of_links(folder: Path, dataset: DatasetConfig, data_dir: str | None) -> Path:
    """Return the folder as a data root that links to the data set's file, and so has a cache of its own."""
    if dataset.format is not Format.synthetic:
        root = Path(os.path.abspath(source.data_root(data_dir)))
        file = Path(os.path.abspath(source.find(dataset, root)))
        if file.is_relative_to(root):  # a file outside the root is found from any root
            link = folder / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file)
    return folder


if __name__ == "__main__":
    main()
