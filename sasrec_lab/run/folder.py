"""The run folder's contract: written by train, read by report and recommend.

run.json says what ran and on what; metrics.json how it ended, under which protocol, and what was measured; ranks.npz
the rank of each test user's target; train.log, .hydra/, checkpoints/ and tb/ come from Hydra and Lightning. Files are
written atomic_write or not at all; .lock belongs to the process that runs in the folder (claims.py).
"""

import json
import os
import shlex
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sasrec_lab.config.convert import is_bookkeeping, to_plain
from sasrec_lab.config.overrides import format_override
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError
from sasrec_lab.files import atomic_write, did_you_mean_path, display_path
from sasrec_lab.run.lock import check_unlocked, check_writable, is_full
from sasrec_lab.run.provenance import COMMAND, as_typed, code_version, is_first_process

if TYPE_CHECKING:
    from sasrec_lab.data.sequences import Sequences

_MAY_CHANGE_ON_RESUME = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
ITEMS = "items.npz"
_OTHER_FOLDER_HINT = "choose another hydra.run.dir"
RETRAIN_HINT = "train the run again, or give another run"  # what can be done about a run folder that is broken


def check_can_run(folder: Path, cfg: TrainConfig) -> dict[str, Any] | None:
    """Whether this configuration may run in the folder; gives its metrics.json where it has finished there already.

    Raises:
        InputError: the folder cannot be written, another process runs in it, or it holds another configuration's
            results.
    """
    check_writable(folder)
    check_unlocked(folder)
    before = _read(folder / "run.json", _OTHER_FOLDER_HINT)
    if before is None:
        _check_there(cfg.ckpt)
        if cfg.ckpt == "last":
            raise InputError(f"ckpt=last: {folder} holds no run; give the folder to go on in as hydra.run.dir=<folder>")
        return None
    differing = differences(before["config"], to_plain(cfg))
    longer = [key for key in differing if key in _MAY_CHANGE_ON_RESUME]
    if others := [key for key in differing if key not in longer or cfg.ckpt is None]:
        raise InputError(
            f"{folder} holds another configuration's results ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''} differ{'s' if len(others) == 1 else ''});"
            " choose another hydra.run.dir"
        )
    metrics = _read(folder / "metrics.json", _OTHER_FOLDER_HINT)
    if metrics and metrics["status"] == "finished" and "end" in before and not longer:
        return metrics
    _check_there(cfg.ckpt)
    if cfg.ckpt == "last" and not has_checkpoint(folder):
        raise InputError(f"ckpt=last: {folder} has no checkpoint yet (no epoch was finished); start anew without ckpt")
    return None


