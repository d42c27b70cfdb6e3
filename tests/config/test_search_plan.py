"""Plans of searches: spaces as they are written, mistakes, folders, and what composing them imports and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from sasrec_lab.config.search import check_search
from sasrec_lab.config.search_space import Dimension
from sasrec_lab.errors import InputError

LR = "optimizer.lr=tag(log,interval(0.001,0.1))"


def dimension(word: str) -> Dimension:
    (found,) = check_search([word]).space
    return found


def test_a_key_with_several_values_is_a_dimension():
    assert dimension("model.dim=32,64") == Dimension("model.dim", "32,64", values=["32", "64"])
    assert dimension("model.dim=choice(32,64,32)").values == ["32", "64"]
    assert dimension("model.dim=range(16,65,16)") == Dimension("model.dim", "range(16,65,16)", None, 16, 64, 16)
    assert dimension("model.dim=int(interval(16,64))") == Dimension("model.dim", "int(interval(16,64))", None, 16, 64)
    assert dimension(LR) == Dimension("optimizer.lr", LR.partition("=")[2], None, 0.001, 0.1, is_log=True)
    assert dimension("loss=glob(*bce)").values == ["bce", "gbce"]
    assert dimension("model.dim=range(64,16,-16)").values == ["64", "48", "32"]


def test_kind_size_and_words_of_dimensions():
    dropout = dimension("model.dropout=range(0.1,0.5,0.1)")
    assert (dropout.kind, dropout.size) == ("float", 4)
    assert [dropout.word(value) for value in dropout.listed()] == [f"model.dropout=0.{tenth}" for tenth in (1, 2, 3, 4)]
    dims = dimension("model.dim=range(16,65,16)")
    assert (dims.kind, dims.listed()) == ("int", [16, 32, 48, 64])
    assert (dimension(LR).kind, dimension(LR).size) == ("float", float("inf"))
    assert dimension("model.dim=int(interval(16,64))").size == 49
    mixed = dimension("model.dropout=range(0,0.5,0.1)")  # an integer first
    assert (mixed.kind, mixed.size, mixed.word(mixed.listed()[0])) == ("float", 5, "model.dropout=0.0")


def test_a_sweep_file_is_a_space():
    plan = check_search(["sweep=small", "model.dim=8,16", "model.blocks=1"])
    assert {each.key: each.kind for each in plan.space} == {
        "model.dim": "choice",
        "model.dropout": "float",
        "optimizer.lr": "float",
    }
    assert plan.space[0].values == ["8", "16"]  # of the command line
    assert sorted(plan.fixed) == ["model.blocks=1", "sweep=small"]
    assert (plan.trials, plan.seeds, plan.example.model.blocks) == (20, [0], 1)


def test_words_and_folders_of_runs_have_the_seed_if_several():
    params = {"model.dim": "8", "optimizer.lr": 0.0125}
    plan = check_search(["model.dim=8,16", LR, "seed=3"])
    assert plan.words(params, 3) == ["seed=3", "model.dim=8", "optimizer.lr=0.0125"]
    assert plan.run_folder(2, params, 3).name == "2-model.dim=8,optimizer.lr=0.0125"
    plan = check_search(["model.dim=8,16", LR, "seed=3", "seeds=2"])
    assert plan.seeds == [3, 4]
    assert plan.words(params, 4) == ["model.dim=8", "optimizer.lr=0.0125", "seed=4"]
    assert plan.run_folder(2, params, 4).name == "2-model.dim=8,optimizer.lr=0.0125,seed=4"


def test_a_grid_has_the_combinations_of_a_sweep():
    plan = check_search(["model.heads=1,2", "model.dim=range(8,25,8)", "sampler=grid"])
    assert plan.trials == 6
    assert list(plan.combinations())[:4] == [
        {"model.heads": heads, "model.dim": dim} for heads, dim in (("1", 8), ("1", 16), ("1", 24), ("2", 8))
    ]
    assert check_search(["model.heads=1,2", "trials=9", "sampler=grid"]).trials == 2
    assert check_search(["model.heads=1,2", "trials=1", "sampler=grid"]).trials == 1


def test_the_folder_is_that_of_the_same_command():
    folder = check_search(["sweep=small", "model.blocks=1", "batch_size=64"]).folder
    assert folder.parent == Path("outputs/ml_100k")
    assert folder.name.startswith("search-small-")
    same = ["batch_size=64", "sweep=small", "trials=50", "model.blocks=1", "jobs=2", "data_dir=/elsewhere"]
    assert check_search(same).folder == folder
    for other in ("model.blocks=2", "seeds=2", "sampler=random", "pruner=none", "model.dim=8,16", "seed=1"):
        assert check_search(["sweep=small", "batch_size=64", "model.blocks=1", other]).folder != folder
    assert check_search(["model.dim=8,16", "hydra.sweep.dir=here/it is"]).folder == Path("here/it is")


def test_a_definition_has_no_searched_key():
    definition = check_search(["model.dim=8,16", "loss=bce,softmax", "model.blocks=1"]).definition()
    assert definition["space"] == {"model.dim": "8,16", "loss": "bce,softmax"}
    assert "dim" not in definition["config"]["model"]
    assert "loss" not in definition["config"]
    assert definition["config"]["model"]["blocks"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.dim=8"], "there is nothing to search: choose a space such as sweep=small, or give a key several"),
        (["sweep=smal"], "sweep=smal does not exist; did you mean small? (sweep is one of: dim, items, maxlen, small)"),
        (["model.dim=8,16", "trails=3"], "unknown key 'trails'; did you mean trials?"),
        (["model.dims=8,16"], "unknown key 'model.dims'; did you mean model.dim?"),
        (["model.dim=8,16", "trials=0"], "trials=0 must be at least 1"),
        (["model.dim=8,16", "trials=many"], "trials=many must be an integer"),
        (["model.dim=8,16", "sampler=tp"], "sampler=tp is not one of tpe, random, grid; did you mean tpe?"),
        (["model.dim=8,16", "seeds=4", "pruner=wilcoxon"], "set seeds to at least 5, not 4, or use another pruner"),
        (["seed=0,1"], "seed=0,1: a seed is not searched; seeds=<number> trains each trial with several"),
        (["model.dropout=interval(0.5,0.1)"], "must be an interval from a number to a larger one"),
        (["model.dropout=interval(0,inf)"], "must be an interval from a number to a larger one"),
        (["model.dropout=tag(log,interval(0,0.1))"], "an interval with tag log must begin above 0"),
        (["model.dim=tag(log,choice(8,16))"], "the only tag is log, for intervals, as in tag(log,interval(0.001,0.1))"),
        ([LR, "sampler=grid"], "sampler=grid needs values to list, but optimizer.lr=tag(log,interval(0.001,0.1)) is"),
        (["seed=1", "model.dim=range(20000)"], "has more than 10,000 values; use an interval"),
        (["model.dim=range(200)", "model.maxlen=range(200)", "sampler=grid"], "10,000 combinations at most"),
        (["model.dim=8,16", "dataset.holdout=none"], "a search compares trials on validation, which"),
        (["model.dim=8,16", "trainer=ddp"], "trainer.devices=-1: each run of a search has one device; set it to 1"),
        (["model.dim=8,16", "ckpt=last"], "ckpt=last is for one run; remove it: the same command continues its search"),
        (["model.dim=8,16", "cluster=ray"], "cluster is for one run on several machines; remove it, and start"),
        (["model.dim=8,16", "hydra/launcher=joblib"], "jobs=<number> runs several trials at a time; remove it"),
        (["model.dim=8,16", "hydra.run.dir=x"], "only hydra.sweep.dir is used; remove it"),
        (["model.dim=8,16", "--cfg", "job"], "--cfg is for one run: python -m sasrec_lab.train --cfg; remove it here"),
        (["model.dim=8,16", "-m"], "search cannot run a sweep; remove -m"),
        (["small"], "small is not of the form key=value"),
    ],
)
def test_a_mistake_in_a_search_gives_one_line(words, message):
    with pytest.raises(InputError) as caught:
        check_search(words)
    assert message in str(caught.value), caught.value


def test_code_of_any_file_that_is_searched_is_refused(tmp_path):
    (tmp_path / "loss").mkdir()
    for name, text in {"mine": "", "theirs": "hydra: {callbacks: {x: {_target_: os.system}}}\n"}.items():
        (tmp_path / "loss" / f"{name}.yaml").write_text(
            f"# @package _global_\n{text}loss: {{name: softmax, negatives: 0, sampler: none, calibration: 0.0}}\n"
        )
    with pytest.raises(InputError, match=r"hydra\.callbacks\.x\._target_=os\.system would run code"):
        check_search(["--config-dir", str(tmp_path), "loss=mine,theirs"])


def test_a_first_combination_may_be_invalid():
    plan = check_search(["model.heads=3,1"])
    assert plan.example.model.heads == 1


def test_help_of_a_search_appears_at_once(tmp_path):
    code = (
        "import sys; from sasrec_lab.search import __main__ as command\n"
        "sys.argv = ['search', 'model.dim=1,2', '--help']\n"
        "try: command.entry()\n"
        "finally: print(sorted({'torch', 'optuna', 'numpy', 'importlib.metadata'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("python -m sasrec_lab.search sweep=small", "pruner: median", "jobs        number of trials"):
        assert word in done.stdout
    assert done.stdout.endswith("[]\n")
