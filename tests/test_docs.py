"""Every command and Python block of the pages runs, and every link, file and key that they name exists."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from commands import environment, in_this_process, process_state

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import FREE_SECTIONS, known_keys
from sasrec_lab.config.list_commands import EvaluateConfig, RecommendConfig
from sasrec_lab.config.search import check_search
from sasrec_lab.data.sequences import load_sequences

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
GUIDES = {name: text for name, text in PAGES.items() if name != "CHANGELOG.md"}
RUN_HERE = {
    name: text for name, text in GUIDES.items() if name != "docs/extend.md"
}  # tests/test_extend.py runs that one
GENERATED = re.compile(r"<!-- results?:.*?<!-- /results? -->", re.S)
TUTORIAL = PAGES["docs/recommend.md"].partition("## The RecTools tutorial")[2].partition("\n## ")[0]
SHORT = ["trainer.max_epochs=1", "model.dim=8", "model.maxlen=5"]
DATA = ["dataset=synthetic", "dataset.synthetic.users=50", "dataset.synthetic.items=200", "name=generated"]
NOT_RUN = {
    "scripts/bench.py": "some minutes; tests/scripts/test_bench.py runs it on little data",
    "scripts/bench_peers.py": "downloads the peers and takes half an hour",
    "scripts/parity_peers.py": "downloads RecTools and RePlay",
    "scripts/check_gpu.py": "needs a GPU; tests/scripts/test_check_gpu.py runs it with --cpu",
    "scripts/compare_reference.py": "trains for hours",
    "scripts/make_synthetic.py": "the tutorial's test runs it",
    "scripts/record_comparison.py": "needs finished sweeps; tests/scripts/test_record_comparison.py has a small one",
    "scripts/record_runs.py": "needs runs of hours; tests/scripts/test_record_runs.py has small ones",
    "scripts/speedrun.py": "trains for half an hour; tests/scripts/test_speedrun.py runs it on little data",
    "scripts/support_matrix.py": "installs environments of GB; tests/scripts/test_support_matrix.py runs its check",
    "scripts/render_results.py": "tests/scripts/test_results.py runs it",
}


def commands(module: str) -> list[str]:
    """Return the words behind `python -m module` or `python script` on all pages: in lines, backticks and tables."""
    pattern = rf"(?:^|`)(?:CXX= )?python {re.escape(module)}((?: [^`\n]*)?)(?:`|$)"
    found = (
        words.partition(" #")[0].strip() for text in RUN_HERE.values() for words in re.findall(pattern, text, re.M)
    )
    return list(dict.fromkeys(words for words in found if words))


TRAINED = commands("-m sasrec_lab.train")
REPORTED = commands("-m sasrec_lab.report")
RECOMMENDED = commands("-m sasrec_lab.recommend")
EXPORTED = commands("-m sasrec_lab.export")
SEARCHED = commands("-m sasrec_lab.search")
EVALUATED = commands("-m sasrec_lab.evaluate")
PRINTED_ONLY = ("--help", "--cfg")


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("<time>", "time"), comments=True)


def inline_code(text: str) -> list[str]:
    """Return what is in backticks outside of code blocks and generated tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", GENERATED.sub("", text), flags=re.S | re.M))


def train_sweep(folder: Path) -> None:
    """Train a small sweep at outputs/ml_100k/time, and show one of its jobs at the same place below run/."""
    sweep = ["-m", *SHORT, *DATA, "model.blocks=1,2", "seed=0,1", "hydra.sweep.dir=outputs/ml_100k/time"]
    done = in_this_process("sasrec_lab.train", folder)(*sweep)
    assert done.returncode == 0, done.stderr
    (folder / "run/outputs/ml_100k").mkdir(parents=True)
    (job,) = (folder / "outputs/ml_100k/time").glob("0-*")
    (folder / "run/outputs/ml_100k/time").symlink_to(job, target_is_directory=True)
    rows = [f"{user},{(user * 7 + time) % 11},{time}" for user in range(30) for time in range(6)]
    (folder / "run/my.csv").write_text("uid,sku,ts\n" + "\n".join(rows) + "\n")
    (folder / "run/ids.txt").write_text("7\n8\n")
    (folder / "run/new.csv").write_text("user_id,item_id,datetime\n7,3,1\n8,4,1\n8,5,2\n")
    (folder / "run/stock.csv").write_text("item_id\n1\n2\n")


