"""The report: rows, spread, published results, paired tests, protocols, runs without results, and files."""

import base64
import csv
import fcntl
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from written_runs import PUBLISHED, write_run

from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import to_plain
from sasrec_lab.report.cells import format_duration
from sasrec_lab.report.contents import ProtocolReport, build_report
from sasrec_lab.report.page import html_page
from sasrec_lab.report.rows import Row, Spread, comparisons
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.significance import FLIPS, compare, holm_correction, sign_flip_p
from sasrec_lab.report.summary import compare_jobs
from sasrec_lab.report.tables import all_tables, protocols_table
from sasrec_lab.run.model_name import model_name


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two rows, with three seeds and with one."""
    for seed, ndcg in enumerate([0.4, 0.5, 0.6]):
        write_run(tmp_path / f"sweep/{seed}-a", "dataset=small", seed=seed, ndcg=ndcg, config={"published": PUBLISHED})
    extra = {"config": {"published": PUBLISHED}, "ranks": [1, 1, 1, 1]}
    write_run(tmp_path / "sweep/3-b", "dataset=small", "model.dim=8", seed=0, ndcg=0.3, **extra)
    return tmp_path / "sweep"


def only_part(folder: Path, baseline: str | None = None, wanted: tuple[str, ...] = ()) -> ProtocolReport:
    """Return the report of the only protocol in a folder."""
    (part,) = build_report(find_runs([folder]), list(wanted), baseline).parts
    return part


# Rows


def test_spread_is_that_of_a_sample():
    assert Spread.from_values([1.0, 2.0, 6.0]) == Spread(3.0, math.sqrt(7.0), 3)
    assert Spread.from_values([0.25]) == Spread(0.25, None, 1)
    assert Spread.from_values([]).n == 0


def test_printed_table(sweep, report_command):
    done = report_command(sweep)
    assert (done.returncode, done.stderr) == (0, "")
    expected = """\
test/ndcg@10: all 9 items except those already seen
  row          n  mean ± std over seeds  published  difference  vs baseline ± 95% over users       p
  default      3        0.5000 ± 0.1000     0.5000     +0.0000                             -       -
  model.dim=8  1                 0.3000     0.2500     +0.0500              +0.4673 ± 0.4052  0.2584
  popularity   -                 0.1000          -           -                             -       -
"""
    assert expected in done.stdout
    assert "every row: dataset=small" in done.stdout
    assert "n = 1: one seed, so no spread" in done.stdout
    assert "published: Somebody 2018, Table IV; difference: ours minus published" in done.stdout
    assert re.search(r"default +0,1,2 +3 +2 +1:00 +100\n", done.stdout)


def test_every_baseline_without_training_has_a_line_and_a_bar(tmp_path, report_here):
    """A run of an older version, which measured popularity only, shares the table."""
    from sasrec_lab.report.figures import draw_figures

    write_run(tmp_path / "x/a", seed=0)
    for name, words in (("b", []), ("c", ["model.dim=8"])):
        folder = write_run(tmp_path / "x" / name, *words, seed=1)
        results = json.loads((folder / "metrics.json").read_text())
        results["baselines"] |= {"markov": {"test/ndcg@10": 0.2}}
        (folder / "metrics.json").write_text(json.dumps(results))
    lines = report_here("x").stdout.splitlines()
    table = lines[lines.index("test/ndcg@10: all 9 items except those already seen") :]
    assert [line.split()[:3] for line in table[4:6]] == [["popularity", "-", "0.1000"], ["markov", "-", "0.2000"]]
    figure = draw_figures(build_report(find_runs([tmp_path / "x"]), [], None))[0]
    assert figure.name == "rows"
    assert [label.get_text() for label in figure.canvas.axes[0].get_yticklabels()][2:] == ["popularity", "markov"]
    assert [bar.get_width() for bar in figure.canvas.axes[0].patches][2:] == [0.1, 0.2]


def test_rows_of_several_models_have_their_names(tmp_path, report_here):
    """A run of an older version has no key of the block; a block of the user's own has its own name."""
    blocks = {"a": {}, "b": {"block": "transformer", "causal": False}, "c": {"block": "ligr"}, "d": {"block": "my:Own"}}
    for name, model in blocks.items():
        write_run(tmp_path / "x" / name, f"experiment={name}", config={"model": model})
    done = report_here("x", "--csv", "a.csv")
    names = ["SASRec", "BERT4Rec", "LiGR", "my:Own"]
    for name, model in zip(blocks, names, strict=True):
        assert re.search(rf"^  experiment={name} +{model} +1 ", done.stdout, re.M)
    assert re.search("^  popularity +- +- ", done.stdout, re.M)
    with open(tmp_path / "a.csv") as file:
        assert list(dict.fromkeys(row["model"] for row in csv.DictReader(file))) == names


def test_a_model_without_epochs_has_empty_cells_for_them(tmp_path, report_here):
    folder = write_run(tmp_path / "x/a", config={"model": {"name": "ease", "regularization": 5.0}})
    results = json.loads((folder / "metrics.json").read_text()) | {"epochs": 0, "best_epoch": None}
    (folder / "metrics.json").write_text(json.dumps(results))
    done = report_here("x", "--csv", "a.csv")
    assert re.search(r"row +seed +epochs +best epoch .*\n  default +0 +- +- ", done.stdout)
    with open(tmp_path / "a.csv") as file:
        assert {(row["epochs"], row["best_epoch"]) for row in csv.DictReader(file)} == {("", "")}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("model=gsasrec", "gSASRec"),
        ("model=gsasrec loss.calibration=0", "SASRec"),
        ("model=esasrec", "eSASRec"),
        ("model=ligr", "LiGR"),
        ("model=ligr loss=sampled_softmax", "LiGR"),
        ("model=gru4rec loss=gbce", "GRU4Rec"),
        ("model=hstu dataset=ml_1m", "HSTU"),
        ("model=fuxi dataset=ml_1m", "FuXi-alpha"),
        ("model=bert4rec", "BERT4Rec"),
        ("model=itemknn", "ItemKNN"),
    ],
)
def test_a_model_is_named_as_in_its_paper(words, name):
    assert model_name(to_plain(load(words.split()))) == name


def test_published_results_apply_only_to_their_data_set(tmp_path):
    write_run(tmp_path / "a", config={"published": PUBLISHED | {"dataset": "other"}})
    assert only_part(tmp_path).comparison.rows[0].published == {}


