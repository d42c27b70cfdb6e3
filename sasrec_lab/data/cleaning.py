"""Filter interactions by the data set's config and sort them by user and time."""

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa

from sasrec_lab.config.dataset import DatasetConfig, Repeats
from sasrec_lab.errors import InputError, shortened

_DAY = 86_400  # seconds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}  # per second
# A time between these (1973 and 5138) is a date in only one of the units; a smaller number may count anything.
_FIRST_SECOND, _LAST_SECOND = 10**8, 10**11
_PART_BITS = 4  # rows are sorted in 2 ** 4 parts; more parts take longer to gather than sorting them in parallel saves


def clean(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions that the data set keeps, sorted by user and time; ties stay in file order.

    Filters apply in this order: ratings from `min_rating`; times from `since` to `until` (both inclusive; a date as
    `until` includes its whole day); with `repeats=drop` only a user's earliest interaction with an item; items with at
    least `min_item` interactions; users with at least `min_user` of those left. The last two run once, or with
    `until_stable` until nothing more is dropped.

    Raises:
        InputError: nothing is left, or only one item.
    """
    if dataset.min_rating is not None:
        keep = table["rating"] >= dataset.min_rating
        least, most = table["rating"].min() + 0, table["rating"].max() + 0  # -0.0 becomes 0.0
        table = _keep(
            table,
            keep,
            f"dataset.min_rating={dataset.min_rating}",
            f"rating ranges from {least} to {most}",
        )
    if dataset.since is not None or dataset.until is not None:
        table = _keep_window(table, dataset)
    table = sort_interactions(table)
    if dataset.repeats is Repeats.drop:
        table = table.drop_duplicates(["user", "item"])
    table = _drop_rare(table, dataset)
    if (table["item"] == table["item"].iloc[0]).all():
        raise one_item_error(table["item"].iloc[0], dataset)
    return table.drop(columns="rating", errors="ignore").reset_index(drop=True)


def one_item_error(item: object, dataset: DatasetConfig) -> InputError:
    """Return the error for data with a single item."""
    file = f"dataset {dataset.name}" if dataset.path is None else f"dataset.path={dataset.path}"
    return InputError(
        f"{file}: only one item, {shortened(str(item))}, is left after cleaning, and a ranking needs at least two;"
        f" check that dataset.item={dataset.item} is the column of the items, or keep more with lower filters"
    )


def _keep(table: pd.DataFrame, keep: pd.Series, key: str, span: str) -> pd.DataFrame:
    if not keep.any():
        raise none_kept_error(key, len(table), span)
    return table[keep]


def none_kept_error(key: str, rows: int, span: str) -> InputError:
    """Return the error for a filter that drops all rows; `span` says what values they have."""
    return InputError(f"{key} keeps none of {rows:,} interactions; {span}")


# Times: numbers of the file, or seconds since 1970 for dates in it


def time_unit(times: pd.Series | np.ndarray) -> str:
    """Return the unit of times since 1970 by their size, a key of `UNITS`; seconds also for what may be no times.

    The median of a sample decides, so that a few zeros or sentinels do not.
    """
    return unit_of_sample(np.asarray(times)[sampled_rows(len(times))])


def sampled_rows(rows: int) -> np.ndarray:
    """Return the rows of the sample that decides the unit of that many times, in no order."""
    return np.random.default_rng(0).integers(0, rows, 1001) if rows > 1001 else np.arange(rows)


def unit_of_sample(sample: np.ndarray) -> str:
    """Return the unit of times by the median of a sample of them."""
    size = abs(float(np.median(sample.astype(np.float64))))
    return next((unit for unit, per_second in UNITS.items() if size < _LAST_SECOND * per_second), "nanoseconds")


def to_seconds(times: np.ndarray, what: str) -> np.ndarray:
    """Return times as whole seconds since 1970, rounded down, from numbers in the unit of `time_unit`; `what` has them.

    Raises:
        InputError: the times are too small for dates, so that their unit is unknown, or one is after the year 5138.
    """
    unit, newest = time_unit(times), times.max()
    if newest < _FIRST_SECOND * UNITS[unit]:
        raise InputError(
            f"{what}: times up to {newest} are too small for seconds since 1970, so their unit is unknown to a model"
            " that reads times; write them as dates or as seconds since 1970"
        )
    seconds = times if unit == "seconds" else times // UNITS[unit]
    if abs(float(farthest := max(seconds.min(), seconds.max(), key=abs))) >= _LAST_SECOND:
        raise InputError(
            f"{what}: the time {farthest * UNITS[unit]} is not within 5,000 years of 1970 (in {unit}); correct the line"
        )
    return seconds if np.issubdtype(seconds.dtype, np.integer) else np.floor(seconds).astype(np.int64)


def describe_span(times: pd.Series | np.ndarray, unit: str) -> str:
    """Return the first and the last time as dates, or as numbers if they are too small for dates of this unit."""
    return describe_ends(times.min(), times.max(), unit)


def describe_ends(oldest: float, newest: float, unit: str) -> str:
    """Return two times as dates, or as numbers if they are too small for dates of this unit."""
    return f"from {_describe_time(oldest, unit)} to {_describe_time(newest, unit)}"


def days_before(times: np.ndarray, days: int) -> int | float | None:
    """Return the time `days` days before the newest one, in the unit of the times; None if they are not dates.

    Smaller numbers than those of dates may count anything, such as a user's actions.
    """
    unit, newest = time_unit(times), times.max().item()
    return newest - days * _DAY * UNITS[unit] if newest >= _FIRST_SECOND * UNITS[unit] else None


def _describe_time(time: float, unit: str) -> str:
    return describe_time(time, unit).partition(" ")[0]


def describe_time(time: float, unit: str) -> str:
    """Return a time as a date and a time of day, only the date at the end of a day, or a small one as it is."""
    seconds = time // UNITS[unit]  # exact, unlike nanoseconds as a float
    if abs(seconds) < _FIRST_SECOND:
        return str(time)
    try:
        moment = datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):  # after the year 9999
        return str(time)
    return str(moment).removesuffix(" 23:59:59")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _keep_window(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    """Return the interactions from `since` to `until`."""
    times, unit = table["time"], time_unit(table["time"])
    for key, text in (("dataset.since", dataset.since), ("dataset.until", dataset.until)):
        if text is not None:
            bound = window_bound(key, text, unit, times.max())
            keep = table["time"] >= bound if key == "dataset.since" else table["time"] <= bound
            span = describe_range(table["time"].min(), table["time"].max(), unit)
            table = _keep(table, keep, f"{key}={text}", span)
    return table


def window_bound(key: str, text: str, unit: str, newest: float) -> float:
    """Return `since` or `until` as a number in the unit of the times, of which `newest` is one; as `read_time`.

    If the times are dates, a number near 0, such as 2018, is refused: it would filter nothing, or everything.
    """
    number = _number(text)
    if number is not None and abs(number) < _FIRST_SECOND and newest >= _FIRST_SECOND * UNITS[unit]:
        raise InputError(f"{key}={text} is a number near 0, but the times are dates; write a date, such as 2018-01-31")
    return time_bound(key, text, unit, newest, ends_day=key == "dataset.until")


def read_time(key: str, text: str, times: pd.Series | np.ndarray, *, ends_day: bool) -> float:
    """Return a time of the config as a number like `times`; a date with `ends_day` is the end of that day.

    Raises:
        InputError: it is neither a number nor a date, or a date in another unit than that of the times.
    """
    return time_bound(key, text, time_unit(times), times.max(), ends_day=ends_day)


def time_bound(key: str, text: str, unit: str, newest: float, *, ends_day: bool) -> float:
    """Return a time of the config as a number in the unit of the times, of which `newest` is one; as `read_time`."""
    if newest >= _FIRST_SECOND * UNITS[unit]:  # the times are dates
        _check_unit(key, text, unit)
    return _bound(key, text, unit, ends_day)


def _check_unit(key: str, text: str, unit: str) -> None:
    """Raise InputError for a number that is a date in another unit than that of the times: it would filter nothing."""
    number = _number(text)
    if number is None or abs(number) < _FIRST_SECOND:
        return
    if (own := time_unit(np.array([number]))) != unit:
        raise InputError(
            f"{key}={text} is a date in {own}, but the times are in {unit}; write a date, or the number in {unit}"
        )


def describe_range(oldest: float, newest: float, unit: str) -> str:
    """Return what times there are, for a filter that keeps none of them."""
    return f"time ranges {describe_ends(oldest, newest, unit)}" + ("" if unit == "seconds" else f", in {unit}")


def _bound(key: str, text: str, unit: str, ends_day: bool) -> float:
    """Return a bound as a number of the file; a date in the unit of its times, with `ends_day` the end of its day."""
    if (number := _number(text)) is not None:
        return number
    try:
        date = datetime.fromisoformat(text)
        microseconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{key}={text} must be a number or an ISO date; write it like 2021-05-11") from error
    if ends_day and len(text) == len("2021-05-11"):
        microseconds += _DAY * 10**6 - 1
    if unit == "nanoseconds":
        return 1000 * microseconds + (999 if ends_day else 0)
    return microseconds / (10**6 // UNITS[unit])


def _drop_rare(table: pd.DataFrame, dataset: DatasetConfig) -> pd.DataFrame:
    if dataset.min_item <= 1 and dataset.min_user <= 1:
        return table
    while True:
        kept = table[_occurrences(table["item"]) >= dataset.min_item]
        kept = kept[_occurrences(kept["user"]) >= dataset.min_user]
        if kept.empty:
            raise all_rare_error(len(table), dataset)
        if len(kept) == len(table) or not dataset.until_stable:
            return kept
        table = kept


def all_rare_error(rows: int, dataset: DatasetConfig) -> InputError:
    """Return the error for the filters of rare items and users if they drop all rows."""
    return InputError(
        f"dataset.min_item={dataset.min_item} and dataset.min_user={dataset.min_user} keep none of {rows} interactions;"
        " lower them"
    )


def _occurrences(ids: pd.Series) -> np.ndarray:
    """Return for each row the number of rows with its id."""
    codes = pd.factorize(ids)[0]
    return np.bincount(codes)[codes]


# Sorting


def sort_interactions(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows sorted by user, then by time if there is one, then as they were, with a new index.

    User and time become one integer key with as few bits as possible (KION: 21 for the user, 8 for the day). The
    highest bits divide the rows into parts, which are sorted in parallel; this is several times faster than np.lexsort.
    """
    key, bits = _sort_key(table)
    low = max(0, bits - _PART_BITS)
    part = (key >> low).astype(np.uint8)
    ends = np.cumsum(np.bincount(part, minlength=1 << _PART_BITS))
    rows = np.empty(len(key), np.int32 if len(key) < 2**31 else np.int64)
    columns = {name: column.to_numpy() for name, column in table.items() if isinstance(column.dtype, np.dtype)}
    ordered = {name: np.empty_like(column) for name, column in columns.items()}

    def sort_part(number: int, start: int, end: int) -> None:
        inside = np.flatnonzero(part == number)
        order = _counting_sort_order(key[inside], low)
        for name, column in columns.items():
            ordered[name][start:end] = column[inside][order]
        rows[start:end] = inside[order]

    with ThreadPoolExecutor(pa.cpu_count()) as pool:  # threads help, because numpy releases the GIL in sort and take
        list(pool.map(sort_part, range(len(ends)), [0, *ends[:-1]], ends))
    texts = {name: table[name].array.take(rows) for name in table if name not in columns}
    return pd.DataFrame({name: (ordered | texts)[name] for name in table}, copy=False)


def _sort_key(table: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Return one integer per row that sorts by user and time, and how many bits it needs, at most 64."""
    key, size = _from_zero(table["user"])
    if "time" in table:
        time, span = _from_zero(table["time"])
        if not (time[:1000] % _DAY).any() and not (time % _DAY).any():  # dates without hours
            time, span = time // _DAY, (span - 1) // _DAY + 1
        size *= span
        key = key.astype(np.uint32 if size < 2**32 else np.uint64) * span + time
    return key, (size - 1).bit_length()


def _from_zero(values: pd.Series) -> tuple[np.ndarray, int]:
    """Return 32-bit integers from 0 in the order of the values, and one more than the largest."""
    is_integer = pd.api.types.is_integer_dtype(values)
    low, high = (int(values.min()), int(values.max())) if is_integer else (0, 2**64)
    if high - low < 2**32:
        return values.to_numpy().astype(np.uint32) - np.uint32(low % 2**32), high - low + 1  # exact, modulo 2**32
    ranks, distinct = pd.factorize(values, sort=True)
    return ranks.astype(np.uint32), len(distinct)


def _counting_sort_order(key: np.ndarray, bits: int) -> np.ndarray:
    """Return the stable order of integers of `bits` bits, 16 bits at a time: numpy sorts those by counting."""
    order = np.argsort(key.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digits = (key >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
