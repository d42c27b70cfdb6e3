"""Generate a data set in KION's files and columns, with learnable order.

python scripts/make_synthetic.py my_data                          2,000 users, 300 items
python scripts/make_synthetic.py my_data --users 20000 --seed 1   other sizes
python scripts/make_synthetic.py my_data --rows 1e8               a folder of Parquet of any size, in little memory

Then `data_dir=my_data dataset=kion` reads it, or with `--rows` `dataset=csv dataset.path=my_data/rows`. Two users of
KION's files are those of RecTools' SASRec tutorial: 324373 has a single interaction, and 14630 a single one with an
item that no other user has seen, so that no training can know it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's package
from sasrec_lab.config.dataset import SyntheticConfig
from sasrec_lab.data.synthetic import make_interactions, stream_interactions
from sasrec_lab.errors import InputError

FIRST_DAY = np.datetime64("2021-03-13")  # KION's
ONE_INTERACTION, UNKNOWN_ITEM_ONLY, UNKNOWN_ITEM = 324373, 14630, 8871
ADJECTIVES = "Silent Winter Hidden Golden Broken Last First Endless Lost Northern Burning Paper Midnight Secret"
NOUNS = "River House Letter Summer Garden Witness Island Mirror Train Promise Harbour Shadow Orchard Signal"


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the data root to write kion/ into")
    parser.add_argument("--users", type=int, help="default: 2000, or a tenth of the rows")
    parser.add_argument("--items", type=int, help="default: 300, or a hundredth of the rows")
    parser.add_argument("--mean-length", type=float, default=12)
    parser.add_argument("--rows", type=number, help="number of interactions without titles, such as 1e8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows is not None:
        write_rows(args.folder / "rows", args.rows, args.users, args.items, args.seed)
        return
    args.users, args.items = args.users or 2000, args.items or 300
    files = make(SyntheticConfig(args.users, args.items, args.mean_length, args.seed))
    folder = args.folder / "kion"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in files.items():
            table.to_csv(folder / name, index=False)
    except OSError as error:
        sys.exit(f"error: {folder} cannot be written: {error.strerror}")
    print(f"{folder}: {', '.join(f'{name} ({len(table):,} rows)' for name, table in files.items())}")


def number(text: str) -> int:
    """Return a number of rows, which may be written as 1e8."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, such as 1e8") from None


def write_rows(folder: Path, rows: int, users: int | None, items: int | None, seed: int) -> None:
    """Write a folder of Parquet files with that many rows, in a stream."""
    try:
        config = SyntheticConfig(users or max(1, rows // 10), items or max(2, rows // 100), 1, seed)
        if rows < config.users:
            raise InputError(f"--rows={rows} must be at least --users={config.users}")
        if any(folder.glob("*")):
            raise InputError(f"{folder} is not empty; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        written = 0
        for number, table in enumerate(stream_interactions(config, rows)):
            parquet.write_table(table, folder / f"part-{number:05}.parquet")
            written += len(table)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {written:,} rows of {config.users:,} users and {config.items:,} items")


def make(config: SyntheticConfig) -> dict[str, pd.DataFrame]:
    """Return KION's three files by name, the same for the same config."""
    random = np.random.default_rng(config.seed)
    walks = make_interactions(config)
    users = _ids(random, config.users, 1_100_000, taken=[ONE_INTERACTION, UNKNOWN_ITEM_ONLY])
    items = _ids(random, config.items, 16_500, taken=[UNKNOWN_ITEM])
    walks = pd.DataFrame(
        {"user_id": users[walks["user"] - 1], "item_id": items[walks["item"] - 1], "time": walks["time"]}
    )
    favorite, middle = walks["item_id"].mode()[0], int(walks["time"].median())
    more = {"user_id": [ONE_INTERACTION, UNKNOWN_ITEM_ONLY], "item_id": [favorite, UNKNOWN_ITEM], "time": middle}
    walks = pd.concat([walks, pd.DataFrame(more)]).sort_values("time", kind="stable", ignore_index=True)
    return {
        "interactions.csv": _views(random, walks),
        "items_en.csv": _items(random, np.append(items, UNKNOWN_ITEM)),
        "users_en.csv": _users(random, np.append(users, [ONE_INTERACTION, UNKNOWN_ITEM_ONLY])),
    }


def _ids(random: np.random.Generator, count: int, below: int, taken: list[int]) -> np.ndarray:
    free = np.setdiff1d(np.arange(max(below, 2 * count)), taken)
    return random.choice(free, count, replace=False)


def _views(random: np.random.Generator, walks: pd.DataFrame) -> pd.DataFrame:
    """Return the views in time order, because dates have no hours; a few views have no percentage."""
    days = (walks["time"] - walks["time"].min()) // 86_400
    seconds = random.lognormal(8, 1.5, len(walks)).astype(int)
    percent = np.where(random.random(len(walks)) < 0.3, random.integers(0, 11, len(walks)), 100.0)
    percent[random.random(len(walks)) < 0.01] = np.nan
    dates = (FIRST_DAY + days.to_numpy()).astype(str)
    return walks[["user_id", "item_id"]].assign(last_watch_dt=dates, total_dur=seconds, watched_pct=percent)


def _items(random: np.random.Generator, items: np.ndarray) -> pd.DataFrame:
    names = [f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    number, name = np.divmod(random.permutation(len(items)), len(names))
    titles = [f"The {names[n]}" + (f" {part + 1}" if part else "") for part, n in zip(number, name, strict=True)]
    kinds = random.choice(["film", "series"], len(items))
    return pd.DataFrame({"item_id": items, "content_type": kinds, "title": titles, "title_orig": titles})


def _users(random: np.random.Generator, users: np.ndarray) -> pd.DataFrame:
    ages = random.choice(["age_18_24", "age_25_34", "age_35_44", "age_45_54", "age_55_64", "age_65_inf"], len(users))
    table = pd.DataFrame({"user_id": users, "age": ages, "sex": random.choice(["M", "F"], len(users))})
    return table.assign(kids_flg=random.integers(0, 2, len(users)))


if __name__ == "__main__":
    main()
