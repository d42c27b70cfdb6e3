"""Lists of any system, read from a table and matched with the rows that they are for. N entries, R rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sasrec_lab.data.ids import Ids, as_id_array
from sasrec_lab.errors import InputError, counted, first_few, shown
from sasrec_lab.evaluate.held_out import HeldOut
from sasrec_lab.recommend.histories import find_column

ROW = "row"


@dataclass(frozen=True)
class ListedRows:
    """The entries of the lists that are for a row."""

    rows: np.ndarray  # (N,) int64, index of the row
    items: np.ndarray  # (N,) int64, 1..num_items of the sequences, 0 for an item that the data set does not have
    ranks: np.ndarray  # (N,) int64, from 1
    raw_items: np.ndarray  # (N,) as in the table
    notes: list[str]  # what was ignored

    @property
    def longest(self) -> int:
        """Return the length of the longest list."""
        return int(np.bincount(self.rows).max(initial=0))

    def ranks_of_targets(self, held_out: HeldOut) -> np.ndarray:
        """Return the rank that each target of the rows has in its list, 0 for none, shape (G,) int64."""
        rows, sequences = held_out.rows, held_out.sequences
        size = len(sequences.item_ids) + 1
        owners = np.repeat(np.arange(len(rows)), np.diff(rows.target_offsets))
        wanted = owners * size + sequences.items[rows.places]
        entries = self.rows * size + self.items
        order = np.argsort(entries)
        if not len(order):
            return np.zeros(len(wanted), dtype=np.int64)
        found = order[np.minimum(np.searchsorted(entries, wanted, sorter=order), len(order) - 1)]
        return np.where(entries[found] == wanted, self.ranks[found], 0)


def match_lists(table: pd.DataFrame, held_out: HeldOut) -> ListedRows:
    """Return the lists in a table with a row per entry, in columns user_id, item_id, and rank or score.

    The columns of ids may be named as in the data set. Lists have the column `row`, if a user has several rows. Without
    ranks the item with the highest score is first, and equal scores count in the order of the table.

    Raises:
        InputError: a column is missing, a rank or score is not valid, or a list has an item twice; or no list is for a
            row.
    """
    dataset, sequences = held_out.dataset, held_out.sequences
    user = find_column(table, (dataset.user, "user_id"), "lists")
    item = find_column(table, (dataset.item, "item_id"), "lists")
    order = next((name for name in ("rank", "score") if name in table), None)
    if order is None:
        columns = ", ".join(map(str, table.columns))
        raise InputError(f"lists must have a column 'rank' or 'score'; its columns are {columns}; rename one")
    find_column(table, (order,), "lists")
    if table.empty:
        raise InputError("lists has no rows; give a row for each item of a list")
    users = Ids(sequences.user_ids).indices(table[user], f"lists, column {user}")
    items = Ids(sequences.item_ids).indices(table[item], f"lists, column {item}") + 1
    raw_users, raw_items = (as_id_array(table[name], f"lists, column {name}") for name in (user, item))
    rows = _find_rows(table, users, held_out)
    notes = _ignored(raw_users, users, rows)
    if not (rows >= 0).any():
        raise InputError(
            f"lists has no list of a user with a target (users such as {first_few(pd.unique(raw_users), 3)}, not"
            f" {first_few(sequences.user_ids[held_out.rows.users[:3]])}); check the ids and the data set"
        )
    _check_distinct(rows, items, raw_users, raw_items)
    numbers = _read_numbers(table[order], order)
    ranks = _check_ranks(numbers, rows, raw_users) if order == "rank" else _ranks_of_scores(numbers, rows)
    kept = rows >= 0
    return ListedRows(rows[kept], items[kept], ranks[kept], raw_items[kept], notes)


def _find_rows(table: pd.DataFrame, users: np.ndarray, held_out: HeldOut) -> np.ndarray:
    """Return the row that each entry is for, -1 for none."""
    rows = held_out.rows
    if rows.num_users == len(rows):
        row_of_user = np.full(len(held_out.sequences.user_ids) + 1, -1)  # its last place is for unknown users
        row_of_user[rows.users] = np.arange(len(rows))
        return row_of_user[users]
    if ROW not in table:
        raise InputError(
            f"lists must have a column {ROW!r}, the place of the list's row in the {held_out.split} from 0, because a"
            " user has several rows with dataset.time_split.target=successive; the lists of sasrec-recommend"
            f" split={held_out.split} have it"
        )
    given = _read_numbers(table[find_column(table, (ROW,), "lists")], ROW)
    if (wrong := (given != given.round()) | (given < 0) | (given >= len(rows))).any():
        at = int(wrong.argmax())
        raise InputError(f"lists, row {at + 1}: {ROW}={given[at]:g} must be an integer from 0 to {len(rows) - 1:,}")
    places = given.astype(np.int64)
    if (wrong := rows.users[places] != users).any():
        at = int(wrong.argmax())
        owner = held_out.sequences.user_ids[rows.users[places[at]]]
        raise InputError(f"lists, row {at + 1}: {ROW}={places[at]} is one of user {owner}; correct the user or the row")
    return places


def _ignored(raw_users: np.ndarray, users: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return a line on the lists of users who have no row."""
    reasons = {"unknown to the data set": users < 0, "without a target": (users >= 0) & (rows < 0)}
    lines = []
    for reason, is_ignored in reasons.items():
        if is_ignored.any():
            ids = pd.unique(raw_users[is_ignored])
            lines.append(f"ignored: the lists of {counted(len(ids), 'user')} {reason} ({first_few(ids, 3)})")
    return lines


