"""The support matrix: what is recorded of an environment that passes, fails or cannot be made; and its check."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import environment

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import support_matrix  # noqa: E402
from support_matrix import Environment, Failed  # noqa: E402


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Let commands only be recorded; the test says what some of them print, or which fail."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/sasrec_lab.whl").touch()
    asked, answers = [], {"the check": '{"torch": "2.13.0"}\n'}

    def run(command, what, cwd=None):
        words = [str(word) for word in command]
        asked.append(words)
        if what == "venv":
            Path(words[-1]).mkdir()
        if "--report" in words:
            names = answers.get("packages", ["torch", "numpy"])
            report = {"install": [{"metadata": {"name": name}} for name in names]}
            Path(words[words.index("--report") + 1]).write_text(json.dumps(report))
        if isinstance(answers.get(what), Exception):
            raise answers[what]
        return answers.get(what, "")

    monkeypatch.setattr(support_matrix, "run", run)
    monkeypatch.setattr(support_matrix, "find_python", lambda version: sys.executable)
    return tmp_path, asked, answers


def outcome(fake, environment_: Environment, max_gb: float = 12) -> dict:
    return support_matrix.outcome_of(environment_, fake[0], max_gb, keep=False)


def test_an_environment_that_passes_has_its_versions(fake):
    row = outcome(fake, Environment("3.12", {"torch": "2.11.0"}, {"hydra-core": "1.4.0rc3"}))
    assert row == {
        "environment": "Python 3.12, torch 2.11.0, hydra-core 1.4.0rc3",
        "outcome": "passed",
        "versions_of_run": {"torch": "2.13.0"},
    }
    pins = (fake[0] / "constraints.txt").read_text().splitlines()
    assert "torch==2.11.0" in pins
    assert "torch==2.13.0" not in pins
    assert fake[1][-2][-2:] == ["--pre", "hydra-core==1.4.0rc3"]
    assert not list(fake[0].glob("Python*"))


def test_rows_of_environments_that_are_not_run_stay(monkeypatch, tmp_path):
    file = tmp_path / "support.json"
    stamp = {"measured": "2026-01-01", "commit": "a"}
    old = [
        {"environment": "Python 3.11", "outcome": "passed"},
        {"environment": "Python 3.13", "outcome": "failed"},
        {"environment": "Python 3.2", "outcome": "passed"},
    ]
    file.write_text(json.dumps({**stamp, "rows": old}))
    monkeypatch.setattr(support_matrix, "build", lambda folder: "passed twine check")
    monkeypatch.setattr(support_matrix, "outcome_of", lambda each, *_: {"environment": each.name, "outcome": "passed"})
    written = []
    monkeypatch.setattr(support_matrix, "write_results", lambda file, rows: written.append(rows))
    monkeypatch.setattr(sys, "argv", ["matrix", "--json", str(file), "--only", "Python 3.12", "--only", "Python 3.13"])
    support_matrix.main()
    assert [len(rows) for rows in written] == [4, 4]  # after each environment
    assert written[-1][1:] == [
        stamp | old[0],
        *({"environment": f"Python 3.{x}", "outcome": "passed"} for x in (12, 13)),
    ]


def test_why_an_environment_is_not_run_is_recorded(fake):
    fake[2]["packages"] = ["torch", "nvidia-cublas"]
    assert outcome(fake, Environment("3.12"), max_gb=2)["outcome"] == (
        "not run: only torch's CUDA build is to be had, which takes 7 GB, and --max-gb=2"
    )
    fake[2]["pip install"] = Failed("pip install: ERROR")
    assert outcome(fake, Environment("3.12"))["outcome"] == "not run: pip does not find these versions together here"


def test_a_failing_check_is_recorded(fake):
    fake[2]["the check"] = Failed("the check: sasrec-train ended with 1: error: no")
    assert outcome(fake, Environment("3.12"))["outcome"] == "failed: the check: sasrec-train ended with 1: error: no"


def test_a_python_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(support_matrix.NotRun, match=r"this machine has no Python 3\.99"):
        support_matrix.find_python("3.99")


@pytest.mark.slow
def test_the_check_passes_here(tmp_path):
    """The environment of the tests has the package as a clone, and its commands."""
    if not Path(sys.executable).with_name("sasrec-train").exists():
        pytest.skip("needs the package's commands next to this Python: pip install -e .")
    command = [sys.executable, ROOT / "scripts/support/check.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["torch"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("twine") is None, reason="needs pip install twine, which reads the network for no check")
def test_sdist_and_wheel_pass_twine_check(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    assert subprocess.run(build, capture_output=True).returncode == 0
    check = [sys.executable, "-m", "twine", "check", "--strict", *tmp_path.iterdir()]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
