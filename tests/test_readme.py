"""Every command of the README runs, on small data and for an epoch, in a fresh process."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sasrec_lab.config.command_line import check_command_line

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^python -m sasrec_lab\.train(.*)$", README, re.M) + re.findall(
    r"`python -m sasrec_lab\.train([^`]*)`", README
)
REPORTS = re.findall(r"^python -m sasrec_lab\.report(.*)$", README, re.M)
RECOMMENDED = re.findall(r"^python -m sasrec_lab\.recommend(.*)$", README, re.M)
TUTORIAL = README.partition("## The RecTools tutorial")[2].partition("\n## ")[0]
SHORT = ["trainer.max_epochs=1", "model.dim=8", "model.maxlen=5"]
GENERATED = ["dataset=synthetic", "dataset.synthetic.users=50", "dataset.synthetic.items=200", "name=generated"]


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("<time>", "time"), comments=True)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_taken_as_it_stands(command):
    check_command_line(words_of(command))


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if "--help" not in command])
def test_it_runs(command, train_here, tmp_path):
    """With data made for the test in the place of real ones, where the command does not name a file."""
    words = words_of(command)
    if "dataset=csv" in words:
        rows = [f"{user},{(user * 7 + time) % 11},{time}" for user in range(30) for time in range(6)]
        (tmp_path / "my.csv").write_text("uid,sku,ts\n" + "\n".join(rows) + "\n")
        words += SHORT
    else:
        words = [word for word in words if not word.startswith("dataset=")] + SHORT + GENERATED
    if "ckpt=last" in words:
        assert train_here(*(word for word in words if word != "ckpt=last")).returncode == 0
        words.append("trainer.max_epochs=2")
        words.remove("trainer.max_epochs=1")
    done = train_here(*words)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = len(check_command_line(words).jobs)
    assert len(list(tmp_path.rglob("metrics.json"))) == done.stdout.count("\ncheckpoint ") == jobs


@pytest.mark.slow
def test_reports_run(train_here, report_here):
    """Each over one small sweep."""
    sweep = ["-m", *SHORT, *GENERATED, "model.blocks=1,2", "seed=0,1", "hydra.sweep.dir=outputs/ml_100k/time"]
    assert train_here(*sweep).returncode == 0
    assert len(REPORTS) >= 3
    for command in REPORTS:
        done = report_here(*words_of(command.replace("sasrec_paper_ml_1m", "ml_100k")))
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"model\.blocks=1 +2 +0\.\d{4} ± 0\.\d{4}", done.stdout)


@pytest.mark.parametrize("command", RECOMMENDED)
def test_a_recommendation_is_taken_as_it_stands(command):
    check_command_line(words_of(command), "recommend")


@pytest.mark.slow
def test_recommendations_run(train_here, recommend_here, tmp_path):
    """From a run on made-up data in the place of MovieLens."""
    assert train_here(*SHORT, *GENERATED, "hydra.run.dir=outputs/ml_100k/time").returncode == 0
    (tmp_path / "ids.txt").write_text("7\n8\n")
    (tmp_path / "new.csv").write_text("user_id,item_id,datetime\n7,3,1\n8,4,1\n8,5,2\n")
    (tmp_path / "stock.csv").write_text("item_id\n1\n2\n")
    commands = [words_of(command) for command in RECOMMENDED if "run=outputs/ml_100k/" in command]
    assert len(commands) >= 4
    for words in commands:
        done = recommend_here(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout
    python = re.search(r"```python\n(.*?)```", README, re.S)[1].replace("<time>", "time")
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_tutorial_is_replayed(train_here, recommend_here, tmp_path):
    """Each of its commands as it stands, after the other; scores are a machine's own, so only the form is compared."""
    make, trained, *listed = re.findall(r"^python (.*)$", TUTORIAL, re.M)
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, root / shlex.split(make)[0], *shlex.split(make)[1:]], cwd=tmp_path, check=True)
    assert train_here(*shlex.split(trained)[2:]).returncode == 0
    printed = [recommend_here(*shlex.split(words)[2:]) for words in listed]
    shown = re.findall(r"^python -m sasrec_lab\.recommend[^\n]*\n```\n```\n(.*?)```", TUTORIAL, re.S | re.M)
    assert len(shown) == len(printed) == 3
    for text, done in zip(shown, printed, strict=True):
        assert done.returncode == 0
        form = [re.sub(r"[\d.]+ .*", "", line) for line in text.splitlines()]
        assert [re.sub(r"[\d.]+ .*", "", line) for line in (done.stdout + done.stderr).splitlines()] == form
