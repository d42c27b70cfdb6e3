"""Odd words on a command line are refused in one line before a folder is made, whatever they are."""

import functools
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec_lab.config.checks import _CHOICES, _RULES, REJECTED_FLAGS, TRAINER_FLAGS, check_trainer_flag
from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import _USUAL_NAMES, known_keys
from sasrec_lab.config.hydra_errors import explain, run_hydra
from sasrec_lab.config.overrides import _parse, format_override, normalize
from sasrec_lab.config.schema import SCHEMAS
from sasrec_lab.errors import InputError, printable


def refused(line: str | list[str], name: str = "train") -> str:
    """Return the message on a command line, which must be one printable line."""
    words = shlex.split(line) if isinstance(line, str) else line
    with pytest.raises(InputError) as caught:
        check_command_line(normalize(words), name)
    text = str(caught.value)
    assert printable(text) == text
    assert 0 < len(text) < 2000
    return text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--hlep", "--hlep is not a flag; did you mean --help?"),
        ("--multi seed=1,2", "--multi is not a flag; did you mean --multirun?"),
        ("--seed=1", "--seed is not a flag, and keys have no dashes; write seed=1"),
        ("--quiet", "--quiet is not a flag; --hydra-help lists the flags, and --help the keys"),
        ("--cfg", "--cfg/-c: expected one argument; --hydra-help lists the flags"),
        ("--cfg job --info", "--cfg and --info exclude each other; remove one"),
        ("--resolve", "--resolve only applies to a printed config; add --cfg job, or remove --resolve"),
        ("--cfg job --resolve dataset.name='${nope}'", "hydra.run.dir: Interpolation key 'nope' not found; "
         "${...} must name another key that exists; correct it, or write the value"),
        ("--cfg job --package nope", "--package nope is not a section of the config; --help lists them"),
        ("-sc", "--shell-completion takes one of install=bash, install=zsh and install=fish; add one"),
        ("lr=0.1", "unknown key 'lr'; did you mean optimizer.lr?"),
        ("evaluation.k=1000", "evaluation.monitor=val/ndcg@10 is not measured at evaluation.k=[1000] and"
         " evaluation.sampled=0; set evaluation.monitor=val/ndcg@1000, for example"),
        ("experiment=dross/ml_1m model=ease", "experiment/dross/ml_1m.yaml: model.dim is not a key of model=ease;"
         " experiment=dross/ml_1m is for encoders: choose one, or remove experiment"),
        ("model=itemknn ablation=blocks_1", "ablation/blocks_1.yaml: model.blocks is not a key of model=itemknn;"
         " ablation=blocks_1 is for encoders: choose one, or remove ablation"),
        ("model=ease model.dim=3", "unknown key 'model.dim'; model has name, regularization"),
        ("-m model=sasrec,ease model.dim=16", "model.dim is not a key of model=ease; give the models that have it a"
         " sweep of their own"),
        ("-m model=ease,sasrec model.regularization=3", "model.regularization is not a key of encoders; give the models"
         " that have it a sweep of their own"),
        ("experiment=esasrec/ml_1m dross=sasrec_plus", "loss.negatives=256 must be 0 for loss=softmax, which scores"
         " every item; set it to 0, or use loss=sampled_softmax; files of dross/ are rows of experiment=dross/...,"
         " not of experiment=esasrec/ml_1m"),
        ("epochs=5", "unknown key 'epochs'; did you mean trainer.max_epochs?"),
        ("learning_rate=0.1", "unknown key 'learning_rate'; did you mean optimizer.lr?"),
        ("device=cuda", "unknown key 'device'; did you mean trainer.accelerator?"),
        ("batch=8", "unknown key 'batch'; did you mean batch_size?"),
        ("layers=2", "unknown key 'layers'; did you mean model.blocks?"),
        ("hidden_size=8", "unknown key 'hidden_size'; did you mean model.dim?"),
        ("max_len=8", "unknown key 'max_len'; did you mean model.maxlen?"),
        ("n_heads=2", "unknown key 'n_heads'; did you mean model.heads?"),
        (
            "path=x.csv",
            "unknown key 'path'; did you mean dataset.path or dataset.titles.path or dataset.features.path?",
        ),
        ("max_epochs=3", "unknown key 'max_epochs'; did you mean trainer.max_epochs?"),
        ("dataset.weigth.column=a", "unknown key 'dataset.weigth.column'; did you mean dataset.weight.column?"),
        ("cluster.workers=3", "cluster.workers=3: a run has no cluster unless it is chosen; add cluster=ray"),
        ("published.foo=1", "published.foo=1: the section is null; set it as <section>={<key>: <value>}"),
        ("~model", "~model would delete a key that every run needs; remove ~model, or write model=<value>"),
        ("~nothing", "~nothing has nothing to delete; remove it"),
        ("model.norm=prre", "model.norm=prre is not one of sasrec, pre, post; did you mean pre?"),
        ("model.final_norm=maybe", "model.final_norm=maybe must be true or false"),
        ("model.dim=[1]", "model.dim=[1] must be an integer"),
        ("seed=null", "seed=null must have a value; set it, or omit seed"),
        ("optimizer.betas=3", "optimizer.betas must be a list; write optimizer.betas=[...]"),
        ("evaluation.k=[a]", "evaluation.k=['a'] must be integers, such as 10 or [5,10]"),
        ("dataset.min_rating=nan", "dataset.min_rating=nan must be a number"),
        ("model=3", "a config group takes the name of a file, as in model=sasrec; to change a key write"
         " model.<key>=<value>"),
        ("trainer=[1]", "a config group takes the name of a file, as in model=sasrec; to change a key write"
         " model.<key>=<value>"),
        ("evaluation=3", "evaluation is a section; set its keys, as in evaluation.<key>=<value>"),
        ("evaluation=[1]", "evaluation is a section; set its keys, as in evaluation.<key>=<value>"),
        ("model={a:b}", "unknown key 'model.a'; model has block, blocks, heads, dim, maxlen, "),
        ("dataset.sources=[{urll:x}]", "unknown key 'dataset.sources.urll'; did you mean dataset.sources.url?"),
        ("name='${name}'", "hydra.run.dir: Recursive interpolation detected; "
         "${...} must name another key that exists; correct it, or write the value"),
        ("dataset.weight='${nope}'", "dataset.weight is a section and must not be an interpolation (${...}); "),
        ("dataset.weight='${dataset}'", "dataset.weight is a section and must not be an interpolation (${...}); "),
        ("dataset.weight='${dataset.path}'", "dataset.weight is a section and must not be an interpolation (${...}); "),
        ("evaluation='${seed}'", "evaluation is a section and must not be an interpolation (${...}); "),
        ("evaluation.monitor=ndcg", "evaluation.monitor=ndcg is not measured at evaluation.k=[5, 10, 20] and"
         " evaluation.sampled=0; set evaluation.monitor=val/ndcg@5, for example"),
        ("dataset=a/my.csv", "dataset=a/my.csv does not exist; for a file of your own write dataset=csv"
         " dataset.path=a/my.csv"),
        ("hydra.run.dir='${nope}'", "hydra.run.dir: Interpolation key 'nope' not found; "
         "${...} must name another key that exists; correct it, or write the value"),
        ("model='${dataset.path}'", "model=${dataset.path} must name a file of the group, or refer to one of "),
        ("hydra/job_logging=none", "hydra/job_logging=none lacks the handlers console and file, which runs log to;"
         " choose hydra/job_logging=default"),
        ("hydra.job_logging.version=2",
         "hydra/job_logging must be a logging configuration; remove it, or choose default"),
        ("hydra.sweeper=null", "hydra.sweeper must name its class; remove it, or choose hydra/sweeper=basic"),
        ("+model.dim=3", "model.dim has a value already; to replace it, write model.dim=... without '+'"),
        ("+callbacks=lengths", "+callbacks=lengths: there is no file callbacks/lengths.yaml; give the folder that has"
         " it with --config-dir"),
        ("hydra.verbose=3", "hydra.verbose=3 must be true, false, or names of loggers"),
        ("hydra.searchpath=[foo]", "hydra.searchpath: there is no folder foo; correct the path, or use --config-dir"),
        ("help", "help is not of the form key=value; write --help"),
        ("tiny", "tiny is not of the form key=value; write model=tiny"),
        ("my.csv", "my.csv is not of the form key=value; write dataset=csv dataset.path=my.csv"),
        ("modle.dim", "modle.dim is not of the form key=value; did you mean model.dim=<value>?"),
        ("\"'model.dim=3\"", "'model.dim=3 has a stray quote or blank; write model.dim=3"),
        ("'mo del=3'", "mo del=3 has a malformed key; keys are names with dots between them, such as model.dim"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_its_fix(line, message):
    text = refused(line)
    assert text.startswith(message) if message.endswith((", ", "; ", " of ")) else text == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--user 1", "--user is not a flag, and keys have no dashes; write users=<value>"),
        ("outputs/a", "outputs/a is not of the form key=value; write run=outputs/a"),
        ("run=a users=all device=gpu",
         "device=gpu is not one of auto, cpu, cuda, cuda:<number>, mps; did you mean cuda?"),
        ("run=a users=all -m", "recommend cannot run a sweep; remove -m"),
        ("run=a users='${users}'", "users: Recursive interpolation detected; "
         "${...} must name another key that exists; correct it, or write the value"),
    ],
)  # fmt: skip
def test_a_mistake_of_recommend_is_answered_with_its_fix(line, message):
    assert refused(line, "recommend") == message


