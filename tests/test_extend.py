"""Parts of the user's own code: docs/extend.md from a folder outside of the clone, every kind, and who imports them."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import in_a_fresh_process, in_this_process
from small_sweep import TINY

import sasrec_lab
from sasrec_lab.errors import InputError
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run.checkpoint_file import load

PAGE = (Path(__file__).parent.parent / "docs" / "extend.md").read_text()
DATA = TINY[:3]
RUN = [*DATA, "trainer=fast"]
REST = """
from dataclasses import dataclass

import numpy as np
from sasrec_lab.data.negatives import SharedSampler, UniformSampler
from sasrec_lab.data.objectives import NextItem
from sasrec_lab.model.head import Head
from sasrec_lab.model.ligr import LiGRBlock
from sasrec_lab.training.losses import bce

own_bce = bce


@dataclass
class Persistence:
    p: float = 0.8


def rbp(ranked, k, options: Persistence):
    is_hit = (ranked.rank > 0) & (ranked.rank <= k)
    gains = np.where(is_hit, (1 - options.p) * options.p ** (ranked.rank - 1.0), 0)
    return np.bincount(ranked.row, gains, len(ranked.count))


def recall(ranked, k):
    is_hit = (ranked.rank > 0) & (ranked.rank <= k)
    return np.bincount(ranked.row, is_hit, len(ranked.count)) / ranked.count


def one(ranked, k):
    return 1.0


class Uniform(UniformSampler):
    pass


class Shared(SharedSampler):
    pass


class Next(NextItem):
    pass


class Scores(Head):
    pass


class Gated(LiGRBlock):
    pass


class Opaque(LiGRBlock):
    def forward(self, x, layout, newest=None, rows=None):
        if float(x.sum()) == 0.5:  # a number of the program, which an export cannot depend on
            return x
        return super().forward(x, layout, newest, rows)
"""


def write_package(folder: Path) -> None:
    """Write the files of the page, and a module with a part of every other kind."""
    files = re.findall(r"`((?:my_package|mine)/[\w/]+\.\w+)`[^\n`]*:\n\n```(?:python|yaml)\n(.*?)```", PAGE, re.S)
    assert len(files) == 6
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "my_package" / "rest.py").write_text(REST)


def forget_package() -> None:
    """Let the next import of the package read its files."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def is_imported() -> bool:
    return any(name.partition(".")[0] == "my_package" for name in sys.modules)


def make_run(folder: Path) -> None:
    """Train a model with a block, a head and an objective of the package."""
    write_package(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        words = ["--config-dir", "mine", "model=local", "objective.name=my_package.rest:Next", *RUN]
        done = in_this_process("sasrec_lab.train", folder)(
            *words, "model.head=my_package.rest:Scores", "hydra.run.dir=run"
        )
        assert done.returncode == 0, done.stderr
    forget_package()


@pytest.fixture
def own(made_once, tmp_path, monkeypatch):
    """The test's own folder with the package, which can be imported but is not, and with a run of it."""
    made = made_once("own-code", make_run)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache", "__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    forget_package()
    yield tmp_path
    forget_package()


def info_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())["metrics"]


def refusal(done) -> str:
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    return done.stderr.removeprefix("error: ").strip()


# The page


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    """Its commands in their order, on generated data and for two epochs; the first of each in a fresh process."""
    write_package(tmp_path)
    commands = [shlex.split(words) for words in re.findall(r"^python -m sasrec_lab\.(.*)$", PAGE, re.M)]
    assert [words[0] for words in commands] == ["train"] * 5 + ["recommend", "export"]
    again = in_this_process("sasrec_lab.train", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, (module, *words) in enumerate(commands):
        more = RUN if module == "train" else []
        forget_package()
        run = again if module == "train" and number else in_a_fresh_process(f"sasrec_lab.{module}", tmp_path)
        done = run(*words, *more)
        assert (done.returncode, done.stderr) == (0, ""), words
    forget_package()
    outputs = tmp_path / "outputs"
    assert len(list((outputs / "losses").glob("*/metrics.json"))) == 2
    gammas = {
        info_of(folder)["config"]["loss"]["options"]["gamma"]
        for folder in (outputs / "gammas").iterdir()
        if folder.is_dir()
    }
    assert gammas == {1, 2}
    assert info_of(outputs / "local")["foreign"]["parts"]["model.block"]["options"] == {"width": 4}
    assert b"item_vectors/length" in b"".join(path.read_bytes() for path in (outputs / "lengths/tb").glob("*tfevents*"))


def test_the_metric_of_the_page_counts_first_places(own, train_here):
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "found_first" in code]
    (own / "my_package" / "metrics.py").write_text(code)
    (words,) = re.findall(r"`(\+evaluation\.metrics\.first\.name=[^`]*)`", PAGE)
    done = train_here(*words.split(), "model=tiny", *RUN, "evaluation.k=[1,10]", "hydra.run.dir=first")
    assert done.returncode == 0, done.stderr
    measured = metrics_of(own / "first")
    assert measured["test/first@10"] == measured["test/recall@1"]


