"""The recommend command, in this process and in fresh ones, on generated data in the format of KION."""

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from sasrec_lab import files
from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import CONF_DIR, RecommendConfig
from sasrec_lab.errors import InputError
from sasrec_lab.files import atomic_write
from sasrec_lab.recommend.__main__ import recommend
from sasrec_lab.recommend.rankers import EncoderRanker
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.train import train

MAKE = Path(CONF_DIR).parent / "scripts" / "make_synthetic.py"
ONE_INTERACTION, UNKNOWN_ITEM_ONLY, UNKNOWN_ITEM = 324373, 14630, 8871


@pytest.fixture(scope="module")
def data(made_once) -> Path:
    """A data root with generated files in the format of KION."""

    def make(folder: Path) -> None:
        command = [sys.executable, str(MAKE), str(folder), "--users", "60", "--items", "40"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)

    return made_once("kion", make)


@pytest.fixture(scope="module")
def run(data, made_once) -> Path:
    """A finished run of the tutorial's job with a small model."""
    small = ["model.dim=8", "trainer.max_epochs=2", f"data_dir={data}"]
    return made_once("kion-run", lambda folder: train(load(["experiment=rectools/kion", *small]), folder))


@pytest.fixture
def here(run, tmp_path, monkeypatch) -> str:
    """Change to an empty folder and return the override that names the run."""
    monkeypatch.chdir(tmp_path)
    return f"run={run}"


def recommended(*words: str) -> None:
    """Run the command in this process."""
    recommend(check_command_line(list(words), "recommend").jobs[0].cfg)