def test_rows_of_two_papers_have_both_as_sources(tmp_path):
    for name, source in {"a": "Somebody 2018", "b": "Others 2023", "c": "Somebody 2018"}.items():
        published = PUBLISHED | {"source": source, "cells": {f"experiment={name}": {"test/ndcg@10": 0.5}}}
        write_run(tmp_path / name, f"experiment={name}", config={"published": published, "n": name})
    part = only_part(tmp_path)
    assert [row.published for row in part.comparison.rows] == [{"test/ndcg@10": 0.5}] * 3
    assert "published: Somebody 2018; Others 2023; difference: ours minus published" in part.legend()


def test_a_run_with_overrides_is_not_the_published_default(tmp_path):
    """If only one job of a sweep has finished, all rows share its overrides, and its row is called default."""
    published = {"config": {"published": PUBLISHED}}
    write_run(tmp_path / "swept/a", "experiment=x", "model.dim=8", **published)
    write_run(tmp_path / "short/a", "experiment=x", "model.maxlen=3", **published)
    write_run(tmp_path / "plain/a", "experiment=x", **published)
    write_run(
        tmp_path / "row/a", "ablation=default", "model.maxlen=3", config={"published": PUBLISHED, "row": "default"}
    )
    cells = {
        name: only_part(tmp_path / name).comparison.rows[0].published for name in ("swept", "short", "plain", "row")
    }
    assert cells == {
        "swept": {"test/ndcg@10": 0.25},
        "short": {},
        "plain": {"test/ndcg@10": 0.5},
        "row": {"test/ndcg@10": 0.5},
    }
    line = "every row here was run with model.maxlen=3; the published rows may differ in that"
    assert line in only_part(tmp_path / "row").legend()
    assert not [line for line in only_part(tmp_path / "swept").legend() if line.startswith("every row")]


def test_another_model_than_the_papers_is_not_its_row(tmp_path):
    cells = {name: {"test/ndcg@10": 0.25} for name in ("default", "plus", "blocks_1")}
    for name, row, override in (
        ("a", "plus", "model=bert4rec"),
        ("b", "blocks_1", "loss=bce"),
        ("c", "default", "model=ligr"),
        ("d", "plus", "dross=plus"),
    ):
        write_run(tmp_path / name, override, config={"row": row, "published": PUBLISHED | {"cells": cells}})
    rows = [only_part(tmp_path / name).comparison.rows[0] for name in "abcd"]
    assert [row.label for row in rows] == ["plus model=bert4rec", "blocks_1 loss=bce", "default", "plus"]
    assert [row.published for row in rows] == [{}, {}, {}, {"test/ndcg@10": 0.25}]


def test_published_rows_without_a_run_are_listed_by_kind(tmp_path):
    cells = {name: {"test/ndcg@10": 0.5} for name in ("default", "no_norm", "no_loss", "model.dim=8", "model.dim=16")}
    published = PUBLISHED | {"cells": cells}
    for name in ("default", "no_norm"):
        write_run(
            tmp_path / "ablated" / name, f"ablation={name}", config={"row": name, "norm": name, "published": published}
        )
    for dim in (8, 9):
        write_run(tmp_path / f"swept/{dim}", f"model.dim={dim}", config={"dim": dim, "published": published})
    write_run(tmp_path / "single/a", config={"published": published})
    notes = {name: only_part(tmp_path / name).notes for name in ("ablated", "swept", "single")}
    assert "published rows not run here: no_loss" in notes["ablated"]
    assert "published rows not run here: model.dim=16" in notes["swept"]
    assert not [note for note in notes["single"] if note.startswith("published")]


def test_ablation_names_its_row_unless_more_differs(tmp_path):
    write_run(tmp_path / "a", "ablation=no_norm", config={"row": "no_norm", "norm": None})
    write_run(tmp_path / "b", "ablation=default", config={"row": "default"})
    write_run(tmp_path / "c", "ablation=default", "model.dim=8", config={"row": "default"})
    assert [row.label for row in only_part(tmp_path).comparison.rows] == [
        "default",  # the baseline comes first
        "no_norm",
        "ablation=default model.dim=8",
    ]


def test_labels_round_numbers_and_csv_keeps_all_digits(tmp_path, report_here):
    proposed = ["0.16040414354827190", "0.00012345678", "0.50001", "0.50002", "0.10"]
    for number, value in enumerate(proposed):
        write_run(tmp_path / f"x/{number}", f"optimizer.lr={value}", config={"lr": value})
    shown = ["0.1604", "0.0001235", "0.50001", "0.50002", "0.10"]
    assert [row.label for row in only_part(tmp_path / "x").comparison.rows] == [
        f"optimizer.lr={value}" for value in shown
    ]
    for baseline in ("0.0001235", "0.00012345678"):
        done = report_here("x", "--baseline", f"optimizer.lr={baseline}", "--csv", "a.csv")
        assert "baseline: optimizer.lr=0.0001235; vs baseline" in done.stdout
        with open(tmp_path / "a.csv") as file:
            rows = list(csv.DictReader(file))
        assert {row["row"] for row in rows} == {f"optimizer.lr={value}" for value in proposed}
        assert {row["baseline"] for row in rows} == {"", "optimizer.lr=0.00012345678"}


def test_equal_overrides_with_different_configs_are_two_rows(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, config={"loss": {"name": "bce"}})  # as after a change in conf/
    write_run(tmp_path / "c", seed=2, config={"loss": {"name": "gbce"}})
    labels = [row.label for row in only_part(tmp_path).comparison.rows]
    assert labels == ["default", "default (loss.name=bce)", "default (loss.name=gbce)"]


def test_runs_with_other_item_features_are_another_row(tmp_path):
    for seed, checksum in enumerate(["a" * 64, "b" * 64, "a" * 64]):
        write_run(tmp_path / str(seed), seed=seed, item_features=checksum)
    rows = only_part(tmp_path).comparison.rows
    assert [row.label for row in rows] == ["default (item_features=aaaaaaa)", "default (item_features=bbbbbbb)"]
    assert [len(row.runs) for row in rows] == [2, 1]


def test_newest_run_of_a_seed_counts_whatever_its_data_dir(tmp_path):
    write_run(tmp_path / "a", ndcg=0.1, config={"data_dir": "/x"}, start="2026-01-01")
    write_run(tmp_path / "b", ndcg=0.2, config={"data_dir": "/y"}, start="2026-01-02", git={"commit": "def"})
    part = only_part(tmp_path)
    assert part.comparison.rows[0].spread("test/ndcg@10") == Spread(0.2, None, 1)
    assert part.notes == [f"{tmp_path}/a is ignored: {tmp_path}/b is a newer run of the same configuration and seed"]


