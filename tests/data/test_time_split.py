"""The split by time against its rules written slowly in pandas, on random interactions with equal times."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import sequences_of

from sasrec_lab.config.closed_form import EaseConfig, ItemKnnConfig, Weighting
from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, Cold, History, HoldoutMode, Target, TimeSplitConfig, Windows
from sasrec_lab.config.evaluation import Draw
from sasrec_lab.data.batches import evaluation_batch
from sasrec_lab.data.holdout import Holdout, hold_out
from sasrec_lab.data.negatives import draw_candidates
from sasrec_lab.data.objectives import NextItem
from sasrec_lab.data.reach import count_unreachable
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.baselines import markov_table, newest_items
from sasrec_lab.evaluation.ranks import full_ranks
from sasrec_lab.ops.sparse_scores import SparseScores, shared_by_all
from sasrec_lab.run.protocol import protocol
from sasrec_lab.training.closed_form import fit
from sasrec_lab.training.lightning_module import SequentialRecommender

Row = tuple[int, list[int], list[int]]  # user, items of the history, targets
SECONDS = 889_000_000  # of 1998
CONFIG = load([])


def timed_sequences(rows: list[tuple[int, int, int]]) -> Sequences:
    """Return sequences of (user, item, time), stably sorted by user and time."""
    table = pd.DataFrame(rows, columns=["user", "item", "time"]).sort_values(["user", "time"], kind="stable")
    lists = [each.item.tolist() for _, each in table.groupby("user")]
    return replace(sequences_of(lists), times=table.time.to_numpy())


def random_sequences(seed: int, users: int = 12, items: int = 15) -> Sequences:
    """Return interactions of 30 moments; some users begin late, and the last items appear late."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        start = random.integers(0, 26)
        for time in random.integers(start, 30, random.integers(1, 13)):
            rows.append((user, int(random.integers(1, items + 1 if time > 20 else items - 3)), SECONDS + int(time)))
    return timed_sequences(rows)


def split(sequences: Sequences, catalogue: Catalogue = Catalogue.all, **keys) -> Holdout:
    cfg = TimeSplitConfig(**keys)
    return hold_out(sequences, Windows.all, catalogue, 3, HoldoutMode.time, cfg)


def rows_of(holdout: Holdout, stage: str) -> list[Row]:
    """Return the rows in raw ids."""
    rows, ids = holdout.rows(stage), np.append(0, holdout.item_ids)
    found = []
    for row, user in enumerate(rows.users.tolist()):
        targets = rows.targets[rows.target_offsets[row] : rows.target_offsets[row + 1]]
        history = holdout.items[rows.starts[row] : rows.ends[row]]
        found.append((user, ids[history].tolist(), ids[targets].tolist()))
    return found


def table_of(sequences: Sequences) -> pd.DataFrame:
    users = np.repeat(np.arange(len(sequences.user_ids)), sequences.lengths)
    return pd.DataFrame({"user": users, "item": sequences.item_ids[sequences.items - 1], "time": sequences.times})


def training_rows(table: pd.DataFrame, cut: float) -> pd.DataFrame:
    second = table.groupby("user").time.nth(1)
    users = table.loc[second[second <= cut].index].user
    return table[table.user.isin(users) & (table.time <= cut)]


