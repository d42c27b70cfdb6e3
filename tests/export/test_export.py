"""The export command, and its program in a process that cannot import this package."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Done, hiding_the_package, in_a_fresh_process, in_this_process, without_the_package

from sasrec_lab import files
from sasrec_lab.data.sequences import load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.export.__main__ import export as write_export
from sasrec_lab.recommend.recommender import Recommender

PAGE = (Path(__file__).parents[2] / "docs/export.md").read_text()
DATA = ("dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=50", "trainer=fast")
# an export to ONNX takes seconds, and other models have the operations of these
WITHOUT_ONNX = {
    "model=sasrec_rectools",
    "model.blocks=0",
    "model.norm=pre",
    "model.positions_from=oldest",
    "model=hstu",
}
SMALL = "model.dim=8 model.maxlen=12 trainer.max_epochs=1"
# what a user would write: neither the working folder nor the clone is on the path
LOADER = """
import json, sys, torch
try:
    import sasrec_lab
except ImportError:
    pass
else:
    sys.exit("sasrec_lab can be imported here, so this shows nothing")
for line in sys.stdin:  # a folder
    folder = line.strip()
    program = torch.export.load(f"{folder}/encoder.pt2").module()
    scores = [program(*map(torch.tensor, given)).tolist() for given in json.load(open(f"{folder}/histories.json"))]
    json.dump(scores, open(f"{folder}/scores.json", "w"))
    print(folder, flush=True)
"""


def export(*args: str, cwd: Path) -> Done:
    return in_this_process("sasrec_lab.export.__main__", cwd)(*args)


@pytest.fixture
def trained(made_once, tmp_path) -> Callable[[str], Path]:
    """Train a model, unless another test has, and return a copy of its run at `run` in the test's own folder."""

    def run(model: str) -> Path:
        def train(folder: Path) -> None:
            done = in_this_process("sasrec_lab.train", folder)(*DATA, *model.split(), "hydra.run.dir=run")
            assert done.returncode == 0, done.stderr

        made = made_once(f"exported-{re.sub('[^a-z0-9]+', '-', model)}", train)
        return shutil.copytree(made / "run", tmp_path / "run")

    return run


