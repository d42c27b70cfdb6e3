"""Checks of single values for the schemas, and of the flags of Lightning's Trainer."""

import re
from collections.abc import Callable
from math import inf, isfinite, isnan
from typing import Any

from sasrec_lab.errors import InputError, did_you_mean
from sasrec_lab.files import NAME_BYTES


def check_finite(key: str, value: float) -> None:
    """Raise InputError if the value is infinite."""
    if value == inf:
        raise InputError(f"{key}={value} must be a finite number")


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise InputError if the value is below `least`, infinite or NaN."""
    check_finite(key, value)
    if not value >= least:
        raise InputError(f"{key}={value} must be at least {least}")


def check_above_0(key: str, value: float, null: str = "") -> None:
    """Raise InputError if the value is not above 0, or infinite; `null` says what null in its place means."""
    check_finite(key, value)
    if not value > 0:
        raise InputError(f"{key}={value} must be above 0" + (f"; use null for {null}" if null else ""))


def check_rate(key: str, value: float) -> None:
    """Raise InputError if the value is below 0, or 1 or more."""
    if not 0 <= value < 1:
        raise InputError(f"{key}={value} must be at least 0 and below 1")


def check_numbers(key: str, value: Any) -> None:
    """Raise InputError if a value, or one in its lists and sections, is NaN or an integer of more than 64 bits."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_numbers(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            check_numbers(key, inner)
    elif isinstance(value, float) and isnan(value):
        raise InputError(f"{key}=nan must be a number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{key}={value} must be an integer of 64 bits; use a smaller one")


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)B")


