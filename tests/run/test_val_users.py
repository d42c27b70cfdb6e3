"""Runs in which only some users have a validation item, and the others are trained on theirs."""

import json

import numpy as np

DATA = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=30", "model=tiny"]
KEYS = [*DATA, "trainer.max_epochs=2", "dataset.val_users=20"]


def test_a_run_says_who_is_in_validation(tmp_path, train_here, report_here):
    for seed in (0, 1):
        done = train_here(*KEYS, f"seed={seed}", f"hydra.run.dir=runs/{seed}")
        assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "runs/0/metrics.json").read_text())
    protocol = written["protocol"]
    users = protocol["held_out_users"]
    assert f" {users} users held out, 20 of them in validation" in done.stdout
    assert f"Test: last item of {users} users, ranked among all" in done.stdout
    assert protocol["holdout"] == (
        "last item: test = last, validation = the one before, of users with 3 interactions or more;"
        " validation of 20 users only, the others are trained on that item"
    )
    assert protocol["validation"] == "20 users"
    with np.load(tmp_path / "runs/0/ranks.npz") as ranks:
        assert len(ranks["user"]) == users

    done = train_here(*DATA, "trainer.max_epochs=2", "hydra.run.dir=runs/all")
    assert done.returncode == 0, done.stderr
    assert "in validation" not in done.stdout
    done = report_here("runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last item of") == 2  # the two protocols have a table each

    done = train_here(*DATA, "trainer.max_epochs=1", "init_from=runs/0", "hydra.run.dir=runs/warm")
    assert "it was trained on other data (holdout), which may include items held out here" in done.stderr + done.stdout


def test_more_users_than_there_are_is_one_line(train_here):
    done = train_here(*DATA, "dataset.val_users=60")
    assert done.returncode == 1
    assert done.stderr.startswith("error: dataset.val_users=60 must be below the ")
    assert done.stderr.endswith(" with 3 interactions; lower it, or set it to null, for all of them\n")


def test_a_search_compares_the_users_of_validation(tmp_path, train_here, report_here):
    for seed in (0, 1):
        done = train_here(*KEYS, "evaluation.test=false", f"seed={seed}", f"hydra.run.dir=runs/{seed}")
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "runs/0/validation_ranks.npz") as ranks:
        assert len(ranks["user"]) == 20
    done = report_here("runs")
    assert done.returncode == 0, done.stderr