def evaluation_rows(
    table: pd.DataFrame, after: float, until: float, known: set[int], cfg: TimeSplitConfig
) -> list[Row]:
    rows = []
    for user, mine in table.groupby("user"):
        late = mine[(mine.time > after) & (mine.time <= until)]
        if cfg.cold_items is Cold.drop:
            late = late[late.item.isin(known)]
        if late.empty:
            continue
        if cfg.target is Target.all:
            chosen = [late.drop_duplicates("item")]
        else:
            each = [late.iloc[[place]] for place in range(len(late))]
            chosen = {Target.first: each[:1], Target.last: each[-1:], Target.successive: each}[cfg.target]
        for targets in chosen:
            history = mine[mine.time <= after]
            to_target = {Target.first: False, Target.last: True, Target.all: False, Target.successive: True}[cfg.target]
            if cfg.history is History.target or (cfg.history is None and to_target):
                history = mine.loc[: targets.index[0] - 1]
            if cfg.cold_users is Cold.keep or history.item.isin(known).any():
                rows.append((user, history.item.tolist(), targets.item.tolist()))
    return rows


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("history", [None, *History])
def test_rows_are_those_of_the_rules(target, history):
    if (target, history) == (Target.all, History.target):
        return
    for seed, cold_users, cold_items in product(range(4), Cold, Cold):
        sequences = random_sequences(seed)
        table = table_of(sequences)
        val, test = (table.time.quantile(quantile) for quantile in (0.6, 0.8))
        keys = {"val": "0.6", "test": "0.8", "target": target, "history": history}
        cfg = TimeSplitConfig(**keys, cold_users=cold_users, cold_items=cold_items)
        training = training_rows(table, val)
        known = set(training.item)
        expected = {
            "val": evaluation_rows(table, val, test, known, cfg),
            "test": evaluation_rows(table, test, np.inf, known, cfg),
        }
        for catalogue in (Catalogue.all, Catalogue.train):
            holdout = split(sequences, catalogue, **vars(cfg))
            in_catalogue = known if catalogue is Catalogue.train else set(table.item)
            assert holdout.item_ids.tolist() == sorted(in_catalogue)
            for stage, rows in expected.items():
                assert rows_of(holdout, stage) == [
                    (user, [i for i in items if i in in_catalogue], [i if i in in_catalogue else 0 for i in targets])
                    for user, items, targets in rows
                ]
            counts = dict(zip(holdout.item_ids.tolist(), holdout.training_counts().tolist(), strict=True))
            assert {item: count for item, count in counts.items() if count} == training.item.value_counts().to_dict()
            trained = set(holdout.window_users.tolist())
            assert trained == set(training.user)


