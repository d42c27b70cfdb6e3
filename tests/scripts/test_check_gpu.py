"""scripts/check_gpu.py on tiny sizes without a GPU, and how its checks are cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MEASURED = {  # by check: a field of its rows
    "attention": "gradient_error",
    "losses": "gradient_error",
    "training": "fraction_of_floor",
    "loss speed": "positions_per_s",
    "run": "ndcg",
    "seed": "equal",
}


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def check_gpu(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"SASREC_LAB_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "check_gpu.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_check_runs_on_a_cpu(tmp_path):
    done = check_gpu("--cpu", "--json", "out.json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"] == "python scripts/check_gpu.py --cpu --json out.json"
    rows = written["rows"]
    assert list(dict.fromkeys(row["check"] for row in rows)) == [
        *("tests", "attention", "losses", "training", "loss speed", "run", "seed", "peer"),
    ]
    assert not [row for row in rows if "failed" in row]
    for check, field in MEASURED.items():
        assert any(field in row for row in rows if row["check"] == check), check
    captured = [row for row in rows if row["what"].endswith(", captured")]
    assert {row["skipped"] for row in captured} == {"no CUDA"}
    assert {row["check"] for row in rows if "skipped" in row and row not in captured} <= {"tests", "peer", "loss speed"}
    for part in (", with a bias", "loss.exclude=history", "loss.sampler=sequence", " in chunks"):
        assert any(part in row["what"] for row in rows), part
    table = done.stdout.partition("| check | what | measured |\n|---|---|---|\n")[2]
    assert table.count("\n| ") + 1 == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_option_is_named(monkeypatch, capsys):
    import check_gpu as script

    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == "error: torch finds no GPU here; use --cpu to try the checks on tiny sizes"
    assert capsys.readouterr() == ("", "")


def test_a_check_keeps_what_it_measured_before_it_ended(monkeypatch):
    from gpu import check

    from sasrec_lab.errors import InputError

    clock = iter(range(1000))  # a second passes whenever it is read: at the start, then before each row
    monkeypatch.setattr(check, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def three(setting):
        yield from ({"what": "a", "ms": 1.0}, {"what": "b", "ms": 2.0}, {"what": "c", "ms": 3.0})

    def ending(error):
        def rows(setting):
            yield {"what": "a", "ms": 1.0}
            raise error

        return rows

    gpu = check.Setting(torch.device("cpu"), tiny=False)
    first = {"check": "x", "what": "a", "ms": 1.0}
    for rows, seconds, then in (
        (three, 3, [{"what": "b", "ms": 2.0}, {"what": "the rest", "skipped": "cut off after 3 s"}]),
        (three, 9, [{"what": "b", "ms": 2.0}, {"what": "c", "ms": 3.0}]),
        (ending(InputError("no file")), 9, [{"what": "all", "skipped": "no file"}]),
        (ending(RuntimeError("no\nkernel")), 9, [{"what": "all", "failed": "RuntimeError: no kernel"}]),
    ):
        found = list(check.measure(check.Check("x", "all", 60, rows), gpu, seconds))
        assert found == [first, *({"check": "x", **row} for row in then)]


def test_nothing_starts_when_no_time_is_left():
    from gpu.check import Check, Setting, measure

    (row,) = measure(
        Check("x", "all", 60, lambda setting: iter([{"what": "a"}])), Setting(torch.device("cpu"), False), -1
    )
    assert row == {"check": "x", "what": "the rest", "skipped": "cut off after 0 s"}


def test_the_checks_fit_in_six_minutes():
    from check_gpu import CHECKS, SECONDS

    assert sum(check.seconds for check in CHECKS.values()) == SECONDS == 360


def test_the_largest_floor_bounds_a_step():
    from gpu.stopwatch import Card
    from gpu.training import _floor

    found = {"positions_per_s": 1e6, "step_ms": 10.0, "flops_per_position": 1e5, "matrix_gflops": 1e5}
    found["dense_parameters"] = 1_000_000
    card = Card(bytes_per_s=1e12, seconds_per_launch=1e-5)
    # 10,000 positions of 1e5 FLOPs at 1e14 a second: 10 us; 32 MB at 1 TB/s: 32 us; 200 launches: 2 ms
    assert _floor(found, 200, card) == {"floor_ms": 2.0, "bound_by": "launches", "fraction_of_floor": 0.2}
    assert _floor(found, None, card)["bound_by"] == "memory"
    assert _floor(found, None, card)["floor_ms"] == pytest.approx(0.032)
    assert _floor(found | {"dense_parameters": 0}, None, card)["floor_ms"] == pytest.approx(0.01)
