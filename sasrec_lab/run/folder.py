"""Contract of the run folder: its files, and functions that read them.

run.json describes what ran and on which machine, metrics.json how it ended and what was measured under which protocol,
ranks.npz has the rank of each test user's target (or validation_ranks.npz that of validation, if the test may not be
seen), items.npz the items that the model knows. run/record.py and training/checkpoints.py write them, each atomically:
a reader sees the old file or the new one. train.log, .hydra/ and tb/ come from Hydra and Lightning; .lock belongs to
the process that runs in the folder (run/lock.py).
"""

import json
import os
import shlex
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sasrec_lab.config.overrides import format_override
from sasrec_lab.data.source import plain_or_gz
from sasrec_lab.errors import InputError
from sasrec_lab.files import (
    atomic_write,
    did_you_mean_path,
    display_path,
    draft_of,
    open_regular,
    read_small_text,
)
from sasrec_lab.run.fields import check_fields

if TYPE_CHECKING:  # help and errors do not wait for NumPy
    import numpy as np

RUN = "run.json"
METRICS = "metrics.json"
RANKS = "ranks.npz"
VALIDATION_RANKS = "validation_ranks.npz"  # in place of the other, if the test may not be seen
ITEMS = "items.npz"
TRACKERS = "trackers.json"  # ids of the run in trackers that have some
SEARCH = "search.json"  # of the folder of a search: its space and its trials
JOURNAL = "study.journal"  # of a search: Optuna's study
WEIGHTS = "weights.npz"  # of a model without epochs, in place of checkpoints
MAX_ARRAY_BYTES = 8 << 30  # 300 million test users, or 20 million items with long titles
_MAX_DIRECTORY = 8 << 20  # bytes of an archive's list of members, of which each takes a hundred
_MAX_HOLES = 16  # times the place that a large file takes on its disk; a disk that compresses halves weights
BEST_CHECKPOINT = Path("checkpoints", "best.ckpt")  # by validation
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")  # of the newest epoch
RESUME_HINT = "resume the run with ckpt=last, which tests it again, or choose another one"
RETRAIN_HINT = "retrain the run, or choose another one"  # the fix for a broken run folder


def read_json(path: Path, fix: str = RETRAIN_HINT) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no file.

    Raises:
        InputError: the file cannot be read, has no JSON object, or a field of it has another type than a run writes;
            the message ends in `fix`.
    """
    try:
        text = read_small_text(path)
        if not text.strip("\0"):
            raise ValueError("empty, as a power cut leaves it")
        content: dict[str, Any] = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        check_fields(content, path.name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a file that a run writes ({error}); {fix}") from error
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object to a JSON file in a folder that this process has locked."""
    with atomic_write(path, locked=True) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run can be resumed from the folder."""
    return any((folder / path).is_file() for path in (LAST_CHECKPOINT, BEST_CHECKPOINT))


def broken_reason(path: Path) -> str | None:
    """Return why a JSON file that exists is not one that a run writes, or None; an interrupted write is a reason."""
    try:
        read_json(path, "")
    except InputError as error:
        return str(error).rstrip("; ")
    return None


def read_intact_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if the file is missing or broken."""
    return {} if broken_reason(path) else read_json(path) or {}


def remove_drafts(folder: Path) -> None:
    """Remove what a killed process left of the files that it was writing; this process has locked the folder."""
    for name in (RUN, METRICS, RANKS, VALIDATION_RANKS, ITEMS, WEIGHTS, BEST_CHECKPOINT, LAST_CHECKPOINT):
        draft_of(folder / name).unlink(missing_ok=True)


def sweep_of(folder: Path) -> Path | None:
    """Return the folder of the sweep or the search that a run belongs to, None if it is a run of its own."""
    is_part = any((folder.parent / name).exists() for name in ("multirun.yaml", JOURNAL))
    return folder.parent if is_part else None


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return metrics.json, or the status "unfinished" if there is none or it is broken."""
    return {"status": "unfinished", "error": None} | read_intact_json(folder / METRICS)


def read_items(folder: Path) -> "dict[str, np.ndarray]":
    """Return the arrays of items.npz: `ids` and, if the data set has titles, `titles`.

    Raises:
        InputError: the file is missing or broken.
    """
    try:
        arrays = read_arrays(folder / ITEMS)
        _check_items(arrays)
    except FileNotFoundError as error:
        raise InputError(
            f"{display_path(folder)} has no {ITEMS}, because an older version wrote it; train the run again"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{display_path(folder / ITEMS)} is broken ({error}); {RETRAIN_HINT}") from error
    return arrays


def read_arrays(path: Path, kinds: str = "iuU") -> "dict[str, np.ndarray]":
    """Return the arrays of an .npz file by name, such as a run writes; nothing is unpickled.

    `kinds` are the kinds of NumPy types that it may have.

    The memory needed is known before any is taken: a run's arrays are not compressed, so they are as large as the file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is broken, or not such a file.
    """
    with open_regular(path) as file:
        try:
            if (size := os.fstat(file.fileno()).st_size) > MAX_ARRAY_BYTES:
                raise ValueError(f"{size:,} bytes, more than {MAX_ARRAY_BYTES:,}")
            with opened_archive(file) as archive:
                return {
                    each.filename.removesuffix(".npy"): _read_array(archive, each, kinds) for each in archive.filelist
                }
        except Exception as error:  # those of zipfile and numpy share no base class
            raise ValueError(str(error).split("\n")[0] or type(error).__name__) from error


@contextmanager
def opened_archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Yield a zip archive that a run wrote, such as a checkpoint, once what reading it takes is known to be little.

    Raises:
        ValueError: its members are compressed, overlap or are too many, or it is a file of holes: a few bytes on a disk
            would become as much memory or time as a stranger likes.
    """
    status = os.fstat(file.fileno())
    if status.st_size > _MAX_HOLES * status.st_blocks * 512 > 0 and status.st_size > MAX_ARRAY_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, but most of them are holes that take no place on the disk")
    if _directory_bytes(file, status.st_size) > _MAX_DIRECTORY:
        raise ValueError("it has more members than a run writes")
    with zipfile.ZipFile(file) as archive:
        members = archive.filelist
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which a run's files are not")
        if sum(member.file_size for member in members) > status.st_size:
            raise ValueError("its members are larger than itself")
        yield archive


