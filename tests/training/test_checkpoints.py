"""Checkpoints that a run may resume from, and their atomic writes."""

import os
import zipfile

import pytest
import torch

from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import to_plain
from sasrec_lab.errors import InputError
from sasrec_lab.training import checkpoints, saved_encoder
from sasrec_lab.training.lightning_module import SequentialRecommender


def save(path, *words: str, num_items: int = 60, epoch: int = 0) -> None:
    config = to_plain(load(["model=tiny", *words]))
    torch.save({"hyper_parameters": {"config": config, "num_items": num_items}, "epoch": epoch}, path)


def rejection(path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        checkpoints.checkpoint_to_resume(load(["model=tiny", f"ckpt={path}", *words]), path.parent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoint_of_a_run_with_the_same_settings_is_accepted(tmp_path):
    path = tmp_path / "a.ckpt"
    save(path)
    words = ["model=tiny", f"ckpt={path}", "trainer.max_epochs=7", "evaluation.lists=5"]
    assert checkpoints.checkpoint_to_resume(load(words), tmp_path) == path


@pytest.mark.parametrize(
    "word", ["seed=3", "optimizer.lr=0.1", "dataset.holdout=none", "dataset.path=x.csv", "loss=bce"]
)
def test_checkpoint_of_a_run_with_other_settings_is_rejected(word, tmp_path):
    path = tmp_path / "a.ckpt"
    save(path)
    message = rejection(path, word)
    assert message.startswith(f"ckpt={path} is of another run (")
    assert message.endswith("; repeat its keys, or take only its weights, with init_from=<its run folder>")


def test_checkpoint_of_an_older_version_is_accepted(tmp_path):
    """It lacks the keys that were added since, which act as their defaults."""
    path = tmp_path / "a.ckpt"
    save(path)
    saved = torch.load(path)
    for key in ("time_bias", "query_time", "position_bias", "norm_affine", "divisor", "qk_dim", "v_dim", "similarity"):
        del saved["hyper_parameters"]["config"]["model"][key]
    torch.save(saved, path)
    assert checkpoints.checkpoint_to_resume(load(["model=tiny", f"ckpt={path}"]), tmp_path) == path
    assert rejection(path, "model.time_bias=decay") == (
        f"ckpt={path} has model.time_bias=none, not decay; set model.time_bias to that value"
    )


def test_a_run_knows_its_own_folder_by_any_path(tmp_path):
    """Or else it would forget its best epoch, and replace it by the next one."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for own in (f"{folder}/../run/checkpoints/last.ckpt", f"{tmp_path}/link/checkpoints/last.ckpt", "last"):
        assert all(each.resumes_here for each in checkpoints.callbacks(folder, "val/mrr", own))
    other = f"{tmp_path}/checkpoints/last.ckpt"
    assert not any(each.resumes_here for each in checkpoints.callbacks(folder, "val/mrr", other))


def test_checkpoint_of_another_model_is_rejected(tmp_path):
    path = tmp_path / "a.ckpt"
    save(path)
    assert rejection(path, "model.dim=8") == f"ckpt={path} has model.dim=16, not 8; set model.dim to that value"


def test_checkpoint_of_another_run_must_leave_epochs(tmp_path):
    path = tmp_path / "a.ckpt"
    save(path, epoch=2)
    assert rejection(path, "trainer.max_epochs=3") == (
        f"ckpt={path} has 3 epochs, and trainer.max_epochs=3 leaves none to train here; set trainer.max_epochs to at"
        " least 4"
    )
    for more in ("trainer.max_epochs=4", "trainer.max_epochs=-1"):
        assert checkpoints.checkpoint_to_resume(load(["model=tiny", f"ckpt={path}", more]), tmp_path) == path
    own = tmp_path / "checkpoints" / "last.ckpt"
    own.parent.mkdir()
    save(own, epoch=2)  # the run's own checkpoint: only the test is repeated
    assert checkpoints.checkpoint_to_resume(load(["model=tiny", "ckpt=last", "trainer.max_epochs=3"]), tmp_path) == own


def test_last_checkpoint_of_another_run_is_rejected(tmp_path):
    own = tmp_path / "checkpoints" / "last.ckpt"
    own.parent.mkdir()
    save(own, "seed=1", "data_dir=elsewhere", "trainer.max_epochs=1")
    with pytest.raises(InputError) as caught:
        checkpoints.checkpoint_to_resume(load(["model=tiny", "ckpt=last", "seed=2"]), tmp_path)
    assert str(caught.value) == (
        f"ckpt=last: {own} is of another run (seed differs); put this run's back, or delete it and start over"
    )
    assert checkpoints.checkpoint_to_resume(load(["model=tiny", "ckpt=last", "seed=1"]), tmp_path) == own


def test_checkpoint_of_another_data_set_is_rejected(tmp_path):
    save(tmp_path / "a.ckpt", num_items=60)
    checkpoints.check_items(tmp_path / "a.ckpt", 60)
    with pytest.raises(
        InputError, match=r"a\.ckpt was trained on 60 items, but the data set has 50; use the same data set"
    ):
        checkpoints.check_items(tmp_path / "a.ckpt", 50)


def test_malformed_or_pickled_checkpoints_are_rejected(tmp_path):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"state_dict": Code()}, tmp_path / "code.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    fix = "; choose another checkpoint, or omit ckpt and start over in another folder"
    missing = tmp_path / "nowhere.ckpt"
    assert rejection(missing) == f"ckpt={missing}: {missing} is missing{fix}"
    for name in ("code.ckpt", "cut.ckpt"):
        path = tmp_path / name
        assert rejection(path).startswith(f"ckpt={path}: {path} is not a checkpoint of this project (")
        assert rejection(path).endswith(f"){fix}")
    assert not (tmp_path / "executed").exists()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoints.AtomicCheckpointIO().save_checkpoint({"epoch": 0}, path)
    monkeypatch.setattr("pathlib.Path.replace", lambda draft, target: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        checkpoints.AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    assert torch.load(path) == {"epoch": 0}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_callbacks_find_their_state_in_checkpoints_of_0_1_0(tmp_path):
    """There the class was called Checkpoint, and Lightning stores state under the name of the class."""
    best, last = checkpoints.callbacks(tmp_path, "val/ndcg@10")
    options = "'mode': 'max', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"
    assert best.state_key == "Checkpoint{'monitor': 'val/ndcg@10', " + options
    assert last.state_key == "Checkpoint{'monitor': None, " + options


# Checkpoints of strangers


def damaged(tmp_path, **changes: object) -> str:
    """Return the message on a checkpoint with these changes."""
    save(tmp_path / "good.ckpt")
    torch.save(torch.load(tmp_path / "good.ckpt") | changes, tmp_path / "a.ckpt")
    return rejection(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.zeros(1).expand(10**6, 10**6)}, "it contains a tensor that is larger than its data"),
        ({"x": torch.zeros(3).to_sparse()}, "it contains a tensor that is larger than its data"),
        ({"x": torch.zeros(3, device="meta")}, "it contains a tensor that is larger than its data"),
        ({"epoch": 10**30}, "it contains an integer of more than 64 bits"),
        ({"loops": {"fit_loop": {"total": "x"}}}, "its counts of epochs and steps are malformed"),
        ({"epoch": "1"}, "its epoch or validation metrics are malformed"),
        ({"x": {1, 2}}, "it contains a set"),
        ({"x": "y" * (9 << 20)}, "it contains more than weights"),
        (
            {"hyper_parameters": {"num_items": 3, "config": {"model": {"dim": {}}}}},
            "its hyper_parameters are malformed",
        ),
        ({"hyper_parameters": []}, "list indices must be integers or slices, not str"),
    ],
)
def test_values_that_no_run_saves_are_rejected(tmp_path, changes, reason):
    assert f"a.ckpt is not a checkpoint of this project ({reason}" in damaged(tmp_path, **changes)


def test_collections_that_repeat_are_rejected(tmp_path):
    value: list[object] = []
    for _ in range(100):
        value = [value, value]
    assert "it contains the same collection twice" in damaged(tmp_path, x=value)


def test_a_compressed_checkpoint_is_rejected(tmp_path):
    save(tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "a.ckpt", "w", 8) as bad:
        for member in good.filelist:
            bad.writestr(member.filename, good.read(member))
    assert "it is compressed, which a run's files are not" in rejection(tmp_path / "a.ckpt")


def test_a_checkpoint_of_holes_is_rejected_unread(tmp_path):
    save(tmp_path / "a.ckpt")
    with (tmp_path / "a.ckpt").open("r+b") as file:
        file.truncate(1 << 40)
    assert "but most of them are holes that take no place on the disk" in rejection(tmp_path / "a.ckpt")


@pytest.mark.parametrize("changes", [{"blocks": 10**9}, {"dim": 10**6}, {"maxlen": 10**9}, {"ff_dim": 10**12}])
def test_a_model_larger_than_its_weights_is_not_built(tmp_path, changes):
    cfg = load(["model=tiny"])
    model = SequentialRecommender(60, cfg)
    config = to_plain(cfg)
    config["model"] |= changes
    saved = {"hyper_parameters": {"config": config, "num_items": 60}, "epoch": 0, "state_dict": model.state_dict()}
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"a\.ckpt does not fit its own configuration: "):
        saved_encoder.load_encoder(tmp_path / "a.ckpt", 60)


def test_a_model_whose_keys_do_not_go_together_is_not_built(tmp_path):
    cfg = load(["model=tiny", "model.dim=16"])
    model = SequentialRecommender(60, cfg)
    config = to_plain(cfg)
    config["model"]["heads"] = 3
    saved = {"hyper_parameters": {"config": config, "num_items": 60}, "epoch": 0, "state_dict": model.state_dict()}
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(
        InputError, match=r"the run's model is not valid: model\.dim=16 is not a multiple of model\.heads=3"
    ):
        saved_encoder.load_encoder(tmp_path / "a.ckpt", 60)


def test_a_table_of_sinusoids_has_a_bound(tmp_path):
    cfg = load(["model=tiny", "model.pos_emb=sinusoidal"])
    model = SequentialRecommender(60, cfg)
    config = to_plain(cfg)
    config["model"]["maxlen"] = 10**9
    saved = {"hyper_parameters": {"config": config, "num_items": 60}, "epoch": 0, "state_dict": model.state_dict()}
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="its weights are not those of 1 blocks and maxlen 1,000,000,000"):
        saved_encoder.load_encoder(tmp_path / "a.ckpt", 60)


def test_no_path_of_a_checkpoint_is_taken_over(tmp_path):
    """Lightning removes the last checkpoint's predecessor, on any disk if its path has a protocol."""
    best, last = checkpoints.callbacks(tmp_path, "val/ndcg@10")
    theirs = {"best_model_path": "local:///precious", "kth_best_model_path": "x", "best_k_models": {"x": 1}}
    for callback in (best, last):
        callback.load_state_dict(theirs | {"dirpath": callback.dirpath, "best_model_score": torch.tensor(1.0)})
        assert (callback.best_model_path, callback.kth_best_model_path, callback.best_k_models) == ("", "", {})


@pytest.mark.parametrize("name", ["pipe", "device"])
def test_a_checkpoint_that_is_no_file_is_not_waited_for(tmp_path, name):
    path = tmp_path / "a.ckpt"
    os.mkfifo(path) if name == "pipe" else path.symlink_to("/dev/zero")
    assert "a.ckpt is missing; choose another checkpoint" in rejection(path)
