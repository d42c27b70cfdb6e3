"""Export a finished run's encoder as a program that needs nothing of this package: torch.export's, or ONNX.

python -m sasrec_lab.export outputs/ml_100k/<run> encoder.pt2           writes encoder.pt2 and encoder.json
python -m sasrec_lab.export outputs/ml_100k/<run> encoder.onnx          the same for ONNX runtimes
python -m sasrec_lab.export outputs/ml_100k/<run> user.pt2 --vectors    writes user.pt2, user.json and user.npy

The program takes one history: the indices of its items (1 to the number of items, the most recent last), int64 of shape
(L,) with L from 1 to maxlen. It returns the scores of all items, float32 of shape (items,); place i is item i + 1. With
--vectors it returns the history's vector, float32 of shape (D,), and the .npy file has the items' vectors, of shape
(items, D); the dot product with an item's vector is the item's score. For a model that reads times the program takes
two more arguments, int64 seconds since 1970: the time of each item (L,), and when the next one is asked for (1,). The
.json file has maxlen, which is one less than the model's if a mask is put behind the history (BERT4Rec), the raw ids of
the items, ordered by index, and `"reads_times": true` if it does.
"""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sasrec_lab.config.arguments import Arguments
from sasrec_lab.config.foreign import names_in
from sasrec_lab.errors import InputError, explain_out_of_memory
from sasrec_lab.files import atomic_write
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run import signals

if TYPE_CHECKING:
    from sasrec_lab.recommend.rankers import EncoderRanker


def entry() -> None:
    """Run the command line; a user error ends in one line."""
    signals.exit_at_once()
    try:
        args = parse(sys.argv[1:])
        with explain_out_of_memory("export the model on a machine with more memory"):
            trust = args.trust.split(",") if args.trust else ()
            written = export(args.run, args.output, trust, vectors=args.vectors)
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        signals.expect_exit()
    print(f"{', '.join(map(str, written[:-1]))} and {written[-1]}")


def parse(words: list[str]) -> Namespace:
    """Return the folder of the `run`, the `output` to write, the packages to `trust`, and whether to export `vectors`.

    The first three may be written run=..., output=... and trust=[...], as recommend takes them.
    """
    parser = Arguments("sasrec-export", __doc__ or "")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("output", type=Path, help="where to write the program, such as encoder.pt2 or encoder.onnx")
    parser.add_argument("--vectors", action="store_true", help="export the history's vector and the items' instead")
    parser.add_argument("--trust", metavar="PACKAGE", help="package whose code may be imported; of several: a,b")
    words = [re.sub(r"^trust=\[?(.*?)\]?$", r"--trust=\1", word) for word in words]
    places = {"run": 0, "output": 2}
    ordered = sorted(words, key=lambda word: places.get(word.partition("=")[0], 1))  # stable
    return parser.parse([re.sub(r"^(run|output)=", "", word) for word in ordered])


def export(run: Path, output: Path, trust: Sequence[str] = (), *, vectors: bool = False) -> list[Path]:
    """Write the program and the ids, and with `vectors` those of the items; return the paths of the files.

    `trust` names the packages whose code may be imported, if the run has a block, head or objective of its own.

    Raises:
        InputError: the run cannot be read, needs code that is not trusted or cannot be exported, or the output cannot
            be written.
    """
    if output.suffix not in (".pt2", ".onnx"):
        fix = output.with_suffix(".pt2") if output.name else output / "encoder.pt2"
        raise InputError(f"output={output} must end in .pt2 (torch.export's format) or .onnx; use {fix}")
    if not output.parent.is_dir():
        raise InputError(f"output={output}: there is no folder {output.parent}; create it, or choose another place")
    ids, table = output.with_suffix(".json"), output.with_suffix(".npy")
    _check_replaceable(ids, table if vectors else None)
    # imported here, because help and user errors need not wait for torch
    import numpy as np

    from sasrec_lab.export.programs import PROGRAMS
    from sasrec_lab.recommend.rankers import EncoderRanker
    from sasrec_lab.recommend.recommender import Recommender

    recommender = Recommender.from_run(run, device="cpu", trust=trust)
    ranker = recommender.ranker
    if not isinstance(ranker, EncoderRanker):
        model = run_folder.load_finished(recommender.folder)[0]["model"]["name"]
        raise InputError(
            f"run={run} has model={model}, which has no encoder and is not exported; use sasrec-recommend for it"
        )
    with _explaining_own_code(recommender.folder):
        content = PROGRAMS[output.suffix](ranker, vectors=vectors)
    signals.raise_exit()  # from here on drafts may have to be removed
    try:
        with ExitStack() as files:
            files.enter_context(atomic_write(output)).write_bytes(content)
            files.enter_context(atomic_write(ids)).write_text(_described(ranker, recommender.items.ids.tolist()))
            if vectors:
                draft = files.enter_context(atomic_write(table))
                with draft.open("wb") as file:
                    np.save(file, ranker.encoder.item_table.detach().numpy())
    except OSError as error:
        raise InputError(
            f"output={output} cannot be written: {error.strerror or error}; choose another place"
        ) from error
    return [output, ids, *([table] if vectors else [])]


@contextmanager
def _explaining_own_code(run: Path) -> Iterator[None]:
    """Turn an exception of the body into an InputError if the run's model has parts that torch.export may refuse."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever such a part makes torch.export raise
        names = names_in({"model": run_folder.load_finished(run)[0]["model"]})
        if not names:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"run={run}: torch.export cannot export {' and '.join(names)}: {reason}") from error


def _described(ranker: "EncoderRanker", items: list[object]) -> str:
    """Return the content of the .json file."""
    known = {"maxlen": ranker.encoder.longest_history, "items": items}
    return json.dumps(known | ({"reads_times": True} if ranker.query_time is not None else {}))


def _check_replaceable(ids: Path, table: Path | None) -> None:
    """Raise InputError if a file that the user has not named exists, and was not written by an export."""
    known = {}
    if ids.exists():
        with suppress(OSError, ValueError, AttributeError):
            known = json.loads(ids.read_text())
        if not isinstance(known, dict) or not {"maxlen", "items"} <= known.keys() <= {"maxlen", "items", "reads_times"}:
            raise InputError(
                f"output: the ids would overwrite {ids}, which no export wrote; move it, or name another file"
            )
    if table is not None and table.exists() and not _has_vectors(table, known.get("items")):
        raise InputError(
            f"output: the items' vectors would overwrite {table}, which no export wrote; move it, or name another file"
        )


def _has_vectors(table: Path, items: object) -> bool:
    """Return whether an array has a vector for each of the items that an export listed next to it."""
    import numpy as np

    try:
        array = np.load(table, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    is_table = isinstance(array, np.ndarray) and array.ndim == 2  # an archive of arrays is not an array
    return is_table and isinstance(items, list) and len(array) == len(items)


if __name__ == "__main__":
    entry()