def _check_distinct(rows: np.ndarray, items: np.ndarray, raw_users: np.ndarray, raw_items: np.ndarray) -> None:
    """Raise InputError if a list has an item twice."""
    pairs = pd.Series(rows * (int(items.max(initial=0)) + 1) + items)
    repeated = pairs.duplicated().to_numpy() & (rows >= 0) & (items > 0)
    if repeated.any():
        second = int(repeated.argmax())
        first = int((pairs == pairs[second]).to_numpy().argmax())
        raise InputError(
            f"lists, rows {first + 1} and {second + 1}: a list of user {raw_users[second]} has item"
            f" {raw_items[second]} twice; remove one"
        )


def _read_numbers(column: pd.Series, name: str) -> np.ndarray:
    """Return a column as float64; raise InputError for a value that is not a number."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if (wrong := np.isnan(numbers)).any():
        at = int(wrong.argmax())
        value: Any = column.iloc[at]
        what = "is missing" if pd.isna(value) else f"is {shown(value)}"
        raise InputError(f"lists, row {at + 1}: {name} {what}; give a number")
    return numbers


def _check_ranks(numbers: np.ndarray, rows: np.ndarray, raw_users: np.ndarray) -> np.ndarray:
    """Return ranks as integers; raise InputError unless they are distinct and from 1, or the worse one of equals."""
    if (wrong := (numbers != numbers.round()) | (numbers < 1) | (numbers > 2**53)).any():
        at = int(wrong.argmax())
        raise InputError(f"lists, row {at + 1}: rank={numbers[at]:g} must be an integer; the first item has rank 1")
    ranks = numbers.astype(np.int64)
    order = np.lexsort((ranks, rows))
    places = _places(rows[order])
    if (wrong := (ranks[order] < places) & (rows[order] >= 0)).any():
        at = int(order[wrong.argmax()])
        raise InputError(
            f"lists, row {at + 1}: rank={ranks[at]} of user {raw_users[at]} is given to several items; number the items"
            " of a list, or give equal ones the worse rank"
        )
    return ranks


def _ranks_of_scores(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the place of each score in its list, the highest first."""
    order = np.lexsort((-scores, rows))  # stable
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[order] = _places(rows[order])
    return ranks


def _places(rows: np.ndarray) -> np.ndarray:
    """Return 1, 2, ... for the entries of each row; rows are ascending."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