LONG = "a" * 5000
ODD = [
    ["seed=" + "9" * 5000], ["optimizer.lr=0." + "3" * 5000 + "x" * 3], [LONG], [LONG + "=1"], ["name=" + LONG],
    ["hydra.run.dir=" + LONG], ["hydra.run.dir=" + "a/" * 3000], ["model.dim=" + "[" * 2000],
    ["model.dim=" + "[" * 500 + "]" * 500], ["model.dim=" + "{a:" * 300 + "}" * 300], ["model=" + LONG],
    ["seed=1\x00"], ["name=a\x1b[31m"], ["name=\ud800"], ["hydra.run.dir=\udcff"], ["ckpt=\udcff\n"], ["\x00"],
    ["--config-dir", "a\x00b"], ["--config-dir", LONG], ["--config-dir", "\udcff"],
    ["--package", "x" * 300, "--cfg", "job"], ["seed==" + LONG], ["seed=", LONG], ["--info", LONG],
    ["--\udcff"], ["--" + LONG],
]  # fmt: skip


@pytest.mark.parametrize("words", ODD, ids=lambda words: ascii(words[-1])[:30])
def test_odd_characters_and_lengths_are_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key", ["model.maxlen", "model.dim", "seed", "batch_size", "trainer.max_epochs", "dataset.min_user"]
)
def test_integers_of_more_than_64_bits_are_refused(key):
    message = f"{key}=10000000000000000000 must be an integer of 64 bits; use a smaller one"
    assert refused(f"{key}=10000000000000000000") == message
    assert refused("evaluation.k=[5,10000000000000000000]").startswith("evaluation.k=10000000000000000000 must be")