def test_runs_of_older_versions_share_a_row_with_new_ones(tmp_path):
    write_run(tmp_path / "old", seed=0)
    write_run(tmp_path / "new", seed=1, config={"dataset": {"name": "small", "check_ids": True}})
    assert [len(row.runs) for row in only_part(tmp_path).comparison.rows] == [2]


def test_notes_name_code_versions_and_equal_configurations(tmp_path):
    write_run(tmp_path / "a", "model.dim=4")
    write_run(tmp_path / "b", git={"commit": None})
    notes = only_part(tmp_path).notes
    assert "rows with the same configuration: model.dim=4 and default" in notes
    assert "runs come from 2 code versions: abc, unknown" in notes


def test_many_equal_configurations_are_one_note(tmp_path):
    for dim in range(1, 6):
        write_run(tmp_path / f"{dim}a", f"model.dim={dim}")
        write_run(tmp_path / f"{dim}b", f"model.dim={dim}", "model.maxlen=5")
    (note,) = [note for note in only_part(tmp_path).notes if "same configuration" in note]
    pairs = "; ".join(f"model.dim={dim} and model.dim={dim} model.maxlen=5" for dim in (1, 2, 3))
    assert note == f"rows with the same configuration: {pairs}; and 2 more"


@pytest.mark.parametrize(("seconds", "text"), [(0.26, "0.3 s"), (9.94, "9.9 s"), (9.96, "0:10"), (3661, "1:01:01")])
def test_durations_below_ten_seconds_have_a_decimal(seconds, text):
    assert format_duration(seconds) == text


def test_training_time_includes_parts_before_a_resume(tmp_path):
    write_run(tmp_path / "a", earlier=[{"seconds": {"fit": 30.0}}])
    assert find_runs([tmp_path]).runs[0].seconds == 90


# Protocols


def test_protocols_get_own_tables_and_a_list_of_differences(tmp_path, report_here):
    write_run(tmp_path / "x/a", ndcg=0.4)
    drawn = {"sampled": 3, "draw": "unseen", "seed": 0}
    write_run(tmp_path / "x/b", seed=1, protocol={"sampled_candidates": drawn, "filters": {"min_user": 5}})
    report = build_report(find_runs([tmp_path / "x"]), [], None)
    assert [[row.label for row in part.comparison.rows] for part in report.parts] == [["default"], ["default"]]
    assert protocols_table(report).rows == [
        ["filters.min_user", "0 (1); 5 (2)"],
        ["sampled_candidates.draw", "paper (1); unseen (2)"],
    ]
    done = report_here("x", "--html", "a.html")
    assert "<td>filters.min_user</td><td>0 (1); 5 (2)</td>" in (tmp_path / "a.html").read_text()
    assert "2 protocols, each with its own tables; they differ in" in done.stdout
    assert done.stdout.count("test/ndcg@10: all 9 items") == 2
    assert all(f"default: x/{name}\n" in done.stdout for name in "ab")  # which of the two rows of this name


def test_two_splits_of_a_data_set_share_no_table(tmp_path):
    last = "last item: test = last, validation = the one before, of users with 3 interactions or more"
    for name, holdout in {"a": last, "b": "time: test from 0.9", "c": "time: test from 0.8"}.items():
        write_run(tmp_path / name, "model.dim=8", protocol={"holdout": holdout})
    parts = build_report(find_runs([tmp_path]), [], None).parts
    runs = [[run for row in part.comparison.rows for run in row.runs] for part in parts]
    assert [[run.folder.name for run in each] for each in runs] == [["a"], ["b"], ["c"]]


def test_the_leak_of_a_holdout_is_a_line(tmp_path, report_here):
    """A run of an older version, which did not record it, shares the table."""
    write_run(tmp_path / "x/a", seed=0)
    write_run(tmp_path / "x/b", seed=1, protocol={"leak": 0.9876})
    assert only_part(tmp_path).comparison.rows[0].spread("test/ndcg@10").n == 2
    line = "leak: 98.8% of the test targets are not later than the latest training interaction"
    assert f"  {line}\n" in report_here("x", "--html", "a.html", "--latex", "a.tex").stdout
    assert f"<li>{line}</li>" in (tmp_path / "a.html").read_text()
    assert line.replace("%", r"\%") in (tmp_path / "a.tex").read_text()


def test_a_sampled_monitor_puts_its_candidates_first(tmp_path):
    evaluation = {"k": [10], "sampled": 3, "monitor": "val/ndcg@10-sampled3"}
    write_run(tmp_path / "a", config={"evaluation": evaluation})
    assert only_part(tmp_path).metrics == ["test/ndcg@10-sampled3", "test/ndcg@10"]


def test_runs_without_a_holdout_have_a_cost_and_no_figures(tmp_path, report_here):
    from sasrec_lab.report.figures import draw_figures

    folder = write_run(tmp_path / "x/0-a")
    results = json.loads((folder / "metrics.json").read_text()) | {"metrics": {}, "baselines": {}}
    (folder / "metrics.json").write_text(json.dumps(results))
    assert [table.title for table in all_tables(only_part(tmp_path))] == ["Cost per run (mean over seeds)"]
    assert draw_figures(build_report(find_runs([tmp_path]), [], None)) == []
    assert compare_jobs(tmp_path / "x") == ""
    assert report_here("x", "--html", "a.html", "--markdown", "a.md", "--csv", "a.csv").returncode == 0


def test_full_and_sampled_ranks_have_separate_tables(sweep):
    titles = [table.title for table in all_tables(only_part(sweep))]
    assert titles[:2] == [
        "test/ndcg@10: all 9 items except those already seen",
        "test/ndcg@10-sampled3: the target and 3 sampled items (draw=paper)",
    ]


# Paired tests


def test_sign_flip_approximates_the_exact_p_value():
    rng = np.random.default_rng(1)
    differences = np.stack([rng.normal(0.4, 1, 10), rng.normal(0, 1, 10), np.r_[np.ones(4), np.zeros(6)]])
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    for row, p in zip(differences, sign_flip_p(differences), strict=True):
        exact = np.mean(np.abs(signs @ row) >= abs(row.sum()) - 1e-9)
        assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / FLIPS) + 1 / FLIPS


def test_p_below_one_flip_is_bounded_by_the_exact_one():
    (p,) = sign_flip_p(np.ones((1, 30)))
    assert 2 * 2.0**-30 <= p < 1e-5


def test_equal_rows_are_rarely_significant():
    rng = np.random.default_rng(0)
    p = sign_flip_p(rng.normal(size=(400, 60)), flips=1000)
    assert 0.02 < np.mean(p <= 0.05) < 0.09


