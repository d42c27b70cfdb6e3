"""Item vectors made of features: sums written out, training, records, lists, starts, and what only they can learn."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_data import sequences_of
from small_models import packed

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import Catalogue, Windows
from sasrec_lab.config.model import ItemVectors, PosEmb
from sasrec_lab.data.holdout import hold_out
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.items import ItemFeatures
from sasrec_lab.data.negatives import SAMPLERS
from sasrec_lab.errors import InputError
from sasrec_lab.evaluation.cold_targets import cold_and_known
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.training.saved_encoder import load_encoder
from sasrec_lab.training.warm_start import EarlierRun, start_from

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = replace(load(["dataset=csv", "dataset.path=x.csv"]).model, dim=8, maxlen=9, dropout=0.0)
NAMES = ["genre=a", "genre=b", "year=1999"]
# item 1 has a and b, item 2 nothing, item 3 all, item 4 (not in training) b
FEATURES = ItemFeatures(
    num_trained=3,
    offsets=np.array([0, 2, 2, 5, 6]),
    categories=np.array([0, 1, 0, 1, 2, 1]),
    names=NAMES,
    vectors=np.arange(8, dtype=np.float32).reshape(4, 2),
)


@pytest.mark.parametrize("items", [ItemVectors.features, ItemVectors.both])
def test_a_vector_is_the_sum_of_its_parts(items):
    model = Encoder(4, replace(SMALL, items=items), FEATURES).eval()
    parts = model.input_items
    expected = parts.projection(parts.given)
    for item, categories in enumerate([[0, 1], [], [0, 1, 2], [1]]):
        for category in categories:
            expected[item] = expected[item] + parts.by_category.weight[category]
        if items is ItemVectors.both and item < 3:
            expected[item] = expected[item] + parts.ids.weight[item]
    torch.testing.assert_close(model.item_table, expected)


def test_a_model_of_features_equals_one_with_the_made_table():
    model = Encoder(4, replace(SMALL, items=ItemVectors.both), FEATURES).eval()
    plain = Encoder(4, SMALL).eval()
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith(("input_", "output_"))}
    table = model.item_table.detach()
    plain.load_state_dict(weights | {"input_items.weight": table, "output_items.weight": table})
    batch = packed([[1, 4, 2], [3]])
    with torch.no_grad():
        assert torch.equal(model(batch), plain(batch))
        states, made = model.states_and_table(batch)
        assert torch.equal(states, plain(batch))
        assert torch.equal(made, table)
        model.freeze_vectors()
        assert torch.equal(model.newest(batch), plain.newest(batch))


def test_a_frozen_table_has_no_dropout():
    model = Encoder(4, replace(SMALL, items=ItemVectors.both, id_dropout=0.9), FEATURES)
    expected = model.eval().item_vectors()
    model.train().freeze_vectors()
    assert torch.equal(model.item_vectors(), expected)


def test_dropout_of_items_is_on_the_sum():
    plain = {"blocks": 0, "final_norm": False, "scale_embeddings": False, "pos_emb": PosEmb.none}
    model = Encoder(4, replace(SMALL, items=ItemVectors.both, dropout_items=0.5, **plain), FEATURES).train()
    batch = packed([[1, 4, 2], [3]])
    states, table = model.states_and_table(batch)
    assert torch.equal(states, table[batch.items - 1])
    assert torch.equal(table, torch.where(table == 0, 0, 2 * model.item_vectors()))
    assert 0 < (table == 0).sum() < table.numel()


def test_a_share_of_the_ids_is_dropped_in_training_only():
    features = replace(
        FEATURES, num_trained=4, names=[], vectors=None, offsets=np.zeros(5, int), categories=np.zeros(0, int)
    )
    model = Encoder(4, replace(SMALL, items=ItemVectors.both, id_dropout=0.5), features)
    torch.manual_seed(0)
    made = torch.stack([model.item_vectors() for _ in range(200)])
    ids = model.input_items.ids.weight
    is_dropped = (made == 0).all(2)
    assert torch.equal(made[~is_dropped], ids.expand(200, -1, -1)[~is_dropped])
    assert is_dropped.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(model.eval().item_vectors(), ids)


def test_items_that_training_lacks_are_last_and_never_compared():
    users = [[5, 1, 3, 2], [1, 3, 5, 4], [3, 1, 5, 2, 6], [1, 5, 2, 4]]
    plain = hold_out(sequences_of(users), Windows.last, Catalogue.all, maxlen=9)
    holdout = hold_out(sequences_of(users), Windows.last, Catalogue.all, maxlen=9, cold_last=True)
    assert (holdout.num_items, holdout.num_compared) == (6, 3)
    assert holdout.item_ids.tolist() == [10, 30, 50, 20, 40, 60]
    assert holdout.item_ids[holdout.items - 1].tolist() == plain.item_ids[plain.items - 1].tolist()
    for stage in ("val", "test"):
        given, expected = (each.item_ids[each.rows(stage).targets - 1] for each in (holdout, plain))
        assert given.tolist() == expected.tolist()
    labels = type("Labels", (), {"counts": np.array([1, 1, 1, 1]), "targets": torch.zeros(4)})()
    for sampler in SAMPLERS.values():
        drawn = sampler(holdout, 2).draw(np.arange(4), labels, np.random.default_rng(0)).items
        assert drawn.max() <= 3


def test_metrics_of_cold_and_known_targets():
    users = [[1, 2, 1, 2], [2, 1, 2, 3], [1, 2, 1, 4], [2, 1, 2, 1]]
    holdout = hold_out(sequences_of(users), Windows.last, Catalogue.all, maxlen=9)
    found = cold_and_known(holdout, torch.tensor([1, 2, 0, 3]), k=[2])
    assert (found["cold"]["targets"], found["known"]["targets"]) == (2, 2)
    assert (found["cold"]["test/recall@2"], found["known"]["test/recall@2"]) == (0.5, 0.5)
    assert found["cold"]["test/ndcg@2"] == pytest.approx(1 / np.log2(3) / 2)
    assert found["known"]["test/mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert cold_and_known(hold_out(sequences_of([[1, 2, 1, 2]]), Windows.last, Catalogue.all, 9), None, [2]) == {}


def test_a_start_takes_ids_and_categories_by_name(tmp_path):
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    cfg = replace(SMALL, items=ItemVectors.both)
    old = Encoder(4, cfg, FEATURES)
    later = ItemFeatures(
        3, np.array([0, 1, 2, 2]), np.array([0, 1]), ["genre=b", "genre=new"], np.ones((3, 2), np.float32)
    )
    new = Encoder(3, cfg, later)
    untouched = new.input_items.by_category.weight[1].clone()
    ids = np.array([7, 8, 9, 10])  # 10 is not in the earlier training
    earlier = EarlierRun(tmp_path, tmp_path / "best.ckpt", old, Ids(ids), NAMES, {})
    start = start_from(earlier, new, np.array([9, 10, 11]))
    assert "2 of 3 items by id, 1 new made of their features" in str(start)
    assert torch.equal(new.input_items.ids.weight[0], old.input_items.ids.weight[2])
    assert not new.input_items.ids.weight[1:].any()
    assert torch.equal(new.input_items.by_category.weight[0], old.input_items.by_category.weight[1])
    assert torch.equal(new.input_items.by_category.weight[1], untouched)
    assert torch.equal(new.input_items.projection.weight, old.input_items.projection.weight)
    other = Encoder(3, cfg, replace(later, vectors=np.ones((3, 5), np.float32)))
    with pytest.raises(InputError, match=r"init_from: .*has the shape \(8, 2\), not \(8, 5\); use the same vectors"):
        start_from(earlier, other, np.array([9, 10, 11]))


CATEGORIES, OF_EACH, COLD = 6, 10, 2  # items of a category, of which the last are not in training


def write_walks(folder) -> list[str]:
    """Write histories in which the next item is any one of the next category; half of the last items are cold."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(240):
        category = rng.integers(CATEGORIES)
        for time in range(8):
            is_cold = time == 7 and user % 2
            item = OF_EACH - COLD + rng.integers(COLD) if is_cold else rng.integers(OF_EACH - COLD)
            rows.append((user, 100 * category + item, time))
            category = (category + 1) % CATEGORIES
    pd.DataFrame(rows, columns=["user_id", "item_id", "time"]).to_csv(folder / "walks.csv", index=False)
    items = sorted({item for _, item, _ in rows})
    kinds = pd.DataFrame({"item_id": items, "kind": [f"of {item // 100}|film" for item in items]})
    kinds.to_csv(folder / "kinds.csv", index=False)
    words = ["dataset=csv", "dataset.path=walks.csv", "dataset.time=time", "model=tiny", "evaluation.k=[10]"]
    words += ["dataset.features.path=kinds.csv", "dataset.features.categories=[kind]", "dataset.repeats=keep"]
    return [*words, "evaluation.filter_seen=false", "optimizer.lr=0.01", "trainer.max_epochs=12", "trainer=cpu"]


