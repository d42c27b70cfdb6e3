"""Generate interactions with learnable order: a user's last item makes a few next items likely."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import gcd

import numpy as np
import pandas as pd
import pyarrow as pa

from sasrec_lab.config.dataset import SyntheticConfig
from sasrec_lab.ops.memory import Need, check_memory

_SPREAD = 0.8  # standard deviation of the logarithm of a user's number of interactions
_SUCCESSORS = np.array([0.5, 0.25, 0.15, 0.1])  # probabilities of an item's likely successors
_FOLLOW, _TASTE = 0.7, 0.2  # probability that an item follows the last one, or fits the user's taste; or is any item
_START, _YEAR, _GAP = 1_600_000_000, 365 * 86_400, 3_600  # seconds


def make_interactions(config: SyntheticConfig) -> pd.DataFrame:
    """Generate a table with `user` (1..users), `item` (1..items) and `time` (int64 seconds), sorted by user and time.

    Items form groups of taste; within a group, popularity follows Zipf's law and each item has a few likely successors.
    A user has one taste, never takes an item twice, and has about `mean_length` interactions (a lognormal number).
    The same config gives the same table.

    Raises:
        InputError: the table would not fit in memory.
    """
    check_memory(_needs(config), "cpu")
    random = np.random.default_rng(config.seed)
    lengths = _lengths(random, config)
    # Repeats are dropped, so more items are drawn: all the more, the larger the user's share of the catalogue.
    drawn = np.ceil(lengths * (1.4 + 10 * lengths / config.items)).astype(int) + 2
    table = _walk(random, config, drawn).drop_duplicates()
    place = table.groupby("user", sort=False).cumcount().to_numpy()
    table = table[place < lengths[table["user"] - 1]].reset_index(drop=True)
    return table.assign(time=_times(random, table["user"].to_numpy()))


def _needs(config: SyntheticConfig) -> list[Need]:
    """Return lower bounds of the memory: what is held for each user, item and interaction at once."""
    keys = [f"dataset.synthetic.{name}={getattr(config, name)}" for name in ("users", "items", "mean_length")]
    users, items, mean_length = keys
    rows = int(config.users * max(1, min(config.mean_length, config.items) / 4))
    return [
        Need(f"{config.users:,} users", (users,), 40 * config.users),
        Need(f"{config.items:,} items", (items,), 48 * config.items),
        Need("interactions", (users, mean_length), 32 * rows),
    ]


def _lengths(random: np.random.Generator, config: SyntheticConfig) -> np.ndarray:
    spread = random.lognormal(np.log(config.mean_length) - _SPREAD**2 / 2, _SPREAD, config.users)
    return np.clip(np.rint(spread), 1, config.items).astype(int)


def _walk(random: np.random.Generator, config: SyntheticConfig, drawn: np.ndarray) -> pd.DataFrame:
    """Draw `drawn[u]` items in order for user u + 1, with repeats; all users take each step together."""
    edges, popularity = _catalogue(random, config)
    groups, successors = len(edges) - 1, _successors(random, edges)
    users = np.argsort(-drawn, kind="stable")  # longest first, so that those still walking are a prefix
    walking = np.searchsorted(-drawn[users], -np.arange(drawn.max()))  # users with more than 0, 1, 2, ... items
    taste = random.integers(groups, size=config.users)
    low, high = edges[taste], edges[taste + 1]
    steps = [_popular(random, popularity, low, high)]
    for count in walking[1:]:
        following = successors[steps[-1][:count], random.choice(len(_SUCCESSORS), count, p=_SUCCESSORS)]
        fitting = _popular(random, popularity, low[:count], high[:count])
        anything = _popular(random, popularity, np.zeros(count, dtype=int), np.full(count, config.items))
        chance = random.random(count)
        steps.append(np.select([chance < _FOLLOW, chance < _FOLLOW + _TASTE], [following, fitting], anything))
    walkers = np.concatenate([users[:count] for count in walking])
    table = pd.DataFrame({"user": walkers + 1, "item": np.concatenate(steps) + 1})
    return table.iloc[np.argsort(walkers, kind="stable")]


def _catalogue(random: np.random.Generator, config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return where the groups of items begin and end, and the total weight of all items before each (items + 1,)."""
    groups = max(1, round(config.items**0.5 / 2))
    edges = np.linspace(0, config.items, groups + 1).astype(int)  # group g has the items edges[g] to edges[g + 1] - 1
    weights = random.permutation(1 / np.arange(1, config.items + 1))
    return edges, np.concatenate([[0], np.cumsum(weights)])


