"""Load a checkpoint file, which may be a stranger's: its code is never run, and it takes no memory beyond its size."""

from pathlib import Path
from typing import Any

import torch

from sasrec_lab.config.convert import flatten
from sasrec_lab.errors import InputError
from sasrec_lab.files import open_regular
from sasrec_lab.run.folder import opened_archive

_OPTIONS = ("options", "head_options")  # keys of `model` with the options of parts of the user's
_MAX_PICKLE = 8 << 20  # bytes of a checkpoint that are not weights; a run writes some thousand


def load(path: Path, fix: str) -> dict[str, Any]:
    """Return the content of one of this project's checkpoints; code in it is never run.

    Raises:
        InputError: the file is missing, truncated, broken, foreign, or contains code; the message ends in `fix`.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; {fix}")
    try:
        _check_archive(path)
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        _check_content(saved)
    except Exception as error:  # torch's errors vary
        raise InputError(f"{path} is not a checkpoint of this project ({_reason(error)}); {fix}") from error
    return saved


def _check_archive(path: Path) -> None:
    """Check checksums, which torch does not, and that reading the file takes no more memory than its size."""
    with open_regular(path) as file, opened_archive(file) as archive:
        if any(member.filename.endswith("/data.pkl") and member.file_size > _MAX_PICKLE for member in archive.filelist):
            raise ValueError("it contains more than weights")
        if broken := archive.testzip():
            raise ValueError(f"checksum mismatch in {broken}")


def _check_content(saved: Any) -> None:
    """Raise an exception if what every command needs of a checkpoint is missing or malformed."""
    _check_values(saved)
    known = saved["hyper_parameters"]
    if not isinstance(known["config"]["model"], dict) or not isinstance(known["num_items"], int):
        raise ValueError("its hyper_parameters are malformed")
    for key, value in known["config"]["model"].items():
        is_options = isinstance(value, dict) and key in _OPTIONS
        if isinstance(value, (dict, list, tuple, torch.Tensor)) and not is_options:
            raise ValueError("its hyper_parameters are malformed")
    if not isinstance(saved["epoch"], int) or not isinstance(saved.get("validation", {}), dict):
        raise ValueError("its epoch or validation metrics are malformed")
    if not all(isinstance(value, int) for value in flatten(saved.get("loops", {})).values()):
        raise ValueError("its counts of epochs and steps are malformed")


def _check_values(saved: Any) -> None:
    """Raise ValueError for values that no run saves: a few bytes of a file could become tensors of any size."""
    stack, seen = [saved], set()
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) in seen and not _is_pair(value):
                raise ValueError("it contains the same collection twice")  # ten levels of ten would be 10 GB
            seen.add(id(value))
            stack += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            is_dense = value.layout is torch.strided and value.device.type == "cpu"
            if not is_dense or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError("it contains a tensor that is larger than its data")
        elif isinstance(value, int):
            if abs(value) >= 2**63:
                raise ValueError("it contains an integer of more than 64 bits")
        elif not isinstance(value, (str, float, type(None))):
            raise ValueError(f"it contains a {type(value).__name__}")


def _is_pair(value: Any) -> bool:
    """Return whether a collection is empty or one of two numbers, such as Adam's betas, which may be shared."""
    return not value or (len(value) <= 2 and all(isinstance(each, float) for each in value))


def _reason(error: Exception) -> str:
    if "Weights only load failed" in str(error):
        return "it contains more than weights, such as code, which was not run"
    return str(error).split("\n")[0] or type(error).__name__