def test_cold_items_are_found_by_their_category(train_here, recommend_here, report_here, tmp_path, monkeypatch):
    """A cold item is one of ten that fit, so features find it always, and ids never."""
    words = write_walks(tmp_path)
    for items in ("ids", "both"):
        kind = ["model.items=both", "model.id_dropout=0.3"] if items == "both" else []
        done = train_here(*words, *kind, f"hydra.run.dir=runs/{items}")
        assert (done.returncode, done.stderr) == (0, "")
    assert "item features: 7 categories, of 60 of 60 items" in done.stdout
    found = {name: json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("ids", "both")}
    recall = {name: each["cold_targets"]["cold"]["test/recall@10"] for name, each in found.items()}
    assert found["both"]["cold_targets"]["cold"]["targets"] == 120
    assert recall["both"] > 0.8
    assert recall["ids"] < 0.4
    printed = report_here("runs").stdout
    assert "cold: 120 of 240 test targets are items that training does not have" in printed
    assert " of model.items=both model.id_dropout=0.3: cold targets 0." in printed
    monkeypatch.setenv("SASREC_LAB_DATA", str(tmp_path / "cache"))
    encoder, _ = load_encoder(tmp_path / "runs/both/checkpoints/best.ckpt", 60)
    recommender = Recommender.from_run(tmp_path / "runs/both", data_dir=str(tmp_path / "cache"))
    histories = pd.DataFrame({"user_id": [1], "item_id": [308], "datetime": [1]})  # a cold item of category 3
    best = recommender.recommend([1], 10, histories, filter_viewed=False)["item_id"] // 100
    assert (best == 4).sum() >= 8
    assert encoder.item_vectors().shape == (60, 16)
    kinds = (tmp_path / "kinds.csv").read_text()
    (tmp_path / "kinds.csv").write_text(kinds.replace("of 3|film", "of 2|film"))
    words[words.index("trainer.max_epochs=12")] = "trainer.max_epochs=13"
    resumed = train_here(*words, *kind, "hydra.run.dir=runs/both", "ckpt=last")
    assert "dataset.features.path=kinds.csv has other features than when this run began" in resumed.stderr
    (tmp_path / "kinds.csv").write_text(kinds)
    resumed = train_here(*words, *kind, "hydra.run.dir=runs/both", "ckpt=last", "tensorboard.projector=true")
    assert (resumed.returncode, resumed.stderr) == (0, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["dataset.features.path=null"], r"features.categories=\[kind\] is not read with dataset.features.path=null"),
        (["model.items=features", "model.share_items=false"], "model.share_items=false does not go with model.items="),
        (["model.id_dropout=0.1"], "model.id_dropout=0.1 only applies to model.items=both"),
        (["dataset.features.categories=[]"], r"needs the columns to use: dataset.features.categories=\[genres\]"),
    ],
)
def test_keys_that_do_not_fit_are_refused(changes, message):
    words = ["dataset=csv", "dataset.path=x.csv", "dataset.features.path=f.csv", "dataset.features.categories=[kind]"]
    with pytest.raises(InputError, match=message):
        load([*words, *changes])
    with pytest.raises(InputError, match=r"^model.items=both needs a file of item features; set dataset.features"):
        load(["dataset=csv", "dataset.path=x.csv", "model.items=both"])


def test_mistakes_are_one_line(train_here, tmp_path):
    words = [*write_walks(tmp_path), "model.items=both"]
    for number, (changed, expected) in enumerate(
        [
            ("dataset.features.path=kind.csv", "kind.csv: no such file; did you mean"),
            ("dataset.features.categories=[kin]", "no column 'kin'; it has item_id, kind"),
            ("dataset.features.vectors=v.npy", "dataset.features.vectors=v.npy: no such file"),
        ]
    ):
        done = train_here(*words, changed, f"hydra.run.dir={number}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert expected in done.stderr, done.stderr