@pytest.fixture
def runs(made_once, tmp_path) -> Path:
    return shutil.copytree(made_once("pages", train_sweep), tmp_path / "runs", symlinks=True)


def test_the_pages_have_commands():
    assert (len(TRAINED) >= 12, len(REPORTED) >= 4, len(RECOMMENDED) >= 7, len(EXPORTED) >= 1) == (True,) * 4
    assert len(SEARCHED) >= 4


@pytest.mark.parametrize("command", TRAINED)
def test_a_training_command_is_accepted(command):
    check_command_line(words_of(command))


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINED)
def test_a_training_command_runs(command, train_here, train_command, tmp_path):
    """On generated data in place of published files, for one epoch."""
    words = words_of(command)
    if "trainer=ddp" in words:
        train_here = train_command  # Lightning repeats the command to start further processes
    needed = {"memory_limit": ("duckdb", "big"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow")}
    for key, (module, extra) in needed.items():
        if key in command and find_spec(module) is None:
            pytest.skip(f"needs pip install 'sasrec-lab[{extra}]'")
    if "cluster=ray" in words:
        pytest.skip("needs Ray; tests/training/test_ray_workers.py runs it")
    if any(word in PRINTED_ONLY for word in words):
        done = train_here(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
        return
    short = SHORT[:1] if {"model=ease", "model=itemknn"} & set(words) else SHORT  # these have no encoder's keys
    if "experiment=gsasrec/ml_1m" in words:
        short = [*short, "loss.negatives=9"]  # its loss takes at most as many as there are items
    if "experiment=hstu/ml_1m" in words:
        short = [*short, "trainer.min_epochs=1"]
    words = [re.sub(r"^dataset.val_users=.*", "dataset.val_users=9", word) for word in words]
    if "dataset=csv" in words:
        rows = [f"{user},{(user * 7 + time) % 11},{time}" for user in range(30) for time in range(6)]
        (tmp_path / "my.csv").write_text("uid,sku,ts\n" + "\n".join(rows) + "\n")
        (tmp_path / "my_data").mkdir()
        table = pd.read_csv(tmp_path / "my.csv").set_axis(["user_id", "item_id", "timestamp"], axis=1)
        table.to_parquet(tmp_path / "my_data" / "0.parquet")
        (tmp_path / "items.csv").write_text("sku,genre\n" + "".join(f"{item},{item % 3}\n" for item in range(11)))
        words += short
    else:
        words = [word for word in words if not word.startswith(("dataset=", "data_dir="))] + short + DATA
    if "ckpt=last" in words:
        assert train_here(*(word for word in words if word != "ckpt=last")).returncode == 0
        words[words.index("trainer.max_epochs=1")] = "trainer.max_epochs=2"
    if starts := [word.partition("=")[2] for word in words if word.startswith("init_from=")]:
        earlier = [*(word for word in words if not word.startswith("init_from=")), f"hydra.run.dir={starts[0]}"]
        assert train_here(*earlier).returncode == 0
    done = train_here(*words)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = len(check_command_line(words).jobs)
    ends = re.findall(r"^(?:checkpoint  |weights  |job \S+: )", done.stdout, re.M)  # of a run, and of a job of a sweep
    assert len(list(tmp_path.rglob("metrics.json"))) == len(ends) + len(starts) == jobs + len(starts)


@pytest.mark.parametrize("command", SEARCHED)
def test_a_search_command_is_accepted(command):
    check_search(words_of(command))


@pytest.mark.slow
@pytest.mark.parametrize("command", SEARCHED)
def test_a_search_command_runs(command, tmp_path):
    """With one trial, on generated data, for one epoch."""
    pytest.importorskip("optuna", minversion="5", reason="needs pip install 'sasrec-lab[search]'")
    words = [word for word in words_of(command) if not word.startswith(("dataset=", "trials=", "seeds="))]
    pruner = ["pruner=none"] if "pruner=wilcoxon" in words else []  # it needs five seeds
    short = [*DATA, "trials=1", "trainer.max_epochs=1", "model.maxlen=5", *pruner]
    done = in_this_process("sasrec_lab.search.__main__", tmp_path)(*words, *short)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 trial: 1 finished" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", REPORTED)
def test_a_report_command_runs(command, runs):
    report = in_this_process("sasrec_lab.report.__main__", runs)
    command = re.sub(r"outputs/(sasrec_paper|dross)_\w+", "outputs/ml_100k", command)
    done = report(*words_of(command.replace("--baseline sasrec_plus", "--baseline model.blocks=1")))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"model\.blocks=1 +2 +(best )?0\.\d{4} +0\.\d{4} ± 0\.\d{4}", done.stdout)


@pytest.mark.parametrize("command", RECOMMENDED)
def test_a_recommend_command_is_accepted(command):
    check_command_line(words_of(command), "recommend")


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in RECOMMENDED if "outputs/kion" not in command])
def test_a_recommend_command_runs(command, runs):
    done = in_this_process("sasrec_lab.recommend.__main__", runs / "run")(*words_of(command))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", EVALUATED)
