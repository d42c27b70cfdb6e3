"""Sorting of interactions by user and time."""

import numpy as np
import pandas as pd
import pytest

from sasrec_lab.data.cleaning import sort_interactions

INT64 = np.iinfo(np.int64)


def plain(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values([name for name in ("user", "time") if name in table], kind="stable", ignore_index=True)


USERS = {
    "one": lambda random, rows: np.full(rows, 7),
    "few": lambda random, rows: random.integers(-3, 4, rows),
    "int32": lambda random, rows: random.integers(-(2**31), 2**31, rows).astype(np.int32),
    "exactly 32 bits": lambda random, rows: np.append(random.integers(5, 2**32, rows - 2), [5, 2**32 + 4]),
    "any": lambda random, rows: random.integers(INT64.min, INT64.max, rows, endpoint=True),
    "text": lambda random, rows: pd.Series(random.integers(0, 30, rows)).astype(str),
}
TIMES = {
    "none": None,
    "all one": lambda random, rows: np.full(rows, 7),
    "days": lambda random, rows: 86_400 * random.integers(-100, 100, rows).astype(np.int32),
    "days, then an hour": lambda random, rows: np.append(86_400 * random.integers(0, 3, rows - 1), 3_600),
    "exactly 32 bits": lambda random, rows: np.append(random.integers(5, 2**32, rows - 2), [2**32 + 4, 5]),
    "seconds": lambda random, rows: random.integers(0, 2**32, rows),
    "any": lambda random, rows: random.integers(INT64.min, INT64.max, rows, endpoint=True),
    "fractions": lambda random, rows: random.choice([-1.5, -0.0, 0.0, 2.25, 1e300], rows),
}


@pytest.mark.parametrize("rows", [2, 3, 50, 3000])
@pytest.mark.parametrize("times", list(TIMES))
@pytest.mark.parametrize("users", list(USERS))
def test_sorting_is_stable(users, times, rows):
    random = np.random.default_rng(rows)
    table = pd.DataFrame({"item": np.arange(rows, dtype=np.int32), "user": USERS[users](random, rows)})
    if TIMES[times]:
        table["time"] = TIMES[times](random, rows)
    table["weight"] = random.random(rows).astype(np.float32)
    before = table.copy()
    pd.testing.assert_frame_equal(sort_interactions(table), plain(table))
    pd.testing.assert_frame_equal(table, before)


def test_sorting_one_row_and_an_index_with_gaps():
    table = pd.DataFrame({"user": [3, 1, 3], "item": [1, 2, 3], "time": [5, 5, 4]}, index=[4, 9, 2])
    assert sort_interactions(table)["item"].tolist() == [2, 3, 1]
    assert sort_interactions(table[:1])["item"].tolist() == [1]
