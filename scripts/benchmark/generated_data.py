"""Generate files of interactions, the same each time: python -m benchmark.generated_data kion_like <folder>

A file that exists is kept. Popularity follows Zipf's law and lengths are lognormal. Their order is random: these
files only serve to measure speed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

SMALL = 100  # --small divides users, items and rows by this
FIRST_DAY, DAYS = np.datetime64("2021-03-13"), 163  # KION's


def main() -> None:
    """Write the file if it is missing, and print its path as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=FILES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    file = args.folder / args.name / "interactions.csv"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        csv.write_csv(FILES[args.name](SMALL if args.small else 1), draft, csv.WriteOptions(quoting_style="none"))
        draft.rename(file)
    print(json.dumps({"file": str(file)}))


def kion_like(fewer: int) -> pa.Table:
    """Return six training interactions per user on average, and the two held out."""
    return histories(users=300_000 // fewer, items=15_700 // fewer, mean=6)


def million(fewer: int) -> pa.Table:
    """Return a million items, 18 training interactions per user on average, and the two held out."""
    return histories(users=200_000 // fewer, items=1_000_000 // fewer, mean=18)


def kion(fewer: int) -> pa.Table:
    """Return KION's columns with 962,000 users and 5.9 million rows in no order."""
    random = np.random.default_rng(0)
    users, rows = 962_000 // fewer, 5_900_000 // fewer
    activity = np.cumsum(random.lognormal(sigma=1.0, size=users))
    more = np.searchsorted(activity, random.uniform(0, activity[-1], rows - users))
    user = random.permutation(np.concatenate([np.arange(users), more]))
    percent = random.integers(0, 101, rows).astype(float)
    return pa.table(
        {
            "user_id": random.permutation(users + users // 7)[:users][user],
            "item_id": popular(random, 15_700 // fewer, rows),
            "last_watch_dt": pa.array(FIRST_DAY + random.integers(0, DAYS, rows)),
            "total_dur": random.lognormal(8, 1.5, rows).astype(int),
            "watched_pct": pa.array(percent, mask=random.random(rows) < 0.001),
        }
    )


FILES: dict[str, Callable[[int], pa.Table]] = {"kion_like": kion_like, "million": million, "kion": kion}


def histories(users: int, items: int, mean: float) -> pa.Table:
    """Return each user's rows in time order: at least two to train on, lognormal with this mean, and two more."""
    random = np.random.default_rng(0)
    lengths = 2 + np.maximum(2, np.rint(random.lognormal(np.log(mean) - 0.5, 1.0, users))).astype(int)
    return pa.table({"user_id": np.repeat(np.arange(users), lengths), "item_id": popular(random, items, lengths.sum())})


def popular(random: np.random.Generator, items: int, rows: int) -> np.ndarray:
    """Return items drawn by Zipf's law, each of them at least once."""
    popularity = np.cumsum(1 / np.arange(1, items + 1))
    drawn = np.searchsorted(popularity, random.uniform(0, popularity[-1], rows - items))
    ids = random.permutation(items) + 1  # so that popular items are not adjacent
    return ids[random.permutation(np.concatenate([np.arange(items), drawn]))]


if __name__ == "__main__":
    main()
