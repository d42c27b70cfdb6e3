"""Write the sequences that a configuration trains on, for peers: python -m benchmark.windows FILE.npz overrides...

`items[offsets[w]:offsets[w + 1]]` is one training window of at most maxlen + 1 items, numbered from 1.
"""

import json
import sys
from pathlib import Path

import numpy as np

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import BlockName, TimeBias
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.sequences import concatenate_ranges, load_sequences
from sasrec_lab.errors import InputError

_KINDS = {BlockName.transformer: "sasrec", BlockName.ligr: "ligr", BlockName.hstu: "hstu"}


def main() -> None:
    """Write the file and print sizes and settings as JSON."""
    file = Path(sys.argv[1])
    try:
        cfg = load(sys.argv[2:])
        fetch_missing(cfg.dataset, cfg.data_dir)
        sequences = load_sequences(cfg.dataset, cfg.data_dir)
        holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    except InputError as error:
        sys.exit(f"error: {error}")
    offsets = np.append(0, np.cumsum(holdout.window_ends - holdout.window_starts))
    places = concatenate_ranges(holdout.window_starts, holdout.window_ends)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, items=holdout.items[places].astype(np.int64), offsets=offsets)
    model = cfg.model
    sizes = {"blocks": model.blocks, "heads": model.heads, "dim": model.dim, "maxlen": model.maxlen}
    kind = _KINDS[model.block] if model.causal else "bert4rec"
    sizes |= {"model": kind, "ff_dim": model.feed_forward_width, "mask_share": cfg.objective.mask_share}
    sizes |= {"time_bias": model.time_bias is TimeBias.buckets, "position_bias": model.position_bias}
    sizes |= {"temperature": model.temperature}
    training = {"dropout": model.dropout, "batch_size": cfg.batch_size, "lr": cfg.optimizer.lr}
    print(json.dumps({"windows": str(file), "num_items": holdout.num_items} | sizes | training))


if __name__ == "__main__":
    main()