def test_holm_correction():
    assert holm_correction([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm_correction([0.4, 0.9]) == pytest.approx([0.8, 0.9])


def test_users_are_matched_by_id_and_averaged_over_seeds(tmp_path):
    """Against the definition, user by user."""
    write_run(tmp_path / "0", seed=0, users=["a", "b", "c", "d"], ranks=[1, 2, 11, 0])
    write_run(tmp_path / "1", seed=1, users=["d", "c", "b", "a"], ranks=[3, 1, 0, 2])
    write_run(tmp_path / "2", "model.dim=8", users=["b", "a", "d", "c"], ranks=[1, 1, 10, 5])
    part = only_part(tmp_path)
    gain = {rank: 1 / math.log2(rank + 1) for rank in range(1, 11)} | {0: 0.0, 11: 0.0}
    baseline = {"a": (gain[1] + gain[2]) / 2, "b": gain[2] / 2, "c": gain[1] / 2, "d": gain[3] / 2}
    row = {"a": gain[1], "b": gain[1], "c": gain[5], "d": gain[10]}
    differences = np.array([row[user] - baseline[user] for user in "abcd"])
    test = part.tests["model.dim=8", "default", "test/ndcg@10"]
    assert test.difference == pytest.approx(differences.mean())
    assert test.margin == pytest.approx(1.96 * differences.std(ddof=1) / 2)
    assert test.p == test.p_holm == sign_flip_p(differences[None])[0]


GAIN = [0, 1, 1 / math.log2(3), 1 / 2, 0, 0, 0, 1 / 3]  # by rank; log2(1 + 7) is 3
BOTH = GAIN[1] + GAIN[2]  # the ideal of two targets


@pytest.mark.parametrize(
    ("metric", "row", "differences"),  # the mean over the users 7, 8 and 9 is the difference of the metric
    [
        ("ndcg@10", [0, 1, 2, 3, 4], [(GAIN[3] - GAIN[1]) * 3 / 5, GAIN[1] * 3 / 5, -GAIN[7] * 3 / 5]),
        ("ndcg@10-by-user", [0, 1, 2, 3, 4], [(GAIN[3] - GAIN[1]) / 2, GAIN[1] / 2, -GAIN[7]]),
        ("ndcg@10", [0, 0, 1, 1, 2], [(GAIN[3] - GAIN[1]) / BOTH, GAIN[1] / BOTH, -GAIN[7]]),
        ("mrr", [0, 0, 1, 1, 2], [1 / 3 - 1, 0, -1 / 7]),
        ("recall@1", [0, 0, 1, 1, 2], [-1 / 2, 1 / 2, 0]),
    ],
)
def test_a_user_with_several_targets_is_one_difference(tmp_path, metric, row, differences):
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [4, 2, 0, 3, 1])):
        folder = write_run(tmp_path / name, *(["model.dim=8"] if name == "b" else []))
        results = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(results | {"metrics": {f"test/{metric}": 0.5}}))
        columns = {"user": [7, 7, 8, 8, 9], "target": [1, 2, 1, 3, 3], "row": row}
        columns["rank"] = [1, 3, 0, 1, 7] if name == "a" else [3, 3, 1, 1, 0]
        np.savez(folder / "ranks.npz", **{key: np.array(values)[order] for key, values in columns.items()})
    test = only_part(tmp_path, wanted=(f"test/{metric}",)).tests["model.dim=8", "default", f"test/{metric}"]
    assert test.difference == pytest.approx(np.mean(differences))
    assert test.margin == pytest.approx(1.96 * np.std(differences, ddof=1) / math.sqrt(3))


def test_users_with_other_targets_are_not_compared(tmp_path):
    write_run(tmp_path / "a", users=[7, 8], ranks=[1, 1])
    folder = write_run(tmp_path / "b", "model.dim=8")
    np.savez(folder / "ranks.npz", user=[7, 7, 8, 8], target=[70, 71, 80, 70], rank=[1, 1, 1, 1])
    part = only_part(tmp_path)
    assert part.tests == {}
    assert "model.dim=8 is not tested: 2 of its users have a different target in default" in part.notes


@pytest.mark.parametrize(("metric", "each"), [("recall@2", [1, 1, 0, 0]), ("mrr", [1, 1 / 2, 1 / 3, 0])])
def test_user_metrics_follow_from_ranks(tmp_path, metric, each):
    names = {"test/recall@2": 0.5, "test/mrr": 11 / 24}
    for name in ("a", "b"):
        write_run(
            tmp_path / name, *(["model.dim=8"] if name == "b" else []), ranks=[1, 2, 3, 0] if name == "b" else [0] * 4
        )
        results = json.loads((tmp_path / name / "metrics.json").read_text())
        (tmp_path / name / "metrics.json").write_text(json.dumps(results | {"metrics": names}))
    test = only_part(tmp_path, wanted=(f"test/{metric}",)).tests["model.dim=8", "default", f"test/{metric}"]
    assert test.difference == pytest.approx(np.mean(each))


def test_rows_that_cannot_be_tested_are_named(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "model.dim=8", users=[7, 8, 9, 10])
    (write_run(tmp_path / "c", "model.dim=16") / "ranks.npz").unlink()
    write_run(tmp_path / "d", "model.dim=32")
    part = only_part(tmp_path)
    assert {row for row, _, _ in part.tests} == {"model.dim=8", "model.dim=32"}
    assert any(note.startswith("model.dim=16 is not tested: ") and "ranks.npz" in note for note in part.notes)
    assert "tests use the 3 users that all rows share" in part.notes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:300]),
            "cannot be read (it does not end like an archive that a run writes)",
        ),
        (lambda path: path.write_bytes(b""), "cannot be read (it does not end like an archive that a run writes)"),
        (lambda path: np.savez(path, user=[7], rank=[1]), "lacks target"),
        (lambda path: np.savez(path, user=[7, 8], target=[70], rank=[1]), "columns of different lengths"),
        (
            lambda path: np.savez(path, user=["7"], target=[70], rank=[1]),
            "user ids are text, but those of default are numbers",
        ),
        (
            lambda path: np.savez(path, user=[7, 8], target=[70, 1], rank=[1, 1]),
            "1 of its users have a different target in default",
        ),
    ],
)
def test_rows_with_malformed_ranks_are_not_tested(tmp_path, damage, message):
    write_run(tmp_path / "a")
    damage(write_run(tmp_path / "b", "model.dim=8") / "ranks.npz")
    write_run(tmp_path / "c", "model.dim=16")
    part = only_part(tmp_path)
    assert {row for row, _, _ in part.tests} == {"model.dim=16"}
    (note,) = [note for note in part.notes if note.startswith("model.dim=8 is not tested: ")]
    assert message in note