@pytest.mark.parametrize("target", Target)
def test_what_comes_after_a_cut_changes_nothing_before_it(target):
    sequences = random_sequences(1)
    cuts = {"val": str(SECONDS + 15), "test": str(SECONDS + 22)}
    one = split(sequences, target=target, **cuts)
    items = np.where(sequences.times > SECONDS + 22, sequences.items[::-1], sequences.items)
    other = split(replace(sequences, items=items), target=target, **cuts)
    assert rows_of(one, "val") == rows_of(other, "val")
    for name in ("window_starts", "window_ends", "window_users"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    windows = zip(one.window_starts, one.window_ends, strict=True)
    assert all((sequences.times[start:end] <= SECONDS + 15).all() for start, end in windows)


# A worked example. Training ends at 20, validation at 30; item 9 is new, user 3 comes late, user 4 has one interaction.

EVENTS = [
    *((0, item, SECONDS + time) for item, time in ((1, 10), (2, 20), (3, 25), (1, 31), (9, 32), (2, 33), (3, 34))),
    *((1, item, SECONDS + time) for item, time in ((3, 5), (2, 6), (1, 29))),
    *((2, item, SECONDS + time) for item, time in ((2, 8), (3, 9), (9, 40))),
    *((3, item, SECONDS + time) for item, time in ((1, 35), (2, 36))),
    (4, 1, SECONDS + 7),
    (4, 3, SECONDS + 37),
]
CUTS = {"val": str(SECONDS + 20), "test": str(SECONDS + 30)}


@pytest.mark.parametrize(
    ("keys", "test"),
    [
        ({"target": Target.last}, [(0, [1, 2, 3, 1, 9, 2], [3]), (3, [1], [2]), (4, [1], [3])]),
        ({"target": Target.first}, [(0, [1, 2, 3], [1]), (4, [1], [3])]),
        ({"target": Target.all}, [(0, [1, 2, 3], [1, 2, 3]), (4, [1], [3])]),
        (
            {"target": Target.successive},
            [
                (0, [1, 2, 3], [1]),
                (0, [1, 2, 3, 1, 9], [2]),
                (0, [1, 2, 3, 1, 9, 2], [3]),
                (3, [1], [2]),
                (4, [1], [3]),
            ],
        ),
        (
            {"target": Target.first, "cold_users": Cold.keep, "cold_items": Cold.keep},
            [(0, [1, 2, 3], [1]), (2, [2, 3], [9]), (3, [], [1]), (4, [1], [3])],
        ),
        ({"target": Target.last, "history": History.cut}, [(0, [1, 2, 3], [3]), (4, [1], [3])]),
    ],
)
def test_a_worked_example(keys, test):
    holdout = split(timed_sequences(EVENTS), **CUTS, **keys)
    expected = [(user, [10 * item for item in items], [10 * item for item in found]) for user, items, found in test]
    assert rows_of(holdout, "test") == expected
    assert holdout.time_split["train"] == {"users": 3, "items": 3, "interactions": 6}


def test_counts_say_what_is_new_and_what_is_left_out():
    record = split(timed_sequences(EVENTS), **CUTS).time_split
    assert record["test"] == {
        "after": SECONDS + 30,
        "date": "1998-03-04 08:27:10",
        "users": 3,
        "rows": 3,
        "targets": 3,
        "new_users": 2,
        "cold_rows": 0,
        "cold_interactions": 2,
    }
    assert record["val"]["after"] == SECONDS + 20
    assert split(timed_sequences(EVENTS), **CUTS, target=Target.first).time_split["test"]["cold_rows"] == 1


def test_batches_of_several_targets_and_of_several_rows():
    objective = NextItem(load([]).objective, load(["model.maxlen=2"]).model)
    holdout = split(timed_sequences(EVENTS), **CUTS, target=Target.all)
    batch = evaluation_batch(holdout, np.array([1, 0]), "test", objective, None)
    assert (batch.rows.tolist(), batch.users.tolist()) == ([1, 0], [4, 0])
    assert (batch.target_rows.tolist(), batch.targets.tolist()) == ([0, 1, 1, 1], [3, 1, 2, 3])
    assert (batch.seen_rows.tolist(), batch.seen_items.tolist()) == ([0, 1, 1, 1], [1, 1, 2, 3])  # before the cut
    assert batch.inputs.items[:3].tolist() == [1, 2, 3]

    holdout = split(timed_sequences(EVENTS), Catalogue.train, **CUTS, target=Target.successive)
    batch = evaluation_batch(holdout, np.array([0, 1, 2]), "test", objective, None)
    assert (batch.users.tolist(), batch.targets.tolist()) == ([0, 0, 0], [1, 2, 3])
    assert batch.inputs.items[:6].tolist() == [2, 3, 3, 1, 1, 2]  # the new item is not read
    assert draw_candidates(holdout, Draw.unseen, 4, 0, "test").shape == (5, 4)


def test_targets_seen_before_are_misses_with_the_filter():
    holdout = split(timed_sequences(EVENTS), **CUTS, target=Target.all)
    assert count_unreachable(holdout, filter_seen=True)["test"] == {"outside_catalogue": 0, "seen_before": 3}
    kept = split(timed_sequences(EVENTS), Catalogue.train, **CUTS, target=Target.all, cold_items=Cold.keep)
    assert count_unreachable(kept, filter_seen=True)["test"] == {"outside_catalogue": 2, "seen_before": 3}


# Cuts


@pytest.mark.parametrize("scale", [1, 1000, 10**6, 10**9])
@pytest.mark.parametrize(
    ("text", "last"),
    [("1998-03-03", "1998-03-03T23:59:59"), ("1998-03-03T12:00", "1998-03-03T12:00"), ("0.5", None)],
)
def test_a_cut_is_a_date_in_the_unit_of_the_times_or_a_quantile(scale, text, last):
    hours = pd.date_range("1998-03-01", periods=120, freq="h").astype("datetime64[s]").astype(int).to_numpy()
    rows = [(place % 5, 1 + place % 7, int(hour) * scale) for place, hour in enumerate(hours)]
    sequences = timed_sequences(rows)
    holdout = split(sequences, val="0.3", test=text, target=Target.all)
    cut = holdout.time_split["test"]["after"]
    expected = np.quantile(hours, 0.5) if last is None else pd.Timestamp(last).timestamp()
    assert cut / scale == pytest.approx(expected, abs=1)
    assert (hours * scale <= cut).sum() == (60 if last is None else 72 if last.endswith("59") else 61)


@pytest.mark.parametrize("scale", [1, 1000, 10**6, 10**9])
def test_different_cuts_of_a_day_have_different_dates(scale):
    hours = pd.date_range("1997-12-30", periods=120, freq="h").astype("datetime64[s]").astype(int).to_numpy()
    sequences = timed_sequences([(place % 5, 1 + place % 7, int(hour) * scale) for place, hour in enumerate(hours)])
    cuts = {
        "1998-01-01": "1998-01-01",
        str(883_612_800 * scale): "1998-01-01 00:00:00",
        str(883_699_199 * scale): "1998-01-01",
        "1998-01-01T12:00": "1998-01-01 12:00:00",
    }
    dates = [split(sequences, val=cut, test="0.9").time_split["val"]["date"] for cut in cuts]
    assert dates == list(cuts.values())


def test_times_of_a_split_may_be_negative_or_fractions():
    rows = [(user, 1 + (user + place) % 3, (place - 3) / 2) for user in range(4) for place in range(7)]
    times = [
        split(timed_sequences(rows), val="-0.5", test="1.0").time_split[stage]["after"] for stage in ("val", "test")
    ]
    assert times == [-0.5, 1.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"test": "1.5"},
            r"^dataset.time_split.test=1.5 must be a quantile between 0 and 1, or a time with interactions",
        ),
        ({"test": "2030-01-01"}, r"the file's times range from 1998-03-04 to 1998-03-04$"),
        ({"val": "-0.5"}, r"^dataset.time_split.val=-0.5 must be a quantile between 0 and 1, or a time with"),
        (
            {"val": str(SECONDS + 35), "test": str(SECONDS + 30)},
            r"^dataset.time_split.val=\d+ \(1998-.*\) must be before",
        ),
        ({"val": str(SECONDS + 34), "test": str(SECONDS + 35)}, r"no user is left for validation after 1998-03-04"),
        (
            {"test": str(SECONDS + 37)},
            r"^x.csv: no user is left for the test after 1998-03-04 08:27:17; excluded: 1 interaction with a new item",
        ),
        ({"val": str(SECONDS + 5)}, r"no user is left for validation|no user has 2 training interactions"),
    ],
)
def test_cuts_that_leave_nothing_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        split(timed_sequences(EVENTS), **(CUTS | keys))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.time_split.test=0.95"], "dataset.time_split.test=0.95 needs dataset.holdout=time"),
        (["dataset.time_split.target=all"], "dataset.time_split.target=all needs dataset.holdout=time"),
        (["dataset.holdout=time", "dataset.time=null"], "dataset.holdout=time needs the timestamps' column"),
        (["dataset.holdout=time", "dataset.time_split.val=0.9"], "must be before dataset.time_split.test=0.9"),
        (["dataset.holdout=time", "dataset.time_split.val=May"], "dataset.time_split.val=May must be a quantile"),
        (["dataset.holdout=time", "dataset.time_split.val=nan"], "dataset.time_split.val=nan must be a quantile"),
        (["dataset.holdout=time", "dataset.time_split.test=-inf"], "dataset.time_split.test=-inf must be a quantile"),
        (["dataset.holdout=time", "dataset.time_split.target=some"], "is not one of first, last, all, successive"),
        (
            ["dataset.holdout=time", "dataset.time_split.target=all", "dataset.time_split.history=target"],
            "dataset.time_split.history=target has no meaning for dataset.time_split.target=all",
        ),
        (
            ["dataset.holdout=time", "dataset.time_split.target=all", "evaluation.sampled=5"],
            "evaluation.sampled=5 ranks one target at a time",
        ),
        (["evaluation.monitor=val/map@10"], "evaluation.monitor=val/map@10 is not measured"),
    ],
)
def test_keys_that_make_no_sense_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        load(words)


