"""The generated data set."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa

from sasrec_lab.config.dataset import SyntheticConfig
from sasrec_lab.data.synthetic import make_interactions, stream_interactions

CONFIG = SyntheticConfig(users=2000, items=500, mean_length=20, seed=0)


def hits(table: pd.DataFrame) -> tuple[float, float]:
    """Return how often the last item is one of the 10 most popular, and of the 10 likeliest after its predecessor."""
    last = table.groupby("user").tail(1).set_index("user")["item"]
    earlier = table.drop(table.groupby("user").tail(1).index)
    popular = set(earlier["item"].value_counts().index[:10])
    same = earlier["user"].eq(earlier["user"].shift(-1))
    pairs = pd.DataFrame({"item": earlier["item"], "next": earlier["item"].shift(-1)})[same].value_counts()
    following = pairs.reset_index().groupby("item")["next"].apply(lambda items: set(items[:10]))
    before = earlier.groupby("user").tail(1).set_index("user")["item"]
    found = [last[user] in following.get(item, ()) for user, item in before.items()]
    return float(last.isin(popular).mean()), float(np.mean(found))


def test_the_next_item_depends_on_the_last_one():
    by_popularity, by_order = hits(make_interactions(CONFIG))
    assert by_order > 0.5 > 0.2 > by_popularity


def test_counts_and_types():
    table = make_interactions(CONFIG)
    assert list(table) == ["user", "item", "time"]
    assert (table.dtypes == np.int64).all()
    assert sorted(table["user"].unique()) == list(range(1, 2001))
    assert table["item"].between(1, 500).all()
    lengths = table.groupby("user").size()
    assert abs(lengths.mean() - 20) < 2
    assert lengths.median() < lengths.mean()


def test_users_never_repeat_an_item_and_times_increase():
    table = make_interactions(CONFIG)
    assert not table.duplicated(["user", "item"]).any()
    gaps = table.groupby("user")["time"].diff().dropna()
    assert (gaps >= 1).all()


def test_some_items_are_far_more_popular():
    counts = make_interactions(CONFIG)["item"].value_counts()
    assert counts.iloc[:25].sum() > 3 * counts.iloc[250:275].sum()


def test_the_seed_decides_the_data():
    pd.testing.assert_frame_equal(make_interactions(CONFIG), make_interactions(CONFIG))
    assert not make_interactions(CONFIG).equals(make_interactions(replace(CONFIG, seed=1)))


def test_the_smallest_data():
    table = make_interactions(SyntheticConfig(users=1, items=2, mean_length=1, seed=0))
    assert table["user"].tolist() == [1] * len(table)
    assert table["item"].between(1, 2).all()


def test_large_data_takes_seconds():
    start = time.process_time()
    table = make_interactions(SyntheticConfig(users=300_000, items=20_000, mean_length=6, seed=0))
    assert time.process_time() - start < 30
    assert abs(len(table) / 300_000 - 6) < 0.2


def test_rows_of_any_number_are_made_in_a_stream():
    config = SyntheticConfig(users=500, items=50, mean_length=1, seed=0)
    tables = list(stream_interactions(config, 3_001, users_at_once=70))
    assert pa.concat_tables(tables).equals(pa.concat_tables(stream_interactions(config, 3_001, users_at_once=70)))
    rows = pa.concat_tables(tables).to_pandas()
    assert len(rows) == 3_001
    assert sorted(rows["user_id"].unique()) == list(range(1, 501))
    assert rows["item_id"].between(1, 50).all()
    owners = [set(table["user_id"].to_pylist()) for table in tables]
    assert sum(map(len, owners)) == 500  # whole users in a table
    named = rows.rename(columns={"user_id": "user", "item_id": "item", "timestamp": "time"})
    assert hits(named.sort_values(["user", "time"], kind="stable"))[1] > 0.5
