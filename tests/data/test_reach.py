"""Targets that no model can rank, against a loop and in the printed line."""

import json

import numpy as np
import pytest
from small_data import holdout_of, random_users

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue
from sasrec_lab.data import reach
from sasrec_lab.data.reach import count_unreachable, describe_unreachable
from sasrec_lab.errors import InputError


@pytest.mark.parametrize("catalogue", Catalogue)
@pytest.mark.parametrize("chunk", [1, 7, 2**18])
def test_unreachable_targets_against_a_loop(catalogue, chunk, monkeypatch):
    monkeypatch.setattr(reach, "PAIRS_PER_CHUNK", chunk)
    for seed in range(3):
        users = [items for items in random_users(seed, items=30) if len(items) > 2] + [[1, 2, 3], [4, 4, 4]]
        holdout = holdout_of(users, catalogue=catalogue, maxlen=4)
        known = set(holdout.item_ids.tolist())
        expected = {"val": [0, 0], "test": [0, 0]}
        for items in ([10 * item for item in items] for items in users):
            for stage, place in (("val", -2), ("test", -1)):
                if items[place] not in known:
                    expected[stage][0] += 1
                elif items[place] in items[:place]:
                    expected[stage][1] += 1
        found = count_unreachable(holdout, filter_seen=True)
        assert {stage: list(counts.values()) for stage, counts in found.items()} == expected
        unfiltered = count_unreachable(holdout, filter_seen=False)
        assert [counts["seen_before"] for counts in unfiltered.values()] == [0, 0]
        assert [unfiltered[stage]["outside_catalogue"] for stage in expected] == [n for n, _ in expected.values()]


NINE = {"val": 9, "test": 9}  # targets by stage


def counts(val: tuple[int, int], test: tuple[int, int]) -> dict[str, dict[str, int]]:
    names = ("outside_catalogue", "seen_before")
    return {"val": dict(zip(names, val, strict=True)), "test": dict(zip(names, test, strict=True))}


def test_line_names_counts_reasons_and_keys():
    cfg, train = load([]), load(["dataset.catalogue=train", "dataset.repeats=drop"])
    assert describe_unreachable(counts((0, 0), (0, 0)), NINE, cfg) is None
    assert describe_unreachable(counts((0, 3), (0, 0)), NINE, cfg) is None
    assert describe_unreachable(counts((0, 3), (0, 2)), NINE, cfg) == (
        "2 of 9 test targets cannot be ranked and are misses: 2 already seen by the user (set dataset.repeats=drop or"
        " evaluation.filter_seen=false)"
    )
    assert describe_unreachable(counts((0, 0), (1, 2)), NINE, train) == (
        "3 of 9 test targets cannot be ranked and are misses: 1 outside the catalogue (set dataset.catalogue=all),"
        " 2 already seen by the user (set evaluation.filter_seen=false)"
    )
    assert describe_unreachable(counts((4, 5), (0, 0)), NINE, train) == (
        "no validation target can be ranked, so validation cannot choose a checkpoint: 4 outside the catalogue (set"
        " dataset.catalogue=all), 5 already seen by the user (set evaluation.filter_seen=false)"
    )


def test_all_targets_out_of_reach_is_an_error_unless_sampled():
    with pytest.raises(InputError, match=r"^every test target would be a miss \(of 9 targets\): 9 already seen by"):
        describe_unreachable(counts((0, 0), (0, 9)), NINE, load([]))
    sampled = load(["evaluation.sampled=5"])
    assert describe_unreachable(counts((0, 0), (0, 9)), NINE, sampled).startswith(
        "9 of 9 test targets cannot be ranked"
    )
    with pytest.raises(InputError, match=r": 9 outside the catalogue$"):
        describe_unreachable(counts((0, 0), (9, 0)), NINE, sampled)


def test_a_loss_without_targets_cannot_choose_a_checkpoint():
    cfg = load(["evaluation.monitor=val/loss", "dataset.catalogue=train"])
    assert describe_unreachable(counts((0, 9), (0, 0)), NINE, cfg).startswith("no validation target can be ranked")
    with pytest.raises(
        InputError, match=r"^evaluation.monitor=val/loss cannot choose .*: 9 outside the catalogue \(set"
    ):
        describe_unreachable(counts((9, 0), (0, 0)), NINE, cfg)


def test_a_sampled_monitor_ranks_targets_that_were_seen():
    cfg = load(["evaluation.sampled=5", "evaluation.monitor=val/mrr-sampled5"])
    assert describe_unreachable(counts((0, 9), (0, 0)), NINE, cfg) is None


def test_rows_that_come_twice_are_reported_before_training(tmp_path, train_here):
    random = np.random.default_rng(0)
    rows = [f"{user},{item},{time}" for user in range(9) for time, item in enumerate(random.permutation(12)[:6])]
    (tmp_path / "my.csv").write_text("\n".join(["user_id,item_id,timestamp", *(2 * f"{row}\n" for row in rows)]))
    words = ["dataset=csv", "dataset.path=my.csv", "model=tiny", "trainer.max_epochs=1", "hydra.run.dir=run"]
    done = train_here(*words)
    assert (done.returncode, done.stdout.count("epoch")) == (1, 0)
    assert done.stderr == (
        "error: every test target would be a miss (of 9 targets): 9 already seen by the user (set dataset.repeats=drop"
        " or evaluation.filter_seen=false)\n"
    )
    dropped = train_here(*words, "dataset.repeats=drop", "hydra.run.dir=dropped")
    assert dropped.returncode == 0, dropped.stderr
    written = json.loads((tmp_path / "dropped" / "metrics.json").read_text())
    assert written["unreachable_targets"] == counts((0, 0), (0, 0))
