"""The matmul backend is chosen once per machine, and a resumed run keeps its own."""

import pytest
import torch

from sasrec_lab.ops import backend

CPU = torch.device("cpu")
TORCH, ONEDNN = "torch's default float32, 9 GFLOP/s", "oneDNN float32, 9 GFLOP/s (torch's default: 8)"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_stopwatch_runs_once(monkeypatch):
    monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: ONEDNN)
    assert backend.choose_matmul(CPU) == ONEDNN
    assert torch.get_float32_matmul_precision() == "medium"
    monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: TORCH)
    assert backend.choose_matmul(CPU) == ONEDNN


def test_two_concurrent_choices_agree_on_the_first(tmp_path, monkeypatch):
    def slower() -> str:
        monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: TORCH)
        backend.choose_matmul(CPU)  # another process, which finishes earlier
        return ONEDNN

    monkeypatch.setattr(backend, "fastest_exact_matmul", slower)
    assert backend.choose_matmul(CPU) == TORCH
    assert len(list(tmp_path.rglob("matmul*"))) == 1


@pytest.mark.parametrize("content", [b"", ONEDNN.encode()[:-1], b"\xff", b"oneDNN bfloat16, 9 GFLOP/s", bytes(40)])
def test_a_damaged_choice_is_made_again(content, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: ONEDNN)
    backend.choose_matmul(CPU)
    (path,) = tmp_path.rglob("matmul*")
    path.write_bytes(content)
    for _ in range(2):
        assert backend.choose_matmul(CPU) == ONEDNN
    assert path.read_text() == ONEDNN
    assert list(path.parent.iterdir()) == [path]


def test_a_resumed_run_keeps_its_backend_if_it_is_exact(monkeypatch):
    monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: TORCH)
    monkeypatch.setattr(backend, "_is_exact", lambda precision: True)
    assert backend.choose_matmul(CPU, previous=ONEDNN) == ONEDNN
    monkeypatch.setattr(backend, "_is_exact", lambda precision: False)
    assert backend.choose_matmul(CPU, previous=ONEDNN) == TORCH
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_chosen_backend_is_exact():
    backend.choose_matmul(CPU)
    assert backend._is_exact(torch.get_float32_matmul_precision())


def test_without_a_cache_folder_a_backend_is_chosen(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(backend, "fastest_exact_matmul", lambda: ONEDNN)
    assert backend.choose_matmul(CPU) == ONEDNN
