"""The training command as a user runs it: what it writes, prints, rejects, repeats and resumes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import children_seconds, in_this_process
from fresh_cache import cache_in
from small_data import holdout_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sasrec_lab.config.composition import load
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.ops import library as kernels
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run.folder import load_finished
from sasrec_lab.run.lock import lock_folder
from sasrec_lab.run.resume import check_can_run
from sasrec_lab.train import train
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.trainer import build_trainer, interruptible

TINY = [
    "dataset=synthetic",
    "dataset.synthetic.users=300",
    "dataset.synthetic.items=60",
    "model=tiny",
    "optimizer.lr=0.01",
    "hydra.run.dir=run",
]


def results(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_run_writes_its_folder_and_beats_popularity(train_command, tmp_path):
    done = train_command(*TINY, "trainer.max_epochs=15", "evaluation.sampled=20")
    run = tmp_path / "run"
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(
        str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and "tb" not in file.parts
    ) == [
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "items.npz",
        "metrics.json",
        "ranks.npz",
        "run.json",
        "train.log",
    ]
    written = results(run)
    keys = ["status", "error", "protocol", "metrics", "baselines", "best_epoch", "epochs", "unreachable_targets"]
    assert list(written) == [*keys, "cold_targets"]
    assert (written["status"], written["error"], written["epochs"]) == ("finished", None, 15)
    one_stage = [f"{metric}@{k}" for metric in ("ndcg", "recall", "mrr") for k in (5, 10, 20)] + ["mrr"]
    assert written["metrics"].keys() == {
        f"{stage}/{name}{ending}" for stage in ("val", "test") for name in one_stage for ending in ("", "-sampled20")
    }
    assert written["baselines"]["popularity"].keys() == written["metrics"].keys()
    for ending in ("", "-sampled20"):
        key = f"test/ndcg@10{ending}"
        assert written["metrics"][key] > 1.2 * written["baselines"]["popularity"][key]

    protocol = written["protocol"]
    assert (protocol["users"], protocol["items"], protocol["selected_by"]) == (300, 60, "val/ndcg@10")
    assert protocol["sampled_candidates"] == {"sampled": 20, "draw": "paper", "seed": 0}

    facts = json.loads((run / "run.json").read_text())
    assert {
        "git",
        "versions",
        "device",
        "threads",
        "seed",
        "command",
        "directory",
        "start",
        "seconds",
        "peak_memory_mb",
    } <= facts.keys()
    assert " -m sasrec_lab.train dataset=synthetic" in facts["command"]

    ranks = np.load(run / "ranks.npz")
    assert len(ranks["user"]) == len(set(ranks["user"])) == protocol["held_out_users"]
    assert set(ranks["target"]) <= set(range(1, 61))
    gains = np.where((ranks["rank"] >= 1) & (ranks["rank"] <= 10), 1 / np.log2(np.maximum(ranks["rank"], 1) + 1), 0)
    assert gains.mean() == pytest.approx(written["metrics"]["test/ndcg@10"], abs=1e-12)
    assert (ranks["sampled_rank"] <= 10).mean() == pytest.approx(
        written["metrics"]["test/recall@10-sampled20"], abs=1e-12
    )

    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] == written["best_epoch"]
    assert saved["hyper_parameters"]["config"]["model"]["dim"] == 16

    lines = done.stdout.splitlines()
    assert lines[0].startswith("data   (generated): 300 users, 60 items,")
    assert lines[2].startswith("model  1 block, 1 head, dim 16, maxlen 20, loss softmax;")
    assert max(len(line) for line in lines[:4]) <= 80
    assert re.search(r"SASRec +0\.\d{4} +0\.\d{4} +0\.\d{4}\n +popularity +0\.\d{4}", done.stdout)
    assert "run folder   run\n" in done.stdout
    assert re.search(r"TensorBoard +\S*tensorboard --logdir run/tb$", done.stdout.strip())
    check_tensorboard(run / "tb", written["metrics"])


def check_tensorboard(folder: Path, metrics: dict[str, float]) -> None:
    events = EventAccumulator(str(folder)).Reload()
    for name in ("val/ndcg@10", "~train/loss"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 16))  # epochs
    groups = [tag.partition("/")[0] for tag in sorted(events.Tags()["scalars"])]
    assert list(dict.fromkeys(groups)) == ["test", "val", "~train"]  # TensorBoard opens the first two
    for name, value in metrics.items():
        if name.startswith("test/"):
            (written,) = events.Scalars(name.replace("/mrr", "/~mrr"))
            assert written.value == pytest.approx(value)
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert {"seed", "model/blocks", "model/heads", "loss/name", "optimizer/lr", "dataset/name"} <= shown.keys()
    assert shown["model/dim"].number_value == 16
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["model/dim"] == 16


@pytest.mark.slow
def test_same_seed_gives_same_numbers_in_another_process(train_command, train_here, tmp_path):
    seen = []
    for run, seed, folder in ((train_command, 1, "a"), (train_here, 1, "b"), (train_here, 2, "c")):
        done = run(*TINY[:-1], f"hydra.run.dir={folder}", f"seed={seed}", "trainer.max_epochs=2", "loss=bce")
        assert done.returncode == 0, done.stderr
        seen.append(results(tmp_path / folder)["metrics"])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_an_uninterrupted_one(train_here, made_once, tmp_path, sent, interrupt_at):
    settings = [
        *TINY,
        "trainer.max_epochs=80",
        "evaluation.patience=null",
        "optimizer.cosine=true",
        "optimizer.ema=0.9",
        "optimizer.name=adamw",
    ]
    whole = made_once("uninterrupted-run", lambda folder: in_this_process("sasrec_lab.train", folder)(*settings))

    code, error = interrupt_at("epoch   2", settings, sent)
    assert code == 130
    assert error.startswith("interrupted; files written so far are in ")
    assert "ckpt=last" in error.splitlines()[1]
    before = results(tmp_path / "run")
    assert before["status"] == "interrupted"
    assert 1 <= before["epochs"] < 80
    assert "val/ndcg@10" in before["metrics"]

    unfinished = train_here(*settings)
    assert unfinished.returncode == 1
    assert re.fullmatch(
        r"error: run contains this run, unfinished; resume with: \S+ -m sasrec_lab\.train dataset=synthetic .*"
        r" hydra\.run\.dir=run ckpt=last, or choose another hydra\.run\.dir\n",
        unfinished.stderr,
    )
    resumed = train_here(*settings, "ckpt=last")
    assert resumed.returncode == 0, resumed.stderr
    after, uninterrupted = results(tmp_path / "run"), results(whole / "run")
    assert after["metrics"] == pytest.approx(uninterrupted["metrics"], abs=1e-7)
    assert (after["epochs"], after["best_epoch"]) == (80, uninterrupted["best_epoch"])
    assert int(re.search(r"epoch +(\d+)  loss", resumed.stdout)[1]) == before["epochs"] + 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(facts["earlier"]) == 1
    assert {"start", "end", "command", "seconds"} <= facts["earlier"][0].keys()
    assert facts["matmul"] == facts["earlier"][0]["matmul"]


def test_finished_run_is_not_repeated_or_overwritten(train_here, tmp_path):
    settings = [*TINY, "trainer=fast"]
    assert train_here(*settings).returncode == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    again = train_here(*settings)
    assert again.returncode == 0
    assert again.stdout.startswith("already finished, nothing to run; its results:\n")
    other = train_here(*settings, "model.dim=8")
    assert (other.returncode, other.stderr) == (
        1,
        "error: run already holds results of a different configuration (model.dim differs);"
        " choose another hydra.run.dir\n",
    )
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_gradients_can_be_clipped_in_mixed_precision(train_here):
    done = train_here(*TINY, "trainer=fast", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1")
    assert (done.returncode, done.stderr) == (0, "")


def test_last_epoch_is_tested_without_validation(train_here, tmp_path):
    done = train_here(*TINY, "trainer=fast", "trainer.limit_val_batches=0")
    assert done.returncode == 0, done.stderr
    written = results(tmp_path / "run")
    assert written["protocol"]["selected_by"] == "last epoch"
    assert written["best_epoch"] is None
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert "val/ndcg@10" not in written["metrics"]
    assert "checkpoint   last epoch" in done.stdout


def test_last_epoch_is_tested_if_no_validation_was_due(train_here, tmp_path):
    done = train_here(*TINY, "trainer=fast", "trainer.check_val_every_n_epoch=5")
    assert done.returncode == 0, done.stderr
    written = results(tmp_path / "run")
    assert (written["protocol"]["selected_by"], written["best_epoch"]) == ("last epoch", None)
    assert "test/chosen by val/ndcg@10" not in EventAccumulator(str(tmp_path / "run" / "tb")).Reload().Tags()["scalars"]


def test_protocol_records_validation_on_some_users(train_here, tmp_path):
    done = train_here(*TINY, "trainer=fast", "trainer.limit_val_batches=1")
    assert done.returncode == 0, done.stderr
    protocol = results(tmp_path / "run")["protocol"]
    assert protocol["validation"] == "those of trainer.limit_val_batches=1, the shortest histories first"


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_last_checkpoint_is_of_the_last_epoch(train_here, tmp_path, ema):
    tiny, folder = TINY[:-1], TINY[-1]
    settings = [*tiny, "evaluation.patience=3", "optimizer.lr=0.05", f"optimizer.ema={ema}", folder]
    done = train_here(*settings, "trainer.max_epochs=200")
    assert done.returncode == 0, done.stderr
    written = results(tmp_path / "run")
    best, last = (torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert written["epochs"] == written["best_epoch"] + 1 + 3 < 200
    assert (best["epoch"], last["epoch"]) == (written["best_epoch"], written["epochs"] - 1)
    assert best["validation"]["val/ndcg@10"] == written["metrics"]["val/ndcg@10"]

    again = train_here(*settings, "trainer.max_epochs=200", "ckpt=last")
    assert again.stdout.startswith("already finished, nothing to run; its results:\n")
    assert results(tmp_path / "run") == written

    (tmp_path / "run").rename(tmp_path / "moved")
    longer = train_here(*settings[:-1], "trainer.max_epochs=201", "ckpt=last", "hydra.run.dir=moved")
    assert longer.returncode == 0, longer.stderr
    assert results(tmp_path / "moved")["metrics"]["val/ndcg@10"] >= written["metrics"]["val/ndcg@10"]
    assert results(tmp_path / "moved")["epochs"] > written["epochs"]


@pytest.mark.slow
@pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
def test_resuming_with_other_kernels_warns(train_command, train_here, tmp_path):
    assert train_here(*TINY, "trainer.max_epochs=1", "trainer.accelerator=cpu").returncode == 0
    same = train_here(*TINY, "trainer.max_epochs=2", "trainer.accelerator=cpu", "ckpt=last")
    assert "kernels" not in same.stdout + same.stderr
    settings = [*TINY, "trainer.max_epochs=3", "trainer.accelerator=cpu", "ckpt=last"]
    other = train_command(*settings, env={"CXX": ""})
    assert other.returncode == 0, other.stderr
    assert "\n       slower torch path: no compiled kernels (CXX names no compiler)\n" in other.stdout
    log = (tmp_path / "run" / "train.log").read_text()
    (warning,) = [line for line in log.splitlines() if "kernels were" in line]
    assert re.search(r"kernels were compiled by \S+ and are now torch's: numbers will differ from those of an", warning)


def test_finished_run_can_be_trained_longer(train_here, tmp_path):
    assert train_here(*TINY, "trainer.max_epochs=2").returncode == 0
    done = train_here(*TINY, "trainer.max_epochs=3", "ckpt=last")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"epoch +(\d+)  loss", done.stdout) == ["3"]
    assert results(tmp_path / "run")["epochs"] == 3
    losses = EventAccumulator(str(tmp_path / "run" / "tb")).Reload().Scalars("~train/loss")
    assert len(losses) == len({event.step for event in losses}) == 3


def test_two_runs_do_not_share_a_folder(train_here, tmp_path):
    with lock_folder(tmp_path / "run"):
        done = train_here(*TINY)
    assert (done.returncode, done.stderr) == (
        1,
        "error: another process is running in run; wait for it, or choose another hydra.run.dir\n",
    )
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


LOOKING = "from pathlib import Path; from sasrec_lab.run.lock import is_locked\nwhile True: is_locked(Path('run'))"


def test_checking_a_lock_does_not_take_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    looking = subprocess.Popen([sys.executable, "-c", LOOKING], cwd=tmp_path)
    try:
        for _ in range(2000):
            with lock_folder(tmp_path / "run"):
                pass
    finally:
        assert looking.poll() is None
        looking.kill()
        looking.wait()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["model ", "test"])
def test_interruption_outside_of_training_is_recorded(tmp_path, moment, interrupt_at):
    """Before the first epoch, and as the test starts."""
    settings = [*TINY[:-1], "trainer=fast", "trainer.max_epochs=4", "evaluation.sampled=20", "hydra.run.dir=lr=1,b"]
    start = "epoch   4" if moment == "test" else moment
    code, error = interrupt_at(start, settings, signal.SIGINT)
    assert code == 130, error
    assert error.splitlines()[0] == "interrupted; files written so far are in lr=1,b"
    assert error.splitlines()[1].startswith("resume with: ")
    assert """ 'hydra.run.dir="lr=1,b"'""" in error
    assert results(tmp_path / "lr=1,b")["status"] == "interrupted"


@pytest.mark.parametrize("flags", [["trainer.devices=2"], ["trainer.devices=1", "+trainer.num_nodes=3"]])
def test_rowwise_adam_on_several_devices_is_rejected(tmp_path, flags):
    cfg = load([*TINY[:-1], "trainer.accelerator=cpu", "+trainer.strategy=ddp", *flags, *ROWWISE])
    with pytest.raises(
        InputError, match=r"^optimizer\.name=rowwise_adam must run on one device, but trainer asks for [23];"
    ):
        build_trainer(cfg, tmp_path)


ROWWISE = ["optimizer.name=rowwise_adam", "loss=sampled_softmax", "loss.negatives=4"]


def test_interrupting_the_test_raises_keyboard_interrupt(default_sigint, tmp_path, monkeypatch):
    """Lightning raises SystemExit instead, and makes the system ignore further signals."""
    cfg = load([*TINY[:-1], "trainer.accelerator=cpu"])
    holdout = holdout_of([[1, 2, 3, 4]] * 3)
    model = SequentialRecommender(holdout.num_items, cfg)
    monkeypatch.setattr(model, "test_step", lambda batch, batch_idx: signal.raise_signal(signal.SIGINT))
    trainer = build_trainer(cfg, tmp_path)
    with pytest.raises(KeyboardInterrupt), interruptible(trainer):
        trainer.test(model, SequenceData(holdout, cfg), verbose=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interruption_during_imports_is_recorded(start_command, tmp_path):
    process = start_command(TINY)
    while not (tmp_path / "run" / "run.json").exists():  # after this, torch and Lightning are imported
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert error.startswith("interrupted; files written so far are in ")
    assert results(tmp_path / "run")["status"] == "interrupted"


def test_diverged_run_fails(train_here, tmp_path):
    done = train_here(*TINY, "trainer=fast", "optimizer.lr=1e30")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: training diverged in epoch \d: the loss is \w+; lower optimizer.lr=1e\+30 or set"
        r" trainer.gradient_clip_val=1\n",
        done.stderr,
    )
    written = results(tmp_path / "run")
    assert written["status"] == "failed"
    assert written["error"].startswith("training diverged in epoch")


@pytest.mark.parametrize(  # during the epoch, or in its only step
    "words", [["batch_size=32", "optimizer.lr=1e30"], ["batch_size=1000", "optimizer.lr=1e39"]]
)
def test_run_diverged_in_its_only_epoch_has_no_checkpoint(train_here, tmp_path, words):
    done = train_here(*TINY, "trainer=fast", "trainer.max_epochs=1", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: training diverged in epoch 1: ")
    assert results(tmp_path / "run")["status"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_warm_up_clipping_and_string_ids(train_here, tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"u{u},i{(u + t) % 9 if rng.random() < 0.8 else rng.integers(9)},{t}" for u in range(40) for t in range(8)]
    (tmp_path / "my.csv").write_text("who,what,when\n" + "\n".join([*rows, "u39,new,9"]) + "\n")
    columns = ["dataset=csv", "dataset.path=my.csv", "dataset.user=who", "dataset.item=what", "dataset.time=when"]
    others = ["evaluation.filter_seen=false", "dataset.catalogue=train", "dataset.windows=all", "model.maxlen=3"]
    optimizer = ["trainer.gradient_clip_val=1", "optimizer.warmup_steps=5"]
    done = train_here(*columns, *others, *optimizer, "model=tiny", "trainer=fast", "hydra.run.dir=r")
    assert done.returncode == 0, done.stderr
    ranks = np.load(tmp_path / "r" / "ranks.npz")
    assert set(ranks["user"]) == {f"u{u}" for u in range(40)}
    last = {row.split(",")[0]: row.split(",")[1] for row in [*rows, "u39,new,9"]}
    assert dict(zip(ranks["user"], ranks["target"], strict=True)) == last
    assert ranks["rank"][list(ranks["user"]).index("u39")] == 0  # the model does not know the item
    rates = [event.value for event in EventAccumulator(str(tmp_path / "r" / "tb")).Reload().Scalars("~train/lr")]
    assert rates == pytest.approx([2 / 5 * 1e-3, 3 / 5 * 1e-3])


BAD_FILES = {
    "empty": (b"", "error: my.csv is empty; dataset.path must name a file with interactions"),
    "header": (
        b"user_id,item_id,timestamp\n",
        "error: my.csv has a header line and no interactions; dataset.path must name a file with some",
    ),
    "short": (
        b"user_id,item_id,timestamp\n1,2,1\n1,3,2\n2,2,1\n",
        "error: my.csv: no user has 3 interactions, which a holdout needs (training, validation, test);"
        " the longest of 2 users has 2; check that dataset.user is the column of the users, or train only:"
        " dataset.holdout=none",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_gives_one_line_and_a_failed_run(kind, train_here, tmp_path):
    content, message = BAD_FILES[kind]
    (tmp_path / "my.csv").write_bytes(content)
    done = train_here("dataset=csv", "dataset.path=my.csv", "hydra.run.dir=run")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message + "\n")
    written = results(tmp_path / "run")
    assert (written["status"], written["error"]) == ("failed", message.removeprefix("error: "))


def test_missing_files_of_the_users_leave_no_run_folder(train_here, tmp_path):
    nowhere = f"no such file (nor is it in {tmp_path}/cache/sasrec_lab)"
    done = train_here("dataset=csv", "dataset.path=my.csv", "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (1, f"error: dataset.path=my.csv: {nowhere}\n")
    (tmp_path / "my.csv").write_text("user_id,item_id,timestamp\n")
    their_folder = nowhere.replace(" (", "; its folder other does not exist (")
    done = train_here("dataset=csv", "dataset.path=my.csv", "dataset.titles.path=other/t", "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (1, f"error: dataset.titles.path=other/t: {their_folder}\n")
    assert not (tmp_path / "run").exists()


def test_invalid_command_line_writes_nothing(train_command, tmp_path):
    before = children_seconds()
    done = train_command("model.hed=2")
    assert children_seconds() - before < 5
    assert (done.returncode, done.stderr) == (1, "error: unknown key 'model.hed'; did you mean model.head?\n")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # the test's own


def test_unwritable_run_folder_is_rejected(train_here, tmp_path):
    (tmp_path / "file").write_text("")
    done = train_here(*TINY[:-1], "hydra.run.dir=file/run")
    assert (done.returncode, done.stderr) == (
        1,
        "error: file/run: the run folder cannot be written: Not a directory; choose another hydra.run.dir\n",
    )


@pytest.mark.slow
def test_file_size_limit_gives_one_line(tmp_path):
    """A limit on the size of files replaces a full disk; the first checkpoint is larger."""
    done = subprocess.run(
        [sys.executable, "-m", "sasrec_lab.train", *TINY[:-1], "hydra.run.dir=run", "model.dim=64", "trainer=fast"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": cache_in(tmp_path), "OMP_NUM_THREADS": "1", "SASREC_LAB_DATA": ""},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*run.*: File too large[^\n]*\n", done.stderr)
    assert results(tmp_path / "run")["status"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs a small file system, and here none can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("filled", [140_000, 150_000])
def test_full_disk_keeps_finished_epochs(filled, train_command, small_disk):
    """The checkpoints of the first epoch fit, those of the second do not; the larger filler uses every byte."""
    settings = [*TINY[:-1], "hydra.run.dir=disk/run", "model.dim=16", "trainer.max_epochs=30", "optimizer.lr=0.001"]
    (small_disk / "filler").write_bytes(bytes(filled))
    done = train_command(*settings)
    assert done.returncode == 1
    assert re.fullmatch(r"error: disk/run: No space left on device; free some space[^\n]*\n", done.stderr)
    assert not list((small_disk / "run").rglob(".draft-*"))
    for file in (small_disk / "run" / "checkpoints").iterdir():
        torch.load(file, weights_only=True)
    assert filled == 150_000 or results(small_disk / "run")["status"] == "failed"


def test_full_disk_is_reported_before_the_start(train_here, small_disk):
    (small_disk / "filler").write_bytes(bytes(290_000))
    done = train_here(*TINY[:-1], "hydra.run.dir=disk/run")
    assert (done.returncode, done.stderr) == (
        1,
        "error: disk/run: the run folder cannot be written: No space left on device;"
        " free some space, or choose another hydra.run.dir\n",
    )
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_folder_without_permission_is_rejected(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    cfg = load(TINY[:-1])
    nobody = 65534
    if os.geteuid() == 0:
        os.seteuid(nobody)
    else:
        (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(InputError, match="the run folder cannot be written: Permission denied; choose another"):
            check_can_run(tmp_path / "locked" / "below" / "run", cfg)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_missing_checkpoint_gives_one_line(train_here, tmp_path):
    done = train_here(*TINY, "ckpt=nowhere.ckpt")
    assert done.returncode == 1
    assert done.stderr == (
        "error: ckpt=nowhere.ckpt: no such file; pass a checkpoint file, or ckpt=last for the run folder's latest\n"
    )
    assert not (tmp_path / "run").exists()


def test_missing_gpu_is_reported_with_an_alternative(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"^trainer: No supported gpu backend found!; use trainer\.accelerator=cpu$"):
        build_trainer(load([*TINY[:-1], "trainer=gpu"]), tmp_path)


@pytest.mark.slow
def test_two_processes_train_and_test_as_one(train_command, train_here, tmp_path):
    """They share out each batch, and losses count by their targets; every user is tested once."""
    settings = [*TINY, "model.dropout=0", "trainer=fast", "trainer.accelerator=cpu", "batch_size=32"]
    done = train_command(*settings, "trainer.devices=2", "+trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("epoch   2  loss") == done.stdout.count("model  1 block") == done.stdout.count("Test:") == 1
    )
    assert "sync_dist" not in (tmp_path / "run" / "train.log").read_text()
    written = results(tmp_path / "run")
    ranks = np.load(tmp_path / "run" / "ranks.npz")
    assert len(set(ranks["user"])) == len(ranks["user"]) == written["protocol"]["held_out_users"]
    hits = ((ranks["rank"] >= 1) & (ranks["rank"] <= 10)).mean()
    assert written["metrics"]["test/recall@10"] == pytest.approx(hits, abs=1e-6)

    single = train_here(*settings, "hydra.run.dir=single")
    assert single.returncode == 0, single.stderr
    assert re.findall("loss (.*?)  ", done.stdout) == re.findall("loss (.*?)  ", single.stdout)
    of_two, of_one = (torch.load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("run", "single"))
    for name in of_two.keys() - {"encoder.blocks.0.key.bias"}:  # which changes no output: its gradient is rounding
        torch.testing.assert_close(of_two[name], of_one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "sent"), [("model ", signal.SIGINT), ("epoch   3", signal.SIGTERM)])
def test_two_interrupted_processes_end_as_one(start_command, tmp_path, moment, sent):
    """While the second one starts, and in training; both get the signal, as with Ctrl-C."""
    devices = ["trainer.accelerator=cpu", "trainer.devices=2", "+trainer.strategy=ddp", "trainer.max_epochs=400"]
    process = start_command([*TINY, *devices, "evaluation.patience=null"], start_new_session=True)
    next(line for line in process.stdout if line.startswith(moment))
    time.sleep(0.3)
    os.killpg(process.pid, sent)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert [line.partition(" ")[0] for line in error.splitlines()] == ["interrupted;", "resume"]
    assert "train_ddp_process" not in error
    assert results(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["first", "second"])
def test_processes_end_together_when_one_is_killed(start_command, tmp_path, killed):
    devices = ["trainer.accelerator=cpu", "trainer.devices=2", "+trainer.strategy=ddp", "trainer.max_epochs=4000"]
    process = start_command([*TINY, *devices, "evaluation.patience=null"])
    next(line for line in process.stdout if line.startswith("epoch   2"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if killed == "first" else int(children[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)  # it ends only when both have closed the pipe
    assert process.returncode != 0
    if killed == "second":
        assert re.fullmatch(r"error: [^\n]*process[^\n]* of this run [^\n]*; resume it with ckpt=last\n", error)
        assert results(tmp_path / "run")["status"] == "failed"


def test_jobs_with_the_same_seed_give_the_same_numbers(train_here, tmp_path):
    done = train_here("-m", *TINY[:-1], "hydra.sweep.dir=sweep", "trainer=fast", "trainer.min_epochs=1,2", "seed=3")
    assert done.returncode == 0, done.stderr
    first, second = (results(folder) for folder in sorted((tmp_path / "sweep").iterdir()) if folder.is_dir())
    assert first["metrics"] == second["metrics"]


def test_relative_paths_of_a_run_resolve_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{user},{item}\n" for user in range(6) for item in range(user, user + 4)]
    Path("my.csv").write_text("".join(["user_id,item_id\n", *rows]))
    words = ["dataset=csv", "dataset.path=my.csv", "dataset.time=null", "data_dir=root", "model=tiny"]
    folder = tmp_path / "run"
    folder.mkdir()
    train(load([*words, "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]), folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    config, _ = load_finished(folder)
    assert config["dataset"]["path"] == str(tmp_path / "my.csv")
    assert config["data_dir"] == str(tmp_path / "root")
    assert len(Recommender.from_run(folder).recommend("all", 1)) == 6
