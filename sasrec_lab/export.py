"""A finished run's encoder as a torch.export program, which needs torch and nothing of this package.

python -m sasrec_lab.export outputs/ml_100k/<run> encoder.pt2    writes encoder.pt2 and encoder.json

The program takes one history, the numbers of its items (1 to the number of items; the most recent last), int64 of shape
(L,) with L from 1 to maxlen, and gives the scores of all items, float32 of shape (items,): place i is item i + 1.
encoder.json has maxlen and the items' external ids in the order of their numbers.
"""

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from sasrec_lab.errors import InputError

if TYPE_CHECKING:
    from sasrec_lab.recommend.recommender import Recommender


def entry() -> None:
    """One line for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("output", type=Path, help="where to put the program, such as encoder.pt2")
    args = parser.parse_args()
    try:
        program, ids = export(args.run, args.output)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{program} and {ids}")


def export(run: Path, output: Path) -> tuple[Path, Path]:
    """Write the program and the ids; gives both files.

    Raises:
        InputError: the run cannot be read, or the output not be written.
    """
    if output.suffix != ".pt2":
        raise InputError(
            f"output={output} is no .pt2 file, as torch.export's programs are named; write {output.with_suffix('.pt2')}"
        )
    if not output.parent.is_dir():
        raise InputError(f"output={output}: there is no folder {output.parent}")
    ids = output.with_suffix(".json")
    _refuse_foreign(ids)
    # imported here, because help and messages about mistakes need not wait for torch
    import torch

    from sasrec_lab.files import atomic_write
    from sasrec_lab.recommend.recommender import Recommender

    recommender = Recommender.from_run(run, device="cpu")
    saved = BytesIO()  # torch itself, writing to a full disk, ends the process
    torch.export.save(program_of(recommender), saved)
    try:
        with atomic_write(output) as program, atomic_write(ids) as draft:
            program.write_bytes(saved.getbuffer())
            draft.write_text(json.dumps({"maxlen": recommender.maxlen, "items": recommender.items.ids.tolist()}))
    except OSError as error:
        raise InputError(
            f"output={output} cannot be written: {error.strerror or error}; choose another place"
        ) from error
    return output, ids


def _refuse_foreign(ids: Path) -> None:
    """An export's own ids are written over, as its program is; the user has not named this file."""
    try:
        if json.loads(ids.read_text()).keys() == {"maxlen", "items"}:
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(f"output: the ids would overwrite {ids}, which no export wrote; move it, or name another .pt2")


def program_of(recommender: "Recommender") -> "torch.export.ExportedProgram":  # noqa: F821  torch comes late
    """By torch's own operators alone: attention asks torch.compiler.is_exporting()."""
    import torch

    from sasrec_lab.model.encoder import SingleHistoryScores

    maxlen = recommender.maxlen
    example = torch.ones(maxlen, dtype=torch.int64)
    lengths = {0: torch.export.Dim("L", min=1, max=maxlen)} if maxlen > 1 else {}
    with torch.no_grad():
        model = SingleHistoryScores(recommender.encoder).eval()
        return torch.export.export(model, (example,), dynamic_shapes=(lengths,))


if __name__ == "__main__":
    entry()