WRONG = [None, "", "x", [], [1], {}, {"a": 1}, -7, 0, -0.5, float("nan"), float("inf"), 10**30, True, 1.5, "1", "nan"]
FITS = {  # of these values
    "devices": [[1]], "max_epochs": [None, 10**30], "max_steps": [10**30], "min_epochs": [None, 10**30],
    "min_steps": [None, 10**30], "max_time": [None, {}], "limit_train_batches": [10**30],
    "limit_val_batches": [0, 10**30], "check_val_every_n_epoch": [10**30], "accumulate_grad_batches": [10**30],
    "num_sanity_val_steps": [None, 0, 10**30], "log_every_n_steps": [None, 0, 10**30], "num_nodes": [],
    "reload_dataloaders_every_n_epochs": [0, 10**30], "gradient_clip_val": [None, 10**30, 1.5],
    "deterministic": [None, True], "gradient_clip_algorithm": [None], "profiler": [None],
    **{flag: [None, True] for flag in ("enable_progress_bar", "enable_model_summary", "benchmark")},
    **{flag: [True] for flag in ("inference_mode", "detect_anomaly", "sync_batchnorm")},
    **{flag: [] for flag in ("accelerator", "strategy", "precision")},
}  # fmt: skip


def test_every_trainer_flag_is_rejected_or_has_a_rule():
    assert set(_CHOICES) | set(_RULES) == set(TRAINER_FLAGS) - set(REJECTED_FLAGS) == set(FITS)