def test_defaults_are_those_of_the_conf():
    dataset = load(["dataset.holdout=time"]).dataset
    assert dataset.time_split == TimeSplitConfig()
    assert dataset.catalogue is Catalogue.train
    assert load(["dataset.holdout=time", "dataset.catalogue=all"]).dataset.catalogue is Catalogue.all
    last = load([]).dataset
    assert (last.time_split, last.catalogue) == (None, Catalogue.all)


@pytest.mark.parametrize(
    ("cold_items", "events", "tested"),
    [
        (Cold.drop, EVENTS, "last item that training knows after 1998-03-04 08:27:10"),
        (Cold.keep, EVENTS, "last item after 1998-03-04 08:27:10"),
        (Cold.drop, [event for event in EVENTS if event[1] != 9], "last item after 1998-03-04 08:27:10"),
    ],
)
def test_the_protocol_says_whether_new_items_were_dropped(cold_items, events, tested):
    keys = ["holdout=time", *(f"time_split.{key}={cut}" for key, cut in CUTS.items())]
    cfg = load([f"dataset.{key}" for key in (*keys, f"time_split.cold_items={cold_items.name}")])
    sequences = timed_sequences(events)
    assert protocol(cfg, sequences, split(sequences, **vars(cfg.dataset.time_split)))["tested"] == tested


