"""Trackers of runs: what each receives, how it ends, and that runs that resume continue theirs.

Tests of extras that are not installed are skipped. Weights & Biases is used offline, MLflow with a SQLite file.
"""

import csv
import json
import os
import re
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_sweep import TINY, ends

from sasrec_lab.config import logger as logger_config
from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.composition import load
from sasrec_lab.config.overrides import format_override
from sasrec_lab.errors import InputError, Pruned
from sasrec_lab.run.folder import sweep_of
from sasrec_lab.training.loggers import make_loggers, opened_loggers

RUN = [*TINY[:-1], "hydra.run.dir=run"]


def needs(extra: str) -> pytest.MarkDecorator:
    spec = find_spec(extra)
    missing = spec is None or spec.origin is None
    return pytest.mark.skipif(missing, reason=f"needs pip install 'sasrec-lab[{extra}]'")


def store_in(folder: Path) -> str:
    """Return the word that chooses a store of a test's own: within a process MLflow remembers a relative one."""
    return format_override("logger.mlflow.tracking_uri", f"sqlite:///{folder}/outputs/mlflow.db")


def query(folder: Path, question: str) -> list[tuple]:
    with sqlite3.connect(folder / "outputs/mlflow.db") as database:
        return database.execute(question).fetchall()


def wandb_records(run: Path) -> Iterator:
    """Yield the records of the offline runs in a run folder, from logs in LevelDB's format with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block
                at += 32768 - at % 32768
                continue
            size, kind = struct.unpack_from("<HB", data, at + 4)
            part = data[at + 7 : at + 7 + size]
            at += 7 + size
            record = part if kind in (1, 2) else record + part  # whole or first
            if kind in (1, 4):  # whole or last
                yield wandb_internal_pb2.Record.FromString(record)


def of_kind(run: Path, kind: str) -> list:
    return [getattr(record, kind) for record in wandb_records(run) if record.WhichOneof("record_type") == kind]


def history(run: Path) -> list[dict[str, float]]:
    rows = [{item.key or item.nested_key[0]: item.value_json for item in row.item} for row in of_kind(run, "history")]
    return [{key: json.loads(value) for key, value in row.items()} for row in rows]


def results(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())["metrics"]


def test_trackers_are_chosen_as_a_list():
    assert load([]).logger.chosen == ["tensorboard"]
    assert load(["logger=none"]).logger.chosen == []
    assert load(["logger=csv"]).logger.chosen == ["csv"]
    cfg = load(["logger=[wandb,tensorboard]", "logger.wandb.project=mine"]).logger
    assert (cfg.chosen, cfg.wandb.project, cfg.wandb.offline) == (["tensorboard", "wandb"], "mine", True)
    mlflow = load(["logger=mlflow", "dataset=synthetic"]).logger.mlflow
    assert (mlflow.tracking_uri, mlflow.experiment) == ("sqlite:///outputs/mlflow.db", "synthetic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=comet"], "logger=comet does not exist"),
        (["logger=[tensorboard,wandbb]"], "logger=wandbb does not exist; did you mean wandb?"),
        (["logger.wandb.project=x"], "logger.wandb has no keys unless it is chosen; add logger=wandb"),
        (["logger=wandb", "logger.wandb.projekt=x"], "unknown key 'logger.wandb.projekt'"),
        (["logger=wandb", "logger.wandb.offline=maybe"], "logger.wandb.offline=maybe must be true or false"),
        (
            ["logger=csv", "tensorboard.projector=true"],
            "needs TensorBoard among the trackers; set logger=[tensorboard,csv]",
        ),
        (
            ["logger=mlflow", "logger.mlflow.tracking_uri='postgresql://me:secret@host/mlflow'"],
            "logger.mlflow.tracking_uri has a password, which the run folder would record; remove it",
        ),
        (["+logger.wandb={_target_: os.system}"], "logger.wandb has no keys unless it is chosen"),
    ],
)
def test_a_mistake_in_the_trackers_gives_one_line(words, message):
    with pytest.raises(InputError) as caught:
        check_command_line(words)
    assert message in str(caught.value), caught.value
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_tracker_is_named_before_a_folder_is_made(extra, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(logger_config, "_is_installed", lambda distribution: False)
    line = f"error: logger={extra} needs a package that is not installed; pip install 'sasrec-lab[{extra}]'\n"
    for words in ([f"logger={extra}", *RUN], ["-m", f"logger=[tensorboard,{extra}]", *TINY, "seed=0,1"]):
        done = train_here(*words)
        assert (done.returncode, done.stderr) == (1, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # the test's own


def test_a_run_without_trackers_has_its_records(train_here, tmp_path):
    done = train_here("logger=none", *RUN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "TensorBoard" not in done.stdout
    assert {"metrics.json", "ranks.npz", "train.log"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run/tb").exists()


@pytest.mark.slow
def test_a_csv_file_has_each_epoch_and_the_results(train_here, tmp_path):
    """A run that resumes writes a second file, and keeps the first one."""
    assert train_here("logger=csv", *RUN).returncode == 0
    assert train_here("logger=csv", *RUN, "ckpt=last", "trainer.max_epochs=3").returncode == 0
    files = sorted((tmp_path / "run/csv").glob("version_*/metrics.csv"))
    tables = [list(csv.DictReader(file.open())) for file in files]
    assert [[row["step"] for row in table if row["train/loss"]] for table in tables] == [["1", "2"], ["3"]]
    measured = results(tmp_path / "run")
    last = next(row for row in tables[1] if row["test/ndcg@10"])
    assert float(last["test/ndcg@10"]) == pytest.approx(measured["test/ndcg@10"])
    for file in files:
        assert "model/dim: 16" in (file.parent / "hparams.yaml").read_text()


@pytest.mark.slow
def test_a_model_without_epochs_has_its_results_in_trackers(train_here, tmp_path):
    words = [word for word in RUN if not word.startswith(("model=", "trainer="))]
    assert train_here("logger=[tensorboard,csv]", *words, "model=itemknn").returncode == 0
    (row,) = csv.DictReader((tmp_path / "run/csv/version_0/metrics.csv").open())
    assert float(row["test/mrr"]) == pytest.approx(results(tmp_path / "run")["test/mrr"])
    assert len(list((tmp_path / "run/tb").glob("events.*"))) == 1


@pytest.mark.slow
@needs("wandb")
@needs("mlflow")
def test_jobs_of_a_sweep_are_closed_in_all_trackers(train_command, tmp_path):
    """The second job diverges. Names are those of the folders, and the group is the sweep."""
    done = train_command("-m", "logger=[wandb,mlflow]", *TINY, "optimizer.lr=0.01,1e30")
    assert ends(tmp_path / "sweep") == {"0": "finished", "1": "failed"}, done.stderr
    jobs = sorted((tmp_path / "sweep").glob("*-*"))
    runs = [of_kind(job, "run")[0] for job in jobs]
    assert [(run.display_name, run.run_group, run.project) for run in runs] == [
        (job.name, "sweep", "sasrec_lab") for job in jobs
    ]
    assert [of_kind(job, "exit")[0].exit_code for job in jobs] == [0, 1]
    rows, measured = history(jobs[0]), results(jobs[0])
    assert [row["trainer/global_step"] for row in rows if "train/loss" in row] == [1, 2]
    assert rows[-1]["test/ndcg@10"] == pytest.approx(measured["test/ndcg@10"])
    assert rows[-1]["test/chosen by val/ndcg@10"] == pytest.approx(measured["val/ndcg@10"])
    config = {update.key or update.nested_key[0]: update.value_json for update in of_kind(jobs[0], "config")[0].update}
    assert (config["model/dim"], config["loss/name"]) == ("16", '"softmax"')

    assert query(tmp_path, "select name, status from runs order by name") == [
        (jobs[0].name, "FINISHED"),
        (jobs[1].name, "FAILED"),
    ]
    assert query(tmp_path, "select distinct value from tags where key = 'sweep'") == [("sweep",)]
    (value,) = query(tmp_path, "select value from latest_metrics where key = 'test/ndcg_at_10'")[0]
    assert value == pytest.approx(measured["test/ndcg@10"])
    assert ("16",) in query(tmp_path, "select value from params where key = 'model/dim'")


@pytest.mark.slow
@needs("mlflow")
def test_a_run_that_resumes_continues_in_mlflow(train_here, tmp_path):
    words = ["logger=mlflow", store_in(tmp_path), *RUN]
    assert train_here(*words).returncode == 0
    done = train_here(*words, "ckpt=last", "trainer.max_epochs=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert query(tmp_path, "select name, status from runs") == [("run", "FINISHED")]
    assert query(tmp_path, "select value from params where key = 'model/dim'") == [("16",)]
    steps = query(tmp_path, "select step from metrics where key = 'train/loss' order by step")
    assert steps == [(1,), (2,), (3,)]


@needs("mlflow")
def test_a_tracker_that_a_resumed_run_adds_gets_the_config(tmp_path):
    cfg = load(["logger=mlflow", store_in(tmp_path)])
    cfg.ckpt = "last"
    (tmp_path / "run").mkdir()
    for _ in range(2):  # the second one continues the first one's run
        with opened_loggers(cfg, tmp_path / "run"):
            pass
    assert query(tmp_path, "select value from params where key = 'model/blocks'") == [("2",)]


@needs("mlflow")
@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (Pruned, "KILLED")],
)
def test_the_end_of_a_run_is_that_of_its_tracker(error, status, tmp_path):
    cfg = load(["logger=mlflow", store_in(tmp_path)])
    (tmp_path / "run").mkdir()
    with pytest.raises(error) if error else nullcontext(), opened_loggers(cfg, tmp_path / "run"):
        if error:
            raise error
    assert query(tmp_path, "select status from runs") == [(status,)]


@needs("mlflow")
def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(["logger=mlflow", "logger.mlflow.tracking_uri=file:nowhere", "logger.mlflow.experiment=''"])
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError) as caught, opened_loggers(cfg, tmp_path / "run"):
        pass
    assert re.fullmatch(r"logger=mlflow cannot start: .*; correct the keys of logger\.mlflow", str(caught.value))


def test_only_the_first_process_starts_trackers(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    with opened_loggers(load(["logger=csv"]), tmp_path) as loggers:
        assert len(loggers) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_belongs_to_a_sweep_or_a_search(tmp_path):
    run = tmp_path / "sweep/0-seed=1"
    run.mkdir(parents=True)
    assert sweep_of(run) is None
    for name in ("multirun.yaml", "study.journal"):
        (run.parent / name).touch()
        assert sweep_of(run) == run.parent
        (run.parent / name).unlink()


def test_tensorboard_keeps_its_folder_and_names(tmp_path):
    (logger,) = make_loggers(load([]), tmp_path)
    assert (Path(logger.log_dir), logger.hparams["model/dim"]) == (tmp_path / "tb", 64)
