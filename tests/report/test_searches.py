"""Records of searches in a report: their line, and files that no search writes."""

import json

import pytest
from written_runs import write_run

from sasrec_lab.report.contents import build_report
from sasrec_lab.report.runs import find_runs

RECORD = {
    "sampler": "tpe",
    "pruner": "median",
    "seeds": 1,
    "monitor": "val/ndcg@10",
    "space": {"model.dim": "8,16"},
    "trials": [
        {"number": 1, "status": "pruned", "value": 0.1, "params": {}, "error": None},
        {"number": 0, "status": "finished", "value": 0.4, "params": {}, "error": None},
        {"number": 2, "status": "failed", "value": None, "params": {}, "error": "too large"},
    ],
    "importance": {},
}


def test_a_report_describes_the_search_of_its_runs(tmp_path):
    write_run(tmp_path / "found/0-model.dim=8", "model.dim=8")
    (tmp_path / "found/search.json").write_text(json.dumps(RECORD))
    write_run(tmp_path / "other", "model.dim=16")
    (part,) = build_report(find_runs([tmp_path]), [], None).parts
    (search,) = part.searches
    assert [trial.number for trial in search.trials] == [0, 1, 2]
    line = "search: 3 trials (1 finished, 1 pruned, 1 failed), sampler tpe, pruner median; val/ndcg@10 over model.dim"
    assert line in part.legend()


@pytest.mark.parametrize(
    "change",
    [
        {"trials": None},
        {"trials": [7]},
        {"trials": [{"number": -1, "status": "finished", "value": 1}]},
        {"trials": [{"number": 1, "status": "finished", "value": 1e400}]},
        {"space": {"model.dim": 8}},
        {"importance": {"model.dim": "much"}},
        {"monitor": ["val/ndcg@10"]},
    ],
)
def test_a_malformed_record_of_a_search_is_skipped(tmp_path, change):
    write_run(tmp_path / "0-model.dim=8", "model.dim=8")
    (tmp_path / "search.json").write_text(json.dumps(RECORD | change))
    found = find_runs([tmp_path])
    assert (len(found.runs), found.searches) == (1, [])
    assert found.skipped[0].startswith(f"{tmp_path}/search.json is not a file that a run writes")
