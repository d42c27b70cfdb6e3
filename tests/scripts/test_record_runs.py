"""scripts/record_runs.py: finished runs become rows of docs/results/papers.json, and these a table."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import record_runs
import render_results

from sasrec_lab.errors import InputError
from sasrec_lab.report.records import Run

PUBLISHED = {
    "dataset": "s3rec_beauty",
    "source": "a paper",
    "cells": {"plus": {"test/ndcg@10": 0.18, "test/recall@10": 0.31}},
}


def run_of(seed: int, ndcg: float, dataset: str = "s3rec_beauty", commit: str = "a") -> Run:
    return Run(
        folder=Path("run"),
        status="finished",
        error=None,
        overrides={"experiment": "p/x", "dross": "plus", "seed": str(seed), "hydra.run.dir": "/a/b"},
        config={"seed": seed, "dataset": {"name": dataset}, "row": "plus", "published": PUBLISHED},
        model="SASRec",
        protocol={},
        metrics={"val/ndcg@10": 0.2, "test/ndcg@10": ndcg, "test/recall@10": 0.3},
        baselines={},
        cold_targets={},
        epochs=9,
        best_epoch=5,
        seconds=61.0 * seed,
        parameters=1,
        commit=40 * commit,
        start=f"2026-11-2{seed}T00:00:00",
    )


def test_runs_of_a_configuration_become_a_row(tmp_path):
    rows = []
    for run in (run_of(1, 0.3), run_of(2, 0.16), run_of(1, 0.5), run_of(1, 0.18, commit="b")):
        words = ["experiment=p/x", "dross=plus", f"seed={run.seed}", "hydra.run.dir=/a/b"]
        record_runs.add_run(rows, run, words[:: 1 if run.seed == 1 else -1], "cpu (1 thread)")
    file = tmp_path / "papers.json"
    record_runs.write(file, rows, "a note")
    written = json.loads(file.read_text())
    assert (written["measured"], written["commit"]) == ("2026-11-22", 40 * "a")
    assert [run["seed"] for run in written["rows"][0]["runs"]] == [1, 2]
    table = render_results.block("papers", tmp_path).splitlines()
    assert table[3] == (
        "| Beauty, 5-core | `python -m sasrec_lab.train experiment=p/x dross=plus` | 0.1700 ± 0.0141 (2) | 0.1800 "
        "| 0.3000 ± 0.0000 (2) | 0.3100 | 1 to 2 | 2026-11-22 at aaaaaaa; seeds at several commits |"
    )


def test_folders_without_a_finished_run_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no run|no finished run"):
        record_runs.with_runs([], [tmp_path / "empty"])


def test_values_published_for_other_data_are_left_out():
    rows = []
    record_runs.add_run(rows, run_of(1, 0.1, dataset="s3rec_toys"), [], "cpu (1 thread)")
    assert "published" not in rows[0]


def test_runs_of_a_search_have_validation_and_no_test(tmp_path):
    runs = [replace(run_of(seed, 0.1), metrics={"val/ndcg@10": 0.2 + seed / 100}, best_epoch=seed) for seed in (0, 2)]
    rows = []
    for run in runs:
        record_runs.add_run(rows, run, ["loss=softmax", "evaluation.test=false", f"seed={run.seed}"], "cpu (1 thread)")
    record_runs.write(tmp_path / "records.json", rows, "a note")
    assert render_results.block("records", tmp_path).splitlines()[3] == (
        "| Beauty, 5-core | `python -m sasrec_lab.train loss=softmax` | 0.2100 ± 0.0141 (2) | 1 to 3"
        " | 2026-11-22 at aaaaaaa |"
    )


def test_a_run_of_a_search_that_has_seen_the_test_is_refused(monkeypatch):
    monkeypatch.setattr(record_runs, "find_runs", lambda folders: SimpleNamespace(finished=[run_of(0, 0.1)]))
    monkeypatch.setattr(record_runs, "read_json", lambda file: {"git": {"dirty": False}, "device": "cpu (1 thread)"})
    with pytest.raises(InputError, match="has seen the test; runs of a search"):
        record_runs.with_runs([], [Path("run")], search=True)