def _directory_bytes(file: BinaryIO, size: int) -> int:
    """Return the bytes of an archive's list of members, which `ZipFile` loads: its end says how many, once or twice."""
    file.seek(max(0, size - 98))
    end = file.read().rjust(98, b"\0")
    large, place, small = end[:56], end[56:76], end[76:]
    if not small.startswith(b"PK\5\6") or not small.endswith(b"\0\0"):  # a comment would follow
        raise ValueError("it does not end like an archive that a run writes")
    (count,) = struct.unpack_from("<L", small, 12)
    if not place.startswith(b"PK\6\7"):
        return int(count)
    if not large.startswith(b"PK\6\6") or struct.unpack_from("<Q", place, 8)[0] != size - 98:
        raise ValueError("it does not end like an archive that a run writes")
    return int(struct.unpack_from("<Q", large, 40)[0])


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kinds: str) -> "np.ndarray":
    import numpy as np

    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} has an unknown format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in kinds or prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} does not contain the {dtype} {shape} that it declares")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_items(arrays: "dict[str, np.ndarray]") -> None:
    import numpy as np

    ids, titles = arrays.get("ids"), arrays.get("titles")
    if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iuU" or len(np.unique(ids)) < len(ids):
        raise ValueError("it has no array `ids` of distinct integers or texts")
    if titles is not None and titles.shape != ids.shape:
        raise ValueError(f"it has {titles.size:,} titles for {len(ids):,} items")


def load_finished(folder: Path, key: str = "run") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plain config of a finished run and its metrics.json; `key` is what the user named the folder with.

    Raises:
        InputError: the folder does not exist, has no run in it, or its run has not finished.
    """
    if not folder.is_dir():
        hint = did_you_mean_path(folder, only_folders=True) or "; check the path"
        raise InputError(f"{key}={folder}: there is no such folder{hint}")
    info = read_json(folder / RUN, RESUME_HINT)
    results = {"status": None, "error": None} | (read_json(folder / METRICS, RESUME_HINT) or {})
    if info is None:
        raise _no_run_error(folder, results, key)
    if results["status"] != "finished" or "end" not in info:
        raise _unfinished_error(folder, results, key)
    try:
        info["config"]["dataset"].keys(), info["config"]["data_dir"]
        results["protocol"]["sha256"], results["best_epoch"]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{key}={folder}: {RUN} or {METRICS} is malformed ({error}); {RETRAIN_HINT}") from error
    _make_paths_absolute(info["config"], info.get("directory", ""))
    return info["config"], results


def _no_run_error(folder: Path, results: dict[str, Any], key: str) -> InputError:
    if results["error"]:
        return InputError(f"{key}={folder}: the run failed ({results['error']}); choose a finished one")
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RUN}"))
    if not runs:
        return InputError(f"{key}={folder} is not a run folder: it has no {RUN}; choose the folder of a finished run")
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    example = shlex.quote(format_override(key, display_path(folder / runs[-1])))
    return InputError(f"{key}={folder} is not a run folder: it contains {count}; choose one, such as {example}")


def _unfinished_error(folder: Path, results: dict[str, Any], key: str) -> InputError:
    ends = {"failed": "failed", "interrupted": "was interrupted", "pruned": "was stopped by a search"}
    reason = f" ({results['error']})" if results["error"] else ""
    end = ends.get(results["status"], "has not finished") + reason
    return InputError(f"{key}={folder}: the run {end}; resume it, or choose a finished one")


def _make_paths_absolute(config: dict[str, Any], directory: str) -> None:
    """Resolve the config's relative paths from the directory of the training command: later ones may run elsewhere."""

    def absolute(path: str) -> str:
        return str(Path(directory, os.path.expanduser(path)))

    if config["data_dir"]:
        config["data_dir"] = absolute(config["data_dir"])
    sections = (config["dataset"], config["dataset"].get("titles") or {})
    if any(os.path.isabs(str(section.get("path"))) for section in sections):
        config["dataset"]["sources"] = []  # earlier versions let own files replace those of a published data set
    if not config["dataset"].get("sources"):  # the user's own file, unless it is below the data root
        for section in sections:
            path = section.get("path")
            if path and plain_or_gz(Path(absolute(path))):
                section["path"] = absolute(path)
