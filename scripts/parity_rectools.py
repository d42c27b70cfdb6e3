"""Show that model=sasrec_rectools is RecTools' SASRec: the same weights give the same numbers in both.

python scripts/parity_rectools.py                                  ML-100K; ends with 1 if a difference exceeds 1e-5
python scripts/parity_rectools.py dataset=synthetic model.dim=8    other data and sizes: keys of sasrec_lab.train
python scripts/parity_rectools.py --train --seeds 3 --epochs 20    both are trained, on MovieLens-1M's first 2,000 users

RecTools 0.19 runs in the environment that bench_peers.py makes for it. Its weights are random, biases and norms among
them, and carried over; nothing is trained without --train, whose results are kept and not computed again.
"""

import argparse
import sys
from pathlib import Path

from benchmark.subprocesses import JobFailed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity.fixture import write_fixture
from parity.outputs import WITHIN, differences, outputs_of_rectools, table
from parity.peer import FOLDER, MODEL, variants, with_weights
from parity.training import compare_training

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError


def main() -> None:
    args = parse_args()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if args.train:
            print(compare_training(args.seeds, args.epochs))
        else:
            compare_outputs(load([*MODEL, *args.overrides]), args.k, args.fixture)
    except (InputError, JobFailed) as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=10, help="length of the lists (10)")
    parser.add_argument(
        "--fixture", type=Path, metavar="FILE", help="write what RecTools gave, for tests/scripts/test_parity.py"
    )
    parser.add_argument("--train", action="store_true", help="train both instead, and compare their NDCG@10")
    parser.add_argument("--seeds", type=int, default=3, help="of the training (3)")
    parser.add_argument("--epochs", type=int, default=20, help="of the training (20)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of python -m sasrec_lab.train")
    return parser.parse_intermixed_args()


def compare_outputs(cfg: TrainConfig, k: int, fixture: Path | None) -> None:
    sequences = with_weights(load_sequences(cfg.dataset, cfg.data_dir))
    theirs = outputs_of_rectools(sequences, cfg, k)
    if fixture:
        write_fixture(fixture, sequences, cfg.model, theirs)
    found = {name: differences(arrays, sequences, variants(cfg.model)[name]) for name, arrays in theirs.items()}
    print(table(found))
    if max(largest for part in found.values() for largest in part.values()) > WITHIN:
        sys.exit(f"error: a difference exceeds {WITHIN:g}")


if __name__ == "__main__":
    main()
