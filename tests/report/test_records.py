"""Run folders as strangers may write them: read within bounds, and skipped with a reason if malformed."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from written_runs import write_run

from sasrec_lab.report import runs as search
from sasrec_lab.report.contents import build_report
from sasrec_lab.report.curves import learning_curve
from sasrec_lab.report.runs import find_runs


def edit(path: Path, **changes: Any) -> None:
    """Replace keys, with dots for nesting as `a__b`, in a JSON file."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = content
        for each in sections:
            section = section[each]
        section[name] = value
    path.write_text(json.dumps(content))


def skipped_line(folder: Path, name: str) -> str:
    """Return the line on the run `name`, next to which one good run must have been found."""
    found = find_runs([folder])
    assert [run.folder.name for run in found.finished] == ["good"]
    build_report(found, [], None)
    (line,) = found.skipped
    assert line.startswith(f"{folder / name}")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("metrics.json", {"metrics": {"test/ndcg@10": "<b>"}}, "metrics.test/ndcg@10 must be a finite number"),
        ("metrics.json", {"metrics": {"test/ndcg@10": True}}, "metrics.test/ndcg@10 must be a finite number"),
        ("metrics.json", {"metrics": {"test/ndcg@10": 10**400}}, "metrics.test/ndcg@10 must be a finite number"),
        ("metrics.json", {"metrics": [1]}, "metrics must be an object, not [1]"),
        ("metrics.json", {"baselines": {"popularity": 3}}, "baselines.popularity must be an object, not 3"),
        ("metrics.json", {"status": "<script>"}, "one of finished, failed, interrupted, pruned, not '<script>'"),
        ("metrics.json", {"status": 7}, "status must be one of finished, failed, interrupted, pruned, not 7"),
        ("metrics.json", {"epochs": None}, "epochs must be an integer of at least 0, not None"),
        ("metrics.json", {"protocol__dataset": 3}, "protocol.dataset must be text, not 3"),
        ("metrics.json", {"protocol__sampled_candidates": None}, "protocol.sampled_candidates is null"),
        ("run.json", {"config__seed": "0"}, "config.seed must be an integer of at least 0, not '0'"),
        ("run.json", {"config__evaluation": None}, "config.evaluation must be an object, not None"),
        ("run.json", {"config__row": ["a"]}, "config.row must be text or null, not ['a']"),
        (
            "run.json",
            {"config__published": {"cells": {"a": {"b": "c"}}}},
            "published.cells.a.b must be a finite",
        ),
        ("run.json", {"seconds": {"fit": "long"}}, "seconds.fit must be a number of at least 0, not 'long'"),
        ("run.json", {"parameters": "many"}, "parameters must be an integer of at least 0"),
        ("run.json", {"git": {"commit": 7}}, "git.commit must be text or null, not 7"),
        ("run.json", {"start": 7}, "start must be text, not 7"),
    ],
)
def test_a_record_of_a_wrong_type_is_skipped(tmp_path, file, changes, message):
    write_run(tmp_path / "good", "model.dim=8")
    edit(write_run(tmp_path / "bad") / file, **changes)
    assert message in skipped_line(tmp_path, "bad")


def test_a_finished_run_without_run_json_is_skipped(tmp_path):
    write_run(tmp_path / "good", "model.dim=8")
    (write_run(tmp_path / "bad") / "run.json").unlink()
    assert skipped_line(tmp_path, "bad").endswith("bad: run.json is missing, so its configuration is unknown")


def test_a_config_without_a_key_of_the_tables_is_skipped(tmp_path):
    write_run(tmp_path / "good", "model.dim=8")
    run = write_run(tmp_path / "bad")
    content = json.loads((run / "run.json").read_text())
    del content["config"]["evaluation"]["monitor"]
    (run / "run.json").write_text(json.dumps(content))
    assert "the config in run.json has no evaluation.monitor" in skipped_line(tmp_path, "bad")


def test_a_run_without_recorded_overrides_is_the_default_row(tmp_path):
    (write_run(tmp_path / "run") / ".hydra/overrides.yaml").unlink()
    (part,) = build_report(find_runs([tmp_path]), [], None).parts
    assert [row.label for row in part.comparison.rows] == ["default"]


def test_a_folder_of_hydra_needs_a_config(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "bad/.hydra").mkdir(parents=True)
    assert skipped_line(tmp_path, "bad").endswith("bad: a run of another program")


def test_a_search_of_an_older_version_has_no_missing_jobs(tmp_path):
    write_run(tmp_path / "0-a", "model.dim=8")
    hydra = {"sweeper": {"_target_": "x.OptunaSweeper"}, "overrides": {"task": ["model.dim=8,16"]}}
    (tmp_path / "multirun.yaml").write_text(yaml.dump({"hydra": hydra}))
    found = find_runs([tmp_path])
    assert (len(found.runs), found.missing, found.jobs) == (1, [], [])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", b"[" * 100_000, "run.json is not a file that a run writes"),
        ("run.json", b" " * (5 << 20), "5,242,880 bytes, more than 4,194,304"),
        ("metrics.json", b"\xff\xfe", "metrics.json is not a file that a run writes"),
        (".hydra/overrides.yaml", b"[" * 1_000_000 + b"]" * 1_000_000, "it has aliases, or is nested deeply"),
        (".hydra/overrides.yaml", b"- &a [x]\n- *a\n", "it has aliases, or is nested deeply"),
        (".hydra/overrides.yaml", b"{a: b}", "overrides.yaml must be of type list, not dict"),
        (".hydra/overrides.yaml", b"[1]", "overrides.yaml must be of type str, not int"),
        (".hydra/overrides.yaml", b"[", "not YAML"),
    ],
)
def test_a_hostile_record_is_skipped(tmp_path, file, content, message):
    write_run(tmp_path / "good", "model.dim=8")
    (write_run(tmp_path / "bad") / file).write_bytes(content)
    assert message in skipped_line(tmp_path, "bad")