def _successors(random: np.random.Generator, edges: np.ndarray) -> np.ndarray:
    """Return the likely next items of each item (items, successors), all but the last of the item's own group."""
    items = edges[-1]
    group = np.repeat(np.arange(len(edges) - 1), np.diff(edges))  # (items,)
    successors = random.integers(edges[group, None], edges[group + 1, None], (items, len(_SUCCESSORS)))
    successors[:, -1] = random.integers(items, size=items)
    return successors


def _popular(random: np.random.Generator, popularity: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Draw one item from low[i] to high[i] - 1 for each i, in proportion to popularity."""
    point = random.uniform(popularity[low], popularity[high])
    return np.clip(np.searchsorted(popularity, point, side="right") - 1, low, high - 1)


def _times(random: np.random.Generator, users: np.ndarray) -> np.ndarray:
    """Draw times: each user starts within one year; gaps are exponential, at least one second."""
    gaps = np.ceil(random.exponential(_GAP, len(users))).astype(np.int64)
    first = np.flatnonzero(np.diff(users, prepend=0))  # row of each user's first interaction
    starts = _START + random.integers(_YEAR, size=len(first))
    elapsed = np.cumsum(gaps)
    return elapsed + np.repeat(starts - elapsed[first], np.diff(first, append=len(users)))


# More rows than fit in memory


def stream_interactions(config: SyntheticConfig, rows: int, users_at_once: int = 200_000) -> Iterator[pa.Table]:
    """Generate tables of user_id, item_id and timestamp, `rows` rows in all, some users at a time.

    Items follow each other as in `make_interactions`, but a user may take one again, and the mean length is `rows` by
    the number of users. A table has whole users, in time order, and their ids are spread over all ids. The same
    arguments give the same tables.
    """
    random = np.random.default_rng(config.seed)
    edges, popularity = _catalogue(random, config)
    successors = _successors(random, edges).astype(np.int32)
    spread = next(odd for odd in itertools.count(config.users // 3 * 2 + 1, 2) if gcd(odd, config.users) == 1)
    for first in range(0, config.users, users_at_once):
        users = min(users_at_once, config.users - first)
        budget = rows * (first + users) // config.users - rows * first // config.users
        lengths = _exact_lengths(random, replace(config, users=users, mean_length=budget / users), budget)
        items = _stream_walk(random, config, lengths, edges, popularity, successors)
        owners = np.repeat(np.arange(users), lengths)
        table = {
            "user_id": (owners + first) * spread % config.users + 1,
            "item_id": items + 1,
            "timestamp": _times(random, owners + 1),
        }
        order = np.argsort(table["timestamp"], kind="stable")
        yield pa.table({name: values[order] for name, values in table.items()})


def _exact_lengths(random: np.random.Generator, config: SyntheticConfig, rows: int) -> np.ndarray:
    """Return each user's number of interactions, at least one, `rows` in all."""
    lengths = _lengths(random, config)
    while missing := rows - int(lengths.sum()):
        able = np.flatnonzero(lengths > 1) if missing < 0 else np.arange(len(lengths))
        lengths[random.choice(able, min(abs(missing), len(able)), replace=False)] += np.sign(missing)
    return lengths


def _stream_walk(
    random: np.random.Generator,
    config: SyntheticConfig,
    lengths: np.ndarray,
    edges: np.ndarray,
    popularity: np.ndarray,
    successors: np.ndarray,
) -> np.ndarray:
    """Return the items of all users, one user after the other; all users take each step together."""
    users = np.argsort(-lengths, kind="stable")  # longest first, so that those still walking are a prefix
    walking = np.searchsorted(-lengths[users], -np.arange(1, lengths.max()))  # users with more than 1, 2, ... items
    taste = random.integers(len(edges) - 1, size=len(users))
    low, high = edges[taste], edges[taste + 1]
    starts = (np.cumsum(lengths) - lengths)[users]
    items = np.empty(lengths.sum(), np.int64)
    items[starts] = last = _popular(random, popularity, low, high)
    for step, number in enumerate(walking, 1):
        which = np.searchsorted(np.cumsum(_SUCCESSORS[:-1]), random.random(number), side="right")
        following = successors[last[:number], which].astype(np.int64)
        chance = random.random(number)
        fits = np.flatnonzero((chance >= _FOLLOW) & (chance < _FOLLOW + _TASTE))
        following[fits] = _popular(random, popularity, low[fits], high[fits])
        free = np.flatnonzero(chance >= _FOLLOW + _TASTE)
        following[free] = _popular(random, popularity, np.zeros(len(free), int), np.full(len(free), config.items))
        items[starts[:number] + step] = last = following
    return items
