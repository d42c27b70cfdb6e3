"""Checks of one value, for the schemas; each raises InputError with the key, the value and the rule."""

import re
from math import inf

from sasrec_lab.errors import InputError


def check_finite(key: str, value: float) -> None:
    if value == inf:
        raise InputError(f"{key}={value} is not finite; give a number")


def check_at_least(key: str, value: float, least: float) -> None:
    check_finite(key, value)
    if not value >= least:
        raise InputError(f"{key}={value} must be at least {least}")


def check_seed(key: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise InputError(f"{key}={value} must be from 0 to {2**32 - 1}")


def check_folder_names(key: str, value: str, what: str, nested: bool = False) -> None:
    name = r"(?!\.\.?(?:/|$))[\w.+=@-]+"
    if not re.fullmatch(f"{name}(/{name})*" if nested else name, value):
        raise InputError(
            f"{key}={value!r} names {what}; use letters, digits, '_', '-'{', ' + repr('/') if nested else ''}"
        )