@pytest.mark.parametrize("flag", FITS)
def test_values_of_a_wrong_type_are_refused_for_a_flag(flag):
    accepted = []
    for value in WRONG:
        try:
            check_trainer_flag(flag, value)
            accepted.append(value)
        except InputError as error:
            assert str(error).startswith(f"trainer.{flag}=")  # noqa: PT017
    assert repr(accepted) == repr(FITS[flag])


@pytest.mark.parametrize("value", ["00:02:00:00", "999:23:59:59", {"hours": 2}, {"days": 1, "minutes": 0.5}])
def test_time_limits_of_lightning_are_accepted(value):
    check_trainer_flag("max_time", value)
    assert refused("trainer.max_time=2h").startswith("trainer.max_time=2h must be days:hours:minutes:seconds, such as")


@pytest.mark.parametrize(
    "line", ["seed=1,2 -m hydra.sweep.dir=s", "seed=1,2 hydra.sweep.dir=s -m", "-m hydra.sweep.dir=s seed=1,2"]
)
def test_the_flag_of_a_sweep_may_be_anywhere(line):
    words = normalize(line.split())
    assert words[0] == "-m"
    assert len(check_command_line(words).jobs) == 2


def test_one_cutoff_is_a_list_of_it():
    assert load(["evaluation.k=10"]).evaluation == load(["evaluation.k=[10]"]).evaluation
    jobs = check_command_line(["-m", "evaluation.k=5,10", "evaluation.monitor=val/mrr"]).jobs
    assert [job.cfg.evaluation.k for job in jobs] == [[5], [10]]


