"""Tests of training/warm_start.py: weights by name, items by id, and runs that start from another one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import packed

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig, PosEmb, TimeBias
from sasrec_lab.data.ids import Ids
from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.training.warm_start import EarlierRun, other_data, start_from

DATA = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=30", "model=tiny"]
QUICK = ["trainer.max_epochs=2", "optimizer.lr=0.01"]
SMALL = replace(load(["dataset=csv", "dataset.path=x.csv"]).model, dim=12, maxlen=9)
KINDS = [SMALL, replace(SMALL, pos_emb=PosEmb.relative), replace(SMALL, pos_emb=PosEmb.relative, causal=False)]
TIMED = ["dataset=csv", "dataset.path=x.csv", "dataset.time=ts", "model.dim=12"]


def earlier_run(tmp_path, encoder: Encoder, ids: list[int]) -> EarlierRun:
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    return EarlierRun(tmp_path, checkpoint, encoder, Ids(np.array(ids)), [], {})


@pytest.mark.parametrize("cfg", KINDS)
def test_known_items_score_as_before_and_new_ones_are_the_mean(cfg: ModelConfig, tmp_path):
    torch.manual_seed(1)
    old = Encoder(4, cfg).eval()
    torch.manual_seed(2)
    new = Encoder(5, cfg).eval()
    ids = [30, 20, 10, 40]
    start = start_from(earlier_run(tmp_path, old, ids), new, np.array([10, 20, 25, 30, 40]))
    assert (start.items, start.of_items, start.weights) == (4, 5, start.of_weights)
    place = {10: 1, 20: 2, 30: 4, 40: 5}  # of an id in the new encoder, from 1
    sequence = [3, 1, 2, 2, 4]  # of the old one
    with torch.no_grad():
        before = old.newest(packed([sequence])) @ old.item_table.T
        after = new.newest(packed([[place[ids[item - 1]] for item in sequence]])) @ new.item_table.T
    torch.testing.assert_close(after[0, [place[each] - 1 for each in ids]], before[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(new.input_items.weight[2], old.input_items.weight.mean(0))


def test_more_positions_repeat_the_weights_of_the_oldest(tmp_path):
    for cfg in KINDS:
        old, new = Encoder(3, cfg), Encoder(3, replace(cfg, maxlen=cfg.maxlen + 2))
        for weights in old.parameters():
            torch.nn.init.normal_(weights)
        start_from(earlier_run(tmp_path, old, [1, 2, 3]), new, np.arange(1, 4))
        if cfg.pos_emb is PosEmb.learned:
            rows = [*range(cfg.maxlen), cfg.maxlen - 1, cfg.maxlen - 1]
            assert torch.equal(new.positions.weight, old.positions.weight[rows])
            continue
        saved, extended = (model.blocks[0].relative_bias for model in (old, new))
        ends = [saved[:, :1]] * 2 * (not cfg.causal), [saved[:, -1:]] * 2
        assert torch.equal(extended, torch.cat([*ends[0], saved, *ends[1]], 1))


def test_a_run_on_other_items_is_refused(tmp_path):
    earlier = earlier_run(tmp_path, Encoder(3, SMALL), [1, 2, 3])
    with pytest.raises(InputError, match="has none of the 2 items of this data set; choose a run on the same items"):
        start_from(earlier, Encoder(2, SMALL), np.array([8, 9]))


@pytest.mark.parametrize(("name", "noun"), [("hstu", "bias"), ("fuxi", "weights")])
def test_biases_by_distance_grow_and_those_by_time_stay(name, noun, tmp_path):
    cfg = load([*TIMED, f"model={name}"]).model
    old, new = Encoder(3, replace(cfg, maxlen=9)), Encoder(3, replace(cfg, maxlen=11))
    start_from(earlier_run(tmp_path, old, [1, 2, 3]), new, np.arange(1, 4))
    for before, after in zip(old.blocks, new.blocks, strict=True):
        positions, times = ([getattr(x, f"{kind}_{noun}") for x in (before, after)] for kind in ("position", "time"))
        assert torch.equal(positions[1], positions[0][[*range(9), 8, 8]])
        assert torch.equal(*times)


def test_a_decay_with_time_is_added_to_a_model_without(tmp_path):
    old, new = Encoder(3, SMALL), Encoder(3, replace(SMALL, time_bias=TimeBias.decay))
    start = start_from(earlier_run(tmp_path, old, [1, 2, 3]), new, np.arange(1, 4))
    assert start.of_weights - start.weights == SMALL.blocks
    assert torch.equal(new.blocks[1].query.weight, old.blocks[1].query.weight)


def test_a_further_block_keeps_its_initial_weights(tmp_path):
    old, new = Encoder(3, SMALL), Encoder(3, replace(SMALL, blocks=SMALL.blocks + 1))
    initial = new.blocks[-1].query.weight.clone()
    start = start_from(earlier_run(tmp_path, old, [1, 2, 3]), new, np.arange(1, 4))
    assert torch.equal(new.blocks[-1].query.weight, initial)
    assert start.of_weights - start.weights == len(list(new.blocks[-1].parameters()))


PROTOCOL = {
    "sha256": "a",
    "holdout": "last item: test = last",
    "filters": {"until": "2001-05-01", "min_item": 0},
    "order": "stable by time",
}


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, None),
        ({"filters": {"until": "2001-04-30", "min_item": 0}}, None),
        ({"filters": {"until": "2001-05-02", "min_item": 0}}, "filters"),
        ({"filters": {"until": None, "min_item": 0}}, "filters"),
        ({"filters": {"until": "2001-04-30", "min_item": 5}}, "filters"),
        ({"filters": 7}, "filters"),
        ({"filters": None}, "filters"),
        ({"filters": {"until": True, "min_item": 0}}, "filters"),
        ({"initial_weights": "of a run on other data (holdout)"}, "initial_weights"),
        ({"holdout": "none: all is trained on"}, "holdout"),
        ({"sha256": "b", "filters": {}}, "sha256, filters"),
        ({"columns": {"user": "session"}}, "columns"),
    ],
)
def test_runs_that_may_have_seen_the_test_are_told_apart(before, expected):
    assert other_data(PROTOCOL | before, PROTOCOL) == expected


def test_any_earlier_limit_is_before_none():
    now = PROTOCOL | {"filters": {"until": None, "min_item": 0}}
    assert other_data(PROTOCOL, now) is None
    numbers = [PROTOCOL | {"filters": {"until": until, "min_item": 0}} for until in ("999", "1000")]
    assert [other_data(*pair) for pair in (numbers, numbers[::-1])] == [None, "filters"]


def test_a_run_without_rare_items_may_have_seen_the_test():
    """Of [a, X, b] it drops X, which is rare until then, and trains on a and b; with X, b is the test."""
    for limits, expected in (({"min_item": 3}, "filters"), ({"min_item": 3, "min_user": 3}, None)):
        runs = [PROTOCOL | {"filters": {"until": until, **limits}} for until in ("2001-04-30", None)]
        assert other_data(*runs) == expected


def test_pointwise_blocks_of_another_length_need_their_divisor(train_here):
    """Null means maxlen, by which sums over items are divided; and FuXi has a matrix of as many columns as maps."""
    small = [*DATA, *QUICK, "model=fuxi", "model.time_bias=none", "model.dim=8", "model.heads=2", "model.blocks=1"]
    assert train_here(*small, "model.maxlen=10", "model.divisor=null", "hydra.run.dir=run").returncode == 0
    for words, expected in (
        (["model.maxlen=20", "model.divisor=null"], "model.divisor=10.0, not 20.0; set model.divisor to that value"),
        (["model.maxlen=10", "model.divisor=null", "model.position_bias=false"], "model.position_bias=true, not false"),
    ):
        done = train_here(*small, *words, "init_from=run", "hydra.run.dir=other")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert expected in done.stderr
    done = train_here(*small, "model.maxlen=20", "model.divisor=10", "init_from=run", "hydra.run.dir=longer")
    assert done.returncode == 0, done.stderr


def test_a_run_on_a_later_cut_starts_from_an_earlier_one(train_here, tmp_path):
    """The data has a new item and more of each user; the first epoch begins where the earlier run ended."""
    rng = np.random.default_rng(0)
    rows = [(user, int(item), time) for user in range(40) for time, item in enumerate(rng.integers(0, 20, 12))]
    rows += [(user, 99, 12) for user in range(20)]
    text = "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    (tmp_path / "events.csv").write_text(text)
    own = ["dataset=csv", "dataset.path=events.csv", "dataset.time=timestamp", "model=tiny", *QUICK]
    assert train_here(*own, "dataset.until=8", "hydra.run.dir=first").returncode == 0
    done = train_here(*own, "init_from=first", "hydra.run.dir=second", "optimizer.lr=1e-12")
    assert done.returncode == 0, done.stderr
    assert "of first; 20 of 21 items by id, 1 new at the mean of its items" in done.stdout
    assert "other data" not in done.stdout + done.stderr
    info = json.loads((tmp_path / "second" / "run.json").read_text())
    assert info["init_from"]["run"] == "first"
    assert info["init_from"]["other_data"] is None
    states = [
        torch.load(tmp_path / folder / "checkpoints" / "best.ckpt")["state_dict"] for folder in ("first", "second")
    ]
    key = "encoder.input_items.weight"
    torch.testing.assert_close(states[0][key], states[1][key][:20], atol=1e-6, rtol=0)
    resumed = train_here(
        *own,
        "init_from=first",
        "hydra.run.dir=second",
        "optimizer.lr=1e-12",
        "ckpt=last",
        "trainer.max_epochs=3",
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "second" / "run.json").read_text())["init_from"] == info["init_from"]


def test_a_start_from_other_data_is_in_the_protocol(train_here, tmp_path):
    """Also in that of a run that starts from one that did so."""
    assert train_here(*DATA, *QUICK, "dataset.holdout=none", "hydra.run.dir=all").returncode == 0
    done = train_here(*DATA, *QUICK, "init_from=all", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "it was trained on other data (holdout), which may include items held out here" in done.stdout + done.stderr
    protocol = json.loads((tmp_path / "run" / "metrics.json").read_text())["protocol"]
    assert protocol["initial_weights"] == "of a run on other data (holdout)"
    done = train_here(*DATA, *QUICK, "init_from=run", "hydra.run.dir=next")
    assert "it was trained on other data (initial_weights)" in done.stdout + done.stderr
    protocol = json.loads((tmp_path / "next" / "metrics.json").read_text())["protocol"]
    assert protocol["initial_weights"] == "of a run on other data (initial_weights)"


def test_mistakes_are_answered_with_their_fix(train_here, tmp_path):
    assert train_here(*DATA, "model=ease", "hydra.run.dir=ease").returncode == 0
    assert train_here(*DATA, *QUICK, "hydra.run.dir=run").returncode == 0
    for words, expected in (
        (["init_from=ru"], "init_from=ru: there is no such folder; did you mean run?"),
        (["init_from=ease"], "init_from=ease: EASE has no weights that training could start from"),
        (["init_from=run", "model.dim=32"], "init_from=run has model.dim=16, not 32; set model.dim to that value"),
        (["init_from=run", "ckpt=run/checkpoints/last.ckpt"], "both give the weights to start with; remove one"),
        (["init_from=run", "model=ease"], "init_from=run: model=ease has no initial weights; remove init_from"),
    ):
        done = train_here(*DATA, *words, "hydra.run.dir=other")
        assert done.returncode == 1
        assert expected in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
