"""Check that models are what they are in RecTools and RePlay: equal weights give equal outputs in both libraries.

python scripts/parity_peers.py                                  ML-100K; exits with 1 if a difference is too large
python scripts/parity_peers.py --only ligr dataset=synthetic    one model, other data: keys of sasrec_lab.train
python scripts/parity_peers.py --train --seeds 3 --epochs 20    train SASRec, on MovieLens-1M's first 2,000 users
python scripts/parity_peers.py --train --only hstu --seeds 10   train HSTU, on MovieLens latest-small

The libraries run in the environments that bench_peers.py creates for them. All of their weights, including biases and
norms, are random and copied into our model. Only --train trains, and reuses the results of earlier calls.
"""

import argparse
import sys
from pathlib import Path

from bench import OVERRIDES_HELP, choice_of
from benchmark.peer import PEERS
from benchmark.results import write_results
from benchmark.subprocesses import JobFailed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity import closed_form, hugging_face, list_metrics, metrics, rectools, replay, training
from parity.comparison import FOLDER, Comparison, Row, table, too_large
from parity.fixture import with_weights, write_fixture

from sasrec_lab.config.composition import load
from sasrec_lab.data.fetch import fetch_missing
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError

MODELS = (
    rectools.SASREC,
    rectools.LIGR,
    rectools.BERT4REC,
    rectools.HSTU,
    replay.BERT4REC,
    hugging_face.BERT4REC,
    closed_form.CLOSED_FORM,
)
COMPARISONS = {x.name: x for x in (*MODELS, metrics.METRICS_OF_LISTS, list_metrics.BEYOND_ACCURACY)}
VERSIONS = {name: version for peer in (*PEERS.values(), hugging_face.PEER) for name, version in peer.version.items()}


def main() -> None:
    """Compare outputs, or trained models."""
    args = parse_args()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if args.train:
            rows = training.compare_training(*args.only, args.overrides, args.seeds, args.epochs)
            print(training.table(rows))
        else:
            rows = [row for x in args.only for row in compare(x, args.overrides, args.k, args.fixtures)]
            print(table(rows))
        if args.json:
            write_results(args.json, rows, VERSIONS)
    except (InputError, JobFailed) as error:
        sys.exit(f"error: {error}")
    if not args.train and too_large(rows):
        names = ", ".join(f"{row['by']}: {row['difference']}" for row in too_large(rows))
        sys.exit(f"error: larger than allowed: {names}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        type=choice_of(COMPARISONS),
        metavar="NAMES",
        help=f"what to compare (default: {', '.join(COMPARISONS)}; with --train: {training.DEFAULT.name})",
    )
    parser.add_argument("--k", type=int, default=10, help="length of the lists (default: 10)")
    parser.add_argument(
        "--fixtures", type=Path, metavar="FOLDER", help="write the outputs there, for tests/scripts/test_parity.py"
    )
    parser.add_argument("--train", action="store_true", help="train sasrec, or --only hstu, in both libraries")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, help="training epochs (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args()
    args.only = args.only or ([training.DEFAULT] if args.train else list(COMPARISONS.values()))
    names = [x.name for x in args.only]
    if args.train and (len(names) > 1 or names[0] not in training.TRAINED):
        parser.error(f"--train with --only {','.join(names)}: give one of {', '.join(training.TRAINED)}")
    return args


def compare(comparison: Comparison, overrides: list[str], k: int, fixtures: Path | None = None) -> list[Row]:
    """Return the largest differences between a library's outputs and ours."""
    cfg = load([*comparison.overrides, *overrides])
    fetch_missing(cfg.dataset, cfg.data_dir)
    sequences = with_weights(load_sequences(cfg.dataset, cfg.data_dir))
    theirs = comparison.outputs(sequences, cfg, comparison.variants(cfg.model), k)
    if fixtures:
        write_fixture(fixtures / f"{comparison.name}.json", sequences, cfg.model, theirs)
    return comparison.rows(theirs, sequences, cfg.model)


if __name__ == "__main__":
    main()
