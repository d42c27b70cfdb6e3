"""Every command of the README runs, on small data and for an epoch, in a fresh process."""

import re
import shlex
from pathlib import Path

import pytest

from sasrec_lab.command_line import check_command_line

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^python -m sasrec_lab\.train(.*)$", README, re.M) + re.findall(
    r"`python -m sasrec_lab\.train([^`]*)`", README
)
REPORTS = re.findall(r"^python -m sasrec_lab\.report(.*)$", README, re.M)
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
def test_it_runs(command, train_command, tmp_path):
    """With data made for the test in the place of real ones, where the command does not name a file."""
    words = words_of(command)
    if "dataset=csv" in words:
        rows = [f"{user},{(user * 7 + time) % 11},{time}" for user in range(30) for time in range(6)]
        (tmp_path / "my.csv").write_text("uid,sku,ts\n" + "\n".join(rows) + "\n")
        words += SHORT
    else:
        words = [word for word in words if not word.startswith("dataset=")] + SHORT + GENERATED
    if "ckpt=last" in words:
        assert train_command(*(word for word in words if word != "ckpt=last")).returncode == 0
        words.append("trainer.max_epochs=2")
        words.remove("trainer.max_epochs=1")
    done = train_command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = len(check_command_line(words).jobs)
    assert len(list(tmp_path.rglob("metrics.json"))) == done.stdout.count("\ncheckpoint ") == jobs


@pytest.mark.slow
def test_reports_run(train_command, report_command):
    """Each over one small sweep."""
    sweep = ["-m", *SHORT, *GENERATED, "model.blocks=1,2", "seed=0,1", "hydra.sweep.dir=outputs/ml_100k/time"]
    assert train_command(*sweep).returncode == 0
    assert len(REPORTS) >= 3
    for command in REPORTS:
        done = report_command(*words_of(command))
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"model\.blocks=1 +2 +0\.\d{4} ± 0\.\d{4}", done.stdout)
