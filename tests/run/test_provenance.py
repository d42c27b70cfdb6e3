"""Which of several processes records a run, by the variables that a launcher sets."""

import pytest

from sasrec_lab.run.provenance import is_first_process, is_started_with_others

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.mark.parametrize(
    ("variables", "is_first", "is_together"),
    [
        ({}, True, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, False, False),  # Lightning has started it
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, True, True),  # torchrun
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "4"}, False, True),  # on another machine
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, True, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, False, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True, False),  # a job of a sweep
    ],
)
def test_the_process_that_records_follows_from_its_rank(variables, is_first, is_together, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_first_process(), is_started_with_others()) == (is_first, is_together)


@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1", "hydra.run.dir=run"]])
def test_processes_started_together_need_one_folder(words, train_here, monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = train_here("dataset=synthetic", *words)
    assert done.returncode == 1
    assert done.stderr == (
        "error: processes that torchrun or Slurm starts together run one configuration in one folder; add"
        " hydra.run.dir=<folder>, and start jobs of -m one by one\n"
    )
    assert not list(tmp_path.glob("run*"))
