"""scripts/record_comparison.py: runs of a sweep become rows, each compared with the first of its kind."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import in_this_process

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import record_comparison
import render_results
from benchmark.results import decimal, difference

from sasrec_lab.report.runs import find_runs

WORDS = "dataset=synthetic dataset.synthetic.users=50 dataset.synthetic.items=200 name=generated trainer.max_epochs=1"


def train_sweep(folder: Path) -> None:
    words = [
        *WORDS.split(),
        "model.dim=8",
        "model.maxlen=5",
        "model.blocks=0,1",
        "seed=0,1",
        "hydra.sweep.dir=outputs/s",
    ]
    done = in_this_process("sasrec_lab.train", folder)("-m", *words)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def sweep(made_once, tmp_path) -> Path:
    return shutil.copytree(made_once("compared", train_sweep), tmp_path / "runs", symlinks=True) / "outputs/s"


def test_of_a_seed_the_newest_run_counts(sweep):
    runs = find_runs([sweep]).finished
    older = replace(runs[0], start="2000-01-01T00:00:00+00:00")
    for found in ([*runs, older], [older, *runs]):
        assert record_comparison.configurations(found) == record_comparison.configurations(runs)


def test_rows_have_means_and_a_gain_over_the_first_of_their_kind(sweep, tmp_path):
    runs = find_runs([sweep]).finished
    rows, note = record_comparison.compared(record_comparison.configurations(runs))
    assert [row["model"] for row in rows] == ["SASRec", "SASRec", "popularity", "markov"]
    assert [row["overrides"] for row in rows[:2]] == ["model.blocks=0", "model.blocks=1"]
    assert note.startswith(
        "overrides of all rows; synthetic, last item: `dataset=synthetic dataset.synthetic.users=50 "
    )
    assert "model.blocks" not in note
    assert "seed" not in note
    first, second = ([run.metrics["test/ndcg@10"] for run in runs if run.overrides["model.blocks"] == n] for n in "01")
    assert rows[1]["ndcg"] == {"mean": np.mean(second), "std": pytest.approx(np.std(second, ddof=1)), "n": 2}
    assert rows[1]["gain"]["mean"] == pytest.approx(np.mean(second) - np.mean(first))
    assert 0 < rows[1]["p_users"] <= 1
    assert "gain" not in rows[0]
    record_comparison.write(tmp_path / "times.json", rows, record_comparison.stamp_of(runs) | {"note": note})
    table = render_results.block("times", tmp_path).splitlines()
    assert table[3].startswith(f"| synthetic | SASRec | `model.blocks=0` | {decimal(rows[0]['ndcg'])} | ")
    assert table[5].startswith("|  | popularity |  | 0.")
    assert table[-2].startswith("*Mean ± standard deviation (number of seeds). Measured 20")


def test_runs_of_changed_code_are_refused(sweep, monkeypatch, capsys):
    for file in sweep.rglob("run.json"):
        info = json.loads(file.read_text())
        info["git"]["dirty"] = True
        file.write_text(json.dumps(info))
    monkeypatch.setattr(sys, "argv", ["record_comparison.py", "times", str(sweep)])
    with pytest.raises(SystemExit, match="was not trained by a commit without changes; train again in a clean clone"):
        record_comparison.main()


def test_a_difference_has_an_error_and_a_p_value_over_seeds():
    """Welch's test of [1, 2, 3] and [2, 4]: t = -1 / sqrt(1 / 3 + 1), 1.68 degrees of freedom."""
    found = difference([1.0, 2.0, 3.0], [2.0, 4.0])
    assert found["mean"] == -1
    assert found["standard_error"] == pytest.approx((1 / 3 + 1) ** 0.5)
    assert found["p"] == pytest.approx(0.493, abs=0.01)
    assert decimal(found) == f"-1.0000, standard error 1.1547, p {found['p']:.2g}"
    assert difference([1.0], [3.0]) == {"mean": -2, "standard_error": None}
    assert decimal(found | {"p": 1e-9}).endswith("p < 0.0001")
