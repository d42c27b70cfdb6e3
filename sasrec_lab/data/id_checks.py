"""Check ids that are text: which are missing, errors of an export, integers, or too long."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sasrec_lab.config.dataset import IdType
from sasrec_lab.data.columns import FIX, cast_values
from sasrec_lab.errors import InputError

IdTest = Callable[[pa.StringArray], pa.BooleanArray]  # which ids are wrong
FindId = Callable[[IdTest], tuple[Callable[[str, str], InputError], int] | None]

# spellings of "no value", compared in lower case
_MISSING_WORDS = pa.array(["nan", "null", "none", "na", "n/a", "<na>", "#n/a", "nat", "\\n"])
_MAX_ID_CHARACTERS = 1000  # an array of text takes 4 bytes for each id and character of the longest one


def are_integers(find: FindId, kind: IdType, key: str, check: bool) -> bool:
    """Return whether ids in text are read as integers.

    `find` returns how to raise the error of the first row whose id passes a test, and how many rows do. With `auto`,
    "007" is text, because as an integer it would come back as "7".

    Raises:
        InputError: an id is missing; with `check` means a missing value or has blanks around it, mostly errors of an
            export; is not an integer, if it must be one; or cannot be in an array of text.
    """
    if missing := find(lambda ids: pc.equal(ids, "")):
        raise missing[0]("", f"every interaction needs one; {FIX}")
    if check:
        keep = "or keep them as ids: dataset.check_ids=false"
        blanks = f"remove the blanks (dataset.separator=', ' if each comma has one), {keep}"
        for (is_wrong, rule), fix in zip(_DOUBTFUL, (f"remove these lines, {keep}", blanks), strict=True):
            if wrong := find(is_wrong):
                raise wrong[0](f"{rule}, the first of {wrong[1]:,}" if wrong[1] > 1 else rule, fix)
    if kind is IdType.int:
        if wrong := find(_differ_from(r"^-?[0-9]+$")) or find(_exceed_64_bits):
            raise wrong[0]("not an integer (of 64 bits)", f"use {key}=str")
        return True
    if kind is IdType.auto:
        if not find(_differ_from(r"^(0|-?[1-9][0-9]*)$")) and not find(_exceed_64_bits):
            return True
        decimal = find(lambda ids: pc.match_substring(ids, "."))
        if decimal and not find(_differ_from(r"^[+-]?[0-9]+\.?[0-9]*$")):
            raise decimal[0]("a decimal number", f"use {key}=str to take it as text")
    for is_wrong, rule in (
        (lambda ids: pc.match_substring(ids, "\0"), "with a NUL character"),
        (_are_long, f"longer than {_MAX_ID_CHARACTERS:,} characters"),
    ):
        if wrong := find(is_wrong):
            raise wrong[0](rule, f"ids are shorter text; {FIX}")
    return False


def _differ_from(pattern: str) -> IdTest:
    return lambda ids: pc.invert(pc.match_substring_regex(ids, pattern))


def _exceed_64_bits(ids: pa.StringArray) -> pa.BooleanArray:
    """Return which integers in text do not fit in 64 bits."""
    if cast_values(ids, pa.int64()) is not None:
        return pa.array(np.zeros(len(ids), bool))
    are_long = pc.greater(pc.utf8_length(ids), 18)
    return pa.array(
        [is_long.as_py() and cast_values(ids[i : i + 1], pa.int64()) is None for i, is_long in enumerate(are_long)]
    )


def _are_long(ids: pa.StringArray) -> pa.BooleanArray:
    return pc.greater(pc.utf8_length(ids), _MAX_ID_CHARACTERS)


def _mean_missing(ids: pa.StringArray) -> pa.BooleanArray:
    return pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(ids)), _MISSING_WORDS)


def _have_blanks(ids: pa.StringArray) -> pa.BooleanArray:
    return pc.not_equal(ids, pc.utf8_trim_whitespace(ids))


_DOUBTFUL = ((_mean_missing, "which means a missing value"), (_have_blanks, "with blanks around it"))


def doubtful_ids(ids: pa.Array) -> list[tuple[np.ndarray, str]]:
    """Return which texts are mostly errors of an export, and what is wrong: first missing values, then blanks."""
    return [(is_wrong(ids).to_numpy(zero_copy_only=False), rule) for is_wrong, rule in _DOUBTFUL]
