"""The order of interactions by user and time, found by counting rather than comparing."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa

_DAY = 86_400  # seconds
_PART_BITS = 4  # KION: 0.25 s with 4, 0.38 s with 6


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows sorted by user, then time where there is one, then as they stood; numbered anew.

    User and time become one whole number of as few bits as hold it (KION: 21 of the user, 8 of the day). Its highest
    bits part the rows, and the parts are sorted at the same time. With four columns, 5.9 million rows of KION's schema
    take 0.25 to 0.3 s on two cores (up to 0.55 s where the memory is fresh), in one part 0.6 to 0.9 s, by np.lexsort
    1.8 to 2.1 s.
    """
    key, bits = _key(table)
    low = max(0, bits - _PART_BITS)
    part = (key >> low).astype(np.uint8)
    ends = np.cumsum(np.bincount(part, minlength=1 << _PART_BITS))
    rows = np.empty(len(key), np.int32 if len(key) < 2**31 else np.int64)
    columns = {name: column.to_numpy() for name, column in table.items() if isinstance(column.dtype, np.dtype)}
    ordered = {name: np.empty_like(column) for name, column in columns.items()}

    def sort(number: int, start: int, end: int) -> None:
        inside = np.flatnonzero(part == number)
        order = _by_counting(key[inside], low)
        for name, column in columns.items():
            ordered[name][start:end] = column[inside][order]
        rows[start:end] = inside[order]

    with ThreadPoolExecutor(pa.cpu_count()) as pool:  # numpy lets go of the interpreter while it sorts and takes
        list(pool.map(sort, range(len(ends)), [0, *ends[:-1]], ends))
    texts = {name: table[name].array.take(rows) for name in table if name not in columns}
    return pd.DataFrame({name: (ordered | texts)[name] for name in table}, copy=False)


def _by_counting(key: np.ndarray, bits: int) -> np.ndarray:
    """The stable order of numbers of so many bits, from the lowest 16 up: numpy sorts 16 bits by counting."""
    order = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digits = (key >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _key(table: pd.DataFrame) -> tuple[np.ndarray, int]:
    """One number a row that sorts by user and time, and how many bits the numbers have, at most 64."""
    key, size = _from_zero(table["user"])
    if "time" in table:
        time, span = _from_zero(table["time"])
        if not (time[:1000] % _DAY).any() and not (time % _DAY).any():  # dates without hours
            time, span = time // _DAY, (span - 1) // _DAY + 1
        size *= span
        key = key.astype(np.uint32 if size < 2**32 else np.uint64) * span + time
    return key, (size - 1).bit_length()


def _from_zero(values: pd.Series) -> tuple[np.ndarray, int]:
    """Whole numbers from 0 in the order of the values, in 32 bits; and one more than the largest."""
    whole = pd.api.types.is_integer_dtype(values)
    low, high = (int(values.min()), int(values.max())) if whole else (0, 2**64)
    if high - low < 2**32:
        return values.to_numpy().astype(np.uint32) - np.uint32(low % 2**32), high - low + 1  # exact, modulo 2**32
    ranks, different = pd.factorize(values, sort=True)
    return ranks.astype(np.uint32), len(different)