def refused(*words: str) -> str:
    """Return the error of the command, which must be one line."""
    with pytest.raises(InputError) as error:
        recommended(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_job_folder_needs_no_quotes(run, recommend_here, tmp_path):
    (tmp_path / "0-model.dim=8,seed=1").symlink_to(run)
    done = recommend_here("run=0-model.dim=8,seed=1", "items=all", "k=1", "output=a=1,b.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a=1,b.csv").is_file()


def test_generated_data_have_kions_format(data):
    interactions = pd.read_csv(data / "kion" / "interactions.csv")
    assert list(interactions) == ["user_id", "item_id", "last_watch_dt", "total_dur", "watched_pct"]
    assert interactions["watched_pct"].isna().any()
    assert interactions["last_watch_dt"].is_monotonic_increasing
    counts = interactions["user_id"].value_counts()
    assert counts[ONE_INTERACTION] == counts[UNKNOWN_ITEM_ONLY] == 1
    assert interactions.loc[interactions["item_id"] == UNKNOWN_ITEM, "user_id"].tolist() == [UNKNOWN_ITEM_ONLY]
    titles = pd.read_csv(data / "kion" / "items_en.csv").set_index("item_id")["title_orig"]
    assert titles.is_unique
    assert set(interactions["item_id"]) <= set(titles.index)
    assert set(interactions["user_id"]) == set(pd.read_csv(data / "kion" / "users_en.csv")["user_id"])


def test_tutorial_job_trains_on_all_interactions(run):
    results = json.loads((run / "metrics.json").read_text())
    assert (results["status"], results["epochs"], results["metrics"]) == ("finished", 2, {})
    assert results["protocol"]["holdout"] == "none: all is trained on"
    assert results["protocol"]["items"] == results["protocol"]["candidates"]["full"] + 1  # except the unknown one
    assert not (run / "ranks.npz").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_printed_lists_have_titles(here, run, data, recommend_here, tmp_path):
    done = recommend_here(here, f"users=[{UNKNOWN_ITEM_ONLY},{ONE_INTERACTION}]", "k=3", "on_unsupported_targets=warn")
    assert done.returncode == 0
    assert done.stderr == (f"warning: users: no list for 1 of 2 (no item known to the model: {UNKNOWN_ITEM_ONLY})\n")
    first, *lines = done.stdout.splitlines()
    assert first == f"user_id {ONE_INTERACTION}"
    table = Recommender.from_run(run).recommend([ONE_INTERACTION], k=3)
    titles = pd.read_csv(data / "kion" / "items_en.csv").set_index("item_id")["title_orig"]
    words = [line.split(maxsplit=3) for line in lines]
    assert [(int(rank), int(item), title) for rank, item, _, title in words] == [
        (row.rank, row.item_id, titles[row.item_id]) for row in table.itertuples()
    ]
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}  # neither a folder of Hydra nor a log


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_lists_of_all_users_are_written_to_a_file(ending, here, run, capsys, tmp_path):
    recommended(here, "users=all", "on_unsupported_targets=ignore", f"output=lists{ending}")
    assert capsys.readouterr() == (f"wrote 61 lists to lists{ending}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == [f"lists{ending}"]  # no draft is left
    written = pd.read_csv(f"lists{ending}") if ending == ".csv" else pd.read_parquet(f"lists{ending}")
    table = Recommender.from_run(run).recommend("all", k=10, on_unsupported_targets="ignore")
    pd.testing.assert_frame_equal(written, table, check_dtype=False, rtol=1e-5)


def test_lists_of_no_user_are_a_file_with_a_header_only(here):
    recommended(here, f"users=[{UNKNOWN_ITEM_ONLY}]", "on_unsupported_targets=ignore", "output=lists.csv")
    assert Path("lists.csv").read_text() == "user_id,item_id,score,rank\n"


def test_ids_and_histories_are_read_from_files(here, run, capsys):
    recommender = Recommender.from_run(run)
    first, second = recommender.items.ids[:2].tolist()
    Path("histories.csv").write_text(
        f"user_id,item_id,datetime\n7,{first},2021-05-11\n8,99999,2021-05-11\n8,{second},2021-05-12\n"
    )
    Path("ids.txt").write_text("8\n7\n")
    Path("ids.csv").write_text("user_id,age\n8,30\n7,40\n8,30\n")
    pd.DataFrame({"user_id": [8, 7]}).to_parquet("ids.parquet")
    table = pd.read_csv("histories.csv")
    wanted = recommender.recommend([8, 7], k=2, interactions=table)
    for file in ("ids.txt", "ids.csv", "ids.parquet", "[8,7]"):
        recommended(here, f"users={file}", "interactions=histories.csv", "k=2", "output=lists.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet("lists.parquet"), wanted)
    table.to_parquet("histories.parquet")
    recommended(here, "users=histories.csv", "interactions=histories.parquet", "k=2", "output=lists.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet("lists.parquet"), recommender.recommend([7, 8], k=2, interactions=table)
    )
    Path("allowed.txt").write_text(f"{first}\n{second}\n")
    recommended(here, "users=[7]", "interactions=histories.csv", "items_to_recommend=allowed.txt", "output=lists.csv")
    assert pd.read_csv("lists.csv")["item_id"].tolist() == [second]
    capsys.readouterr()


def test_each_line_of_a_text_file_is_an_id(here, run):
    item = Recommender.from_run(run).items.ids[0]
    Path("histories.csv").write_text(f"user_id,item_id,datetime\nMary Ann,{item},2021-05-11\nBob,{item},2021-05-11\n")
    Path("ids.txt").write_text("\ufeffMary Ann\r\n\n  Bob \n", encoding="utf-8")
    recommended(here, "users=ids.txt", "interactions=histories.csv", "k=1", "output=lists.csv")
    assert pd.read_csv("lists.csv")["user_id"].tolist() == ["Mary Ann", "Bob"]


def test_tilde_is_the_home_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(run)
    item = Recommender.from_run("~/run").items.ids[0]
    (tmp_path / "histories.csv").write_text(f"user_id,item_id,datetime\n7,{item},2021-05-11\n")
    (tmp_path / "ids.txt").write_text("7\n")
    files = ["users='~/ids.txt'", "interactions='~/histories.csv'", "output='~/lists.csv'"]
    recommended("run='~/run'", "k=1", *files)
    assert pd.read_csv(tmp_path / "lists.csv")["user_id"].tolist() == [7]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("NaN,1", "column user_id, row 2 is 'NaN', which means a missing value"),
        ("7,null", "column item_id, row 2 is 'null', which means a missing value"),
        ("7, 1", "column item_id, row 2 is ' 1', with blanks around it"),
    ],
)
def test_ids_that_training_refuses_are_refused(here, tmp_path, row, wrong):
    (tmp_path / "histories.csv").write_text(f"user_id,item_id\n7,1\n{row}\n")
    message = refused(here, "users=all", "interactions=histories.csv")
    assert message == f"interactions=histories.csv: {wrong}; correct or remove the row"