# Every kind


def test_every_kind_trains_and_is_recorded(own, train_here):
    done = train_here(
        "--config-dir", "mine", "loss=focal", "model=local", "+callbacks=lengths", *RUN, "hydra.run.dir=all",
        "loss.sampler=my_package.rest:Uniform", "loss.negatives=2", "objective.name=my_package.rest:Next",
        "model.head=my_package.rest:Scores", "+evaluation.metrics.rbp.name=my_package.rest:rbp",
        "+evaluation.metrics.rbp.options.p=0.5", "evaluation.monitor=val/rbp@5",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    recorded = info_of(own / "all")["foreign"]
    assert {key: part["options"] for key, part in recorded["parts"].items()} == {
        "loss.name": {"gamma": 1.5},
        "loss.sampler": {},
        "model.block": {"width": 4},
        "model.head": {},
        "objective.name": {},
        "evaluation.metrics.rbp.name": {"p": 0.5},
        "callbacks.lengths.name": {"epochs": 1},
    }
    modules = ("blocks", "callbacks", "losses", "rest")
    assert set(recorded["modules"]) == {f"my_package.{name}" for name in modules}
    assert {"val/rbp@5", "test/rbp@10"} <= metrics_of(own / "all").keys()
    assert "loss my_package.losses:focal (2 negatives per position)" in done.stdout


@pytest.mark.parametrize(
    ("own_words", "built_in"),
    [
        (["loss.name=my_package.rest:own_bce"], []),
        (["loss.sampler=my_package.rest:Uniform"], ["loss.sampler=uniform"]),
        (["objective.name=my_package.rest:Next"], []),
        (["model.head=my_package.rest:Scores"], []),
        (["model.block=my_package.rest:Gated"], ["model.block=ligr"]),
        (["+callbacks.rate.name=pytorch_lightning.callbacks:LearningRateMonitor"], []),
    ],
)
def test_a_part_equals_the_built_in_one_that_it_copies(own, train_here, own_words, built_in):
    common = ["model=tiny", "loss=bce", "loss.negatives=2", "model.norm=pre", "model.ff_dim=32", *RUN]
    for name, words in (("own", own_words), ("built_in", built_in)):
        done = train_here(*common, *words, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    assert metrics_of(own / "own") == metrics_of(own / "built_in")
    mine, theirs = (load(own / name / "checkpoints" / "last.ckpt", "")["state_dict"] for name in ("own", "built_in"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "rows",
    [[], ["dataset.holdout=time", "dataset.time_split.target=all"], ["evaluation.sampled=5"]],
    ids=["one target", "several targets", "sampled"],
)
def test_an_own_metric_is_measured_on_all_rows(own, train_here, rows):
    done = train_here(
        "model=tiny", *RUN, *rows, "+evaluation.metrics.mine.name=my_package.rest:recall", "hydra.run.dir=m"
    )
    assert done.returncode == 0, done.stderr
    measured = metrics_of(own / "m")
    pairs = {name: name.replace("mine", "recall") for name in measured if "/mine@" in name}
    assert len(pairs) == (12 if "evaluation.sampled=5" in rows else 6)
    assert [measured[name] for name in pairs] == pytest.approx([measured[other] for other in pairs.values()])


def test_an_own_metric_of_another_shape_is_refused(own, train_here):
    done = train_here("model=tiny", *RUN, "+evaluation.metrics.mine.name=my_package.rest:one")
    assert refusal(done).startswith("evaluation.metrics.mine must return a finite number for each of ")


def test_a_model_without_epochs_takes_own_metrics_only(own, train_here):
    ease = ["model=ease", *DATA, "loss.name=my_package.missing:x"]  # it has no loss
    done = train_here(*ease, "+evaluation.metrics.rbp.name=my_package.rest:rbp", "hydra.run.dir=ease")
    assert done.returncode == 0, done.stderr
    assert "test/rbp@10" in metrics_of(own / "ease")
    lines = refusal(train_here(*ease, "+callbacks.x.name=my_package.rest:Next"))
    assert lines == "callbacks.x is for models trained in steps, which model=ease is not; remove it"


# Mistakes: before a folder is made, and in one line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["loss.name=my_packge.losses:focal"], "my_packge; did you mean my_package? If not, install it"),
        (["loss.name=my_package.loses:focal"], "no module my_package.loses; did you mean my_package.losses?"),
        (["loss.name=my_package.losses:focl"], "my_package.losses has no focl; did you mean focal?"),
        (
            ["loss.name=my_package.losses"],
            "is not one of softmax, sampled_softmax, bce, gbce, bpr; a loss of your own is",
        ),
        (["loss.name=softmxa"], "is not one of softmax, sampled_softmax, bce, gbce, bpr; did you mean softmax?"),
        (["loss.name=my_package.blocks:Local"], "must be callable with (states, table, labels, negatives, cfg)"),
        (["model.block=my_package.losses:focal"], "is not a block: it has no forward"),
        (["model.head=2"], "model.head=2 must be package.module:Name; did you mean model.heads?"),
        (
            ["+callbacks.x.name=my_package.rest:Persistence"],
            "must be a class that inherits from pytorch_lightning.Callback",
        ),
        (
            ["+callbacks.x.name=my_package.blocks:Local"],
            "must be callable with no arguments, and options if it has any",
        ),
        (["loss=focal", "loss.options.gama=3"], "the config does not set it; add it as +loss.options.gama=..."),
        (["loss=focal", "+loss.options.gama=3"], "'loss.options.gama'; did you mean loss.options.gamma?"),
        (["loss=focal", "loss.options.gamma=big"], "loss.options.gamma=big must be a number"),
        (["+loss.options.gamma=3"], "loss.options has gamma, but loss.name=softmax has no options"),
        (["model.head=my_package.rest:Scores", "+model.head_options.x=1"], "my_package.rest:Scores takes no options"),
        (["+model.head_options.x=1"], "model.head_options has x, but only a head of your own has options"),
        (["loss=focal", "capture=true"], "the operations of loss.name=my_package.losses:focal may depend on a batch"),
        (["loss=focal", "optimizer.name=rowwise_adam"], "loss.name=my_package.losses:focal may touch others; use adam"),
        (["loss=focal", "loss.exclude=history"], "loss.exclude=history only applies to loss=softmax"),
        (["loss=focal", "loss.negatives=3"], "must be 0 for loss.sampler=none, which draws none"),
        (
            ["loss=bce", "loss.sampler=my_package.rest:Shared"],
            "draws for each batch, but loss=bce takes negatives of each",
        ),
        (["model=local", "tensorboard.attention_users=1"], "draws the softmax of attention, which model.block="),
        (["+evaluation.metrics.ndcg.name=a:b"], "evaluation.metrics.ndcg has the name of a built-in metric"),
        (["+callbacks.x.nam=a:b"], "unknown key 'callbacks.x.nam'; did you mean name?"),
        (["+callbacks.x=a:b"], "callbacks.x is a section; set callbacks.x.name=package.module:Name"),
    ],
)
def test_a_mistake_with_own_code_is_one_line(own, train_here, words, line):
    model = [] if "model=local" in words else ["model=tiny"]
    done = train_here("--config-dir", "mine", *model, *RUN, "hydra.run.dir=none", *words)
    assert line in refusal(done)
    assert not (own / "none" / "items.npz").exists()


def test_a_module_that_fails_is_named_with_its_line(own, train_here):
    (own / "broken.py").write_text("import math\nx = 1 / 0\n")
    (own / "unreadable.py").write_text("def f(:\n")
    (own / "lacking.py").write_text("import no_such_library\n")
    for name, reason in {
        "broken": "(broken.py, line 2): ZeroDivisionError: division by zero; correct it",
        "unreadable": "(unreadable.py, line 1): SyntaxError: invalid syntax; correct it",
        "lacking": "(lacking.py, line 1): ModuleNotFoundError: No module named 'no_such_library'; correct it",
    }.items():
        expected = f"loss.name={name}:x: importing {name} failed {reason}"
        assert refusal(train_here("model=tiny", *RUN, f"loss.name={name}:x")) == expected


# Trust


def test_a_run_with_own_code_needs_trust(own, recommend_here):
    words = ["run=run", "users=[1]", "k=2"]
    assert refusal(recommend_here(*words)) == (
        "model.block=my_package.blocks:Local is code that is not of this package; if you trust the module"
        " my_package.blocks that you have here, add trust=[my_package]"
    )
    export = in_this_process("sasrec_lab.export.__main__", own)
    assert "add trust=[my_package]" in refusal(export("run", "x.pt2"))
    assert "add trust=[my_package]" in refusal(export("run", "x.pt2", "trust=[my_packag]"))
    assert "model.block=my_package.blocks:Local is code" in refusal(recommend_here(*words, "trust=my_package.rest"))
    assert not (own / "x.pt2").exists()
    listed = recommend_here(*words, "trust=[my_package]")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert export("run", "x.pt2", "trust=[my_package]").returncode == 0


def test_python_trusts_what_it_is_given(own, monkeypatch):
    monkeypatch.chdir(own)
    run = sasrec_lab.load_run("run", device="cpu")
    with pytest.raises(InputError, match=r"add trust=\[my_package\]"):
        run.encoder  # noqa: B018
    assert not is_imported()
    trusted = sasrec_lab.load_run("run", device="cpu", trust="my_package")
    assert type(trusted.encoder.blocks[0]).__name__ == "Local"
    words = ["model=local", *RUN]
    trained = sasrec_lab.train_model(*words, folder="trained", config_dir="mine")
    assert type(trained.encoder.blocks[0]).__name__ == "Local"


def test_trust_must_be_names_of_packages(own, recommend_here):
    for given in ("3", "[a/b]"):
        assert refusal(recommend_here("run=run", "users=[1]", f"trust={given}")).startswith("trust=")
    with pytest.raises(InputError, match="must be the name of a package"):
        Recommender.from_run(own / "run", trust=["my-package"])


def test_an_exported_own_block_scores_as_the_recommender(own):
    recommender = Recommender.from_run(own / "run", device="cpu", trust=["my_package"])
    program = in_this_process("sasrec_lab.export.__main__", own)("run", "x.pt2", "trust=my_package")
    assert program.returncode == 0, program.stderr
    ids = json.loads((own / "x.json").read_text())["items"]
    scores = torch.export.load(own / "x.pt2").module()(torch.tensor([3, 1, 2]))
    history = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [ids[2], ids[0], ids[1]], "datetime": [1, 2, 3]})
    listed = recommender.recommend([1], k=len(ids), interactions=history, filter_viewed=False)
    expected = scores.detach().numpy()[[ids.index(item) for item in listed["item_id"]]]
    assert listed["score"].to_numpy() == pytest.approx(expected, abs=1e-5)