@pytest.mark.parametrize("file", ["run.json", "metrics.json", ".hydra/overrides.yaml"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path, file):
    write_run(tmp_path / "good", "model.dim=8")
    path = write_run(tmp_path / "bad") / file
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in skipped_line(tmp_path, "bad")


def test_a_pipe_as_lock_ranks_or_events_is_not_waited_for(tmp_path):
    write_run(tmp_path / "good", "model.dim=8")
    other = write_run(tmp_path / "other")
    for name in (".lock", "tb/events.out.tfevents.1", "ranks.npz"):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).unlink(missing_ok=True)
        os.mkfifo(other / name)
    (other / "metrics.json").unlink()
    assert [run.status for run in find_runs([tmp_path]).runs] == ["finished", "unfinished"]
    assert learning_curve(other, "val/ndcg@10") == {}
    write_run(tmp_path / "third")
    (tmp_path / "third/ranks.npz").unlink()
    os.mkfifo(tmp_path / "third/ranks.npz")
    (part,) = build_report(find_runs([tmp_path]), [], None).parts
    assert any("ranks.npz cannot be read (not a regular file)" in note for note in part.notes)


def test_ranks_that_unpack_to_more_than_the_file_are_refused(tmp_path):
    write_run(tmp_path / "a")
    bomb = write_run(tmp_path / "b", "model.dim=8") / "ranks.npz"
    np.savez_compressed(bomb, user=np.zeros(10_000_000, np.int64), target=[1], rank=[1])
    text = write_run(tmp_path / "c", "model.dim=16") / "ranks.npz"
    np.savez(text, user=[7], target=[70], rank=["first"])
    shape = write_run(tmp_path / "d", "model.dim=32") / "ranks.npz"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999999,), }"
    with zipfile.ZipFile(shape, "w") as archive:
        archive.writestr("user.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    notes = build_report(find_runs([tmp_path]), [], None).parts[0].notes
    assert [note.partition(" is not tested: ")[0] for note in notes] == ["model.dim=8", "model.dim=16", "model.dim=32"]
    assert "it is compressed, which a run's files are not" in notes[0]
    assert "malformed columns: rank" in notes[1]
    assert "cannot be read" in notes[2]


def test_malformed_events_are_skipped(tmp_path):
    (tmp_path / "tb").mkdir()
    record = b"\xff" * 20 + b"val/ndcg@10"
    data = len(record).to_bytes(8, "little") + b"0000" + record + b"0000" + b"\xff" * 30
    (tmp_path / "tb/events.out.tfevents.1").write_bytes(data)
    (tmp_path / "tb/events.out.tfevents.2").write_bytes(b"")
    for number, size in enumerate((1 << 26, 1 << 34), 3):  # of zeros, which take no place on the disk
        with open(tmp_path / f"tb/events.out.tfevents.{number}", "wb") as file:
            file.truncate(size)
    assert learning_curve(tmp_path, "val/ndcg@10") == {}


# The search


def test_links_in_circles_are_followed_once(tmp_path):
    write_run(tmp_path / "a/run")
    (tmp_path / "a/back").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to("self")
    assert [run.folder for run in find_runs([tmp_path]).runs] == [tmp_path / "a/run"]


def test_a_search_of_too_many_folders_ends_in_one_line(tmp_path, report_here, monkeypatch):
    monkeypatch.setattr(search, "_MAX_OTHER_FOLDERS", 20)
    for number in range(30):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    done = report_here("many")
    expected = (
        "error: many and what is below it have more than 20 folders that are not runs; give the folder of a sweep, or"
        " one nearer to the runs\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    for number in range(30):
        write_run(tmp_path / "runs" / str(number), seed=number)
    assert report_here("runs").returncode == 0


def test_a_folder_that_cannot_be_listed_is_skipped(tmp_path, monkeypatch):
    write_run(tmp_path / "a/run")
    (tmp_path / "a/private").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "private":  # the tests may run as root, who may read everything
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_runs([tmp_path])
    assert len(found.runs) == 1
    assert f"{tmp_path}/a/private: cannot be read (Permission denied)" in found.skipped


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (["seed=range(1000000000)"], "a sweep may have 10,000 jobs at most"),
        (["x=" + "(" * 60_000], "its command has more than 50,000 characters"),
        ("seed", "which jobs are missing is unknown"),
        ([{"a": "b"}], "which jobs are missing is unknown"),
    ],
)
def test_the_command_of_a_hostile_sweep_is_not_expanded(tmp_path, task, message):
    write_run(tmp_path / "sweep/0-a")
    hydra = {"sweeper": {"_target_": "x.BasicSweeper", "params": None}, "overrides": {"task": task}}
    (tmp_path / "sweep/multirun.yaml").write_text(yaml.dump({"hydra": hydra}))
    (line,) = find_runs([tmp_path]).missing
    assert message in line
    assert "\n" not in line