def _check_there(ckpt: str | None) -> None:
    if ckpt not in (None, "last") and not Path(ckpt).is_file():
        raise InputError(
            f"ckpt={ckpt}: there is no such file; give a checkpoint, or last, the only word, for the run folder's own"
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to go on from."""
    return (folder / "checkpoints" / "last.ckpt").is_file()


class Run:
    """The record of one run. run.json is written at the start and at the end, metrics.json when it ends, however."""

    def __init__(self, folder: Path, cfg: TrainConfig):
        self.folder = folder
        self.before = (_read(folder / "run.json", _OTHER_FOLDER_HINT) if cfg.ckpt else None) or {}
        self.info: dict[str, Any] = {
            "git": code_version(),
            "command": os.environ.get(COMMAND) or as_typed(),
            "directory": os.getcwd(),  # of the command's relative paths
            "start": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": cfg.seed,
            "seconds": {},
            "config": to_plain(cfg),
        }
        if self.before:
            last = {key: value for key, value in self.before.items() if key not in ("config", "earlier")}
            self.info["earlier"] = [*self.before.get("earlier", []), last]
        self.results = _no_results()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds spent inside are added to run.json under this name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.info["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def write(self) -> None:
        _write(self.folder / "run.json", self.info)

    def end(self, status: str, error: str | None = None) -> None:
        """`status` is finished, failed or interrupted."""
        self.results |= {"status": status, "error": error}
        _write(self.folder / "metrics.json", self.results)
        self.info["end"] = datetime.now(UTC).isoformat(timespec="seconds")  # without it metrics.json is of before
        self.write()


@contextmanager
def record_run(folder: Path, cfg: TrainConfig) -> Iterator[Run]:
    """However the block ends, the folder says so; a process that is not the first of several writes nothing."""
    run = Run(folder, cfg)
    first = is_first_process()
    end = run.end if first else lambda status, error=None: None
    if first:
        run.write()
        if not run.before:
            (folder / "metrics.json").unlink(missing_ok=True)  # of an earlier try that failed
    try:
        yield run
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(OSError):  # a full disk must not hide the error
            end("interrupted" if interrupted else "failed", None if interrupted else _error_text(error))
        raise
    end("finished")


def mark_failed(folder: Path, error: Exception) -> None:
    """metrics.json of a job of a sweep that has no valid configuration to record."""
    _write(folder / "metrics.json", _no_results() | {"error": _error_text(error)})


def _no_results() -> dict[str, Any]:
    """metrics.json of a run of which nothing is known yet."""
    nothing = {"protocol": {}, "metrics": {}, "baselines": {}, "best_epoch": None, "epochs": 0}
    return {"status": "failed", "error": None} | nothing


def read_config(folder: Path) -> dict[str, Any]:
    """The plain config of the run that began in the folder."""
    return (_read(folder / "run.json") or {"config": {}})["config"]


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json, or that there is none."""
    return _read(folder / "metrics.json") or {"status": "unfinished", "error": None}


def write_ranks(folder: Path, ranks: dict[str, Any], sequences: "Sequences") -> None:
    """ranks.npz: of each test user the external ids of user and target and the target's rank, 0 for a miss."""
    columns = {name: np.asarray(column) for name, column in ranks.items()}
    users = columns["user"]
    columns["user"] = sequences.user_ids[users]
    columns["target"] = sequences.item_ids[sequences.items[sequences.offsets[users + 1] - 1] - 1]  # known or not
    with atomic_write(folder / "ranks.npz", locked=True) as draft:
        np.savez(draft, **columns)


def write_items(folder: Path, ids: np.ndarray, titles: np.ndarray | None) -> None:
    """items.npz: the external ids of the items that the model knows, number i + 1 is ids[i]; and titles, if any."""
    arrays = {"ids": ids} if titles is None else {"ids": ids, "titles": titles}
    with atomic_write(folder / ITEMS, locked=True) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def read_items(folder: Path) -> dict[str, np.ndarray]:
    """What `write_items` wrote.

    Raises:
        InputError: it is not there or broken.
    """
    try:
        with zipfile.ZipFile(folder / ITEMS), np.load(folder / ITEMS) as file:
            arrays = dict(file)
        _check_items(arrays)
    except FileNotFoundError as error:
        raise InputError(f"{display_path(folder)} has no {ITEMS}: an older version made it; train it again") from error
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{display_path(folder / ITEMS)} is broken ({error}); {RETRAIN_HINT}") from error
    return arrays


def _check_items(arrays: dict[str, np.ndarray]) -> None:
    ids, titles = arrays.get("ids"), arrays.get("titles")
    if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iU" or len(np.unique(ids)) < len(ids):
        raise ValueError("it has no array `ids` of numbers or text, each once")
    if titles is not None and titles.shape != ids.shape:
        raise ValueError(f"it has {titles.size:,} titles for {len(ids):,} items")


def load_finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a finished run, as plain values, and its metrics.json.

    Raises:
        InputError: there is no such folder, it holds no run, or the run has not finished.
    """
    if not folder.is_dir():
        raise InputError(f"run={folder}: there is no such folder{did_you_mean_path(folder, only_folders=True)}")
    facts, results = _read(folder / "run.json"), {"status": None, "error": None} | read_metrics(folder)
    if facts is None:
        inner = sorted(path.parent.name for path in folder.glob("*/run.json"))
        if results["error"]:
            raise InputError(f"run={folder}: the run failed ({results['error']}); give one that has finished")
        what = "it has no run.json"
        if inner:
            example = shlex.quote(format_override("run", display_path(folder / inner[-1])))
            what = f"it holds {len(inner)}; give one, such as {example}"
        raise InputError(f"run={folder} is no run's folder: {what}")
    if results["status"] != "finished" or "end" not in facts:
        ends = {"failed": "failed", "interrupted": "was interrupted"}
        why = f" ({results['error']})" if results["error"] else ""
        end = ends.get(results["status"], "has not finished") + why
        raise InputError(f"run={folder}: the run {end}; go on with it, or give one that has finished")
    try:
        facts["config"]["dataset"].keys(), facts["config"]["data_dir"]
        results["protocol"]["sha256"], results["best_epoch"]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"run={folder}: run.json or metrics.json is malformed ({error}); {RETRAIN_HINT}") from error
    _set_paths(facts["config"], facts.get("directory", ""))
    return facts["config"], results


def _set_paths(config: dict[str, Any], directory: str) -> None:
    """Relative paths as they were meant where the run was made, which another command may not be called from."""

    def there(path: str) -> str:
        return str(Path(directory, Path(path).expanduser()))

    if config["data_dir"]:
        config["data_dir"] = there(config["data_dir"])
    if not config["dataset"].get("sources"):  # the user's own file, if not one below the data root
        for section in (config["dataset"], config["dataset"].get("titles") or {}):
            path = section.get("path")
            if path and any(Path(f"{there(path)}{ending}").is_file() for ending in ("", ".gz")):
                section["path"] = there(path)


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """The keys, dotted, in which two plain configs are two configurations."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = [
            differences(before.get(key), now.get(key), f"{prefix}{key}.")
            for key in keys
            if not is_bookkeeping(f"{prefix}{key}")
        ]
        return [key for keys in inner for key in keys]
    return [] if before == now else [prefix[:-1]]


def _error_text(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def describe_failure(error: Exception, folder: Path) -> str:
    """In one line what ended the run in this folder, and what of it there is."""
    if not isinstance(error, OSError):
        return _error_text(error).split("\n")[0]
    fix = "; free some space and start again" if is_full(error) else ""
    kept = f"; what was finished is in {display_path(folder)}" if has_checkpoint(folder) else ""
    return f"{error.filename or display_path(folder)}: {error.strerror or error}{fix}{kept}"


def _read(path: Path, fix: str = RETRAIN_HINT) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no object of JSON")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not what a run writes ({error}); {fix}") from error
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path, locked=True) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")