@pytest.mark.parametrize("catalogue", [Catalogue.all, Catalogue.train])
@torch.inference_mode()
def test_a_row_without_a_history_is_a_miss_of_models_only(catalogue):
    events = [event for event in EVENTS if event[0] != 3] + [(3, 2, SECONDS + 36)]
    holdout = split(timed_sequences(events), catalogue, **CUTS, target=Target.first, cold_users=Cold.keep)
    (row,) = np.flatnonzero(holdout.test.users == 3)
    assert holdout.test.starts[row] == holdout.test.ends[row]
    assert count_unreachable(holdout, filter_seen=False)["test"] == {"outside_catalogue": 0, "seen_before": 0}
    cfg = load(["dataset=csv", "dataset.path=x.csv", "model=tiny"])
    batch = evaluation_batch(holdout, np.array([row]), "test", NextItem(cfg.objective, cfg.model), None)

    model = SequentialRecommender(holdout.num_items, cfg).eval()
    of_models = [model.scores(batch)] + [
        fit(each, holdout).scores(1, batch.seen_rows, batch.seen_items)
        for each in (EaseConfig("ease", 1.0), ItemKnnConfig("itemknn", 5, 0.0, Weighting.none))
    ]
    for scores in of_models:
        assert full_ranks(scores, batch, filter_seen=True).tolist() == [holdout.num_items]
    counts = holdout.training_counts()
    newest = newest_items(holdout, "test", batch.rows)
    assert newest.tolist() == [0]
    for table in (shared_by_all(torch.from_numpy(counts)), markov_table(holdout, counts)):
        assert full_ranks(SparseScores(table, newest), batch, filter_seen=True).tolist() == [1]  # item 2 leads


# A user with a row of validation and none of the test

OTHERS = [
    *((user, item, SECONDS + 2 * user + item) for user in range(4) for item in (1 + user % 2, 3 + user)),
    *((0, item, SECONDS + time) for item, time in ((2, 25), (7, 34), (5, 35))),
]


@pytest.mark.parametrize("first", [10, 21])  # with and without training
@pytest.mark.parametrize("catalogue", [Catalogue.all, Catalogue.train])
@pytest.mark.parametrize("times", [1, 3])
def test_repeats_that_only_validation_reads_count_once(times, catalogue, first):
    late = [(9, 4, SECONDS + 23 + place) for place in range(times)]
    sequences = timed_sequences([*OTHERS, (9, 2, SECONDS + first), (9, 3, SECONDS + 22), *late, (9, 1, SECONDS + 29)])
    holdout = split(sequences, catalogue, **CUTS)
    assert (holdout.val.users.tolist(), holdout.test.users.tolist()) == ([0, 4], [0])
    assert holdout.has_repeats == (times > 1)
    batch = evaluation_batch(holdout, np.array([1]), "val", NextItem(CONFIG.objective, CONFIG.model), None)
    assert batch.seen_items.tolist() == [2, 3, 4]

    others = holdout.item_ids // 10 > 4
    same = SparseScores(shared_by_all(torch.zeros(holdout.num_items)), torch.tensor([0]))
    assert full_ranks(same, batch, filter_seen=True).tolist() == [1 + others.sum()]
    for cfg in (EaseConfig("ease", 1.0), ItemKnnConfig("itemknn", 5, 0.0, Weighting.none)):
        weights = fit(cfg, holdout)
        scores = weights.block(1, torch.zeros(3, dtype=torch.long), torch.tensor([2, 3, 4]))[0].numpy()
        ranks = full_ranks(weights.scores(1, batch.seen_rows, batch.seen_items), batch, filter_seen=True)
        assert ranks.tolist() == [1 + (scores[others] >= scores[0]).sum()]
