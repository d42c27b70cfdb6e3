"""When users ask for lists, with a model that reads times: the default, a date, the newest items, a table."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import in_this_process
from small_data import next_item

from sasrec_lab.errors import InputError
from sasrec_lab.recommend.recommender import Recommender

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["dataset=synthetic", "dataset.synthetic.users=30", "dataset.synthetic.items=40", "trainer=fast"]
HSTU = [*WORDS, "model=hstu", "model.dim=8", "model.maxlen=12"]
DAY = 86_400


@pytest.fixture
def runs(made_once) -> Path:
    """Return the folder of finished runs: of HSTU, of HSTU that is asked at the newest item, and without times."""

    def make(folder: Path) -> None:
        train = in_this_process("sasrec_lab.train", folder)
        for name, words in {
            "hstu": HSTU,
            "last": [*HSTU, "model.query_time=last"],
            "sasrec": [*WORDS, "model=tiny"],
        }.items():
            done = train(*words, f"hydra.run.dir={name}")
            assert (done.returncode, done.stderr) == (0, "")

    return made_once("query-times", make)


@pytest.fixture
def recommender(runs) -> Recommender:
    return Recommender.from_run(runs / "hstu", device="cpu")


def newest_times(recommender: Recommender) -> np.ndarray:
    histories = recommender.histories
    return histories.times[histories.offsets[1:] - 1]


def scores_at(recommender: Recommender, times: np.ndarray) -> np.ndarray:
    """Return the best score of each user who asks at these times, by the model itself."""
    histories, encoder = recommender.histories, recommender.ranker.encoder
    starts, ends = histories.offsets[:-1], histories.offsets[1:]
    batch = next_item(12, reads_times=True).inference(histories.items, starts, ends, histories.times, times)
    return (encoder.newest(batch) @ encoder.item_table.T).max(1).values.detach().numpy()


def best_scores(recommender: Recommender, query_time: object = None, **more: object) -> np.ndarray:
    lists = recommender.recommend("all", k=1, filter_viewed=False, query_time=query_time, **more)
    return lists["score"].to_numpy()


def test_a_user_asks_at_the_given_time(recommender):
    newest = newest_times(recommender)
    later = newest + np.arange(len(newest)) * DAY
    table = pd.DataFrame({"user_id": recommender.histories.users.ids, "datetime": later}).sample(frac=1, random_state=0)
    dates = table.assign(datetime=pd.to_datetime(table["datetime"], unit="s"))
    end = int(newest.max())
    for query_time, times in (
        (None, np.full(len(newest), end)),
        ("last", newest),
        (end + DAY, np.full(len(newest), end + DAY)),
        (str(pd.Timestamp(end + DAY, unit="s")), np.full(len(newest), end + DAY)),
        (pd.Timestamp(end + DAY, unit="s"), np.full(len(newest), end + DAY)),
        (table, later),
        (dates, later),
        (dates.assign(datetime=dates["datetime"].dt.tz_localize("UTC")), later),
    ):
        found = best_scores(recommender, query_time)
        np.testing.assert_allclose(found, scores_at(recommender, times), rtol=0, atol=1e-5)
    assert np.abs(scores_at(recommender, newest) - scores_at(recommender, later)).max() > 1e-4


def test_a_model_asked_at_the_newest_item_stays_so(runs):
    recommender = Recommender.from_run(runs / "last", device="cpu")
    newest = newest_times(recommender)
    np.testing.assert_allclose(best_scores(recommender), scores_at(recommender, newest), rtol=0, atol=1e-5)
    later = int(newest.max()) + DAY
    assert np.abs(best_scores(recommender, later) - best_scores(recommender)).max() > 1e-4


def test_interactions_bring_their_times(recommender):
    histories = recommender.histories
    rows, items = histories.user_item_pairs(np.arange(len(histories.users)))
    table = pd.DataFrame({"user_id": histories.users.ids[rows], "item_id": recommender.items.ids[items - 1]})
    for times in (histories.times, pd.to_datetime(histories.times, unit="s"), histories.times.astype(np.int64) * 1000):
        given = table.assign(datetime=times).sample(frac=1, random_state=0)
        found = recommender.recommend(histories.users.ids, 1, given, False)["score"].to_numpy()
        np.testing.assert_allclose(found, best_scores(recommender), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="interactions has no column time, but the model reads times; add the time"):
        recommender.recommend("all", 1, table)
    with pytest.raises(InputError, match="interactions, column time: times up to 5 are too small"):
        recommender.recommend("all", 1, table.assign(time=5))


@pytest.mark.parametrize(
    ("query_time", "message"),
    [
        (
            "tomorrow",
            r"query_time=tomorrow must be last \(the time of each user's newest item\), a date as text such as",
        ),
        (True, "query_time=True must be last"),
        ([1], r"query_time=\[1\] must be last"),
        (5, r"query_time=5 is before the newest item of 30 of 30 users \(1, 2, .*\); give a later time"),
        ("1999-01-01", "query_time=1999-01-01 is before the newest item of 30 of 30 users"),
        (1_700_000_000_000, "query_time=1700000000000 must be last"),
        (pd.DataFrame({"user_id": [], "time": []}), "query_time has no rows; give the time at which each user asks"),
        (10**30, "query_time=1000000000000000000000000000000 must be last"),
        (pd.DataFrame({"user_id": [1]}), "query_time must have a column time; add the time at which each user asks"),
        (pd.DataFrame({"who": [1], "time": [2e9]}), "query_time must have a column 'user_id'; its columns are who"),
        (
            pd.DataFrame({"user_id": [1, 1], "time": [2e9, 2e9]}),
            "one row per user, but has several for 1; keep one",
        ),
        (pd.DataFrame({"user_id": [1, 2], "time": [2e9, 2e9]}), r"query_time has no row for 28 of 30 users \(3, 4"),
        (pd.DataFrame({"user_id": [1, 2], "time": ["x", "y"]}), "query_time, column time: row 1 has 'x'"),
    ],
)
def test_a_time_of_asking_that_is_none_is_refused(recommender, query_time, message):
    with pytest.raises(InputError, match=message):
        recommender.recommend("all", 1, filter_viewed=False, query_time=query_time)


def test_a_model_without_times_takes_none(runs):
    with pytest.raises(InputError, match="query_time has no effect, because the model reads no times; remove it"):
        Recommender.from_run(runs / "sasrec", device="cpu").recommend([1], 1, query_time="last")


def test_the_output_says_when_users_ask(runs, recommender, recommend_here, tmp_path):
    run = f"run={runs / 'hstu'}"
    (tmp_path / "asked.csv").write_text("user_id,datetime\n1,2030-01-01\n2,2031-01-01\n")
    newest = pd.Timestamp(int(newest_times(recommender).max()), unit="s")
    for words, line in {
        (): f"asked at {newest}, the newest time of the histories; query_time=... sets another",
        ("query_time=last",): "asked at the time of each user's newest item",
        ("query_time=2030-05-01",): "asked at 2030-05-01",
        ("query_time=asked.csv",): "asked at the times of query_time",
    }.items():
        done = recommend_here(run, "users=[1,2]", "k=1", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == line
        done = recommend_here(run, "users=[1,2]", "k=1", "output=lists.csv", *words)
        assert done.stdout == f"wrote 2 lists to lists.csv, {line}\n"


def test_similar_items_need_no_time(runs, recommend_here):
    run = f"run={runs / 'hstu'}"
    done = recommend_here(run, "items=[1]", "k=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("target_item_id 1\n")
    done = recommend_here(run, "items=[1]", "query_time=last")
    assert done.stderr == "error: query_time=last only applies to users=...; remove it for items=...\n"


def test_reports_put_the_two_query_times_into_two_tables(runs, report_here):
    done = report_here(runs / "hstu", runs / "last", runs / "sasrec")
    assert (done.returncode, done.stderr) == (0, "")
    headings = re.findall(r"^\d: (synthetic, .*)$", done.stdout, re.M)
    users = r"last item of \d+ users"
    assert len(headings) == 2
    assert re.fullmatch(f"synthetic, {users}, asked at the target's own time", headings[0])
    assert re.fullmatch(f"synthetic, {users}", headings[1])
    second = done.stdout[done.stdout.index(f"2: {headings[1]}") :]
    assert re.search(r"HSTU.*\n(.*\n)*.*SASRec|SASRec.*\n(.*\n)*.*HSTU", second)
