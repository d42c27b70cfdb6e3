"""The runs of a sweep as a DataFrame."""

import json
import shutil
from pathlib import Path

import pytest
from commands import in_this_process
from small_sweep import TINY

from sasrec_lab import InputError, load_sweep

JOBS = ["-m", *TINY, "model.dim=4,8", "seed=0,1", "model.heads=2"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run_sweep(folder: Path) -> None:
    done = in_this_process("sasrec_lab.train", folder)(*JOBS)
    assert done.returncode == 0, done.stderr
    (broken,) = (folder / "sweep").glob("3-*")
    for file in broken.iterdir():
        if file.name not in (".hydra", "metrics.json"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    (broken / "metrics.json").write_text(json.dumps({"status": "failed", "error": "the disk is full"}))


@pytest.fixture
def sweep(made_once) -> Path:
    return made_once("sweep-to-load", run_sweep) / "sweep"


def test_a_row_for_each_job_in_their_order(sweep):
    table = load_sweep(sweep)
    assert table["model.dim"].tolist() == [4, 4, 8, 8]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    assert table["status"].tolist() == ["finished", "finished", "finished", "failed"]
    assert table["row"].tolist()[:3] == ["model.dim=4", "model.dim=4", "model.dim=8"]
    assert table["protocol"].tolist()[:3] == [1, 1, 1]
    assert table["error"][3] == "the disk is full"
    assert table.iloc[3][["protocol", "row", "model", "test/ndcg@10", "epochs"]].isna().all()
    assert "model.heads" not in table
    assert table["epochs"].dtype == table["seed"].dtype == "Int64"
    for _, row in table[:3].iterrows():
        metrics = json.loads((Path(row["folder"]) / "metrics.json").read_text())["metrics"]
        assert {name: row[name] for name in metrics} == metrics


def test_seeds_average_as_in_the_report(sweep):
    groups = load_sweep(sweep).groupby(["protocol", "row"])["test/ndcg@10"]
    assert groups.count().to_dict() == {(1, "model.dim=4"): 2, (1, "model.dim=8"): 1}


def test_a_run_and_several_folders(sweep):
    jobs = sorted(sweep.glob("[0-2]-*"))
    assert load_sweep(jobs[2])["row"].tolist() == ["default"]
    assert load_sweep(*map(str, jobs[:2]))["folder"].tolist() == [str(job) for job in jobs[:2]]


def test_a_sweep_over_models_has_one_column_of_their_names(tmp_path):
    words = ["dataset=synthetic", "model=tiny,itemknn", "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "logger=none"]
    done = in_this_process("sasrec_lab.train", tmp_path)("-m", *words)
    assert done.returncode == 0, done.stderr
    table = load_sweep(tmp_path / "sweep")
    assert table.columns.is_unique
    assert table["model"].tolist() == ["SASRec", "ItemKNN"]


def test_a_folder_without_runs_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="contains no run"):
        load_sweep(tmp_path)
    with pytest.raises(InputError, match="needs a folder"):
        load_sweep()
