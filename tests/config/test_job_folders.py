"""Names of the folders of a sweep's jobs, new, resumed and of older versions."""

import yaml

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.job_folders import common_keys, job_folder, job_folders


def start_job(sweep, name, *words):
    """Write what Hydra records when a job starts."""
    (sweep / name / ".hydra").mkdir(parents=True)
    (sweep / name / ".hydra/overrides.yaml").write_text(yaml.dump(list(words)))


def names(sweep, *words):
    """Return the names of the folders that a command's jobs would have."""
    return [job.folder.name for job in check_command_line(["-m", *words, f"hydra.sweep.dir={sweep}"]).jobs]


def test_a_name_has_the_swept_keys_only(tmp_path):
    assert names(tmp_path, "model.dim=32,64", "trainer.max_epochs=3", "seed=0") == ["0-model.dim=32", "1-model.dim=64"]
    assert names(tmp_path, "++trainer.max_epochs=3", "seed=0,1") == ["0-seed=0", "1-seed=1"]
    assert names(tmp_path, "sweep=dim")[:2] == ["0-model.dim=10", "1-model.dim=20"]


def test_the_name_of_an_only_job_has_all_keys(tmp_path):
    assert names(tmp_path, "seed=1", "model.dim=32", "data_dir=x") == ["0-model.dim=32,seed=1"]


def test_jobs_of_older_versions_keep_their_folders(tmp_path):
    """Version 0.1.0 named a folder after all overrides."""
    start_job(tmp_path, "0-model.dim=32,seed=0,trainer.max_epochs=3", "trainer.max_epochs=3", "model.dim=32", "seed=0")
    (tmp_path / "1-model.dim=32,seed=1,trainer.max_epochs=3").mkdir()  # it was not started
    assert names(tmp_path, "model.dim=32", "trainer.max_epochs=3", "seed=0,1,2") == [
        "0-model.dim=32,seed=0,trainer.max_epochs=3",
        "1-model.dim=32,seed=1,trainer.max_epochs=3",
        "2-seed=2",
    ]


def test_jobs_keep_their_folders_when_another_key_is_swept(tmp_path):
    for number, dim in enumerate((32, 64)):
        start_job(tmp_path, f"{number}-model.dim={dim}", f"model.dim={dim}", "seed=0", "data_dir=/elsewhere")
    assert names(tmp_path, "model.dim=32,64", "seed=0,1") == [
        "0-model.dim=32",
        "4-model.dim=32,seed=1",
        "1-model.dim=64",
        "3-model.dim=64,seed=1",
    ]


def test_a_job_of_a_grid_keeps_its_folder_whatever_its_number(tmp_path):
    assert job_folder(3, ["seed=1"], [], str(tmp_path)) == "3-seed=1"
    (tmp_path / "0-seed=1").mkdir()
    assert job_folder(3, ["seed=1"], [], str(tmp_path)) == "0-seed=1"


def test_job_folders_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10-seed=2", "2-seed=1", "notes-1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "3-file").write_text("")
    assert job_folders(tmp_path) == ["2-seed=1", "10-seed=2"]


def test_a_record_that_is_not_a_list_of_overrides_is_no_match(tmp_path):
    start_job(tmp_path, "0-a")
    (tmp_path / "0-a/.hydra/overrides.yaml").write_text("{seed: 1}")
    assert job_folder(1, ["seed=1"], [], str(tmp_path)) == "1-seed=1"


def test_common_keys_have_one_value_in_all_jobs():
    assert common_keys([["+a=1", "b=2", "~c"], ["+a=1", "b=3", "~c"]]) == ["a", "c"]
