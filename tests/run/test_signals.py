"""Ctrl-C ends a command in one line at any moment of its imports, and stays ignored where it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from sasrec_lab.config.composition import load
from sasrec_lab.run import signals
from sasrec_lab.run.record import RunRecord, record_run

COMMANDS = {
    "train": ["model=tiny", "trainer=fast", "dataset=synthetic"],
    "recommend": ["run=a", "users=all"],
    "report": ["a"],
    "export": ["a", "x.pt2"],
}
MODULES = ["sasrec_lab", "omegaconf", "sasrec_lab.config.schema", "numpy"]


@pytest.fixture(autouse=True)
def _keep_handlers():
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def end_at_import(command: str, words: list[str], module: str, folder: Path) -> tuple[int, list[str]]:
    """Send SIGINT as soon as a module is imported; return the exit code and the lines of the error stream."""
    run = [sys.executable, "-X", "importtime", "-m", f"sasrec_lab.{command}", *words]
    process = subprocess.Popen(
        run, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.endswith(f" {module}\n"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=300)
    return process.returncode, [line for line in error.splitlines() if not line.startswith("import time:")]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_import_is_one_line(command, module, default_sigint, tmp_path):
    code, lines = end_at_import(command, COMMANDS[command], module, tmp_path)
    if code == 1:  # its error, such as a missing folder, came first
        assert lines[0].startswith("error: ")
    else:
        assert (code, lines[0].partition(";")[0]) == (130, "interrupted")


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """`nohup` and a shell's `command &` start a process so."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = ['-m']\n"
        "import sasrec_lab\n"
        "from sasrec_lab.run import signals\n"
        "signals.raise_interrupt(); os.kill(os.getpid(), signal.SIGINT); signals.use_defaults(); print('alive')\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", -signal.SIGTERM)


def test_the_package_sets_handlers_in_its_commands_only():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import sasrec_lab\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n"


def interrupt_an_import(reached: list[str]) -> None:
    with signals.interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("end")


def test_a_signal_during_imports_is_raised_after_them(default_sigint):
    signals.raise_interrupt()
    reached = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_an_import(reached)
    assert reached == ["end"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_imports_of_a_notebook_keep_its_handler(default_sigint):
    reached = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_an_import(reached)
    assert not reached


def test_a_signal_while_files_are_written_raises_exit(default_sigint, capfd):
    signals.exit_at_once()
    signals.raise_exit()
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    assert capfd.readouterr().err == "interrupted\n"


INTERRUPTED_EXEC = """import signal, sys
from sasrec_lab.config.composition import load
from sasrec_lab.run import signals
from sasrec_lab.run.record import RunRecord, record_run
signals.raise_interrupt()
try:
    exec("signal.raise_signal(signal.SIGINT)")
except KeyboardInterrupt:
    signals.use_defaults()
    sys.exit(130)
"""


def test_an_interrupt_inside_exec_keeps_the_exit_status(default_sigint, tmp_path):
    """With a KeyboardInterrupt Python would end the module's process by SIGINT instead, which is status -2 here."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_EXEC)
    command, env = [sys.executable, "-m", "interrupted"], environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 130, done.stderr


def test_a_signal_while_a_run_begins_is_recorded(tmp_path, monkeypatch):
    cfg = load(["dataset=synthetic", "model=tiny"])
    write_info = RunRecord.write_info

    def interrupted(run: RunRecord) -> None:
        write_info(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunRecord, "write_info", interrupted)
    signals.raise_interrupt()
    with pytest.raises(KeyboardInterrupt), record_run(tmp_path, cfg):
        raise AssertionError("the run has begun")
    assert json.loads((tmp_path / "metrics.json").read_text())["status"] == "interrupted"