def test_similar_items_are_printed_and_written(here, run, capsys):
    recommender = Recommender.from_run(run)
    item = recommender.items.ids[0]
    recommended(here, f"items=[{item}]", "k=2", "filter_itself=false")
    first, own, _ = capsys.readouterr().out.splitlines()
    assert first == f"target_item_id {item}"
    assert own.split()[:3] == ["1", str(item), "1.0000"]
    recommended(here, "items=all", "k=2", "output=lists.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet("lists.parquet"), recommender.recommend_to_items("all", k=2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either users=... or items=...: ids in brackets such as [7,12], all, or a file of ids"),
        (["users=[1]", "items=[2]"], "give either users=... or items=..."),
        (["users=1"], "users=1 is not a .txt, .csv or .parquet file; write ids in brackets: users=[1]"),
        (["users='all '"], "users=all  is not a .txt, .csv or .parquet file; write users=all"),
        (["users='1 2'"], "users=1 2 is not a .txt, .csv or .parquet file; write ids in brackets: 'users=[1 2]'"),
        (["users=1,2"], "users=1,2 has several values; write [...] for a list"),
        (["users=[[1]]"], "users contains [1]; ids are integers or text"),
        (["users={a:1}"], "users={'a': 1} is not a list of ids; write users=[...]"),
        (["users=[]"], "users is empty; give at least one id"),
        (["users=[5]"], "users: no list for 1 of 1 (unknown: 5); remove them, or set on_unsupported_targets=warn"),
        (["items=[5]"], "items: no list for 1 of 1 (unknown: 5); remove them, or set on_unsupported_targets=warn"),
        (["users=[5]", "k=0"], "k=0 must be from 1 to 40, the number of items that the model knows"),
        (["users=[5]", "k=41"], "k=41 must be from 1 to 40"),
        (["users=[5]", "k=ten"], "k=ten must be an integer"),
        (["user=[5]"], "unknown key 'user'; did you mean users?"),
        (["+user=[5]", "users=[5]"], "unknown key 'user'; did you mean users?"),
        (["users=[5]", "model=tiny"], "unknown key 'model'"),
        (["users=[5]", "on_unsupported_targets=skip"], "on_unsupported_targets=skip is not one of raise, warn, ignore"),
        (["users=[5]", "-m"], "recommend cannot run a sweep; remove -m"),
        (["users=[5]", "output=lists.txt"], "output=lists.txt must end in .csv or .parquet; omit it to print"),
        (["users=[5]", "output=no/where.csv"], "output=no/where.csv: there is no folder no; create it"),
        (["users=[5]", "output=folder.csv"], "output=folder.csv is a folder; give a file in it"),
        (["users=al"], "users=al is not a .txt, .csv or .parquet file; did you mean users=all?"),
        (["users=none.txt"], "users=none.txt: no such file; check the path"),
        (["users=folder.csv"], "users=folder.csv cannot be read ("),
        (["users=other.csv"], "users=other.csv must have a column user_id; its columns are uid, item_id; rename"),
        (
            ["users=[5]", "interactions=other.csv"],
            "interactions=other.csv must have a column user_id; its columns are uid, item_id; rename one of them",
        ),
        (["users=[5]", "interactions=ids.txt"], "interactions=ids.txt must be a .csv, .csv.gz or .parquet file"),
        (["users=[5]", "interactions=empty.csv"], "interactions=empty.csv cannot be read (No columns to parse"),
        (["users=[5]", "interactions=broken.parquet"], "interactions=broken.parquet cannot be read ("),
        (
            ["items=[5]", "interactions=other.csv"],
            "interactions=other.csv only applies to users=...; remove it for items=...",
        ),
        (
            ["users=[5]", "items_to_recommend=[1,2]"],
            "items_to_recommend must contain an item known to the model, not only",
        ),
        (
            ["users=[5]", "device=gpu"],
            "device=gpu is not one of auto, cpu, cuda, cuda:<number>, mps; did you mean cuda?",
        ),
        (["users=[5]", "device=meta"], "device=meta is not one of auto, cpu, cuda, cuda:<number>, mps"),
    ],
)
def test_invalid_input_is_one_line(words, message, here, tmp_path):
    Path("folder.csv").mkdir()
    Path("other.csv").write_text("uid,item_id\n1,2\n")
    Path("empty.csv").write_text("")
    Path("broken.parquet").write_bytes(b"PAR1")
    before = sorted(tmp_path.iterdir())
    assert refused(here, *words).startswith(message)
    assert sorted(tmp_path.iterdir()) == before


