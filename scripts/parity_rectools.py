"""Check that model=sasrec_rectools is RecTools' SASRec: equal weights give equal outputs in both libraries.

python scripts/parity_rectools.py                                  ML-100K; exits with 1 if a difference exceeds 1e-5
python scripts/parity_rectools.py dataset=synthetic model.dim=8    other data and sizes: keys of sasrec_lab.train
python scripts/parity_rectools.py --train --seeds 3 --epochs 20    train both, on MovieLens-1M's first 2,000 users

RecTools 0.19 runs in the environment that bench_peers.py creates for it. All of its weights, including biases and
norms, are random and copied into our model. Only --train trains, and reuses the results of earlier calls.
"""

import argparse
import sys
from pathlib import Path

from bench import OVERRIDES_HELP
from benchmark.results import write_results
from benchmark.subprocesses import JobFailed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity import outputs, training
from parity.fixture import write_fixture
from parity.outputs import WITHIN, differences, outputs_of_rectools
from parity.peer import FOLDER, MODEL, PEER, variants, with_weights
from parity.training import compare_training

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError


def main() -> None:
    """Compare outputs, or trained models."""
    args = parse_args()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if args.train:
            rows = compare_training(args.seeds, args.epochs)
            print(training.table(rows))
            if args.json:
                write_results(args.json, rows, PEER.version)
        else:
            compare_outputs(load([*MODEL, *args.overrides]), args.k, args.fixture, args.json)
    except (InputError, JobFailed) as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=10, help="length of the lists (default: 10)")
    parser.add_argument(
        "--fixture", type=Path, metavar="FILE", help="write RecTools' outputs for tests/scripts/test_parity.py"
    )
    parser.add_argument("--train", action="store_true", help="train both libraries instead, and compare their metrics")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, help="training epochs (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser.parse_intermixed_args()


def compare_outputs(cfg: TrainConfig, k: int, fixture: Path | None, json: Path | None = None) -> None:
    """Print the largest differences, and exit with an error if one is too large."""
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = with_weights(load_sequences(cfg.dataset, cfg.data_dir))
    theirs = outputs_of_rectools(sequences, cfg, k)
    if fixture:
        write_fixture(fixture, sequences, cfg.model, theirs)
    found = {name: differences(arrays, sequences, variants(cfg.model)[name]) for name, arrays in theirs.items()}
    rows = outputs.rows_of(found)
    print(outputs.table(rows))
    if json:
        write_results(json, rows, PEER.version)
    if max(largest for part in found.values() for largest in part.values()) > WITHIN:
        sys.exit(f"error: a difference exceeds {WITHIN:g}")


if __name__ == "__main__":
    main()
