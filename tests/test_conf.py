"""Every file of conf/ composes and validates, and a mistake gives one line with the nearest right name."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sasrec_lab.command_line import check_command_line, load
from sasrec_lab.config import CONF_DIR, TRAINER_FLAGS, InputError, flat, plain


def names_in(group: str) -> list[str]:
    folder = Path(CONF_DIR) / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [f"{group}={name}" for group in ("model", "loss", "trainer", "experiment") for name in names_in(group)],
)
def test_every_file_composes(override):
    load([override])


def test_experiments_say_how_to_run_them():
    for name in names_in("experiment"):
        header = (Path(CONF_DIR) / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
        assert f"# Command: python -m sasrec_lab.train experiment={name}" in header
        assert "# Protocol: " in header


def test_the_paper_preset_has_every_later_addition_off():
    cfg = load(["experiment=sasrec_paper/ml_1m"])
    optimizer = cfg.optimizer
    assert (optimizer.name.name, optimizer.lr, optimizer.betas) == ("adam", 1e-3, [0.9, 0.98])
    assert (optimizer.weight_decay, optimizer.warmup_steps, optimizer.cosine, optimizer.ema) == (0, 0, False, None)
    assert cfg.trainer["gradient_clip_val"] is None
    assert (cfg.model.dim, cfg.model.blocks, cfg.model.heads, cfg.model.maxlen, cfg.model.dropout) == (
        50,
        2,
        1,
        200,
        0.2,
    )
    assert (cfg.loss.name.name, cfg.loss.negatives, cfg.evaluation.sampled, cfg.evaluation.draw.name) == (
        "bce",
        1,
        100,
        "paper",
    )


def test_trainer_flags_are_lightnings():
    import pytorch_lightning as pl

    from sasrec_lab.config import _OURS

    real = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert set(TRAINER_FLAGS) | set(_OURS) == real


MISTAKES = {
    "model.head=2": "unknown key 'model.head'; did you mean model.heads?",
    "+model.head=2": "unknown key '+model.head'; did you mean model.heads?",
    "modle.dim=2": "unknown key 'modle.dim'; did you mean model.dim?",
    "model.dim=abc": "model.dim: Value 'abc' of type 'str' could not be converted to Integer",
    "model.pos_emb=learnt": "model.pos_emb: Invalid value 'learnt', expected one of [learned, sinusoidal, none]",
    "model.heads=3": "model.dim=64 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16, 32, 64",
    "model.maxlen=0": "model.maxlen=0 must be at least 1",
    "model.dropout=1": "model.dropout=1.0 is not a probability from 0 to below 1",
    "model=sasrecc": "model=sasrecc does not exist; did you mean sasrec?; model is one of: sasrec, tiny",
    "loss=bpr": "loss=bpr does not exist; loss is one of: bce, gbce, sampled_softmax, softmax",
    "loss.negatives=5": (
        "loss.negatives=5: loss=softmax ranks every item and draws none; use 0, or loss=sampled_softmax"
    ),
    "loss.calibration=.5": "loss.calibration=0.5 is t of loss=gbce; loss=softmax has none: use 0",
    "loss.calibration=2": "loss.calibration=2.0 is not a share from 0 to 1",
    "optimizer.name=rowwise_adam": (
        "optimizer.name=rowwise_adam updates the rows that a batch touches, and loss=softmax touches them all;"
        " use adam, or loss=sampled_softmax"
    ),
    "optimizer.lr=0": "optimizer.lr=0.0 must be above 0",
    "optimizer.ema=1": "optimizer.ema=1.0 is not a decay between 0 and 1; null switches averaging off",
    "trainer.max_epoch=3": "unknown key 'trainer.max_epoch'; did you mean trainer.max_epochs?",
    "+trainer.max_epoch=3": "trainer.max_epoch is not a Lightning Trainer flag; did you mean max_epochs?",
    "trainer.profiler=simple": (
        "unknown key 'trainer.profiler': it is a Lightning Trainer flag that this file leaves out;"
        " write +trainer.profiler=..."
    ),
    "+trainer.logger=false": "trainer.logger is set by train.py and cannot be given",
    "trainer.max_epochs=abc": "trainer.max_epochs=abc must be a whole number of at least 1, or -1 for no limit",
    "evaluation.monitor=val/ndgc@10": (
        "evaluation.monitor=val/ndgc@10 is not measured; did you mean val/ndcg@10?"
        " (the validation metrics at evaluation.k=[5, 10, 20])"
    ),
    "dataset=csv": "dataset.path has no value; give it one, in a file or on the command line",
    "dataset.separator=''": "dataset.separator is empty; it is the text between two columns, such as ',' or '\\t'",
    "dataset.weight.above=5": (
        "a key is given below one that is null here, such as dataset.weight; set that one: dataset.weight={...}"
    ),
    "experiment=quality/sasrec_ml1m": (
        "experiment=quality/sasrec_ml1m does not exist; did you mean quality/sasrec_ml_1m?;"
        " experiment is one of: quality/sasrec_ml_1m, sasrec_paper/beauty, sasrec_paper/ml_1m"
    ),
    "seed=1,2": "seed=1,2 has several values; add -m to run one job for each, or write [...] for a list",
    "seed=-1": "seed=-1 must be at least 0",
    "+experiment=sasrec_paper/beauty": (
        "experiment is chosen already; to choose another write experiment=..., without '+'"
    ),
    "name=../up": "name='../up' names a folder below outputs/; use letters, digits, '_', '-', '/'",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_gives_one_line(override, message):
    with pytest.raises(InputError) as caught:
        check_command_line([override])
    assert str(caught.value) == message


def test_a_mistake_in_a_file_names_file_and_key(tmp_path):
    (tmp_path / "experiment").mkdir()
    for name, text in {"root": "modle:\n  dim: 5\n", "inner": "model:\n  dmi: 5\n"}.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    for name, message in {
        "root": "experiment/root.yaml: unknown key 'modle'; did you mean model?",
        "inner": "experiment/inner.yaml: unknown key 'model.dmi'; did you mean model.dim?",
    }.items():
        with pytest.raises(InputError) as caught:
            check_command_line(["--config-dir", str(tmp_path), f"experiment={name}"])
        assert str(caught.value) == message


def test_a_users_own_files_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - sasrec\n\ndim: 32\n")
    cfg, _ = check_command_line(["--config-dir", str(tmp_path), "model=mine"])
    assert cfg.model.dim == 32


def test_of_a_sweep_the_first_job_is_checked():
    assert check_command_line(["-m", "seed=range(3)", "model.heads=1,2"]) is None
    with pytest.raises(InputError, match=r"model.dim=64 is not a multiple of model.heads=3"):
        check_command_line(["-m", "seed=0,1", "model.heads=3,1"])


def test_plain_values_are_json_and_weights_only_safe():
    tree = plain(load(["dataset=kion"]))
    assert tree["dataset"]["weight"] == {"column": "watched_pct", "above": 10.0, "then": 3.0, "otherwise": 1.0}
    assert flat(tree)["model/pos_emb"] == "learned"
    assert all(isinstance(value, (int, float, str, list, type(None))) for value in flat(tree).values())


def test_help_is_a_menu_and_imports_no_torch(tmp_path):
    code = "import sys; from sasrec_lab import train; sys.argv = ['train', '--help']; train.entry()"
    done = subprocess.run(
        [sys.executable, "-c", code + "\n"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0
    for word in ("dataset: bert4rec_beauty, csv,", "loss: bce, gbce,", "python -m sasrec_lab.train", "blocks: 2"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^python -m sasrec_lab\.train (.+)$|`python -m sasrec_lab\.train ([^`]+)`", README, re.M)


@pytest.mark.parametrize("words", [first or second for first, second in COMMANDS])
def test_every_command_of_the_readme_is_taken(words):
    """That they are understood as they stand; test_train runs their like on data made for it."""
    check_command_line(shlex.split(words.replace("<time>", "t"), comments=True))


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8
