"""Models and metrics give what other libraries gave, as scripts/parity_peers.py wrote it.

They are of generated histories, for the variants of each model with equal weights.

python scripts/parity_peers.py --k 4 --fixtures tests/fixtures/parity dataset=synthetic model.dim=8 model.maxlen=5
    model.blocks=2 dataset.synthetic.users=20 dataset.synthetic.items=25 dataset.synthetic.mean_length=6 seed=16
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.config.closed_form import Weighting
from sasrec_lab.config.composition import load
from sasrec_lab.config.model import Activation, Init, Norm, PositionsFrom

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import parity_peers
from parity import fixture
from parity.comparison import GRADIENTS, too_large
from parity_peers import COMPARISONS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")
FIXTURES = ROOT / "tests/fixtures/parity"
GIVEN = {name: fixture.read_fixture(FIXTURES / f"{name}.json", x.defaults.model) for name, x in COMPARISONS.items()}
VARIANTS = [(name, variant) for name, (*_, theirs) in GIVEN.items() for variant in theirs]
RECTOOLS_ROWS = {
    "states of the newest items",
    "scores",
    "states of all tokens in training",
    "softmax loss, padding a class as in RecTools",
    "softmax loss, items only",
    "sampled softmax, with the same negatives",
    GRADIENTS,
    "lists of users",
}
ROWS = {
    "sasrec": RECTOOLS_ROWS | {"lists of items"},
    "ligr": RECTOOLS_ROWS,
    "bert4rec": RECTOOLS_ROWS,
    "hstu": RECTOOLS_ROWS | {"buckets of differences in time"},
    "hugging_face": {
        "states of the newest items",
        "scores",
        "states of all tokens in training",
        "softmax loss, padding and mask classes",
        "softmax loss, items only",
        GRADIENTS,
    },
    "replay": {"states of all tokens in training", "logits of masked tokens", "scores"},
    "closed_form": {"weights between items, relative to the largest", "lists of users"},
    "list_metrics": {f"{name}@k, k from 1 to 20" for name in ("coverage", "novelty", "popularity", "diversity")},
    "metrics": {f"{name}@k, k from 1 to 20" for name in ("NDCG", "recall", "precision", "MAP", "MRR", "hit rate")},
}


def differences(name: str, variant: str, theirs: dict | None = None, **changes) -> dict[str, float]:
    compared, (sequences, cfg, given) = COMPARISONS[name], GIVEN[name]
    model = replace(compared.variants(cfg)[variant], **changes)
    return compared.differences(theirs or given[variant], sequences, replace(compared.defaults, model=model))


@pytest.mark.parametrize("name", ["sasrec", "ligr", "bert4rec", "hstu", "replay", "hugging_face"])
def test_the_fixtures_cover_the_difficult_cases(name):
    sequences, cfg, given = GIVEN[name]
    assert list(given) == list(COMPARISONS[name].variants(cfg))
    lengths = sequences.lengths
    assert lengths.min() == 1  # one user is not trained on, and gets a list
    assert (lengths < cfg.maxlen).sum() > 5  # pads
    assert lengths.max() > cfg.maxlen + 1  # truncated history
    for theirs in given.values():
        items = theirs["training/items"]
        assert (items == 0).any() == (name in ("bert4rec", "replay", "hugging_face"))  # masks
        if name not in ("replay", "hugging_face"):
            assert len(theirs["item_ids"]) < len(sequences.item_ids)  # one item is in no training window
            assert len(theirs["user_ids"]) in (len(lengths), len(lengths) - 1)


def test_bert4rec_has_masks_kept_items_and_replaced_items():
    found = [(arrays["training/items"], arrays["training/targets"]) for arrays in GIVEN["bert4rec"][2].values()]
    items, targets = np.concatenate(found, axis=1)
    assert (targets == 0).any()
    items, targets = items[targets > 0], targets[targets > 0]
    assert (items == 0).any()
    assert (items == targets).any()
    assert ((items != targets) & (items > 0)).any()


@pytest.mark.parametrize(
    ("deep", "row"),
    [
        (2e-5, {"largest": 8e-6, "of": "flat", "at_most": 1e-5}),
        (6e-5, {"largest": 6e-5, "of": "deep", "at_most": 5e-5}),
        (float("nan"), {"of": "deep", "at_most": 5e-5}),
    ],
)
def test_the_row_is_of_the_variant_nearest_to_its_own_limit(deep, row):
    comparison = replace(
        COMPARISONS["hstu"],
        variants=lambda model: {"flat": model, "deep": model},
        differences=lambda theirs, sequences, cfg: theirs,
        at_most_of={"deep": 5e-5},
    )
    (found,) = comparison.rows({"flat": {"scores": 8e-6}, "deep": {"scores": deep}}, None, comparison.defaults.model)
    assert {key: found[key] for key in row} == row
    assert too_large([found]) == ([] if deep == 2e-5 else [found])


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_outputs_equal_those_of_the_other_library(name, variant):
    found = differences(name, variant)
    assert set(found) == ROWS[name]
    at_most = {"metrics": 1e-12, "list_metrics": 1e-10, "closed_form": 1e-4}.get(name, 1e-5)
    assert {x: value for x, value in found.items() if not value <= (1e-4 if x == GRADIENTS else at_most)} == {}


@pytest.mark.parametrize(
    ("name", "variant", "changes"),
    [
        ("sasrec", "1 head, no key mask", {"pad_keys": False}),
        ("sasrec", "1 head, key mask", {"pad_keys": True}),
        ("sasrec", "1 head, key mask", {"heads": 4}),
        ("sasrec", "4 heads, key mask", {"scale_embeddings": True}),
        ("sasrec", "4 heads, key mask", {"norm_eps": 1e-3}),
        ("sasrec", "4 heads, key mask", {"final_norm_eps": 1e-3}),
        ("ligr", "1 head, inner width 4 dim", {"heads": 4}),
        ("ligr", "2 heads, inner width 1 dim", {"norm_eps": 1e-3}),
        ("ligr", "1 head, inner width 4 dim", {"residual": False}),
        ("bert4rec", "4 heads", {"heads": 1}),
        ("bert4rec", "4 heads", {"norm_eps": 1e-3}),
        ("bert4rec", "4 heads", {"activation": Activation.relu}),
        ("hstu", "2 heads, time bias", {"heads": 1}),
        ("hstu", "1 head, both biases", {"norm_eps": 1e-3}),
        ("hstu", "1 head, both biases", {"divisor": 6.0}),
        ("hstu", "1 head, both biases", {"positions_from": PositionsFrom.oldest}),
        ("hstu", "2 heads, both biases, 8 layers", {"scale_embeddings": False}),
    ],
)
def test_a_different_model_is_detected(name, variant, changes):
    found = differences(name, variant, **changes)
    assert min(found["states of the newest items"], found["scores"], found["softmax loss, items only"]) > 1e-5
    assert found[GRADIENTS] > 1e-4
    assert found["lists of users"] > 1e-5


def test_other_times_are_detected():
    """A second more for an equal time, for the gap after it, or for a question."""
    given = GIVEN["hstu"][2]["2 heads, time bias"]
    later = {name: given[name] + np.arange(len(given[name])) % 2 for name in ("time", "asked")}
    newest = later["time"][GIVEN["hstu"][0].offsets[1:] - 1]  # no user asks before it
    for changed in ({"time": later["time"], "asked": np.maximum(given["asked"], newest)}, {"asked": later["asked"]}):
        assert differences("hstu", "2 heads, time bias", given | changed)["states of the newest items"] > 1e-5
    theirs = given | {"buckets": given["buckets"] + (np.arange(len(given["buckets"])) == 9)}
    assert differences("hstu", "2 heads, time bias", theirs)["buckets of differences in time"] == 1


def test_the_times_have_the_difficult_gaps():
    given = GIVEN["hstu"][2]["1 head, both biases"]
    sequences = GIVEN["hstu"][0]
    inside = np.ones(len(given["time"]) - 1, bool)
    inside[sequences.offsets[1:-1] - 1] = False
    gaps = np.diff(given["time"])[inside]
    assert gaps.min() == 0
    assert gaps.max() > 200 * 86_400
    assert (given["asked"] >= given["time"][sequences.offsets[1:] - 1]).all()
    assert sorted(set(given["buckets"])) == [0, *range(2, 72)]
    edges = np.flatnonzero(np.diff(given["buckets"]))
    assert (np.diff(given["differences"])[edges] == 1).all()  # both sides of every edge


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 2},
        {"norm": Norm.pre},
        {"norm_eps": 1e-3},
        {"embedding_norm": False},
        {"activation": Activation.relu},
        {"positions_from": PositionsFrom.newest},
    ],
    ids=str,
)
def test_a_different_bert_is_detected(changes):
    theirs = GIVEN["hugging_face"][2]["4 heads"]
    if "embedding_norm" in changes:
        theirs = {name: x for name, x in theirs.items() if "embeddings.LayerNorm" not in name}
    found = differences("hugging_face", "4 heads", theirs, **changes)
    assert min(value for kind, value in found.items() if kind != GRADIENTS) > 1e-5
    assert found[GRADIENTS] > 1e-4


def test_another_head_is_detected():
    found = differences("replay", "shared tables", heads=1)
    assert min(found.values()) > 1e-5


@pytest.mark.parametrize(
    ("variant", "changes"), [("ease", {"regularization": 11.0}), ("cosine", {"weighting": Weighting.tfidf})]
)
def test_another_closed_form_is_detected(variant, changes):
    assert min(differences("closed_form", variant, **changes).values()) > 1e-3


def test_another_metric_is_detected():
    theirs = {key: x.copy() for key, x in GIVEN["metrics"][2]["RecTools"].items()}
    theirs["values/ndcg@10"][3] += 1e-9
    assert {name for name, value in differences("metrics", "RecTools", theirs).items() if value > 1e-12} == {
        "NDCG@k, k from 1 to 20"
    }


@pytest.mark.parametrize(
    ("name", "place", "value"), [("users, seen kept", "rank", 9), ("items, itself kept", "item_id", -1)]
)
def test_a_list_of_different_items_is_detected(name, place, value):
    theirs = {key: x.copy() for key, x in GIVEN["sasrec"][2]["1 head, key mask"].items()}
    theirs[f"lists/{name}/{place}"][3] = value
    found = differences("sasrec", "1 head, key mask", theirs)
    others = {"lists of users", "lists of items"} - {f"lists of {name.partition(',')[0]}"}
    assert {kind for kind in ("lists of users", "lists of items") if found[kind] <= 1e-5} == others


def test_the_script_fails_if_a_number_differs(monkeypatch, capsys, tmp_path):
    sequences, cfg, given = GIVEN["ligr"]
    theirs = {name: dict(arrays) for name, arrays in given.items()}
    replaced = replace(COMPARISONS["ligr"], outputs=lambda *_: theirs)
    monkeypatch.setattr(parity_peers, "load_sequences", lambda *_: sequences)
    monkeypatch.setattr(parity_peers, "COMPARISONS", {"ligr": replaced})
    sizes = [f"model.{key}={getattr(cfg, key)}" for key in ("blocks", "dim", "maxlen")]
    words = ["parity_peers.py", "dataset=synthetic", *sizes]
    monkeypatch.setattr(sys, "argv", [*words, f"--json={tmp_path}/parity.json"])
    parity_peers.main()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[1] for line in lines[2:]} == ROWS["ligr"]
    written = json.loads((tmp_path / "parity.json").read_text())
    assert {row["difference"] for row in written["rows"]} == ROWS["ligr"]
    variant = "2 heads, inner width 1 dim"
    theirs[variant]["losses"] = theirs[variant]["losses"] + 2e-5
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="LiGR, RecTools: softmax loss, padding a class"):
        parity_peers.main()
    assert f"| {variant} |" in capsys.readouterr().out


@pytest.mark.parametrize("name", GIVEN)
def test_the_script_writes_the_same_fixture_again(name, tmp_path):
    fixture.write_fixture(tmp_path / "again.json", *GIVEN[name])
    assert (tmp_path / "again.json").read_bytes() == (FIXTURES / f"{name}.json").read_bytes()


def test_the_preset_differs_from_the_authors_in_five_keys():
    default = load(["model=sasrec", "dataset=csv", "dataset.path=-"]).model
    changes = {"norm_eps": 1e-5, "output_projection": True, "scale_embeddings": False, "pad_keys": True}
    assert COMPARISONS["sasrec"].defaults.model == replace(default, **changes, init=Init.xavier_packed)


def test_an_unknown_key_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["parity_peers.py", "model.dimm=8"])
    with pytest.raises(SystemExit) as end:
        parity_peers.main()
    assert capsys.readouterr() == ("", "")
    assert "\n" not in end.value.code  # Python prints it, and exits with 1
    assert "model.dim" in end.value.code
