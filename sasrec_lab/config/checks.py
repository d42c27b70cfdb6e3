"""Checks of single values for the schemas, and of the flags of Lightning's Trainer."""

import re
from math import inf
from typing import Any

from sasrec_lab.errors import InputError, did_you_mean


def check_finite(key: str, value: float) -> None:
    """Raise InputError if the value is infinite."""
    if value == inf:
        raise InputError(f"{key}={value} must be a finite number")


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise InputError if the value is below `least`, infinite or NaN."""
    check_finite(key, value)
    if not value >= least:
        raise InputError(f"{key}={value} must be at least {least}")


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


# Flags of pytorch_lightning.Trainer, listed here because importing it takes seconds; a test compares the two.
TRAINER_FLAGS = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "fast_dev_run", "max_epochs", "min_epochs",
    "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "log_every_n_steps", "enable_progress_bar", "enable_model_summary",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark",
    "inference_mode", "profiler", "detect_anomaly", "sync_batchnorm", "reload_dataloaders_every_n_epochs",
)  # fmt: skip
_INTEGER_FLAGS = ("max_epochs", "min_epochs", "max_steps", "check_val_every_n_epoch", "accumulate_grad_batches")
_MANAGED_FLAGS = (
    "logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
    "barebones", "enable_autolog_hparams", "model_registry",
)  # fmt: skip
REJECTED_FLAGS = dict.fromkeys(_MANAGED_FLAGS, "train.py manages it") | {
    "limit_test_batches": "testing on part of the users would not be comparable",
    "fast_dev_run": "it writes no checkpoint to test; for a quick run use trainer=fast",
    "overfit_batches": "it would validate on training data; to train on few batches use trainer.limit_train_batches",
    "val_check_interval": "validation follows an epoch; to validate less often use trainer.check_val_every_n_epoch",
}
_CHOICES = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
    "precision": ("32-true", 32, "bf16-mixed"),
    "deterministic": (True, False, "warn", None),
}


def check_trainer_flag(flag: str, value: Any) -> None:
    """Raise InputError if the flag is rejected here or not a Trainer flag, or if its value is wrong."""
    key = f"trainer.{flag}"
    if flag in REJECTED_FLAGS:
        raise InputError(f"{key} cannot be set: {REJECTED_FLAGS[flag]}")
    if flag not in TRAINER_FLAGS:
        raise InputError(f"{key} is not a Lightning Trainer flag{did_you_mean(flag, list(TRAINER_FLAGS))}")
    is_int = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_int or isinstance(value, float)
    is_count = is_int and (value >= 1 or value == -1)
    if flag in _INTEGER_FLAGS and value is not None and not is_count:
        raise InputError(f"{key}={value} must be an integer of at least 1, or -1 for no limit")
    if flag in _CHOICES and not any(value is choice or value == choice for choice in _CHOICES[flag]):
        raise InputError(f"{key}={value} is not one of {', '.join(str(choice) for choice in _CHOICES[flag])}")
    if flag == "devices" and not (is_count or value == "auto" or isinstance(value, list)):
        raise InputError(f"{key}={value} must be a number of devices, a list of device indices, or -1 or auto for all")
    if flag.startswith("limit_"):
        least = 0 if flag == "limit_val_batches" else 1e-9
        if not is_number or not (least <= value <= 1 or (is_int and value > 1)):
            raise InputError(f"{key}={value} must be a fraction up to 1.0, such as 0.1, or a number of batches")
    if flag == "gradient_clip_val" and value is not None and not (is_number and value > 0):
        raise InputError(f"{key}={value} must be above 0; use null for no clipping")
