"""Write the record of a run into its folder: run.json, metrics.json, ranks.npz and items.npz."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasrec_lab.config.closed_form import ClosedFormConfig
from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, Pruned, explain_out_of_memory, printable
from sasrec_lab.files import atomic_write, display_path, sync_tree
from sasrec_lab.run.folder import (
    ITEMS,
    METRICS,
    RANKS,
    RUN,
    VALIDATION_RANKS,
    broken_reason,
    has_checkpoint,
    read_intact_json,
    remove_drafts,
    write_json,
)
from sasrec_lab.run.lock import is_full
from sasrec_lab.run.provenance import COMMAND, as_typed, code_version, is_first_process
from sasrec_lab.run.signals import interrupts_deferred

if TYPE_CHECKING:  # help and errors do not wait for NumPy
    import numpy as np

    from sasrec_lab.data.evaluation_rows import EvaluationRows
    from sasrec_lab.data.sequences import Sequences

log = logging.getLogger(__name__)


class RunRecord:
    """Writes a run's records: run.json at the start and the end, metrics.json at the end, whatever the outcome.

    `info` becomes run.json and `results` metrics.json; `previous` is the run.json of the run that this one resumes.
    """

    def __init__(self, folder: Path, cfg: TrainConfig):
        self.folder = folder
        self.previous = read_intact_json(folder / RUN) if cfg.ckpt else {}
        self.info: dict[str, Any] = {
            "git": code_version(),
            "command": os.environ.get(COMMAND) or as_typed(),
            "directory": os.getcwd(),  # the command's relative paths start here
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": cfg.seed,
            "seconds": {},
            "config": to_plain(cfg),
        }
        for key in ("init_from", "item_features"):  # what the run began with
            if key in self.previous:
                self.info[key] = self.previous[key]
        if self.previous:
            last = {key: value for key, value in self.previous.items() if key not in ("config", "earlier")}
            self.info["earlier"] = [*self.previous.get("earlier", []), last]
        self.results = _empty_results()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to run.json under this name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.info["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def write_info(self) -> None:
        """Write run.json."""
        write_json(self.folder / RUN, self.info)

    def end(self, status: str, error: str | None = None) -> None:
        """Write metrics.json, then run.json; `status` is finished, failed, interrupted or pruned."""
        self.results |= {"status": status, "error": error}
        write_json(self.folder / METRICS, self.results)
        for name in (".hydra", "tb", "train.log"):  # others write these: what has ended survives a power cut as a whole
            sync_tree(self.folder / name)
        # a run.json without an end tells that metrics.json, if any, is older than this run
        self.info["end"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.write_info()

    def end_failed(self, error: str) -> bool:
        """Write that the run failed unless it has ended already, and return whether it had not."""
        if is_open := "end" not in self.info:
            self.end("failed", error)
        return is_open


@contextmanager
def record_run(folder: Path, cfg: TrainConfig) -> Iterator[RunRecord]:
    """Record the run inside, however it ends. With several processes only the first one writes."""
    run, is_begun = RunRecord(folder, cfg), False
    try:
        if is_first_process():
            with interrupts_deferred():  # so that a signal is recorded as soon as there is a record
                _begin(run)
                is_begun = True
        with explain_out_of_memory(_memory_hint(cfg)):
            yield run
    except BaseException as error:
        if is_begun:
            with suppress(OSError):  # a full disk must not hide the error
                run.end(*_end_of(error))
        raise
    if is_begun:
        run.end("finished")


def _begin(run: RunRecord) -> None:
    """Write run.json, and remove what earlier attempts that failed have left."""
    remove_drafts(run.folder)
    for reason in filter(None, (broken_reason(run.folder / name) for name in (RUN, METRICS))):
        log.warning(f"{reason}; it is written again")
    run.write_info()
    if not run.previous:
        (run.folder / METRICS).unlink(missing_ok=True)


def _end_of(error: BaseException) -> tuple[str, str | None]:
    """Return the status of a run that ends with this error, and the text to record."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None
    return ("pruned", str(error)) if isinstance(error, Pruned) else ("failed", _error_text(error))


def _memory_hint(cfg: TrainConfig) -> str:
    """Return which keys a run that is out of memory can lower."""
    if isinstance(cfg.model, ClosedFormConfig):
        return f"lower evaluation.batch_size={cfg.evaluation.batch_size}, or use fewer items"
    batch, model = f"batch_size={cfg.batch_size}", f"model.dim={cfg.model.dim}, model.maxlen={cfg.model.maxlen}"
    negatives = f"loss.negatives={cfg.loss.negatives}, " if cfg.loss.negatives else ""
    return f"lower {batch}, {negatives}{model} or evaluation.batch_size={cfg.evaluation.batch_size}"


def mark_failed(folder: Path, error: Exception) -> None:
    """Write metrics.json for a sweep's job whose configuration is invalid, so that no run can record it."""
    write_json(folder / METRICS, _empty_results() | {"error": _error_text(error)})


def _empty_results() -> dict[str, Any]:
    """Return the metrics.json of a run that has measured nothing yet."""
    nothing: dict[str, Any] = {"protocol": {}, "metrics": {}, "baselines": {}, "best_epoch": None, "epochs": 0}
    return {"status": "failed", "error": None} | nothing


def write_ranks(
    folder: Path, ranks: dict[str, Any], rows: "EvaluationRows", sequences: "Sequences", stage: str = "test"
) -> None:
    """Write ranks.npz: per test target the raw ids of user and target, and the target's rank (0: a miss).

    `ranks` has the columns `row` and `user` (indices), `rank` and, if asked for, `sampled_rank`, one entry per target
    of the stage's rows, in their order. The row is written too if a user may have several targets. For "val" the file
    is validation_ranks.npz.
    """
    import numpy as np

    columns = {name: np.asarray(column) for name, column in ranks.items()}
    if len(rows.targets) == rows.num_users:
        del columns["row"]
    columns["user"] = sequences.user_ids[columns["user"]]
    columns["target"] = sequences.item_ids[sequences.items[rows.places] - 1]  # the model may not know them
    name = {"test": RANKS, "val": VALIDATION_RANKS}[stage]
    with atomic_write(folder / name, locked=True) as draft:
        np.savez(draft, **columns)  # type: ignore[arg-type] # no column is called allow_pickle


def write_items(
    folder: Path, ids: "np.ndarray", titles: "np.ndarray | None", categories: "list[str] | None" = None
) -> None:
    """Write items.npz: the raw ids of the items that the model knows, item i + 1 at place i, and any titles.

    `categories` are the names of those that item vectors are made of.
    """
    import numpy as np

    arrays = {"ids": ids} if titles is None else {"ids": ids, "titles": titles}
    if categories:
        arrays["categories"] = np.array(categories)
    with atomic_write(folder / ITEMS, locked=True) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _error_text(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def describe_failure(error: Exception, folder: Path) -> str:
    """Return one line on what ended the run in this folder and, if the disk failed, on what it has kept."""
    if not isinstance(error, OSError):
        return printable(_error_text(error).split("\n")[0])
    fix = "; free some space and start again" if is_full(error) else ""
    kept = f"; finished epochs are in {display_path(folder)}" if has_checkpoint(folder) else ""
    place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else display_path(folder)
    return printable(f"{place}: {error.strerror or error}{fix}{kept}")