@pytest.fixture(scope="module")
def loader(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    """Start the process that cannot import this package; it serves all tests of the module."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(hiding_the_package(LOADER), cwd=tmp_path_factory.mktemp("empty"), **pipes) as process:
        yield process
        process.stdin.close()


def assert_onnx_gives(scores: np.ndarray, given: list[list[list[int]]], folder: Path, saved: dict[str, Any]) -> None:
    """Check that the run in a folder, exported as ONNX, gives these scores of histories, if the extra is installed."""
    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        return
    import onnxruntime

    done = export("run", "encoder.onnx", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "encoder.onnx and encoder.json\n"), done.stderr
    assert json.loads((folder / "encoder.json").read_text()) == saved
    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"))
    names = [each.name for each in session.get_inputs()]
    assert names == ["history", "times", "query_time"][: 3 if "reads_times" in saved else 1]
    for arrays, expected in zip(given, scores, strict=True):
        (found,) = session.run(["scores"], dict(zip(names, map(np.array, arrays), strict=True)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "model=tiny model.blocks=2 model.heads=2",
        "model=sasrec_rectools model.dim=8 model.maxlen=12",  # attends to the pads too
        "model=tiny model.maxlen=1 model.blocks=0 model.share_items=false",
        "model=tiny model.norm=pre model.pos_emb=sinusoidal model.activation=gelu",
        "model=ligr model.dim=8 model.maxlen=12 model.heads=2 model.positions_from=oldest",
        "model=tiny model.heads=2 model.blocks=2 model.pos_emb=rope",
        "model=tiny model.heads=2 model.blocks=2 model.pos_emb=relative",
        "model=gru4rec model.dim=8 model.maxlen=12 model.blocks=2",
        "model=hstu model.dim=8 model.maxlen=12 model.heads=2",
        "model=fuxi model.dim=8 model.maxlen=12 model.heads=2",
        "model=ligr model.dim=8 model.maxlen=12 model.time_bias=decay model.pos_emb=relative",
        "model=bert4rec model.dim=8 model.maxlen=12",
        "model=bert4rec model.dim=8 model.maxlen=2 model.block=ligr model.pos_emb=rope",
    ],
)
def test_the_program_gives_the_same_lists_without_the_package(model, trained, loader, tmp_path):
    trained(model)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = export("run", str(empty / "encoder.pt2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    recommender = Recommender.from_run(tmp_path / "run")
    saved = json.loads((empty / "encoder.json").read_text())
    expected = {"maxlen": recommender.ranker.encoder.longest_history, "items": recommender.items.ids.tolist()}
    reads_times = recommender.ranker.query_time is not None
    assert saved == expected | ({"reads_times": True} if reads_times else {})
    sequences = load_sequences(recommender.dataset, str(tmp_path / "cache"))
    numbers = {item: number for number, item in enumerate(saved["items"], 1)}
    users = np.argsort(np.diff(sequences.offsets))[[*range(5), *range(-5, 0)]]  # the shortest and the longest
    histories = []
    for user in users:
        items = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        histories.append([numbers[item] for item in sequences.item_ids[items - 1].tolist()][-saved["maxlen"] :])
    histories[0] = histories[0][-1:]  # a single item
    times = [[1_600_000_000 + 7**place % 10**7 + 10**7 * place for place in range(len(items))] for items in histories]
    asked = [[own[-1] + 10**user] for user, own in enumerate(times)]
    given = [*zip(histories, times, asked, strict=True)] if reads_times else [[items] for items in histories]
    (empty / "histories.json").write_text(json.dumps(given))
    print(empty, file=loader.stdin, flush=True)
    assert (answer := loader.stdout.readline()) == f"{empty}\n", answer + loader.communicate(timeout=60)[0]

    scores = np.array(json.loads((empty / "scores.json").read_text()))
    assert scores.shape == (len(users), len(saved["items"]))
    if not WITHOUT_ONNX & set(model.split()):
        assert_onnx_gives(scores, given, tmp_path, saved)
    rows = [
        (user, saved["items"][item - 1], time)
        for user, items in enumerate(histories)
        for time, item in zip(times[user], items, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "datetime"])
    when = pd.DataFrame({"user_id": range(len(users)), "datetime": np.ravel(asked)}) if reads_times else None
    lists = recommender.recommend(list(range(len(users))), 10, table, filter_viewed=False, query_time=when)
    for user, own in lists.groupby("user_id"):
        best = np.argsort(-scores[user], kind="stable")[:10]
        assert [saved["items"][place] for place in best] == own["item_id"].tolist()
        np.testing.assert_allclose(scores[user][best], own["score"], atol=1e-5)


@pytest.mark.slow
def test_the_page_on_exports_runs_unchanged(trained, tmp_path, monkeypatch):
    trained("model=tiny")
    command = re.search(r"^python -m sasrec_lab\.export (.*)$", PAGE, re.M)[1]
    words = command.replace("outputs/ml_100k/<time>", "run").split()
    assert in_a_fresh_process("sasrec_lab.export", tmp_path)(*words).returncode == 0
    done = without_the_package(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], tmp_path)
    assert done.returncode == 0, done.stderr
    refused = export("run", "/proc/encoder.pt2", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: output=/proc/encoder.pt2 cannot be written: ")

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync_file", fail)
    with pytest.raises(InputError, match=r"full\.pt2 cannot be written: No space left on device; choose another place"):
        write_export(tmp_path / "run", tmp_path / "full.pt2")
    monkeypatch.undo()
    table = pd.DataFrame({"user_id": 1, "item_id": [50, 18, 17], "datetime": range(3)})
    lists = Recommender.from_run(tmp_path / "run").recommend([1], 10, table, filter_viewed=False)
    assert json.loads(done.stdout) == lists["item_id"].tolist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere", "encoder.pt2"), "error: run=nowhere: there is no such folder"),
        (
            ("nowhere", "encoder.pt"),
            "error: output=encoder.pt must end in .pt2 (torch.export's format) or .onnx; use encoder.pt2\n",
        ),
        (("nowhere", "."), "error: output=. must end in .pt2 (torch.export's format) or .onnx; use encoder.pt2\n"),
        (("output=encoder.pt2", "run=nowhere"), "error: run=nowhere: there is no such folder; check the path\n"),
        (("run=nowhere",), "error: the following arguments are required: output: write sasrec-export <run> <output>; "),
        (("nowhere", "no/encoder.pt2"), "error: output=no/encoder.pt2: there is no folder no"),
    ],
)
def test_a_mistake_is_one_line(words, said, tmp_path):
    done = export(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # the test's own


@pytest.mark.parametrize("content", ["{}", "[1]", "text"])
def test_a_json_of_another_origin_is_kept(content, tmp_path):
    (tmp_path / "encoder.json").write_text(content)
    done = export("nowhere", "encoder.pt2", cwd=tmp_path)
    assert done.stderr.startswith("error: output: the ids would overwrite encoder.json, which no export wrote; move it")
    (tmp_path / "encoder.json").write_text('{"maxlen": 5, "items": [1]}')
    assert export("nowhere", "encoder.pt2", cwd=tmp_path).stderr.startswith("error: run=nowhere: ")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["user.pt2", "user.onnx"])
@pytest.mark.parametrize("model", ["model=tiny model.output_bias=true", "model=hstu", "model=bert4rec"])
def test_products_of_exported_vectors_are_the_scores(model, program, trained, tmp_path):
    if program.endswith("onnx"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    trained(f"{model} {SMALL}")
    done = export("run", program, "--vectors", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{program}, user.json and user.npy\n"), done.stderr
    vectors, known = np.load(tmp_path / "user.npy"), json.loads((tmp_path / "user.json").read_text())
    assert vectors.dtype == np.float32
    assert len(vectors) == len(known["items"])
    history, times, asked = [3, 1, 4, 1, 5], [10**9 + 3600 * place**3 for place in range(5)], [10**9 + 10**6]
    given = [history, times, asked] if "reads_times" in known else [history]
    if program.endswith("onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / program))
        names = [each.name for each in session.get_inputs()]
        (vector,) = session.run(["vector"], dict(zip(names, map(np.array, given), strict=True)))
    else:
        vector = torch.export.load(tmp_path / program).module()(*map(torch.tensor, given)).detach().numpy()
    scores = vectors @ vector
    items = [known["items"][item - 1] for item in history]
    table = pd.DataFrame({"user_id": 1, "item_id": items, "datetime": times})
    when = pd.DataFrame({"user_id": [1], "datetime": asked}) if "reads_times" in known else None
    lists = Recommender.from_run(tmp_path / "run").recommend([1], 10, table, filter_viewed=False, query_time=when)
    best = np.argsort(-scores, kind="stable")[:10]
    assert [known["items"][place] for place in best] == lists["item_id"].tolist()
    np.testing.assert_allclose(scores[best], lists["score"], rtol=1e-5, atol=1e-5)


def test_vectors_of_another_origin_are_kept(tmp_path):
    (tmp_path / "user.npy").write_text("mine")
    done = export("nowhere", "user.pt2", "--vectors", cwd=tmp_path)
    assert done.stderr.startswith("error: output: the items' vectors would overwrite user.npy, which no export wrote;")
    (tmp_path / "user.json").write_text(json.dumps({"maxlen": 5, "items": [7, 8]}))  # of an export without vectors
    for array, said in (
        (np.zeros(2), "output: the items' vectors"),
        (np.zeros((3, 4)), "output: the items' vectors"),
        (np.zeros((2, 4)), "run=nowhere"),
    ):
        np.save(tmp_path / "user.npy", array)
        assert export("nowhere", "user.pt2", "--vectors", cwd=tmp_path).stderr.startswith(f"error: {said}")


def test_a_missing_extra_is_one_line(trained, tmp_path, monkeypatch):
    trained("model=tiny")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)  # is installed
    done = export("run", "encoder.onnx", cwd=tmp_path)
    needs = "output ends in .onnx, which needs onnxscript; install the extra: pip install 'sasrec-lab[onnx]'"
    assert (done.returncode, done.stderr) == (1, f"error: {needs}\n")


@pytest.mark.slow
def test_the_onnx_example_of_the_page_runs_unchanged(trained, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    trained("model=tiny")
    assert export("run", "encoder.onnx", cwd=tmp_path).returncode == 0
    done = without_the_package(re.findall(r"```python\n(.*?)```", PAGE, re.S)[1], tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.DataFrame({"user_id": 1, "item_id": [50, 18, 17], "datetime": range(3)})
    lists = Recommender.from_run(tmp_path / "run").recommend([1], 10, table, filter_viewed=False)
    assert json.loads(done.stdout) == lists["item_id"].tolist()
