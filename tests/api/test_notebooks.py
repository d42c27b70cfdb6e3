"""The notebooks of examples/ run, and a notebook's stop button leaves a run that can be resumed."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import environment

HINT = "pip install 'sasrec-lab[test]'"
nbclient = pytest.importorskip("nbclient", reason=f"needs nbclient: {HINT}")
nbformat = pytest.importorskip("nbformat", reason=f"needs nbformat: {HINT}")
manager = pytest.importorskip("jupyter_client.manager", reason=f"needs jupyter-client: {HINT}")
pytest.importorskip("ipykernel", reason=f"needs ipykernel: {HINT}")

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
TRAIN = """
from sasrec_lab import train_model
words = ["dataset=synthetic", "dataset.synthetic.users=200", "model=tiny", "trainer.max_epochs=20"]
"""

pytestmark = pytest.mark.slow


def outputs(notebook: dict) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_examples():
    assert [path.name for path in EXAMPLES] == ["quickstart.ipynb", "read_a_sweep.ipynb"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment(tmp_path))
    made, shown = outputs(notebook), outputs(nbformat.read(path, as_version=4))
    assert [output.output_type for output in made if output.output_type != "stream"] == [
        output.output_type for output in shown if output.output_type != "stream"
    ]
    assert not [output for output in made if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_shows_nothing_of_a_machine(path):
    text = path.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, sum(cell.cell_type == "code" for cell in notebook.cells) + 1)
    )
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.fixture
def kernel(tmp_path) -> Iterator[tuple]:
    process, client = manager.start_new_kernel(cwd=str(tmp_path), env=environment(tmp_path))
    yield process, client
    client.stop_channels()
    process.shutdown_kernel(now=True)


def run_cell(kernel: tuple, code: str, stop_at: str | None = None) -> dict:
    """Run a cell, and interrupt the kernel once its output has a text; return its streams, result and error."""
    process, client = kernel
    asked = client.execute(code)
    said = {"stdout": "", "stderr": "", "result": "", "error": ""}
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=240)
        kind, content = message["msg_type"], message["content"]
        if message["parent_header"].get("msg_id") != asked:
            continue
        if kind == "stream":
            said[content["name"]] += content["text"]
            if stop_at and stop_at in said["stdout"]:
                process.interrupt_kernel()
                stop_at = None
        elif kind == "execute_result":
            said["result"] = content["data"]["text/plain"]
        elif kind == "error":
            said["error"] = content["ename"]
        elif kind == "status" and content["execution_state"] == "idle":
            return said
    raise TimeoutError(said)


def test_the_stop_button_leaves_a_run_to_resume(kernel, tmp_path):
    stopped = run_cell(kernel, TRAIN + "run = train_model(*words, folder='run')", stop_at="epoch   2")
    assert stopped["error"] == "KeyboardInterrupt", stopped
    assert "resume with folder='run' and the override 'ckpt=last'" in stopped["stdout"]
    assert "Epoch 2:" in stopped["stdout"] + stopped["stderr"]  # the progress bar
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "interrupted"
    resumed = run_cell(kernel, "train_model(*words, 'ckpt=last', folder='run')")
    assert resumed["error"] == "", resumed
    assert resumed["result"].startswith("Run('run': SASRec, synthetic, test/ndcg@10 0.")
    assert "epoch  20" in resumed["stdout"]
    assert run_cell(kernel, "train_model('model.dimm=3')")["error"] == "InputError"