def test_metric_defaults_to_test_stage_and_may_be_lacking(tmp_path):
    write_run(tmp_path / "a")
    assert only_part(tmp_path, wanted=("ndcg@10",)).metrics == ["test/ndcg@10"]
    other = write_run(tmp_path / "b", protocol={"dataset": "other"})
    results = json.loads((other / "metrics.json").read_text())
    results["metrics"]["test/mrr"] = 0.2
    (other / "metrics.json").write_text(json.dumps(results))
    first, second = build_report(find_runs([tmp_path]), ["mrr"], None).parts
    assert ("no run under this protocol has test/mrr" in first.notes, second.notes) == (True, [])


def test_many_rows_without_a_default_one_need_a_named_baseline(tmp_path):
    for dim in range(9):
        write_run(tmp_path / f"{dim}", f"model.dim={dim}")
    page = html_page(build_report(find_runs([tmp_path]), [], None), [])
    assert page.index("so nothing is tested") < page.index("Cost per run")
    assert only_part(tmp_path).notes == [
        "no row named default, so nothing is tested; choose a baseline row with --baseline"
    ]
    part = only_part(tmp_path, "model.dim=7")
    assert [row.label for row in part.comparison.rows][:2] == ["model.dim=7", "model.dim=0"]
    assert {(row, other) for row, other, _ in part.tests} == {
        (f"model.dim={dim}", "model.dim=7") for dim in range(9) if dim != 7
    }


def test_few_rows_without_a_default_one_are_tested_in_pairs(tmp_path, report_here):
    """Which of three models is better than which, in one table, corrected for three questions."""
    users = list(range(60))
    ranks = {4: [2] * 60, 8: [1, 2] * 30, 16: [1] * 60}
    for dim, each in ranks.items():
        write_run(tmp_path / f"x/{dim}", f"model.dim={dim}", users=users, ranks=each)
    gain = {dim: 1 / np.log2(np.array(each) + 1) for dim, each in ranks.items()}
    pairs = [(8, 4), (16, 4), (16, 8)]
    differences = np.stack([gain[one] - gain[other] for one, other in pairs])
    tests = only_part(tmp_path / "x").tests
    names = [(f"model.dim={one}", f"model.dim={other}", "test/ndcg@10") for one, other in pairs]
    assert list(tests) == names
    assert [test.difference for test in tests.values()] == pytest.approx(differences.mean(1))
    assert [test.p_holm for test in tests.values()] == pytest.approx(holm_correction(sign_flip_p(differences)))
    done = report_here("x", "--latex", "a.tex", "--html", "a.html")
    title = "test/ndcg@10 in pairs: each row minus each one above it"
    lines = done.stdout.partition(title)[2].splitlines()[1:4]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["model.dim=8", "minus", "model.dim=4"],
        ["model.dim=16", "minus", "model.dim=4"],
    ]
    assert lines[1].endswith(f"+{differences[0].mean():.4f} ± {tests[names[0]].margin:.4f}  * <0.0001")
    assert (
        "  pairs: mean difference over users, ± half its 95% interval; p: paired sign-flip test over users"
        in done.stdout
    )
    assert f"<h3>{title}</h3>" in (tmp_path / "a.html").read_text()
    labels = re.findall(r"label{(.*)}", (tmp_path / "a.tex").read_text())
    assert labels[:2] == ["tab:small-test-ndcg-10", "tab:small-test-ndcg-10-in-pairs"]
    assert len(set(labels)) == len(labels)


def test_of_two_rows_the_second_is_tested_against_the_first(tmp_path, report_here):
    """As in `report A B`: the order of the folders names the baseline."""
    write_run(tmp_path / "a/x", "model.dim=8")
    write_run(tmp_path / "b/y", "model.dim=16")
    done = report_here("b", "a")
    assert "baseline: model.dim=16; vs baseline" in done.stdout
    (part,) = build_report(find_runs([tmp_path / "b", tmp_path / "a"]), [], None).parts
    assert {row for row, _, _ in part.tests} == {"model.dim=8"}
    assert part.notes == []


def test_best_row_is_best_on_validation_not_on_test(tmp_path, report_here):
    for dim, (validation, test) in {8: (0.2, 0.9), 16: (0.4, 0.3), 32: (0.3, 0.5)}.items():
        folder = write_run(tmp_path / f"x/{dim}", f"model.dim={dim}", ndcg=test)
        results = json.loads((folder / "metrics.json").read_text())
        results["metrics"]["val/ndcg@10"] = validation
        (folder / "metrics.json").write_text(json.dumps(results))
    part = only_part(tmp_path)
    assert part.best.label == "model.dim=16"
    assert [row.label for row in part.by_validation(part.comparison.rows)] == [
        "model.dim=16",
        "model.dim=32",
        "model.dim=8",
    ]
    done = report_here("x", "--csv", "a.csv")
    assert "  model.dim=16  1  best 0.4000                 0.3000\n" in done.stdout
    assert "best: highest mean of val/ndcg@10, on validation" in done.stdout
    with open(tmp_path / "a.csv") as file:
        best = {row["row"]: (row["validation"], row["best_on_validation"]) for row in csv.DictReader(file)}
    assert best == {"model.dim=8": ("0.2", "0"), "model.dim=16": ("0.4", "1"), "model.dim=32": ("0.3", "0")}


def test_a_sweep_ends_with_its_rows_best_on_validation_first(tmp_path):
    for dim in range(1, 13):
        folder = write_run(tmp_path / f"{dim}-x", "dataset=small", f"model.dim={dim}", ndcg=1 / dim)
        results = json.loads((folder / "metrics.json").read_text())
        results["metrics"]["val/ndcg@10"] = dim / 20
        (folder / "metrics.json").write_text(json.dumps(results))
    lines = compare_jobs(tmp_path).splitlines()
    assert lines[:4] == [
        "",
        "small: mean over seeds, the rows best on val/ndcg@10 first (10 of 12)",
        "  row           n  val/ndcg@10  test/ndcg@10",
        "  model.dim=12  1       0.6000        0.0833",
    ]
    assert lines[-1] == "  popularity    -            -        0.1000"
    assert len(lines) == 3 + 10 + 1


def test_a_sweep_over_splits_says_what_each_table_has(tmp_path):
    for target in ("first", "last"):
        split = f"dataset.time_split.target={target}"
        write_run(tmp_path / f"0-{target}", "dataset=small", split, protocol={"tested": f"{target} item after 2001"})
    titles = [line for line in compare_jobs(tmp_path).splitlines() if "mean over seeds" in line]
    assert [title.partition(":")[0] for title in titles] == [
        "small, dataset.time_split.target=first",
        "small, dataset.time_split.target=last",
    ]