BROKEN = {
    "dim: [1,\n": ", line 2: not valid YAML (expected the node content, but found '<stream end>'); correct the line",
    "dim: 3\n\tx: 5\n": ", line 2: not valid YAML (found character '\\t' that cannot start any token); correct",
    "dim: 8\ndim: 9\n": ", line 2: not valid YAML (found duplicate key dim); correct the line",
    "- a\n": "model/mine.yaml: a section must be keys with values, not a list; write key: value",
    "model:\n  dim: 8\n": (
        "model/mine.yaml: it sets keys of model already; remove the line 'model:' and the blanks before its keys"
    ),
    "defaults: [mine]\n": "the config refers to itself: a list of defaults, an interpolation ${...}, or too many",
    "caf\udce9: 1\n": "a config file is not UTF-8 (invalid continuation byte at byte 3); convert it to UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_config_file_is_one_line(text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert BROKEN[text] in refused(["--config-dir", str(tmp_path), "model=mine"])


@pytest.mark.parametrize("group", ["ablation", "dross", "experiment", "sweep", "mygroup"])
def test_a_file_that_needs_the_global_package_is_named(group, tmp_path):
    (tmp_path / group).mkdir()
    file = tmp_path / group / "mine.yaml"
    file.write_text("model:\n  dim: 8\n")
    word = f"{'+' * (group == 'mygroup')}{group}=mine"
    assert refused(["--config-dir", str(tmp_path), word]) == (
        f"{group}/mine.yaml: it sets keys of the whole config; its first line must be '# @package _global_'"
    )
    file.write_text("# @package _global_\nmodel:\n  dim: 8\n")
    (job,) = check_command_line(["--config-dir", str(tmp_path), word]).jobs
    assert job.cfg.model.dim == 8


WORDS = st.text(max_size=12) | st.builds(
    lambda prefix, key, value: f"{prefix}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from([*known_keys(SCHEMAS["train"]), "hydra.run.dir", "hydra", "model@x"]),
    st.text(max_size=12) | st.sampled_from(["${", "[1,{a:2}]", "1e999", "'", "range(2)", "${seed}", "null"]),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(words=st.lists(WORDS, max_size=3), name=st.sampled_from(["train", "recommend"]))
def test_any_words_give_a_command_or_one_line(words, name):
    try:
        check_command_line(normalize(words), name)
    except InputError as error:
        text = str(error)
        assert text
        assert printable(text) == text
    except SystemExit as end:
        assert end.code == 0  # noqa: PT017


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_a_formatted_value_is_read_back(value):
    override = _parse(format_override("run", value))
    assert override is not None
    assert not override.is_sweep_override()
    assert str(override.value()) == value


def test_no_command_line_is_planned_in_a_folder_that_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_command_line(["hydra.run.dir=a"]).jobs[0].folder == Path("a")
    assert not list(tmp_path.iterdir())


def test_a_sweep_does_not_take_the_folder_of_a_run():
    with pytest.raises(InputError, match=r"^hydra\.run\.dir=x has no effect with -m; write hydra\.sweep\.dir=<folder"):
        check_command_line(["-m", "seed=1,2", "hydra.run.dir=x"])


def test_usual_names_of_keys_name_a_key():
    assert set(_USUAL_NAMES.values()) <= {*known_keys(), "hydra.run.dir"}


def test_a_fault_of_the_program_is_no_mistake_of_the_user(monkeypatch, capsys):
    monkeypatch.setattr("sasrec_lab.config.composition.check_code", None)
    assert refused("seed=1") == (
        "unexpected TypeError: 'NoneType' object is not callable; this is a fault of sasrec_lab, please report it with"
        " the traceback above"
    )
    assert "in compose_checked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            "Cannot set 'cluster.workers' because 'cluster' is None",
            ["cluster.workers=3"],
            "cluster.workers=3: a run has no cluster unless it is chosen; add cluster=ray",
        ),
        (
            "Cannot merge incompatible container types\n    full_key: evaluation",
            ["evaluation=[1]"],
            "evaluation is a section; set its keys, as in evaluation.<key>=<value>",
        ),
        (
            "In 'experiment/x': Invalid Defaults List override '/datset: ml_1m'.\n"
            "No earlier Group Default for 'datset' exists to override.",
            ["experiment=x"],
            "experiment/x.yaml: unknown key 'datset'; did you mean dataset?",
        ),
    ],
)
def test_words_of_the_next_hydra_are_explained_too(text, words, message):
    assert explain(ValueError(text), "train", words) == message


def test_a_fault_around_a_run_blames_no_key_of_hydra(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as run_hydra sets it, so that it is taken back

    def main() -> None:
        raise AssertionError  # never reached: the wrapper fails

    @functools.wraps(main)
    def broken() -> None:
        {}["x"]

    with pytest.raises(InputError, match=r"^unexpected KeyError: 'x'; this is a fault of sasrec_lab, .* above$"):
        run_hydra(broken, "train")
    assert "Traceback" in capsys.readouterr().err