HEADER = "user_id,item_id,datetime\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER}7,8,2021-05-11,1\n9,8,2021-05-11,1\n", "line 2: 4 columns, but the header has 3"),
        (f"\ufeff{HEADER}7,8,2021-05-11,1\n", "line 2: 4 columns, but the header has 3"),
        (f"{HEADER}7,8,2021-05-11\n\n9,8,2021-05-11,1\n", "line 4: 4 columns, but the header has 3"),
        (f'{HEADER}7,"8\n8",2021-05-11\n9,8\n', "line 4: 2 columns, but the header has 3"),
        ("user_id,item_id\n7\n", "line 2: 1 column, but the header has 2"),
    ],
)
@pytest.mark.parametrize("key", ["interactions", "users"])
def test_csv_rows_must_be_as_long_as_the_header(key, text, message, here):
    Path("table.csv").write_text(text, encoding="utf-8")
    users = [] if key == "users" else ["users=[7]"]
    error = refused(here, *users, f"{key}=table.csv")
    assert error == f"table.csv, {message}; correct or remove the line"
    with gzip.open("table.csv.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    if key == "interactions":
        assert refused(here, *users, f"{key}=table.csv.gz").startswith(f"table.csv.gz, {message}")


def test_unused_columns_of_a_csv_may_have_gaps(here, run, capsys):
    item = Recommender.from_run(run).items.ids[0]
    Path("histories.csv").write_text(f"{HEADER[:-1]},note\n7,{item},2021-05-11,\n\n7,{item},2021-05-12,x\n")
    recommended(here, "users=[7]", "interactions=histories.csv", "k=1")
    assert capsys.readouterr().out.startswith("user_id 7\n")


def test_run_is_required(here):
    assert refused("users=[5]") == "run has no value; set it on the command line (run=...) or in a config file"
    assert refused("users=[5]", "run=") == "run is empty; give the folder of a finished run"
    assert refused("users=[5]", "run=nowhere") == "run=nowhere: there is no such folder; check the path"


def test_invalid_input_ends_the_command_with_one_line(here, recommend_here):
    done = recommend_here(here, "users=[5]")
    assert done.returncode == 1
    assert done.stderr.startswith("error: users: no list for 1 of 1")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_unfinished_file_is_removed(here, tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        if path.name.endswith("lists.csv"):  # not a file of the cache
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync_file", fail)
    error = refused(here, "users=all", "on_unsupported_targets=ignore", "output=lists.csv")
    assert error == "output=lists.csv cannot be written: No space left on device; choose another path"
    assert not list(tmp_path.glob("*lists.csv"))


def test_every_writer_has_a_draft_of_its_own(tmp_path):
    path = tmp_path / "lists.csv"
    with atomic_write(path) as own:
        own.write_text("own")
        with atomic_write(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "own"
    assert [file.name for file in tmp_path.iterdir()] == ["lists.csv"]


def test_users_without_candidates_are_named_and_not_counted(here, run, capsys):
    recommender = Recommender.from_run(run)
    seen, other = recommender.items.ids[:2]
    Path("histories.csv").write_text(f"user_id,item_id,datetime\n7,{seen},2021-05-11\n8,{other},2021-05-11\n")
    given = ["interactions=histories.csv", f"items_to_recommend=[{seen}]", "output=lists.csv"]
    recommended(here, "users=[7,8]", *given)
    line = "users: no list for 1 of 2: no candidate is left (7); filter_viewed=false keeps seen items"
    assert capsys.readouterr() == ("wrote 1 list to lists.csv\n", f"warning: {line}\n")
    assert pd.read_csv("lists.csv")["user_id"].tolist() == [8]


@pytest.mark.parametrize("users", ["[8,7,8]", "ids.txt", "ids.csv", "ids.parquet"])
def test_duplicate_users_get_one_list_and_a_warning(users, here, run, capsys):
    item = Recommender.from_run(run).items.ids[0]
    Path("histories.csv").write_text(f"user_id,item_id,datetime\n7,{item},2021-05-11\n8,{item},2021-05-11\n")
    Path("ids.txt").write_text("8\n7\n8\n")
    Path("ids.csv").write_text("user_id\n8\n7\n8\n")
    pd.DataFrame({"user_id": [8, 7, 8]}).to_parquet("ids.parquet")
    recommended(here, f"users={users}", "interactions=histories.csv", "k=1", "output=lists.csv")
    line = "warning: users: duplicates ignored: 8\n"
    assert capsys.readouterr() == ("wrote 2 lists to lists.csv\n", line)
    assert pd.read_csv("lists.csv")["user_id"].tolist() == [8, 7]


def test_unknown_items_are_skipped_on_request(here, run, capsys):
    item = Recommender.from_run(run).items.ids[0]
    recommended(here, f"items=[5,{item}]", "k=1", "on_unsupported_targets=warn", "output=lists.csv")
    assert capsys.readouterr() == ("wrote 1 list to lists.csv\n", "warning: items: no list for 1 of 2 (unknown: 5)\n")
    assert pd.read_csv("lists.csv")["target_item_id"].tolist() == [item]


def test_histories_without_times_give_a_warning(here, run, capsys):
    Path("histories.csv").write_text(f"user_id,item_id\n7,{Recommender.from_run(run).items.ids[0]}\n")
    recommended(here, "users=[7]", "interactions=histories.csv", "k=1")
    line = "interactions has no column last_watch_dt, so each user's rows count as in time order"
    assert capsys.readouterr().err == f"warning: {line}\n"


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_command_quietly_without_a_file(sent, code, default_sigint, here, run, tmp_path):
    """A draft shows that writing has begun; with this many users it takes a while."""
    item = Recommender.from_run(run).items.ids[0]
    rows = "\n".join(f"{user},{item},2021-05-11" for user in range(300_000))
    Path("histories.csv").write_text(f"user_id,item_id,datetime\n{rows}\n")
    words = [here, "users=all", "interactions=histories.csv", "k=20", "output=lists.csv"]
    command = [sys.executable, "-m", "sasrec_lab.recommend", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".draft-*")):
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.communicate(timeout=300) == ("", "interrupted\n")
    assert process.returncode == code
    assert [path.name for path in tmp_path.iterdir()] == ["histories.csv"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which accepts no byte")
@pytest.mark.slow
def test_printing_to_a_full_disk_is_one_line(here):
    command = [sys.executable, "-m", "sasrec_lab.recommend", here, "users=all", "on_unsupported_targets=ignore"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    line = "error: stdout cannot be written: No space left on device; free some space\n"
    assert (done.returncode, done.stderr) == (1, line)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_help_lists_every_key_without_importing_torch(tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from sasrec_lab.recommend.__main__ import entry\n"
        "try: entry()\n"
        "finally: print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "python -m sasrec_lab.recommend run=" in done.stdout
    assert "on_unsupported_targets: raise" in done.stdout
    for field in fields(RecommendConfig):
        assert re.search(rf"^  {field.name}  +\S", done.stdout, re.M), field.name
    assert done.stdout.rstrip().endswith("False False")
    assert list(tmp_path.iterdir()) == []


def test_a_lack_of_memory_is_one_line(here, monkeypatch):
    def fail(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(EncoderRanker, "for_users", fail)
    with pytest.raises(InputError) as caught:
        recommended(here, "users=all", "k=1", "on_unsupported_targets=ignore")
    assert str(caught.value) == "out of memory; ask for fewer users or items at a time, or use more memory"