def test_a_sweep_without_a_finished_job_has_no_comparison(tmp_path):
    assert compare_jobs(tmp_path) == ""
    (write_run(tmp_path / "0-x") / "metrics.json").write_text('{"status": "failed", "error": "diverged"}')
    assert compare_jobs(tmp_path) == ""


def test_rows_without_validation_have_no_best_one(sweep):
    assert only_part(sweep).best is None


def test_significant_differences_have_a_star(tmp_path):
    users = list(range(100))
    write_run(tmp_path / "a", users=users, ranks=[5] * 100)
    write_run(tmp_path / "b", "model.dim=8", users=users, ranks=[1] * 100)
    write_run(tmp_path / "c", "model.dim=16", users=users, ranks=[4, 6] * 50)
    part = only_part(tmp_path)
    cells = {row[0]: row[-1] for row in all_tables(part)[0].rows}
    assert cells["model.dim=8"] == "* <0.0001"
    assert not cells["model.dim=16"].startswith("*")
    assert [part.is_significant(row, "test/ndcg@10") for row in part.comparison.rows] == [False, True, False]


def test_compare_skips_a_metric_that_one_side_lacks(tmp_path):
    runs = find_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", "model.dim=8")]).runs
    rows = comparisons(runs, None, [])[0].rows
    assert isinstance(rows[0], Row)
    assert compare(rows, [("model.dim=8", "default")], ["val/ndcg@10"]) == ({}, [])


# Runs without results


def test_folders_without_results_are_listed_by_status(sweep, report_here):
    end = json.loads((sweep / "0-a/metrics.json").read_text())
    failed = write_run(sweep / "4-c", seed=4)
    (failed / "metrics.json").write_text(json.dumps({"status": "failed", "error": "training diverged"}))
    cut_off = write_run(sweep / "5-d", seed=5)
    (cut_off / "metrics.json").unlink()
    resumed = write_run(sweep / "6-e", seed=6)
    run = json.loads((resumed / "run.json").read_text())
    del run["end"]  # metrics.json is of an earlier part
    (resumed / "run.json").write_text(json.dumps(run))
    (write_run(sweep / "7-f", seed=7) / "metrics.json").write_text(json.dumps(end)[:100])
    old = write_run(sweep / "8-g", seed=8)
    (old / "metrics.json").write_text(json.dumps(end | {"protocol": {"dataset": "small"}}))
    (sweep / "notes").mkdir()
    (sweep / "hydra/.hydra").mkdir(parents=True)
    (sweep / "hydra/.hydra/config.yaml").write_text("db: mysql\n")
    (sweep / "theirs").mkdir()
    (sweep / "theirs/metrics.json").write_text('[{"accuracy": 1}]')
    running = write_run(sweep / "9-h", seed=9)
    (running / "metrics.json").unlink()
    with open(running / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = report_here("sweep")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"default +3 +0.5000 ± 0.1000", done.stdout)
    rest = done.stdout.partition("failed (1)")[2]
    assert "sweep/4-c: training diverged" in rest
    assert re.search(r"unfinished \(2\)\n-+\n  sweep/5-d\n  sweep/6-e\n", rest)
    assert re.search(r"running \(1\)\n-+\n  sweep/9-h\n", rest)
    skipped = rest.partition("skipped (5)")[2]
    assert "sweep/7-f/metrics.json is not a file that a run writes (Unterminated string" in skipped
    assert "sweep/8-g: written by another version of this program: its protocol lacks candidates, " in skipped
    assert "sweep/hydra: a run of another program" in skipped
    assert "sweep/notes: contains no run" in skipped
    assert "sweep/theirs/metrics.json is not a file that a run writes (not a JSON object)" in skipped


def test_missing_jobs_of_a_sweep_are_listed(sweep, report_here):
    hydra = {"sweeper": {"_target_": "x.BasicSweeper", "params": {"model.dim": "8"}}}
    hydra["overrides"] = {"task": ["dataset=small", "seed=range(3)", "ablation=glob(no_pos*)"]}
    (sweep / "multirun.yaml").write_text(yaml.dump({"hydra": hydra}))
    for folder in sweep.glob("*-*"):
        (folder / ".hydra/overrides.yaml").write_text(
            yaml.dump(["model.dim=8", "dataset=small", f"seed={folder.name[0]}", "ablation=no_pos_emb"])
        )
    (sweep / "1-a").rename(sweep.parent / "elsewhere")
    assert "missing (1)\n-----------\n  sweep: job 1, seed=1\n" in report_here("sweep").stdout
    hydra["overrides"]["task"][1] = "seed=7,8"
    (sweep / "multirun.yaml").write_text(yaml.dump({"hydra": hydra}))
    done = report_here("sweep")
    assert "which jobs are missing is unknown (no folder has a job that multirun.yaml names)" in done.stdout


