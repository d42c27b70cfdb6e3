"""Runs of a search: nothing is measured on the test, the loss of validation may choose, the report compares them."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from written_runs import write_run

from sasrec_lab.config.composition import load
from sasrec_lab.data import evaluation_data
from sasrec_lab.errors import InputError

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=200",
    "dataset.synthetic.items=50",
    "model=tiny",
    "optimizer.lr=0.01",
    "trainer.max_epochs=4",
]


def results(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder / "tb")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_without_test_reads_no_test_target(tmp_path, train_here, monkeypatch):
    """Its training and validation equal those of the same run with a test."""
    assert train_here(*TINY, "hydra.run.dir=with").returncode == 0
    read: list[str] = []
    original = evaluation_data.evaluation_batch

    def spy(holdout, rows, stage, *args):
        read.append(stage)
        return original(holdout, rows, stage, *args)

    monkeypatch.setattr(evaluation_data, "evaluation_batch", spy)
    done = train_here(*TINY, "evaluation.test=false", "evaluation.sampled=5", "hydra.run.dir=without")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(read) == {"val"}
    whole, searched = results(tmp_path / "with"), results(tmp_path / "without")
    assert {name.partition("/")[0] for name in whole["metrics"]} == {"val", "test"}
    for metrics in (searched["metrics"], *searched["baselines"].values()):
        assert {name.partition("/")[0] for name in metrics} == {"val"}
    assert {name: searched["metrics"][name] for name in whole["metrics"] if name.startswith("val/")} == {
        name: value for name, value in whole["metrics"].items() if name.startswith("val/")
    }
    assert set(searched["unreachable_targets"]) == {"val"}
    assert "cold_targets" not in searched
    assert searched["protocol"] | {"sampled_candidates": None} == whole["protocol"]
    assert not any("test" in tag for tag in scalars(tmp_path / "without"))
    assert "test/" not in done.stdout
    assert "Validation (evaluation.test=false), ranked among all 50 items except those already seen" in done.stdout

    assert not (tmp_path / "without" / "ranks.npz").exists()
    with np.load(tmp_path / "without" / "validation_ranks.npz") as ranks:
        hits = (ranks["rank"] >= 1) & (ranks["rank"] <= 10)
        assert hits.mean() == pytest.approx(searched["metrics"]["val/recall@10"])
        assert set(ranks) >= {"user", "target", "rank", "sampled_rank"}


@pytest.mark.parametrize("part", ["1", "0"])
def test_the_chosen_checkpoint_is_measured_on_all_users(tmp_path, train_here, part):
    """Of whom validation in training may take a part."""
    words = [*TINY, "evaluation.test=false", "evaluation.batch_size=50", f"trainer.limit_val_batches={part}"]
    assert train_here(*words, "hydra.run.dir=run").returncode == 0
    written = results(tmp_path / "run")
    with np.load(tmp_path / "run" / "validation_ranks.npz") as ranks:
        reciprocal = np.where(ranks["rank"] >= 1, 1 / np.maximum(ranks["rank"], 1), 0)
    assert written["metrics"]["val/mrr"] == pytest.approx(reciprocal.mean())
    assert written["protocol"]["validation"].endswith("; of the chosen checkpoint, all held-out users")


@pytest.mark.parametrize("model", ["ease", "itemknn"])
def test_models_without_epochs_measure_no_test_either(tmp_path, train_here, model):
    words = [*TINY[:3], f"model={model}", "evaluation.test=false", "hydra.run.dir=run"]
    done = train_here(*words)
    assert (done.returncode, done.stderr) == (0, "")
    written = results(tmp_path / "run")
    assert {name.partition("/")[0] for name in written["metrics"]} == {"val"}
    assert (tmp_path / "run" / "validation_ranks.npz").exists()


def test_the_loss_of_validation_can_choose_and_stop(tmp_path, train_here):
    """Less is better: the best epoch has the lowest loss, and patience counts from there."""
    words = ["optimizer.lr=0.1", "trainer.max_epochs=20", "evaluation.monitor=val/loss", "evaluation.patience=2"]
    done = train_here(*TINY, *words, "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    losses = scalars(tmp_path / "run")["val/loss"]
    written = results(tmp_path / "run")
    best = int(np.argmin(losses))
    assert (written["best_epoch"], written["epochs"]) == (best, best + 3)
    assert written["metrics"]["val/loss"] == pytest.approx(losses[best])
    assert written["protocol"]["selected_by"] == "val/loss"
    assert f"val/loss {losses[best]:.4f}" in done.stdout
    resumed = train_here(*TINY, *words, "trainer.max_epochs=21", "ckpt=last", "hydra.run.dir=run")
    assert resumed.returncode == 0
    assert "another epoch" not in resumed.stdout + resumed.stderr
    assert results(tmp_path / "run")["best_epoch"] == int(np.argmin(scalars(tmp_path / "run")["val/loss"]))


def test_a_sweep_compares_runs_without_test(tmp_path, train_here, report_here):
    done = train_here(*TINY, "-m", "model.dim=4,8,16", "evaluation.test=false", "hydra.sweep.dir=sweep")
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout.partition("mean over seeds")[2]
    assert "val/ndcg@10" in table
    assert "test/" not in done.stdout
    report = report_here("sweep", "--baseline", "model.dim=4")
    assert (report.returncode, report.stderr) == (0, "")
    assert "val/ndcg@10 of the 3 settings tried: mean 0." in report.stdout
    assert "vs baseline" in report.stdout
    best = report_here("sweep", "--best-by", "val/loss", "--metric", "val/ndcg@10")
    assert "best: lowest mean of val/loss, on validation" in best.stdout


def test_the_test_must_choose_nothing(tmp_path, report_here):
    with pytest.raises(InputError) as caught:
        load(["evaluation.monitor=test/ndcg@10"])
    assert str(caught.value) == (
        "evaluation.monitor=test/ndcg@10 would choose by the test, which must choose nothing; set"
        " evaluation.monitor=val/ndcg@10"
    )
    with pytest.raises(InputError, match=r"^evaluation\.monitor=val/loss is not measured"):
        load(["model=ease", "evaluation.monitor=val/loss"])
    write_run(tmp_path / "run")
    refused = report_here("run", "--best-by", "test/ndcg@10")
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --best-by test/ndcg@10 must be a metric of validation, because the best of many test results would be"
        " too good; use --best-by val/ndcg@10\n",
    )
    unknown = report_here("run", "--best-by", "val/recall@7")
    assert unknown.stderr.startswith("error: --best-by val/recall@7: no run has this metric")
