"""model=sasrec_rectools gives the outputs of RecTools 0.19 at equal weights, as scripts/parity_rectools.py wrote them.

They are of generated histories, for one head and several, with and without use_key_padding_mask.

python scripts/parity_rectools.py --k 4 --fixture tests/fixtures/rectools.json dataset=synthetic model.dim=8
    model.maxlen=5 dataset.synthetic.users=20 dataset.synthetic.items=25 dataset.synthetic.mean_length=6
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.config.command_line import load
from sasrec_lab.config.schema import Init

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import parity_rectools
from parity import fixture, outputs, peer

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")
FIXTURE = ROOT / "tests/fixtures/rectools.json"
SEQUENCES, CFG, RECTOOLS = fixture.read_fixture(FIXTURE)
ROWS = {
    "states",
    "states in training",
    "scores",
    "softmax loss, the pad a class as in RecTools",
    "softmax loss, items only",
    *(
        f"lists of {targets} {seen}{allowed}"
        for targets, seen in [
            ("users, seen", "excluded"),
            ("users, seen", "kept"),
            ("items, itself", "excluded"),
            ("items, itself", "kept"),
        ]
        for allowed in ("", ", some items allowed")
    ),
}


def differences(name: str, **changes) -> dict[str, float]:
    return outputs.differences(RECTOOLS[name], SEQUENCES, replace(peer.variants(CFG)[name], **changes))


def test_the_fixture_covers_the_difficult_cases():
    assert list(RECTOOLS) == list(peer.variants(CFG))
    assert len(RECTOOLS) == 4
    lengths = SEQUENCES.lengths
    assert lengths.min() == 1  # one user is not trained on, and gets a list
    assert (lengths < CFG.maxlen).sum() > 5  # pads
    assert lengths.max() > CFG.maxlen + 1  # truncated history
    for theirs in RECTOOLS.values():
        assert len(theirs["user_ids"]) == len(lengths)
        assert len(theirs["item_ids"]) < len(SEQUENCES.item_ids)  # one item is in no training window
        one_user = theirs["lists/users, seen excluded, some items allowed/user_id"]
        assert np.bincount(one_user).max() == 4


@pytest.mark.parametrize("name", RECTOOLS)
def test_states_scores_losses_and_lists_equal_those_of_rectools(name):
    found = differences(name)
    assert set(found) == ROWS
    assert {row: value for row, value in found.items() if not value <= 1e-5} == {}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("1 head, no key mask", {"pad_keys": False}),
        ("1 head, key mask", {"pad_keys": True}),
        ("1 head, key mask", {"heads": 4}),
        ("4 heads, key mask", {"scale_embeddings": True}),
        ("4 heads, key mask", {"norm_eps": 1e-3}),
        ("4 heads, key mask", {"final_norm_eps": 1e-3}),
    ],
)
def test_a_different_model_is_detected(name, changes):
    found = differences(name, **changes)
    assert min(found["states"], found["scores"], found["softmax loss, items only"]) > 1e-5
    assert found["lists of users, seen excluded"] > 1e-5


def test_a_list_of_different_items_is_detected():
    theirs = {key: x.copy() for key, x in RECTOOLS["1 head, key mask"].items()}
    theirs["lists/items, itself kept/item_id"][:2] = theirs["lists/items, itself kept/item_id"][1::-1]
    theirs["lists/users, seen kept/rank"][3] = 9
    found = outputs.differences(theirs, SEQUENCES, peer.variants(CFG)["1 head, key mask"])
    assert found["lists of items, itself kept"] == found["lists of users, seen kept"] == float("inf")
    assert found["lists of users, seen excluded"] <= 1e-5


def test_the_script_fails_if_a_number_differs(monkeypatch, capsys, tmp_path):
    theirs = dict(RECTOOLS)
    monkeypatch.setattr(parity_rectools, "load_sequences", lambda *_: SEQUENCES)
    monkeypatch.setattr(parity_rectools, "outputs_of_rectools", lambda *_: theirs)
    cfg = replace(peer.defaults(), model=CFG)
    parity_rectools.compare_outputs(cfg, k=4, fixture=None, json=tmp_path / "parity.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| largest difference | " + " | ".join(RECTOOLS) + " |"
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines[2:]} == ROWS
    written = json.loads((tmp_path / "parity.json").read_text())
    assert {row["difference"] for row in written["rows"]} == ROWS
    assert written["rows"][0].keys() - {"difference"} == set(RECTOOLS)
    name = "4 heads, no key mask"
    theirs[name] = RECTOOLS[name] | {"losses": RECTOOLS[name]["losses"] + np.float32(2e-5)}
    with pytest.raises(SystemExit, match="exceeds 1e-05"):
        parity_rectools.compare_outputs(cfg, k=4, fixture=None)


def test_the_script_writes_the_same_fixture_again(tmp_path):
    fixture.write_fixture(tmp_path / "again.json", SEQUENCES, CFG, RECTOOLS)
    assert (tmp_path / "again.json").read_bytes() == FIXTURE.read_bytes()


def test_the_preset_differs_from_the_authors_in_five_keys():
    default = load(["model=sasrec", "dataset=csv", "dataset.path=-"]).model
    changes = {"norm_eps": 1e-5, "output_projection": True, "scale_embeddings": False, "pad_keys": True}
    assert peer.defaults().model == replace(default, **changes, init=Init.xavier_packed)


@pytest.mark.slow
def test_an_unknown_key_is_one_line():
    command = [sys.executable, ROOT / "scripts/parity_rectools.py", "model.dimm=8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "model.dim" in done.stderr