def parse_size(key: str, text: str, least: int) -> int:
    """Return the bytes of a size such as 2GB or 1.5GiB; raise InputError if it is malformed or below `least`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InputError(f"{key}={text} must be a size with its unit, such as 2GB or 500MB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size < least:
        raise InputError(f"{key}={text} must be at least {least // 10**6}MB")
    return size


def check_seed(key: str, value: int) -> None:
    """Raise InputError if the value is not an unsigned 32-bit integer, as torch and NumPy seeds are."""
    if not 0 <= value < 2**32:
        raise InputError(f"{key}={value} must be from 0 to {2**32 - 1}")


def check_folder_names(key: str, value: str, what: str, nested: bool = False) -> None:
    """Raise InputError if the value is not a folder name, or with `nested` a path of these; `what` says whose."""
    name = r"\w[\w.+=@-]*"  # without a dot in front, which would hide it
    if not re.fullmatch(f"{name}(/{name})*" if nested else name, value):
        raise InputError(
            f"{key}={value!r} names {what}; use only letters, digits, '_', '-'{', ' + repr('/') if nested else ''}"
        )
    if longest := max((part for part in value.split("/") if len(part.encode()) > NAME_BYTES), default=None):
        raise InputError(f"{key}={longest[:50]}... names {what}; use at most {NAME_BYTES} characters")


# Flags of pytorch_lightning.Trainer, listed here because importing it takes seconds; a test compares the two.
TRAINER_FLAGS = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "fast_dev_run", "max_epochs", "min_epochs",
    "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "log_every_n_steps", "enable_progress_bar", "enable_model_summary",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark",
    "inference_mode", "profiler", "detect_anomaly", "sync_batchnorm", "reload_dataloaders_every_n_epochs",
)  # fmt: skip
_MANAGED_FLAGS = (
    "logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
    "barebones", "enable_autolog_hparams", "model_registry",
)  # fmt: skip
REJECTED_FLAGS = dict.fromkeys(_MANAGED_FLAGS, "train.py manages it") | {
    "logger": "train.py manages it: choose trackers as in logger=[tensorboard,wandb]",
    "callbacks": "train.py manages them: checkpoints, early stopping (evaluation.patience), averaging (optimizer.ema)",
    "enable_checkpointing": "train.py manages it: every run keeps its best and its last checkpoint",
    "default_root_dir": "train.py manages it: to choose the run's folder set hydra.run.dir",
    "limit_test_batches": "testing on part of the users would not be comparable",
    "fast_dev_run": "it writes no checkpoint to test; for a quick run use trainer=fast",
    "limit_predict_batches": "lists are made by sasrec_lab.recommend, without Lightning",
    "overfit_batches": "it would validate on training data; to train on few batches use trainer.limit_train_batches",
    "val_check_interval": "validation follows an epoch; to validate less often use trainer.check_val_every_n_epoch",
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
    "precision": ("32-true", 32, "bf16-mixed"),
    "deterministic": (True, False, "warn", None),
    "gradient_clip_algorithm": ("norm", "value", None),
    "profiler": ("simple", "advanced", "pytorch", None),
    **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "benchmark"), (True, False, None)),
    **dict.fromkeys(("inference_mode", "detect_anomaly", "sync_batchnorm"), (True, False)),
}
_MOST_DEVICES = 1024  # of a machine: each is a process
_TIME = r"\d{1,6}:\d\d:\d\d:\d\d"
_TIME_UNITS = {"weeks", "days", "hours", "minutes", "seconds"}


def _is_int(value: Any, least: float = -inf, most: float = inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and isfinite(value))


def _is_count_or_unlimited(value: Any) -> bool:
    return _is_int(value, 1) or _is_int(value, -1, -1)


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_int(index, 0) for index in value) and len(set(value)) == len(value)
    return _is_int(value, 1, _MOST_DEVICES) or _is_int(value, -1, -1) or value == "auto"


def _is_limit(value: Any) -> bool:
    """Return whether a value is a fraction, or an integer of batches; an integer 1 is one batch."""
    return _is_int(value, 1) or (isinstance(value, float) and 0 < value <= 1)


def _is_duration(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() <= _TIME_UNITS and all(_is_number(part) and 0 <= part < 1e6 for part in value.values())
    return isinstance(value, str) and bool(re.fullmatch(_TIME, value))


_LIMIT = "a fraction above 0 and up to 1.0, such as 0.1, or an integer of at least 1, the number of batches"
# Of the flags that are not in _CHOICES: whether a value is valid, and the rule in words.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "devices": (
        _is_devices,
        "a number of devices, a list of device indices, or -1 or auto for all; set it to 1, for example",
    ),
    "num_nodes": (lambda value: _is_int(value, 1, 2**16), "an integer of at least 1"),
    "max_epochs": (
        lambda value: value is None or _is_count_or_unlimited(value),
        "an integer of at least 1, or -1 for no limit",
    ),
    "max_steps": (_is_count_or_unlimited, "an integer of at least 1, or -1 for no limit"),
    "min_epochs": (lambda value: value is None or _is_int(value, 1), "an integer of at least 1, or null for none"),
    "min_steps": (lambda value: value is None or _is_int(value, 1), "an integer of at least 1, or null for none"),
    "max_time": (
        lambda value: value is None or _is_duration(value),
        "days:hours:minutes:seconds, such as 00:02:00:00 for two hours, or null for no limit",
    ),
    "limit_train_batches": (_is_limit, _LIMIT),
    "limit_val_batches": (
        lambda value: _is_limit(value) or (_is_number(value) and value == 0),
        "a fraction from 0 to 1.0, such as 0.1, or a number of batches; 0 is for no validation",
    ),
    "check_val_every_n_epoch": (lambda value: _is_int(value, 1), "an integer of at least 1"),
    "accumulate_grad_batches": (lambda value: _is_int(value, 1), "an integer of at least 1"),
    "num_sanity_val_steps": (
        lambda value: value is None or _is_int(value, -1),
        "an integer of at least 0, or -1 for all batches",
    ),
    "log_every_n_steps": (lambda value: value is None or _is_int(value, 0), "an integer of at least 0"),
    "reload_dataloaders_every_n_epochs": (lambda value: _is_int(value, 0), "an integer of at least 0"),
    "gradient_clip_val": (
        lambda value: value is None or (_is_number(value) and value > 0),
        "above 0; use null for no clipping",
    ),
}


def check_trainer_flag(flag: str, value: Any) -> None:
    """Raise InputError if the flag is rejected here or not a Trainer flag, or if its value is wrong."""
    key = f"trainer.{flag}"
    if flag in REJECTED_FLAGS:
        raise InputError(f"{key} cannot be set: {REJECTED_FLAGS[flag]}")
    if flag not in TRAINER_FLAGS:
        raise InputError(f"{key} is not a Lightning Trainer flag{did_you_mean(str(flag), list(TRAINER_FLAGS))}")
    if flag in _CHOICES:
        choices = _CHOICES[flag]
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            named = [typed_form(choice) for choice in choices]
            hint = did_you_mean(str(value), named)
            raise InputError(f"{key}={typed_form(value)} is not one of {', '.join(named)}{hint}")
        return
    is_valid, rule = _RULES[flag]
    if not is_valid(value):
        raise InputError(f"{key}={typed_form(value)} must be {rule}")


def typed_form(value: Any) -> str:
    """Return a value as it is written on the command line, such as null, true, [5,10] and the name of a choice."""
    value = getattr(value, "name", value)
    if isinstance(value, list):
        return f"[{','.join(map(typed_form, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_lengths(key: str, given: Any) -> list[int]:
    """Return the list lengths to measure at, of which one may be given as an integer.

    Raises:
        InputError: these are not distinct integers of at least 1.
    """
    lengths = given if isinstance(given, list) else [given]
    if not lengths:
        raise InputError(f"{key} must not be empty; set it to the list lengths to measure at, such as [10]")
    for k in lengths:
        if type(k) is not int:
            raise InputError(f"{key}={lengths} must be integers, such as 10 or [5,10]")
        check_at_least(key, k, 1)
    if len(set(lengths)) < len(lengths):
        raise InputError(f"{key}={list(lengths)} must not repeat a length; remove the duplicates")
    return lengths
