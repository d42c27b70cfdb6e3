"""The printed lines and table of a run, and the phrase on ranked items that the report shares."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from small_data import holdout_of, sequences_of

from sasrec_lab.config.composition import load
from sasrec_lab.run.protocol import describe_candidates
from sasrec_lab.run.summary import data_line, job_line, kernel_change_warning, model_line, results_table

PROTOCOL = {
    "held_out_users": 1234,
    "candidates": {"full": 5678},
    "sampled_candidates": {"sampled": 100, "draw": "paper", "seed": 0},
    "seen_items": "left out, a target among them is a miss",
}


def results(**changes) -> dict:
    metrics = {f"test/{name}{suffix}": 0.25 for name in ("ndcg@10", "recall@10") for suffix in ("", "-sampled100")}
    baselines = {"popularity": {"test/mrr": 0.125}}
    written = {"protocol": PROTOCOL, "metrics": metrics, "baselines": baselines, "best_epoch": 3, "epochs": 7}
    return written | changes


def test_times_that_are_not_in_seconds_are_named():
    users = [[1, 2, 3], [2, 3]]
    sequences = sequences_of(users)
    seconds = 1620000000 + 86400 * np.arange(5)
    for times in (None, np.arange(5), seconds):
        lines = data_line(replace(sequences, times=times), holdout_of(users)).splitlines()
        assert (len(lines), lines[0]) == (2, "data   x.csv: 2 users, 3 items, 5 interactions")
    for scale, unit in ((10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")):
        lines = data_line(replace(sequences, times=seconds * scale), holdout_of(users)).splitlines()
        assert lines[2] == f"       times in {unit}, from 2021-05-03 to 2021-05-07"


def test_candidates_are_described_per_metric():
    assert describe_candidates(PROTOCOL, "test/ndcg@10") == "all 5,678 items except those already seen"
    assert describe_candidates(PROTOCOL | {"seen_items": "ranked like the others"}, "") == "all 5,678 items"
    sampled = describe_candidates(PROTOCOL, "test/ndcg@10-sampled100")
    assert sampled == "the target and 100 sampled items (draw=paper)"


def test_table_has_a_part_for_full_and_sampled_ranking():
    table = results_table(results(), load(["evaluation.sampled=100"]), Path("run"))
    assert table.splitlines()[1:5] == [
        "Test: last item of 1,234 users, ranked among all 5,678 items except those already seen",
        "                   NDCG@10   recall@10         MRR",
        "  SASRec            0.2500      0.2500           -",
        "  popularity             -           -      0.1250",
    ]
    assert table.splitlines()[6].endswith(" ranked among the target and 100 sampled items (draw=paper)")
    assert "\ncheckpoint   epoch 4 of 7 (best on validation)\nrun folder   run\n" in table


def test_every_configuration_of_sasrec_is_named_so():
    for model in ("sasrec", "sasrec_rectools", "tiny"):
        assert "\n  SASRec  " in results_table(results(), load([f"model={model}"]), Path("run"))


def test_data_line_has_singulars_and_the_median():
    users = [[1, 2], [1, 2, 3, 4], [3]]
    lines = data_line(sequences_of(users), holdout_of(users)).splitlines()
    assert lines[0] == "data   x.csv: 3 users, 4 items, 7 interactions"
    assert lines[1] == "       interactions per user: mean 2.3, median 2, max 4; 1 user held out"
    even = [[1], [1, 2, 3, 2]]
    assert "mean 2.5, median 2.5, max 4; 1 user held out" in data_line(sequences_of(even), holdout_of(even))


def test_table_without_holdout_explains_missing_metrics():
    cfg = load(["dataset.holdout=none"])
    table = results_table(results(metrics={}, baselines={}, best_epoch=None), cfg, Path("run"))
    assert table.splitlines()[1] == "No holdout (dataset.holdout=none), so there are no test metrics."
    assert "NDCG" not in table
    assert "\ncheckpoint   last epoch\n" in table


def test_other_kernels_are_reported_on_resume():
    assert kernel_change_warning({}, {"kernels": "torch's"}) is None
    assert kernel_change_warning({"kernels": "compiled"}, {"kernels": "compiled by g++"}) is None
    assert kernel_change_warning({"kernels": "compiled by g++"}, {"kernels": "torch's"}) == (
        "kernels were compiled by g++ and are now torch's: numbers will differ from those of an uninterrupted run"
    )


def test_a_job_of_a_sweep_is_one_line():
    cfg = load(["evaluation.k=[5]", "evaluation.monitor=val/ndcg@5"])
    metrics, baselines = {"test/ndcg@5": 0.25}, {"popularity": {"test/ndcg@5": 0.125}}
    line = job_line(results(metrics=metrics, baselines=baselines), cfg, Path("sweep/0-a"))
    assert line.startswith("job 0-a: test/ndcg@5 0.2500, popularity 0.1250, epoch ")
    unmeasured = results(metrics={}, baselines={}, best_epoch=None)
    assert job_line(unmeasured, cfg, Path("sweep/0-\x1b[2J")) == r"job 0-\x1b[2J: last epoch"


def test_a_split_by_time_is_described_by_stage():
    counts = {"users": 1, "targets": 1200, "new_users": 0, "cold_rows": 0, "cold_interactions": 0}
    record = {
        "cold_users": "drop",
        "cold_items": "keep",
        "train": {"users": 5, "items": 1, "interactions": 70},
        "val": counts | {"date": "2021-05-03"},
        "test": counts | {"date": "2021-05-07", "new_users": 1, "cold_rows": 1, "cold_interactions": 2000},
    }
    lines = data_line(sequences_of([[1, 2, 3]]), replace(holdout_of([[1, 2, 3, 4]]), time_split=record)).splitlines()
    assert lines[-3:] == [
        "       training up to 2021-05-03: 5 users, 1 item, 70 interactions",
        "       validation up to 2021-05-07: 1 user, 1,200 targets",
        "       test after 2021-05-07: 1 user (1 not in training), 1,200 targets; excluded: 1 row without an item of"
        " training in the history; kept: 2,000 interactions with a new item",
    ]
    holdout = replace(holdout_of([[1, 2, 3, 4]]), time_split=record | {"cold_items": "drop"})
    assert data_line(sequences_of([[1, 2, 3]]), holdout).endswith(
        "; excluded: 1 row without an item of training in the history and 2,000 interactions with a new item"
    )


def test_the_table_names_what_the_test_looks_for():
    tested = results(protocol=PROTOCOL | {"tested": "each item after 2021-05-07"})
    first = results_table(tested, load([]), Path("run")).splitlines()[1]
    assert first.startswith("Test: each item after 2021-05-07 of 1,234 users, ranked among all 5,678 items")


def test_the_model_line_names_the_form_of_attention_on_a_gpu():
    info = {"parameters": 5000, "device": "cuda (a card)", "matmul": "cuda float32 without TF32"}
    info |= {"kernels": "torch's", "attention": "in one launch (efficient); flash: not for this type"}
    assert model_line(load([]), "softmax", info).splitlines()[1:] == [
        "       cuda (a card), cuda float32 without TF32",
        "       attention in one launch (efficient); flash: not for this type",
    ]
    forms = {"softmax": "Triton kernels", "capture": "a CUDA graph for each size of batch"}
    assert model_line(load([]), "softmax", info | forms).splitlines()[3:] == [
        "       softmax by Triton kernels",
        "       capture: a CUDA graph for each size of batch",
    ]
    on_cpu = info | {"device": "cpu (2 threads)", "softmax": "CPU kernel"}
    assert "CPU kernel" not in model_line(load([]), "softmax", on_cpu)  # in run.json only
    assert kernel_change_warning({}, info) is None
    assert kernel_change_warning(info, info | {"attention": "in one launch (efficient)"}) is None
    for before in (
        {"kernels": "torch's"},
        info | {"attention": "in buckets; efficient: differs from buckets by 1e-02"},
    ):
        assert kernel_change_warning(before, info) == (
            "attention was in buckets and is now in one launch (efficient): numbers will differ from those of an"
            " uninterrupted run"
        )