def test_an_evaluate_command_runs(command, runs):
    """On the lists of a run, and for a data set in place of a published one."""
    folder = runs / "run"
    words = words_of(command)
    (lists,) = (word.partition("=")[2] for word in words if word.startswith("lists="))
    made = ["run=outputs/ml_100k/time", "split=test", "k=20", f"output={lists}"]
    assert in_this_process("sasrec_lab.recommend.__main__", folder)(*made).returncode == 0
    if not any(word.startswith("run=") for word in words):
        words = [word for word in words if not word.startswith("dataset=")] + DATA[:-1]
    done = in_this_process("sasrec_lab.evaluate.__main__", folder)(*words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  ndcg( +0\.\d{4})+$", done.stdout, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("command", EXPORTED)
def test_an_export_command_runs(command, runs):
    done = in_this_process("sasrec_lab.export.__main__", runs / "run")(*words_of(command))
    assert (done.returncode, done.stderr) == (0, "")


PYTHON = {
    f"{name} {i}": code
    for name in RUN_HERE
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", RUN_HERE[name], re.S))
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [name for name in PYTHON if not name.startswith(("docs/export.md", "docs/scale.md", "docs/serving.md"))],
)
def test_a_python_block_runs(block, runs, capsys):
    """Those of export.md and serving.md run without the package in tests/export/, those of docs/scale.md below.

    The README's runs in a fresh process; the others would only import the same again.
    """
    code, folder = PYTHON[block].replace("<time>", "time"), runs / "run"
    if block.startswith("README.md"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        with process_state([block], environment(folder), folder):
            exec(compile(code, block, "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr()
        assert printed.out
        assert printed.err == ""


@pytest.mark.parametrize("engine", ["duckdb", "polars"])
def test_an_engine_writes_a_folder_of_parquet(engine, tmp_path):
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    (block,) = (
        code for name, code in PYTHON.items() if name.startswith("docs/scale.md") and f"import {engine}" in code
    )
    rows = "".join(f"{row % 9},a{row % 7},{row // 2},x\n" for row in range(100))
    (tmp_path / "my.csv").write_text(f"user_id,item_id,timestamp,other\n{rows}")
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment(tmp_path), check=True, timeout=300)
    paths = (tmp_path / name for name in ("my.csv", "my_data"))
    one, other = (
        load_sequences(load(["dataset=csv", f"dataset.path={path}"]).dataset, str(tmp_path)) for path in paths
    )
    for array in ("items", "offsets", "user_ids", "item_ids", "times"):
        assert getattr(one, array).tolist() == getattr(other, array).tolist()


@pytest.mark.slow
def test_the_tutorial_can_be_replayed(train_here, recommend_here, tmp_path):
    """Its commands run one after the other; scores differ between machines, so only the form is compared."""
    make, trained, *listed = re.findall(r"^python (.*)$", TUTORIAL, re.M)
    script, *words = shlex.split(make)
    subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, check=True)
    assert train_here(*shlex.split(trained)[2:]).returncode == 0
    printed = [recommend_here(*shlex.split(words)[2:]) for words in listed]
    shown = re.findall(
        r"^python -m sasrec_lab\.recommend[^\n]*\n```\n<!-- [^\n]*\n```\n(.*?)```", TUTORIAL, re.S | re.M
    )
    assert len(shown) == len(printed) == 3
    for text, done in zip(shown, printed, strict=True):
        assert done.returncode == 0
        form = [re.sub(r"[\d.]+ .*", "", line) for line in text.splitlines()]
        assert [re.sub(r"[\d.]+ .*", "", line) for line in (done.stdout + done.stderr).splitlines()] == form


def test_scripts_exist_and_have_the_options():
    for text in GUIDES.values():
        for script, words in re.findall(r"(?:^|`)(?:CXX= )?python (scripts/\w+\.py)([^`\n]*)", text, re.M):
            assert script in NOT_RUN, f"{script}: run it in a test"
            source = (ROOT / script).read_text()
            assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", words)), f"{script}{words}"


def test_all_console_scripts_are_listed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    page = (ROOT / "docs/install.md").read_text()
    for name, entry in scripts.items():
        module = entry.partition(":")[0].removesuffix(".__main__")
        assert f"| `{name}` | `python -m {module}` |" in page
    assert page.count("| `sasrec-") == len(scripts)


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, text in GUIDES.items():
        for target in re.findall(r"(?:^|`)make (\w+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name}: make {target}"
        for extra in re.findall(r"\.\[(\w+)\]", text):
            assert extra in extras, f"{name}: {extra}"


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", GUIDES)
def test_files_that_a_page_names_exist(page):
    """Paths are relative to the project or to the package; a capitalized part is a placeholder."""
    folders = {path.name for root in (ROOT, ROOT / "sasrec_lab") for path in root.iterdir() if path.is_dir()}
    for name in inline_code(GUIDES[page]):
        first, slash, _ = name.partition("/")
        is_path = re.fullmatch(r"[\w./-]+", name) and not re.search(r"\b[A-Z]+\b", name)
        if (
            is_path
            and first not in ("outputs", "my_package", "mine")
            and (name.endswith(".py") or (slash and first in folders))
        ):
            assert any((root / name).exists() for root in (ROOT, ROOT / "sasrec_lab")), name


def test_files_in_the_picture_exist():
    names = re.findall(r">([a-z]+/[a-z_.]*|\w+\.py)</text>", (ROOT / "docs/architecture.svg").read_text())
    assert len(names) >= 15
    for name in names:
        assert (ROOT / "sasrec_lab" / name).exists(), name


@pytest.mark.parametrize("page", GUIDES)
def test_keys_that_a_page_names_exist(page):
    keys = {*known_keys(), *known_keys(RecommendConfig), *known_keys(EvaluateConfig)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for code in inline_code(GUIDES[page]):
        for key in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)(?=[=` ']|$)", code):
            is_of_user = any(f"{section}." in key for section in FREE_SECTIONS)  # options, and names of parts
            assert key.partition(".")[0] not in sections or key in keys or is_of_user, key
        for group, choice in re.findall(
            r"(?<![\w./])(dataset|model|loss|trainer|experiment|ablation|sweep)=([\w/]+)(?![\w(])", code
        ):
            assert (
                choice in ("NAME", "wide", "shop", "focal", "local") or (ROOT / f"conf/{group}/{choice}.yaml").is_file()
            ), code


@pytest.mark.parametrize("page", GUIDES)
def test_measured_numbers_are_generated(page):
    text = re.sub(r"^```.*?^```", "", GENERATED.sub("", GUIDES[page]), flags=re.S | re.M)
    assert not re.search(r"(?<![\w.])0?\.\d{3,}", text)


def test_the_readme_is_short_and_names_its_limits_early():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert "## Limits" in lines[:80]


def test_the_config_files_to_copy_are_complete(tmp_path):
    examples = re.findall(
        r"`mine/(\w+)/(\w+)\.yaml`[^`]*?(?:`[^`\n]*`[^`]*?)*```yaml\n(.*?)```", PAGES["docs/configuration.md"], re.S
    )
    assert [group for group, _, _ in examples] == ["model", "dataset", "experiment"]
    for group, name, text in examples:
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    dims = []
    for group, name, _ in examples:
        (job,) = check_command_line(["--config-dir", str(tmp_path), f"{group}={name}"]).jobs
        dims.append((job.cfg.model.dim, job.cfg.dataset.name, job.cfg.loss.name.name, job.cfg.optimizer.lr))
    assert dims == [(128, "ml_100k", "softmax", 0.001), (64, "shop", "softmax", 0.001), (64, "ml_100k", "bce", 0.0005)]
