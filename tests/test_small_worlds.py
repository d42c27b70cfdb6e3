"""Data sets so small that parts of them are empty: a run finishes, or one line says why before it trains."""

import json
import re
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from commands import Done, in_this_process

from sasrec_lab.ops import library as kernels

WORLDS = {  # item ids by user
    "one held-out user": [[1, 2, 3, 4], [1, 2], [2, 3]],
    "one held-out user with one training item": [[1, 2, 3], [1, 2], [2, 3]],
    "one user": [[1, 2, 3, 4]],
    "two users": [[1, 2, 3, 4], [2, 3, 4, 1]],
    "two items": [[1, 2, 1, 2], [2, 1, 2, 1]],
    "every target seen": [[1, 2, 1, 2], [3, 2, 3, 2], [1, 1, 1, 1], [1, 2, 4, 5, 3]],
    "no target in training": [[1, 2, 3, 14 + user, 105 + user] for user in range(4)],
    "one user with everything": [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3], [4, 5]],
    "all users with everything": [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
    "one interaction of most users": [[1], [2], [3], [1, 2, 3, 4, 5]],
}
NEGATIVES = {
    "softmax": [],
    "sampled_softmax": ["loss.negatives=50"],
    "bce": ["loss.negatives=9"],
    "gbce": ["loss.negatives=1"],
    "bpr": [],
}
CHOICES = [  # combined at random, by a fixed seed
    [[], ["dataset.windows=all"]],
    [[], ["dataset.catalogue=train"]],
    [[], [], ["dataset.holdout=none"]],
    [[], ["model.maxlen=1"], ["model.maxlen=2"]],
    [["batch_size=1"], ["batch_size=10000"]],
    [[], ["evaluation.batch_size=1"]],
    [[], ["evaluation.filter_seen=false"]],
    [["evaluation.k=[1]", "evaluation.monitor=val/ndcg@1"], ["evaluation.k=[1000,10]"]],
    [
        [],
        ["evaluation.sampled=1"],
        ["evaluation.sampled=9", "evaluation.draw=unseen"],
        ["evaluation.sampled=60", "evaluation.draw=popularity", "evaluation.monitor=val/mrr-sampled60"],
    ],
    [[], [], ["trainer.limit_val_batches=0"]],
    [[], ["optimizer.ema=0.9"], ["optimizer.cosine=true", "optimizer.warmup_steps=9"]],
    [[], ["tensorboard.attention_users=3", "tensorboard.projector=true"]],
    [["times=0,1,2"], ["times=7,7,7"]],
]


def cases() -> list[pytest.param]:
    """Return two cases of each world, with another loss and other choices each, one of them without kernels."""
    random, losses = np.random.default_rng(16), cycle(NEGATIVES)
    cases = []
    for number, (world, loss) in enumerate((world, next(losses)) for world in WORLDS for _ in range(2)):
        chosen = [word for options in CHOICES for word in options[random.integers(len(options))]]
        words = [f"loss={loss}", *NEGATIVES[loss], *chosen]
        form = ["compiled", "torch"][number % 2]
        marks = [pytest.mark.slow] if number % 4 in (1, 2) else []
        cases.append(pytest.param(world, words, form, id=f"{world}, {loss}, {form}", marks=marks))
    return cases


def write(users: list[list[int]], folder: Path, times: str = "times=0,1,2") -> None:
    """Write the users' interactions to my.csv, with ascending or equal times."""
    time = 0 if times == "times=7,7,7" else 1
    rows = [f"{user},{item},{time * place}" for user, items in enumerate(users) for place, item in enumerate(items)]
    (folder / "my.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))


FILE = ["dataset=csv", "dataset.path=my.csv", "model=tiny", "trainer.accelerator=cpu", "hydra.run.dir=run"]


def check_is_one_line(done: Done) -> None:
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert "epoch" not in done.stdout


def check_records(folder: Path) -> None:
    """Check that every metric is a share, and that each held-out user is ranked once."""
    written = json.loads((folder / "metrics.json").read_text())
    assert written["status"] == "finished"
    assert all(0 <= value <= 1 for value in written["metrics"].values()), written["metrics"]
    held_out = written["protocol"]["held_out_users"]
    assert (folder / "ranks.npz").exists() == (held_out > 0)
    if held_out:
        ranks = np.load(folder / "ranks.npz")
        assert len(ranks["user"]) == len(set(ranks["user"].tolist())) == held_out
        assert {"test/mrr", "test/recall@1", "test/recall@10"} & written["metrics"].keys()


@pytest.mark.parametrize(("world", "words", "form"), cases())
def test_small_world_finishes(world, words, form, tmp_path, train_here, monkeypatch):
    if form == "torch":
        monkeypatch.setattr(kernels, "supports", lambda *tensors: False)
    write(WORLDS[world], tmp_path, *(word for word in words if word.startswith("times=")))
    given = [word for word in words if not word.startswith("times=")]
    done = train_here(*FILE, "trainer.max_epochs=2", *given)
    if done.returncode:
        check_is_one_line(done)
        return
    assert done.stderr == ""
    assert "nan" not in done.stdout
    check_records(tmp_path / "run")
    recommend = in_this_process("sasrec_lab.recommend.__main__", tmp_path)
    for asked in ("users=all", "items=all"):
        lists = recommend("run=run", asked, "k=1")
        if lists.returncode:  # such as a user with an unknown item only
            check_is_one_line(lists)


@pytest.mark.parametrize(("world", "model"), [*zip(WORLDS, cycle(["ease", "itemknn"]), strict=False)])
def test_a_model_without_epochs_finishes_in_a_small_world(world, model, tmp_path, train_here):
    write(WORLDS[world], tmp_path)
    done = train_here(*FILE, f"model={model}", "evaluation.k=[1,10]")
    if done.returncode:
        check_is_one_line(done)
        return
    assert (done.stderr, "nan" in done.stdout) == ("", False)
    check_records(tmp_path / "run")
    recommend = in_this_process("sasrec_lab.recommend.__main__", tmp_path)
    for lists in (recommend("run=run", "users=all", "k=1"), recommend("run=run", "items=all", "k=1")):
        if lists.returncode:  # such as a user with an unknown item only
            check_is_one_line(lists)


NO_TRAINING = {  # users, words, and the line
    "one item": ([[1, 1, 1, 1], [1, 1, 1]], [], "dataset.path=my.csv: only one item, 1, is left after cleaning"),
    "one interaction each": ([[1], [2], [3]], [], "my.csv: no user has 3 interactions, which a holdout needs"),
    "one interaction each, no holdout": (
        [[1], [2]],
        ["dataset.holdout=none"],
        "my.csv: no user has 2 training interactions; the longest of 2 users has 1",
    ),
    "two users of three": (
        [[1, 2, 3], [3, 2, 1]],
        [],
        "my.csv: no user has 2 training interactions; with the last two of each held out, the longest of 2 users has 3",
    ),
    "more negatives than items": (
        [[1, 2, 3, 4]],
        ["loss=gbce", "loss.negatives=4"],
        "loss.negatives=4 must be at most 3 with loss=gbce, the number of items other than the target; lower it",
    ),
}


@pytest.mark.parametrize("world", NO_TRAINING)
def test_world_without_training_is_one_line(world, tmp_path, train_here):
    users, words, line = NO_TRAINING[world]
    write(users, tmp_path)
    done = train_here(*FILE, *words)
    assert done.returncode == 1
    check_is_one_line(done)
    assert done.stderr.startswith(f"error: {line}")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "failed"
