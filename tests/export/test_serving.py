"""The examples of docs/serving.md, in processes that cannot import this package: their lists are those of recommend."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from commands import in_this_process, without_the_package

from sasrec_lab.recommend.recommender import Recommender

DATA = ("dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=50", "trainer=fast")
PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text()
INDEX, SERVER = re.findall(r"```python\n(.*?)```", PAGE, re.S)
EXPORTS = re.findall(r"^python -m sasrec_lab\.export (.*)$", PAGE, re.M)
CLIENT = """
from fastapi.testclient import TestClient
from server import app

client = TestClient(app)
answers = [client.post("/recommend", params={"k": k}, json=history) for history, k in json.load(open("asked.json"))]
print(json.dumps([[answer.status_code, answer.json()] for answer in answers]))
"""


@pytest.fixture(scope="module")
def exported(made_once) -> Path:
    """A run, and what the commands of the page write of it."""

    def make(folder: Path) -> None:
        train, export = (in_this_process(f"sasrec_lab.{name}", folder) for name in ("train", "export.__main__"))
        done = train(*DATA, "model=tiny", "hydra.run.dir=run")
        assert done.returncode == 0, done.stderr
        for command in EXPORTS:
            done = export(*shlex.split(command.replace("outputs/ml_100k/<time>", "run")))
            assert done.returncode == 0, done.stderr
        (folder / "server.py").write_text(SERVER)

    return made_once("serving", make)


def listed(folder: Path, history: list[int], k: int, filter_viewed: bool) -> pd.DataFrame:
    table = pd.DataFrame({"user_id": 1, "item_id": history, "datetime": range(len(history))})
    return Recommender.from_run(folder / "run").recommend([1], k, table, filter_viewed=filter_viewed)


@pytest.mark.slow
def test_the_index_finds_the_items_of_recommend(exported):
    pytest.importorskip("usearch")
    done = without_the_package(INDEX, exported)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == listed(exported, [50, 18, 17], 10, False)["item_id"].tolist()


@pytest.mark.slow
def test_the_server_answers_with_the_lists_of_recommend(exported, tmp_path):
    for package in ("fastapi", "httpx"):
        pytest.importorskip(package)
    asked = [([50, 18, 17], 5), (["3", 999, 7], 3), ([7] * 30 + [*range(1, 41)], 50), ([3], 0), ([999], 5)]
    (exported / "asked.json").write_text(json.dumps(asked))
    done = without_the_package("import json, sys; sys.path.insert(0, '.')" + CLIENT, exported)
    assert done.returncode == 0, done.stderr
    *answers, (of_no_item, _), (status, content) = json.loads(done.stdout)
    assert of_no_item == 422
    assert (status, content["detail"]) == (422, "the model knows no item of this history")
    histories = [[50, 18, 17], [3, 7], [7] * 30 + [*range(1, 41)]]
    for (code, found), history, k in zip(answers, histories, (5, 3, 10), strict=True):
        assert code == 200
        lists = listed(exported, history, k, True)
        assert [each["item"] for each in found] == lists["item_id"].tolist()
        assert [each["score"] for each in found] == pytest.approx(lists["score"].tolist(), abs=1e-5)


def test_the_examples_are_short():
    assert len([line for line in INDEX.splitlines() if line and "import" not in line]) <= 10
    assert len([line for line in SERVER.splitlines() if line]) <= 22