def test_a_block_that_cannot_be_exported_is_one_line(own, train_here):
    done = train_here(
        "model=tiny", "model.norm=pre", "model.block=my_package.rest:Opaque", *RUN, "hydra.run.dir=opaque"
    )
    assert done.returncode == 0, done.stderr
    export = in_this_process("sasrec_lab.export.__main__", own)
    done = export("opaque", "x.pt2", "trust=[my_package]")
    line = done.stderr.splitlines()[-1]  # torch prints the program so far before it
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert line.startswith("error: run=opaque: torch.export cannot export my_package.rest:Opaque: ")


def test_a_checkpoint_cannot_name_other_code(own, train_here, recommend_here):
    (own / "their_module.py").write_text("open('mark', 'w')\n")
    for path in (own / "run" / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        saved["hyper_parameters"]["config"]["model"]["block"] = "their_module:Block"
        torch.save(saved, path)
    line = refusal(recommend_here("run=run", "users=[1]", "trust=[my_package]"))
    assert line.startswith("model.block=their_module:Block is code that is not of this package")
    words = ["--config-dir", "mine", "model=local", "model.head=my_package.rest:Scores", *RUN]
    assert "model.block=their_module:Block is code" in refusal(
        train_here(*words, "init_from=run", "hydra.run.dir=warm")
    )
    assert not (own / "mark").exists()


def test_a_report_imports_no_own_code(own, report_here):
    done = report_here("run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "default is with code that is not of this package: my_package.rest:Next (" in done.stdout
    assert not is_imported()


def test_evaluating_lists_imports_no_own_code(own):
    (own / "lists.csv").write_text("user_id,item_id,rank\n1,2,1\n")
    done = in_this_process("sasrec_lab.evaluate.__main__", own)("lists=lists.csv", "run=run")
    assert done.returncode == 0, done.stderr
    assert not is_imported()


def test_init_from_needs_the_same_code_in_the_command(own, train_here):
    assert refusal(train_here("model=tiny", *RUN, "init_from=run")) == (
        "init_from=run has model.block=my_package.blocks:Local, not transformer; it is code that is not of this"
        " package: if you trust it, set model.block to that value"
    )
    assert not is_imported()
    words = ["--config-dir", "mine", "model=local", "model.head=my_package.rest:Scores", *RUN]
    done = train_here(*words, "init_from=run", "hydra.run.dir=warm")
    assert done.returncode == 0, done.stderr
    assert "weight tables of run" in done.stdout


def test_a_run_resumes_with_its_own_code_repeated(own, train_here):
    longer = ["hydra.run.dir=run", "ckpt=last", "trainer.max_epochs=3"]
    assert "has a different configuration (model" in refusal(train_here("model=tiny", *RUN, *longer))
    assert not is_imported()
    words = ["--config-dir", "mine", "model=local", "objective.name=my_package.rest:Next", *RUN]
    (own / "my_package" / "blocks.py").write_text((own / "my_package" / "blocks.py").read_text() + "\n")
    done = train_here(*words, "model.head=my_package.rest:Scores", *longer)
    assert done.returncode == 0, done.stderr
    assert "my_package.blocks changed since this run began: its epochs are of different code" in done.stdout


def test_help_and_printed_configs_import_nothing(own, train_here):
    for flags in (["--help"], ["--cfg", "job"], ["--info", "defaults"]):
        assert train_here(*flags, "--config-dir", "mine", "model=local", "loss=focal").returncode == 0
    assert not is_imported()


def test_a_config_of_a_run_folder_must_be_named_too(own, train_here):
    shutil.copytree(own / "mine", own / "run" / "theirs")
    words = ["--config-dir", "run/theirs", "loss=focal", "model=tiny", *RUN, "hydra.run.dir=new"]
    line = refusal(train_here(*words))
    assert line.startswith("loss.name=my_package.losses:focal is code that a config of a run folder names (run/theirs)")
    assert "add loss.name=my_package.losses:focal to the command line" in line
    assert not is_imported()
    assert train_here(*words, "loss.name=my_package.losses:focal").returncode == 0


def test_a_search_imports_no_code_that_its_trials_name(own):
    """The second value is checked with the first ones of other keys; if these are invalid, when its trial runs."""
    pytest.importorskip("optuna", minversion="5", reason="needs pip install 'sasrec-lab[search]'")
    shutil.copytree(own / "mine", own / "run" / "theirs")
    search = in_this_process("sasrec_lab.search.__main__", own)
    words = ["--config-dir", "run/theirs", "loss=softmax,focal", "model=tiny", "sampler=grid", *RUN]
    message = "loss.name=my_package.losses:focal is code that a config of a run folder names (run/theirs)"
    assert refusal(search(*words)).startswith(message)
    done = search(*words, "model.heads=3,1", "hydra.sweep.dir=found")
    assert done.returncode == 0, done.stderr
    trials = json.loads((own / "found/search.json").read_text())["trials"]
    assert [trial["status"] for trial in trials].count("finished") == 1  # one head, and a loss of this package
    assert sum((trial["error"] or "").startswith(message) for trial in trials) == 1
    assert not is_imported()
