"""Code that configs name: refused unless Hydra or a plugin ships it, or the command line names it too."""

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from sasrec_lab.config import trust
from sasrec_lab.config.command_line import check_command_line, grid_jobs
from sasrec_lab.errors import InputError

CALLBACK = "callbacks: {mine: {_target_: my.Callback}}"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
TYPED = "hydra.callbacks.mine._target_=my.Callback"


def words_with(folder: Path, hydra: str, extra: str = "") -> list[str]:
    """Return words that choose an experiment of a stranger, which sets Hydra's keys."""
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{extra}\nhydra:\n  {hydra}\n")
    return ["--config-dir", str(folder), "experiment=theirs"]


def refusal(words: list[str], name: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        check_command_line(words, name)
    return str(caught.value)


@pytest.mark.parametrize("flags", [[], ["-m"], ["--cfg", "job"], ["--help"], ["--info"], ["--hydra-help"]])
def test_a_callback_of_a_config_file_is_refused_by_name(tmp_path, flags):
    assert refusal([*flags, *words_with(tmp_path, CALLBACK)]) == (
        f"{TYPED} would run code that neither this package nor a plugin of Hydra ships; if you trust it, add {TYPED} to"
        " the command line"
    )


@pytest.mark.parametrize("word", [TYPED, "hydra.callbacks.mine={_target_:my.Callback}"])
def test_a_callback_that_the_command_line_names_is_allowed(tmp_path, word):
    assert check_command_line([*words_with(tmp_path, CALLBACK), word])
    assert check_command_line(["-m", *words_with(tmp_path, CALLBACK), word, "seed=1,2"])


def test_typing_another_key_of_a_callback_allows_nothing(tmp_path):
    assert refusal([*words_with(tmp_path, CALLBACK), "+hydra.callbacks.mine.path=x"]).startswith(TYPED)
    nested = "callbacks: {mine: {_target_: my.Callback, then: {_target_: os.system}}}"
    assert refusal([*words_with(tmp_path, nested), TYPED]).startswith("hydra.callbacks.mine.then._target_=os.system ")


def test_a_callback_of_any_job_of_a_sweep_is_refused(tmp_path):
    words = words_with(tmp_path, CALLBACK)
    (tmp_path / "experiment" / "harmless.yaml").write_text("# @package _global_\nseed: 1\n")
    assert refusal(["-m", *words[:2], "experiment=harmless,theirs"]).startswith(TYPED)


def test_a_callback_of_any_file_of_a_glob_is_refused(tmp_path):
    assert refusal(["-m", *words_with(tmp_path, CALLBACK)[:2], "experiment=glob(*)"]).startswith(TYPED)


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_config_dir_is_checked_beside_a_typed_search_path(tmp_path, flags):
    (tmp_path / "other" / "experiment").mkdir(parents=True)
    (tmp_path / "other" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 1\n")
    (tmp_path / "a, $b").mkdir()
    words = words_with(tmp_path / "a, $b", CALLBACK)
    search = f"hydra.searchpath=[file://{tmp_path / 'other'}]"
    assert refusal([*flags, *words, search]).startswith(TYPED)
    assert check_command_line([*flags, *words[:2], search, "experiment=mine"]).jobs[0].cfg.seed == 1


def test_recommend_refuses_code_of_config_files(tmp_path):
    (tmp_path / "hydra" / "callbacks").mkdir(parents=True)
    (tmp_path / "hydra" / "callbacks" / "theirs.yaml").write_text("mine: {_target_: my.Callback}\n")
    words = ["--config-dir", str(tmp_path), "hydra/callbacks=theirs", "run=x", "users=[1]"]
    assert refusal(words, "recommend").startswith(TYPED)


@pytest.mark.parametrize(
    ("hydra", "key"),
    [
        ("callbacks: {mine: {_target_: hydra_plugins.x.os.system}}", "hydra.callbacks.mine._target_"),
        ("callbacks: {mine: [{_target_: my.Callback}]}", "hydra.callbacks.mine.0._target_"),
        ("callbacks: {mine: {_target_: '${name}'}}", "hydra.callbacks.mine._target_"),
        ("callbacks: {mine: '${oc.decode:\"{_target_: os.system}\"}'}", "hydra.callbacks.mine"),
        ("callbacks: {mine: '${trainer.profiler}'}", "hydra.callbacks.mine._target_"),
        ("callbacks: {mine: {x: '${oc.env:HOME}'}}", "hydra.callbacks.mine.x"),
        ("sweeper: {_target_: my.Sweeper}", "hydra.sweeper._target_"),
        ("launcher: {_target_: my.Launcher}", "hydra.launcher._target_"),
        ("job_logging: {handlers: {console: {class: my.Handler}}}", "hydra.job_logging.handlers.console.class"),
        ("hydra_logging: {formatters: {x: {(): my.Format}}}", "hydra.hydra_logging.formatters.x.()"),
        ("job_logging: {handlers: {console: {stream: 'ext://os.environ'}}}", "hydra.job_logging.handlers"),
        ("job_logging: {root: {x: '${hydra.job.name}'}}\n  job: {name: 'ext://x.y'}", "hydra.job_logging.root.x"),
        ("job_logging: {handlers: {file: {filename: x/.profile}}}", "hydra.job_logging.handlers.file.filename"),
        ("job_logging: {handlers: {file: {filename: '${data_dir}'}}}", "hydra.job_logging.handlers.file.filename"),
        ("job_logging: {handlers: {file: {.: {baseFilename: /x}}}}", "hydra.job_logging.handlers.file...baseFilename"),
        ("job: {env_set: {CXX: /tmp/program}}", "hydra.job.env_set.CXX"),
        ("callbacks: {mine: {x: '${oc.decode:\"[1]\"}'}}", "hydra.callbacks.mine.x"),
    ],
)  # fmt: skip
def test_every_key_that_makes_hydra_run_code_is_refused(tmp_path, hydra, key):
    words = words_with(tmp_path, hydra, "trainer: {profiler: {_target_: os.system}}")
    assert refusal(words).startswith(key)


def test_an_own_variable_of_the_environment_can_be_typed(tmp_path):
    words = words_with(tmp_path, "job: {env_set: {CXX: clang}}")
    assert check_command_line([*words, "hydra.job.env_set.CXX=clang"])


@pytest.mark.parametrize("word", ["hydra/job_logging=default", "hydra/hydra_logging=hydra_debug", "hydra.verbose=true"])
def test_logging_that_hydra_ships_needs_no_trust(word):
    assert check_command_line([word])


def test_a_cluster_launcher_must_be_chosen_on_the_command_line(tmp_path, monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setitem(store.repo["hydra"]["launcher"], "cluster.yaml", None)  # taken out again at the end
    target = {"_target_": "hydra_plugins.cluster.ClusterLauncher"}
    store.store(group="hydra/launcher", name="cluster", node=target, provider="test")
    words = words_with(tmp_path, "verbose: false", "defaults: [override /hydra/launcher: cluster]")
    assert refusal(["-m", *words]) == (
        "ClusterLauncher, which a config file chooses, runs commands among its options; if you trust the file, add"
        " hydra/launcher=cluster to the command line"
    )
    command = check_command_line(["-m", *words, "hydra/launcher=cluster"])
    assert command.launcher._target_ == target["_target_"]


def test_a_launcher_in_place_of_a_typed_one_is_refused(tmp_path, monkeypatch):
    target = "hydra_plugins.cluster.ClusterLauncher"
    monkeypatch.setattr(trust, "_shipped_targets", lambda: {target, BASIC_SWEEPER})
    words = ["-m", *words_with(tmp_path, f"launcher: {{_target_: {target}}}")]
    assert refusal([*words, "hydra/launcher=basic"]) == (
        "ClusterLauncher, which a config file chooses, runs commands among its options; if you trust the file, add"
        f" hydra.launcher._target_={target} to the command line"
    )
    command = check_command_line([*words, f"hydra.launcher._target_={target}"])
    assert command.launcher._target_ == target


def test_code_that_is_typed_by_a_resolver_must_be_typed_itself():
    word = "hydra.callbacks.mine._target_=${oc.env:HOME}"
    assert refusal([f"+{word}"]) == f"{word} takes its value from a resolver; type the value itself"


@pytest.mark.parametrize("name", ["train", "recommend"])
def test_flags_that_run_a_strangers_files_are_refused(name):
    assert refusal(["--experimental-rerun=x.pickle"], name).startswith("--experimental-rerun x.pickle would unpickle")
    assert refusal(["--config-path", "theirs", "--help"], name).startswith("--config-path theirs would replace")


@pytest.mark.parametrize(
    "words",
    [
        ["seed=range(1000000000000)"],
        ["seed=shuffle(range(1000000000000))"],
        ["seed=range(0,inf)"],
        [f"a{number}=1,2" for number in range(40)],
    ],
)
def test_a_sweep_of_too_many_jobs_is_refused_uncounted(words):
    with pytest.raises(InputError, match="a sweep may have 10,000 jobs at most; give fewer values"):
        grid_jobs(words, None)