def test_only_finished_row_of_a_sweep_has_its_final_label(tmp_path, report_here):
    hydra = {"sweeper": {"_target_": "x.BasicSweeper", "params": None}}
    hydra["overrides"] = {"task": ["model.maxlen=5", "dataset=ml_100k,ml_1m", "model.dim=8,16", "seed=0,1"]}
    write_run(tmp_path / "sweep/0-a", "model.maxlen=5", "dataset=ml_100k", "model.dim=8")
    (tmp_path / "sweep/multirun.yaml").write_text(yaml.dump({"hydra": hydra}))
    assert [row.label for row in only_part(tmp_path).comparison.rows] == ["model.dim=8"]
    assert not [note for note in only_part(tmp_path).notes if "nothing is tested" in note]
    done = report_here("sweep", "--baseline", "model.dim=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "every row: model.maxlen=5 dataset=ml_100k\n" in done.stdout  # the other data set has its own table
    assert "missing (7)" in done.stdout


def test_a_run_given_twice_counts_once(sweep):
    assert len(find_runs([sweep, sweep / "0-a", sweep.parent]).runs) == 4


def test_without_finished_runs_there_is_an_error(tmp_path, report_here):
    (write_run(tmp_path / "x/a") / "metrics.json").write_text('{"status": "interrupted", "error": null}')
    done = report_here("x")
    assert "interrupted (1)" in done.stdout
    assert (done.returncode, done.stderr) == (1, "error: no run has finished; finish one to get a table\n")


# The command


def test_all_output_files_are_written(sweep, report_here, tmp_path):
    write_run(sweep / "4-c", "dataset=small", "model.dim=16", "model.maxlen=9", ndcg=1 / 3)
    options = {
        "--markdown": "a.md",
        "--latex": "new/a.tex",
        "--csv": "a.csv",
        "--html": "a.html",
        "--figures": "figures",
    }
    done = report_here("sweep", *itertools.chain(*options.items()))
    assert (done.returncode, done.stderr) == (0, "")
    assert "| model.dim=8 | 1 | 0.3000 | 0.2500 | +0.0500 |" in (tmp_path / "a.md").read_text()
    latex = (tmp_path / "new/a.tex").read_text()
    assert r"default & 3 & 0.5000 $\pm$ 0.1000 & 0.5000" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") == 3
    with open(tmp_path / "a.csv") as file:
        rows = {(row["row"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(rows["model.dim=16 model.maxlen=9", "test/ndcg@10"]["mean"]) == 1 / 3
    assert rows["default", "test/ndcg@10"]["seeds"] == "0 1 2"
    assert float(rows["model.dim=8", "test/ndcg@10"]["p"]) > 0
    for file in (tmp_path / "figures").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG" if file.suffix == ".png" else b"%PDF")
    assert {file.name for file in (tmp_path / "figures").iterdir()} >= {"rows.png", "rows.pdf", "time.png", "time.pdf"}
    page = (tmp_path / "a.html").read_text()
    figures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(figures) == len(list((tmp_path / "figures").glob("*.png")))
    assert all(b"<svg" in base64.b64decode(figure) for figure in figures)
    assert not re.search(r"(src|href)=(?!\"data:)|<script|@import|url\(", page)


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        ([("model.dim=4",), ("model.dim=8",), ("model.dim=16",)], "by-model.dim"),
        ([(f"model.dim={d}", f"model.maxlen={m}") for d in (4, 8) for m in (5, 9)], "by-model.dim-model.maxlen"),
        ([("loss=bce",), ("loss=gbce",)], "rows"),
    ],
)
def test_kind_of_figure_depends_on_the_keys_of_a_sweep(tmp_path, grid, name):
    from sasrec_lab.report.figures import draw_figures

    for number, overrides in enumerate(grid):
        write_run(tmp_path / str(number), *overrides, config={"n": number} if name == "rows" else None)
    assert [figure.name for figure in draw_figures(build_report(find_runs([tmp_path]), [], None))] == [name, "time"]


def test_latex_tables_have_captions_labels_and_legends(tmp_path, report_here):
    published = {"published": PUBLISHED | {"source": "Somebody & al."}}
    write_run(tmp_path / "x/a", "dataset=small", config=published)
    write_run(tmp_path / "x/b", "dataset=small", "model.dim=8", config=published, ranks=[1, 1, 1, 1])
    write_run(tmp_path / "x/c", seed=1, protocol={"dataset": "an_other"}, git={"commit": "def"})
    write_run(tmp_path / "x/d", seed=2, protocol={"dataset": "an_other"})
    assert report_here("x", "--latex", "a.tex").returncode == 0
    latex = (tmp_path / "a.tex").read_text()
    assert latex.startswith("% needs \\usepackage{booktabs}\n\n\\begin{table}\n\\caption{2 protocols, each with")
    assert "\n% 1: small, last item of 4 users\n% every row: dataset=small\n\n\\begin{table}" in latex
    assert "% 2: an_other, last item of 4 users\n% runs come from 2 code versions: def, abc\n" in latex
    assert latex.count("published: Somebody \\& al.; difference: ours minus published\n") == 1
    assert latex.count("; vs baseline: mean difference over users, $\\pm$ half its 95\\% interval") == 1
    assert re.findall(r"\\caption{(.*)}", latex)[4] == (
        r"2: an\_other, last item of 4 users; test/ndcg@10: all 9 items except those already seen"
    )
    labels = re.findall(r"\\label{(.*)}", latex)
    assert labels[:3] == ["tab:2-protocols", "tab:1-small-test-ndcg-10", "tab:1-small-test-ndcg-10-sampled3"]
    assert len(set(labels)) == len(labels) == 7


def test_only_wide_figures_take_both_columns(tmp_path):
    from sasrec_lab.report.figures import draw_figures

    for dim, maxlen in itertools.product((1, 2), range(1, 10)):
        write_run(tmp_path / f"{dim}-{maxlen}", f"model.dim={dim}", f"model.maxlen={maxlen}")
    report = build_report(find_runs([tmp_path]), [], None)
    figures = draw_figures(report)
    assert [(figure.name, figure.is_full_width) for figure in figures] == [
        ("by-model.dim-model.maxlen", True),
        ("time", False),
    ]
    page = html_page(report, figures)
    assert "color-scheme: only light" in page  # a browser that darkens pages would hide the text of figures
    assert (page.count("<figure class=full>"), page.count("<figure>")) == (1, 1)


def test_heat_map_text_has_the_color_with_more_contrast():
    from sasrec_lab.report.canvas import text_color

    backgrounds = {"yellow": (1.0, 0.9, 0.1, 1.0), "teal": (0.13, 0.57, 0.55, 1.0), "violet": (0.27, 0.0, 0.33, 1.0)}
    colors = {name: text_color(background) for name, background in backgrounds.items()}
    assert colors == {"yellow": "black", "teal": "black", "violet": "white"}


def test_long_labels_in_figures_keep_their_end(tmp_path):
    from sasrec_lab.report.plots import _name

    words = ["model.dim=16", "model.maxlen=2", "optimizer.lr=1e-05", "optimizer.weight_decay=0.01"]
    write_run(tmp_path / "a", *words)
    write_run(tmp_path / "b")
    part = only_part(tmp_path)
    assert [_name(part, row) for row in part.comparison.rows] == [
        "default",
        "dim=16 maxlen=2 lr=1e-05\nweight_decay=0.01",
    ]


def test_learning_curves_equal_those_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from sasrec_lab.report.curves import learning_curve

    with SummaryWriter(str(tmp_path / "tb")) as writer:
        for epoch in range(5):
            for tag, value in {"val/ndcg@10": epoch / 7, "val/ndcg@10-sampled3": 1, "epoch": epoch}.items():
                writer.add_scalar(tag, value, 10 * epoch + 9)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    curve = learning_curve(tmp_path, "val/ndcg@10")
    assert list(curve) == [0, 1, 2, 3, 4]
    assert list(curve.values()) == [scalar.value for scalar in events.Scalars("val/ndcg@10")]
    (file,) = (tmp_path / "tb").iterdir()
    file.write_bytes(file.read_bytes()[:-20])  # as after a run was killed
    assert list(learning_curve(tmp_path, "val/ndcg@10")) == [0, 1, 2, 3]


def test_a_curve_of_resumed_runs_has_the_newest_values(tmp_path):
    """The older file counts steps and has a scalar `epoch`, as those of version 0.1.0."""
    from torch.utils.tensorboard import SummaryWriter

    from sasrec_lab.report.curves import learning_curve

    with SummaryWriter(str(tmp_path / "tb"), filename_suffix=".1") as writer:
        for epoch in range(3):
            writer.add_scalar("val/ndcg@10", epoch / 8, 10 * epoch + 9)
            writer.add_scalar("epoch", epoch, 10 * epoch + 9)
    with SummaryWriter(str(tmp_path / "tb"), filename_suffix=".2") as writer:
        for epoch in (2, 3):
            writer.add_scalar("val/ndcg@10", epoch / 2, epoch + 1)
    assert learning_curve(tmp_path, "val/ndcg@10") == {0: 0.0, 1: 0.125, 2: 1.0, 3: 1.5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep"], "swep is not a folder; did you mean sweep?"),
        (["empty"], "empty: contains no run; give the folder of a run or a sweep, such as outputs/<name>/<time>"),
        (["begun"], "no run in begun; give the folder of a run or a sweep, such as outputs/<name>/<time>"),
        (
            ["foreign"],
            "foreign/0: a run of another program; foreign/1: a run of another program; foreign/2: a run of another "
            "program; and 1 more; give the folder of a run or a sweep, such as outputs/<name>/<time>",
        ),
        (
            ["sweep", "--metric", "test/ndgc@10"],
            "--metric test/ndgc@10: no run has this metric; did you mean test/ndcg@10?",
        ),
        (
            ["sweep", "--metric", "loss"],
            "--metric test/loss: no run has this metric; choose from test/ndcg@10, test/ndcg@10-sampled3",
        ),
        (
            ["sweep", "--baseline", "model.dim=88"],
            "--baseline model.dim=88: no row has this name; did you mean model.dim=8?",
        ),
        (["sweep", "--metrik", "x"], "unknown option --metrik; did you mean --metric?"),
        (["sweep", "--csv"], "argument --csv: expected one argument; --help lists the options"),
        ([], "the following arguments are required: FOLDER: write sasrec-report <FOLDER>; --help lists the options"),
        (["sweep", "--csv", "sweep"], "sweep cannot be written: Is a directory; choose another path"),
        (
            ["sweep", "--csv", "/dev/full"],
            "/dev/full cannot be written: No space left on device; choose another path",
        ),
        (
            ["sweep", "--metric", "d1"],
            "--metric test/d1: no run has this metric; choose from test/ndcg@10, test/ndcg@10-sampled3",
        ),
        (["sweep/0-a/run.json"], "sweep/0-a/run.json is a file; give its folder, sweep/0-a"),
        (
            ["sweep/nothing/like/it"],
            "sweep/nothing/like/it is not a folder; its folder sweep/nothing/like does not exist",
        ),
        (["sweep", "--figures", "file/x"], "file/x: Not a directory; choose another path"),
    ],
)
def test_invalid_input_is_one_line(sweep, report_here, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/multirun.yaml").write_text("hydra: {}")
    for name in "0123":
        (tmp_path / "foreign" / name / ".hydra").mkdir(parents=True)
        (tmp_path / "foreign" / name / ".hydra/config.yaml").write_text("[1]" if name in "01" else "db: mysql")
    done = report_here(*words)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_report_imports_no_torch(sweep):
    code = (
        "import sys; from sasrec_lab.report.__main__ import entry; sys.argv = ['report', sys.argv[1]]; entry();"
        "print([name for name in ('torch', 'pytorch_lightning', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep)], capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.slow
def test_sweep_is_reported_from_training_to_page(train_here, report_here, tmp_path):
    small = ["dataset=synthetic", "dataset.synthetic.users=100", "dataset.synthetic.items=40", "model=tiny"]
    words = [
        "-m",
        *small,
        "trainer=fast",
        "evaluation.sampled=5",
        "ablation=default,no_pos_emb",
        "hydra.sweep.dir=sweep",
    ]
    assert train_here(*words, "seed=0,1").returncode == 0
    assert train_here(*small, "optimizer.lr=1e30", "hydra.run.dir=failed").returncode == 1
    done = report_here("sweep", "failed", "--html", "page.html", "--figures", "figures")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"no_pos_emb +2 .* 0\.\d{4} ± 0\.\d{4} +[+-]0\.\d{4} ± 0\.\d{4} +[01<*]", done.stdout)
    assert "failed: training diverged" in done.stdout
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert names == {"rows", "curves", "time"}
    for metric in ("test/ndcg@10", "test/recall@10-sampled5"):
        part = only_part(tmp_path / "sweep", wanted=(metric,))
        means = {row.label: row.spread(metric).mean for row in part.comparison.rows}
        test = part.tests["no_pos_emb", "default", metric]  # from ranks.npz; the means are from metrics.json
        assert test.difference == pytest.approx(means["no_pos_emb"] - means["default"], abs=1e-6)


def test_runs_that_lack_newer_keys_share_the_row(tmp_path):
    """The cosine of an older run is the schedule of this version."""
    config = to_plain(load(["dataset=csv", "dataset.path=x.csv", "optimizer.schedule=cosine"]))
    older = config | {"optimizer": {key: x for key, x in config["optimizer"].items() if key != "schedule"}}
    older["evaluation"] = {key: x for key, x in config["evaluation"].items() if key != "test"}
    write_run(tmp_path / "a", seed=0, config=older | {"seed": 0})
    write_run(tmp_path / "b", seed=1, config=config | {"seed": 1})
    (row,) = only_part(tmp_path).comparison.rows
    assert (row.label, len(row.runs)) == ("default", 2)


def test_closed_pipe_is_not_an_error(sweep):
    command = f"{sys.executable} -m sasrec_lab.report {sweep} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ, timeout=300)
    assert (done.stdout, done.stderr) == ("small, last item of 4 users\n", "")


def test_lists_of_validation_have_a_table_of_their_own(report_here, tmp_path):
    """Runs with evaluation.test=false measure these."""
    metrics = write_run(tmp_path / "run") / "metrics.json"
    content = json.loads(metrics.read_text())
    content["metrics"] = {"val/ndcg@10": 0.4, "val/coverage@5": 0.25}
    metrics.write_text(json.dumps(content))
    done = report_here("run")
    assert done.returncode == 0, done.stderr
    assert "lists of validation beyond accuracy: mean ± std over seeds\n  row      coverage@5" in done.stdout
