"""Resuming runs whose records or checkpoints are missing, torn or of another run, and what the refusals say."""

import errno
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import in_this_process

from sasrec_lab.config.composition import load
from sasrec_lab.errors import InputError
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run.record import describe_failure
from sasrec_lab.run.resume import check_can_run, recorded_config

WORDS = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=30", "model=tiny"]
WORDS += ["optimizer.lr=0.05", "trainer.max_epochs=5", "hydra.run.dir=run"]
BROKEN = {"empty": b"", "zeros": bytes(50), "torn": b'{"git": {"com', "of another program": b"[1]"}


def train_run(folder: Path) -> None:
    done = in_this_process("sasrec_lab.train", folder)(*WORDS)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(made_once, tmp_path) -> Path:
    """Return a copy of a finished run, made with the command in WORDS."""
    return shutil.copytree(made_once("finished-run", train_run) / "run", tmp_path / "run")


def measured(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def cut_off(folder: Path) -> None:
    """Make the run look like one that a power cut has ended after its last epoch."""
    info = json.loads((folder / "run.json").read_text())
    del info["end"]
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.json").unlink()


@pytest.mark.parametrize(
    ("file", "kind"),
    [("run.json", "empty"), ("run.json", "torn"), ("metrics.json", "zeros"), ("metrics.json", "of another program")],
)
def test_a_broken_record_is_explained_and_repaired(file, kind, run, train_here):
    before = measured(run)
    (run / file).write_bytes(BROKEN[kind])
    with pytest.raises(InputError, match=rf"{file} is not a file that a run writes \(.*\); resume the run with"):
        Recommender.from_run(run)
    refused = train_here(*WORDS)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: run contains this run, but run/{file} is not a file that a run writes (")
    assert refused.stderr.count("\n") == 1
    command = re.search(r"resume with: \S+ -m sasrec_lab\.train (.*), or choose", refused.stderr)[1]
    resumed = train_here(*shlex.split(command))
    assert resumed.returncode == 0, resumed.stderr
    assert f"run/{file} is not a file that a run writes (" in resumed.stdout
    assert measured(run) == before
    assert "end" in json.loads((run / "run.json").read_text())
    assert Recommender.from_run(run)


def test_a_run_without_run_json_is_known_by_its_checkpoint(run):
    (run / "run.json").unlink()
    cfg = load([*WORDS[:-1], "ckpt=last"])
    assert check_can_run(run, cfg) is None
    with pytest.raises(InputError, match=r"different configuration \(seed differs\); repeat the keys that it was"):
        check_can_run(run, load([*WORDS[:-1], "ckpt=last", "seed=1"]))
    (run / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert recorded_config(run)["seed"] == 0
    (run / "checkpoints" / "best.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"is missing or broken, and so are the checkpoints \(.*\); delete .*/run to"):
        recorded_config(run)


def test_a_broken_run_json_without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    cfg = load(WORDS[:-1])
    for kind in ("torn", "of another program"):
        (run / "run.json").write_bytes(BROKEN[kind])
        with pytest.raises(InputError, match=r"run\.json .*; there is no checkpoint to resume from: delete it to"):
            check_can_run(run, cfg)
    (run / "run.json").write_bytes(b"\xff")  # no text
    with pytest.raises(InputError, match=r"run\.json .*; there is no checkpoint to resume from: delete it to"):
        check_can_run(run, cfg)
    for kind in ("empty", "zeros"):
        (run / "run.json").write_bytes(BROKEN[kind])
        assert check_can_run(run, cfg) is None, "nothing is lost if it starts over"


def test_nothing_is_resumed_without_a_run_or_a_checkpoint(run, tmp_path):
    cfg = load([*WORDS[:-1], "ckpt=last"])
    with pytest.raises(InputError, match=r"^ckpt=last: no run found in .*/empty; pass the folder to resume as hydra"):
        check_can_run(tmp_path / "empty", cfg)
    cut_off(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"^ckpt=last: .*/run has no checkpoint yet \(no epoch was finished\); start"):
        check_can_run(run, cfg)


def test_a_full_disk_is_one_line_with_what_is_kept(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    full = OSError(errno.ENOSPC, "No space left on device", "run/tb/events")
    start = "run/tb/events: No space left on device; free some space and start again"
    assert describe_failure(full, run) == f"{start}; finished epochs are in run"
    shutil.rmtree(run / "checkpoints")
    assert describe_failure(full, run) == start
    assert describe_failure(OSError(errno.EIO, "Input/output error"), run) == "run: Input/output error"


def test_resuming_with_other_keys_names_the_command(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    cfg = load(["dataset=synthetic", "model=tiny", "ckpt=last"])

    def refusal() -> str:
        with pytest.raises(InputError) as caught:
            check_can_run(Path("run"), cfg)
        return str(caught.value)

    start = "ckpt=last: the run in run has a different configuration (dataset.synthetic.items, dataset.synthetic.users,"
    assert refusal().startswith(start)
    assert re.search(rf"; repeat its keys in \S+: \S+ -m sasrec_lab\.train {' '.join(WORDS)} ckpt=last$", refusal())
    info = json.loads((run / "run.json").read_text())
    commands = {
        "python -m sasrec_lab.train -m seed=1,2 hydra.sweep.dir=old": r"-m seed=1,2 hydra\.sweep\.dir=\S*$",
        "sasrec-train seed=3 ckpt=last hydra.run.dir=old": r"[^-]seed=3 dataset\..* hydra\.run\.dir=run ckpt=last$",
        "rm -rf /": "repeat the keys that it was started with$",
        "'": "repeat the keys that it was started with$",
    }
    for command, end in commands.items():
        (run / "run.json").write_text(json.dumps(info | {"command": command}))
        assert re.search(end, refusal()), refusal()


def test_resuming_names_values_that_conf_has_changed(run):
    info = json.loads((run / "run.json").read_text())
    info["config"]["model"] |= {"dropout_output": 0.1, "norm": "post"}  # as if the files of conf/ had these then
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"\(model\.dropout_output, model\.norm differ\)") as caught:
        check_can_run(run, load([*WORDS[:-1], "ckpt=last"]))
    words = shlex.split(str(caught.value).partition("sasrec_lab.train ")[2])
    assert words[-4:-2] == ["model.dropout_output=0.1", "model.norm=post"]
    assert check_can_run(run, load([word for word in words if not word.startswith("hydra")])) is not None


def test_resuming_with_another_limit_of_memory(run):
    check_can_run(run, load([*WORDS[:-1], "ckpt=last", "dataset.memory_limit=2GB"]))
    with pytest.raises(InputError, match=r"dataset\.min_user differs"):
        check_can_run(run, load([*WORDS[:-1], "ckpt=last", "dataset.min_user=3"]))


def copy_of_another_epoch(best: Path) -> None:
    saved = torch.load(best)
    saved["validation"] = {name: value / 2 for name, value in saved["validation"].items()}
    torch.save(saved, best)


def copy_of_another_run(best: Path) -> None:
    saved = torch.load(best)
    saved["hyper_parameters"]["config"]["seed"] = 7
    torch.save(saved, best)


def copy_without_validation(best: Path) -> None:
    saved = torch.load(best)
    saved["validation"] = {}
    torch.save(saved, best)


def truncate(best: Path) -> None:
    best.write_bytes(best.read_bytes()[:-100])


DAMAGE = {
    "is missing": Path.unlink,
    "is not a checkpoint of this project (": truncate,
    "is of another epoch (val/ndcg@10": copy_of_another_epoch,
    "has no val/ndcg@10": copy_without_validation,
    "is of another run (seed differs)": copy_of_another_run,
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_run_resumed_without_its_best_tests_the_last(reason, run, train_here):
    cut_off(run)
    DAMAGE[reason](run / "checkpoints" / "best.ckpt")
    done = train_here(*WORDS, "ckpt=last")
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/best.ckpt {reason}" in done.stdout
    assert ": unless a later epoch is better, the last one will be tested\n" in done.stdout
    written = measured(run)
    assert (written["status"], written["best_epoch"]) == ("finished", None)
    assert written["protocol"]["selected_by"] == "last epoch"
    assert not [name for name in written["metrics"] if name.startswith("val/")]
    lists = Recommender.from_run(run).recommend("all", 3)

    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
    assert Recommender.from_run(run).recommend("all", 3).equals(lists)


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_best_lost_while_running_is_not_tested(reason, train_here, tmp_path, monkeypatch):
    from sasrec_lab import train

    fit = train.fit

    def fit_and_damage(record, trainer, *args) -> None:
        best = tmp_path / "run" / "checkpoints" / "best.ckpt"
        end = trainer.fit
        monkeypatch.setattr(trainer, "fit", lambda *words, **keys: (end(*words, **keys), DAMAGE[reason](best)))
        fit(record, trainer, *args)

    monkeypatch.setattr(train, "fit", fit_and_damage)
    done = train_here(*WORDS)
    assert done.returncode == 1
    assert re.search(rf"best\.ckpt {re.escape(reason)}.*: put it back, or resume with ckpt=last to test", done.stderr)
    assert done.stderr.count("\n") == 1
    written = measured(tmp_path / "run")
    assert (written["status"], written["metrics"], written["best_epoch"]) == ("failed", {}, None)


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_a_run_cannot_be_given_fewer_epochs_than_it_has(status, run):
    """Lightning refuses such a checkpoint, but only when the record of the run is already replaced."""
    metrics = measured(run)
    (run / "metrics.json").write_text(json.dumps(metrics | {"status": status}))
    words = [word for word in WORDS[:-1] if not word.startswith("trainer.max_epochs")]
    with pytest.raises(InputError) as caught:
        check_can_run(run, load([*words, "trainer.max_epochs=3", "ckpt=last"]))
    assert str(caught.value) == f"trainer.max_epochs=3: the run in {run} has 5 epochs already; set it to at least 5"
    assert check_can_run(run, load([*words, "trainer.max_epochs=6", "ckpt=last"])) is None


def test_a_later_better_epoch_replaces_a_lost_best(train_here, tmp_path):
    slowly = [*(word for word in WORDS if not word.startswith("optimizer.lr")), "optimizer.lr=0.003"]
    assert train_here(*slowly).returncode == 0
    run = tmp_path / "run"
    cut_off(run)
    (run / "checkpoints" / "best.ckpt").unlink()
    words = [word for word in slowly if not word.startswith("trainer.max_epochs")]
    done = train_here(*words, "trainer.max_epochs=40", "ckpt=last")
    assert done.returncode == 0, done.stderr
    assert "best.ckpt is missing: unless a later epoch" in done.stdout
    written = measured(run)
    assert written["best_epoch"] >= 5
    assert written["protocol"]["selected_by"] == "val/ndcg@10"


def test_a_broken_last_checkpoint_names_the_best_one(run, train_here):
    before = measured(run)
    cut_off(run)
    truncate(run / "checkpoints" / "last.ckpt")
    done = train_here(*WORDS, "ckpt=last")
    assert done.returncode == 1
    fix = r"; resume from the best epoch with (ckpt=run/checkpoints/best\.ckpt)\n"
    named = re.search(fix, done.stderr)
    assert named, done.stderr
    assert done.stderr.count("\n") == 1
    resumed = train_here(*WORDS, named[1])
    assert resumed.returncode == 0, resumed.stderr
    assert measured(run) == before
    cut_off(run)
    for name in ("best", "last"):
        truncate(run / "checkpoints" / f"{name}.ckpt")
    done = train_here(*WORDS, "ckpt=last")
    assert re.search(r"; delete \S*run/checkpoints and start over without ckpt\n", done.stderr)


def test_a_missing_last_checkpoint_resumes_from_the_best(run, train_here):
    before, ranks = measured(run), np.load(run / "ranks.npz")["rank"]
    cut_off(run)
    (run / "checkpoints" / "last.ckpt").unlink()
    done = train_here(*WORDS, "ckpt=last")
    assert done.returncode == 0, done.stderr
    assert "last.ckpt is missing: resuming from the best epoch, best.ckpt\n" in done.stdout
    assert measured(run) == before
    np.testing.assert_array_equal(np.load(run / "ranks.npz")["rank"], ranks)


def test_drafts_of_a_killed_run_are_removed(run, train_here):
    cut_off(run)
    drafts = [run / ".draft-ranks.npz", run / "checkpoints" / ".draft-best.ckpt"]
    for draft in drafts:
        draft.write_bytes(b"half")
    assert train_here(*WORDS, "ckpt=last").returncode == 0
    assert not [draft for draft in drafts if draft.exists()]


def test_a_run_whose_data_set_was_not_fetched_starts_again(train_here, tmp_path):
    words = ["dataset=csv", "dataset.name=x", "dataset.path=x/x.csv", "dataset.sources=[{url: 'http://127.0.0.1:1/x'}]"]
    words += ["dataset.time=null", "model=tiny", "trainer=fast", "hydra.run.dir=run"]
    for _ in range(2):
        done = train_here(*words, "data_dir=data")
        assert done.stderr == (
            "error: x/x.csv is not in data and no source gives it (http://127.0.0.1:1/x: no connection); put the file"
            " at data/x/x.csv, or set data_dir=... or SASREC_LAB_DATA to the folder that has it\n"
        )
    (tmp_path / "other" / "x").mkdir(parents=True)
    rows = [f"{user},{(user + place) % 9}\n" for user in range(40) for place in range(6)]
    (tmp_path / "other" / "x" / "x.csv").write_text("user_id,item_id\n" + "".join(rows))
    assert train_here(*words, "data_dir=other").returncode == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "finished"
