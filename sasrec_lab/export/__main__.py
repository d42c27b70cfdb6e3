"""Export a finished run's encoder as a torch.export program, which needs torch and nothing of this package.

python -m sasrec_lab.export outputs/ml_100k/<run> encoder.pt2    writes encoder.pt2 and encoder.json

The program takes one history: the indices of its items (1 to the number of items, the most recent last), int64 of shape
(L,) with L from 1 to maxlen. It returns the scores of all items, float32 of shape (items,); place i is item i + 1.
For a model that reads times it takes two more arguments, int64 seconds since 1970: the time of each item (L,), and when
the next one is asked for (1,). encoder.json has maxlen, which is one less than the model's if a mask is put behind the
history (BERT4Rec), the raw ids of the items, ordered by index, and `"reads_times": true` if it does.
"""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from sasrec_lab.config.arguments import Arguments
from sasrec_lab.config.foreign import names_in
from sasrec_lab.errors import InputError, explain_out_of_memory
from sasrec_lab.files import atomic_write
from sasrec_lab.run import folder as run_folder
from sasrec_lab.run import signals


def entry() -> None:
    """Run the command line; a user error ends in one line."""
    signals.exit_at_once()
    try:
        args = parse(sys.argv[1:])
        with explain_out_of_memory("export the model on a machine with more memory"):
            program, ids = export(args.run, args.output, args.trust.split(",") if args.trust else ())
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        signals.expect_exit()
    print(f"{program} and {ids}")


def parse(words: list[str]) -> Namespace:
    """Return the folder of the run and the file to write, as `run` and `output`, and the packages to `trust`.

    They may be written run=..., output=... and trust=[...], as recommend takes them.
    """
    parser = Arguments("sasrec-export", __doc__ or "")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("output", type=Path, help="where to write the program, such as encoder.pt2")
    parser.add_argument("--trust", metavar="PACKAGE", help="package whose code may be imported; of several: a,b")
    words = [re.sub(r"^trust=\[?(.*?)\]?$", r"--trust=\1", word) for word in words]
    places = {"run": 0, "output": 2}
    ordered = sorted(words, key=lambda word: places.get(word.partition("=")[0], 1))  # stable
    return parser.parse([re.sub(r"^(run|output)=", "", word) for word in ordered])


def export(run: Path, output: Path, trust: Sequence[str] = ()) -> tuple[Path, Path]:
    """Write the program and the ids; return the paths of both files.

    `trust` names the packages whose code may be imported, if the run has a block, head or objective of its own.

    Raises:
        InputError: the run cannot be read, needs code that is not trusted or cannot be exported, or the output cannot
            be written.
    """
    if output.suffix != ".pt2":
        raise InputError(f"output={output} must end in .pt2 (torch.export's format); use {output.with_suffix('.pt2')}")
    if not output.parent.is_dir():
        raise InputError(f"output={output}: there is no folder {output.parent}; create it, or choose another place")
    ids = output.with_suffix(".json")
    _check_replaceable(ids)
    # imported here, because help and user errors need not wait for torch
    import torch

    from sasrec_lab.export.programs import program_of
    from sasrec_lab.recommend.rankers import EncoderRanker
    from sasrec_lab.recommend.recommender import Recommender

    recommender = Recommender.from_run(run, device="cpu", trust=trust)
    ranker = recommender.ranker
    if not isinstance(ranker, EncoderRanker):
        model = run_folder.load_finished(recommender.folder)[0]["model"]["name"]
        raise InputError(
            f"run={run} has model={model}, which has no encoder and is not exported; use sasrec-recommend for it"
        )
    saved = BytesIO()  # when torch itself writes to a full disk, it ends the process
    with _explaining_own_code(recommender.folder):
        torch.export.save(program_of(ranker), saved)
    signals.raise_exit()  # from here on drafts may have to be removed
    try:
        with atomic_write(output) as program, atomic_write(ids) as draft:
            program.write_bytes(saved.getbuffer())
            known = {"maxlen": ranker.encoder.longest_history, "items": recommender.items.ids.tolist()}
            if ranker.query_time is not None:
                known["reads_times"] = True
            draft.write_text(json.dumps(known))
    except OSError as error:
        raise InputError(
            f"output={output} cannot be written: {error.strerror or error}; choose another place"
        ) from error
    return output, ids


@contextmanager
def _explaining_own_code(run: Path) -> Iterator[None]:
    """Turn an exception of the body into an InputError if the run's model has parts that torch.export may refuse."""
    try:
        yield
    except Exception as error:  # whatever such a part makes torch.export raise
        names = names_in({"model": run_folder.load_finished(run)[0]["model"]})
        if not names:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"run={run}: torch.export cannot export {' and '.join(names)}: {reason}") from error


def _check_replaceable(ids: Path) -> None:
    """Raise InputError if the file of ids, which the user has not named, exists and was not written by an export."""
    try:
        if {"maxlen", "items"} <= json.loads(ids.read_text()).keys() <= {"maxlen", "items", "reads_times"}:
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(f"output: the ids would overwrite {ids}, which no export wrote; move it, or name another .pt2")


if __name__ == "__main__":
    entry()
