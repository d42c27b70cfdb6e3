"""Made-up interactions with real order in them: what a user took last says much about what comes next."""

import numpy as np
import pandas as pd

from sasrec_lab.config.dataset import SyntheticConfig

_SPREAD = 0.8  # standard deviation of the logarithm of a user's number of interactions
_SUCCESSORS = np.array([0.5, 0.25, 0.15, 0.1])  # chances of an item's likely successors
_FOLLOW, _TASTE = 0.7, 0.2  # chances that an item follows the last, or fits the user's taste; else it is anything
_START, _YEAR, _GAP = 1_600_000_000, 365 * 86_400, 3_600  # seconds


def make_interactions(config: SyntheticConfig) -> pd.DataFrame:
    """Columns `user` (1..users), `item` (1..items) and `time` (int64 seconds), sorted by user and time.

    Items fall into groups of taste; inside a group, popularity is Zipf's and each item has a few likely successors.
    A user has one taste, never takes an item twice, and has about `mean_length` interactions, lognormally spread.
    The same config gives the same table.
    """
    random = np.random.default_rng(config.seed)
    lengths = _lengths(random, config)
    # Some of what is drawn are repeats, which go: the more of the catalogue a user takes, the more.
    drawn = np.ceil(lengths * (1.4 + 10 * lengths / config.items)).astype(int) + 2
    table = _walk(random, config, drawn).drop_duplicates()
    place = table.groupby("user", sort=False).cumcount().to_numpy()
    table = table[place < lengths[table["user"] - 1]].reset_index(drop=True)
    return table.assign(time=_times(random, table["user"].to_numpy()))


def _lengths(random: np.random.Generator, config: SyntheticConfig) -> np.ndarray:
    spread = random.lognormal(np.log(config.mean_length) - _SPREAD**2 / 2, _SPREAD, config.users)
    return np.clip(np.rint(spread), 1, config.items).astype(int)


def _walk(random: np.random.Generator, config: SyntheticConfig, drawn: np.ndarray) -> pd.DataFrame:
    """`drawn[u]` items for user u + 1, in order, repeats among them; all users take a step at once."""
    groups = max(1, round(config.items**0.5 / 2))
    edges = np.linspace(0, config.items, groups + 1).astype(int)  # group g has the items edges[g] to edges[g + 1] - 1
    weights = random.permutation(1 / np.arange(1, config.items + 1))
    popularity = np.concatenate([[0], np.cumsum(weights)])  # of all items before this one
    successors = _successors(random, edges)
    users = np.argsort(-drawn, kind="stable")  # longest first: those still walking are the first so many
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


def _successors(random: np.random.Generator, edges: np.ndarray) -> np.ndarray:
    """The likely next items of each item, all but the last in its own group. Shape (items, successors)."""
    items = edges[-1]
    group = np.repeat(np.arange(len(edges) - 1), np.diff(edges))  # (items,)
    successors = random.integers(edges[group, None], edges[group + 1, None], (items, len(_SUCCESSORS)))
    successors[:, -1] = random.integers(items, size=items)
    return successors


def _popular(random: np.random.Generator, popularity: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One item from low[i] to high[i] - 1 for each i."""
    point = random.uniform(popularity[low], popularity[high])
    return np.clip(np.searchsorted(popularity, point, side="right") - 1, low, high - 1)


def _times(random: np.random.Generator, users: np.ndarray) -> np.ndarray:
    """Each user starts within one year; the gaps are exponential, one second at least."""
    gaps = np.ceil(random.exponential(_GAP, len(users))).astype(np.int64)
    first = np.flatnonzero(np.diff(users, prepend=0))  # row of each user's first interaction
    starts = _START + random.integers(_YEAR, size=len(first))
    elapsed = np.cumsum(gaps)
    return elapsed + np.repeat(starts - elapsed[first], np.diff(first, append=len(users)))
