"""Atomic and durable writes, folder names, paths in messages, and help whose reader goes away."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sasrec_lab.files import (
    atomic_write,
    did_you_mean_path,
    display_path,
    draft_folder,
    folder_name,
    make_folder,
    read_small_text,
    read_small_yaml,
    sync_tree,
)


def test_a_draft_replaces_the_file_at_the_end(tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text("old")
    with atomic_write(file) as draft:
        draft.write_text("new")
        assert (draft.parent, file.read_text()) == (tmp_path, "old")
    assert file.read_text() == "new"


def test_a_draft_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text("old")

    def fail() -> None:
        with atomic_write(file) as draft:
            draft.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (file.read_text(), list(tmp_path.iterdir())) == ("old", [file])


def test_a_draft_left_in_a_locked_folder_is_overwritten(tmp_path):
    file = tmp_path / "numbers.txt"
    (tmp_path / ".draft-numbers.txt").write_text("of a killed process")
    with atomic_write(file, locked=True) as draft:
        draft.write_text("new")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("new", [file])


@pytest.fixture
def calls(monkeypatch):
    """Record what is synced and renamed, by name and in order."""
    seen = []
    fsync, rename = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_rename(draft: Path, path: Path) -> None:
        seen.append(f"rename {Path(path).name}")
        rename(draft, path)

    monkeypatch.setattr("os.fsync", record_sync)
    monkeypatch.setattr("os.replace", record_rename)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, to name what is synced")
def test_a_file_is_synced_before_and_its_folder_after_rename(tmp_path, calls):
    (tmp_path / "a").mkdir()
    with atomic_write(tmp_path / "a" / "x.txt", locked=True) as draft:
        draft.write_text("new")
    assert calls == ["sync .draft-x.txt", "rename x.txt", "sync a"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, to name what is synced")
def test_new_folders_are_synced_into_their_parents(tmp_path, calls):
    make_folder(tmp_path / "a" / "b")
    assert calls == ["sync a", f"sync {tmp_path.name}"]
    calls.clear()
    make_folder(tmp_path / "a" / "b")
    assert calls == ["sync a"]
    (tmp_path / "a" / "b" / "x.txt").write_text("")
    calls.clear()
    sync_tree(tmp_path / "a")
    assert calls == ["sync a", "sync x.txt", "sync b"]


def test_a_failing_sync_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "numbers.txt"
    file.write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
    with pytest.raises(OSError, match="broken disk"), atomic_write(file) as draft:
        draft.write_text("new")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("old", [file])
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EINVAL, "no such call")))
    with atomic_write(file) as draft:  # a file system that cannot sync
        draft.write_text("new")
    assert file.read_text() == "new"


KILLED = """
import os, sys
from pathlib import Path
from sasrec_lab.files import atomic_write, draft_folder
with atomic_write(Path("lists.csv")) as draft, draft_folder(Path("cache")) as folder:
    draft.write_text("half")
    (folder / "items.npy").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_drafts_of_killed_processes_are_removed(tmp_path):
    words = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    (tmp_path / ".draft-mine.csv").write_text("a name that no process gives")
    with atomic_write(tmp_path / "other.csv") as draft:
        draft.write_text("")
    assert len(list(tmp_path.glob(".draft-*"))) == 3, "it lives"
    process.communicate("")
    with draft_folder(tmp_path / "other"):
        assert len(list(tmp_path.glob(".draft-*"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"other.csv", ".draft-mine.csv"}


def test_a_draft_folder_is_renamed_or_removed(tmp_path):
    with draft_folder(tmp_path / "kept") as draft:
        (draft / "x").write_text("")
        draft.rename(tmp_path / "kept")
    with draft_folder(tmp_path / "dropped") as draft:
        (draft / "x").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_draft_that_another_process_is_removing_is_made_anew(tmp_path, monkeypatch):
    """A remover holds the lock of the first draft, and has removed that when the lock is free."""
    lock, removers = fcntl.flock, []

    def flock(descriptor, operation):
        if not removers:
            (first,) = tmp_path.iterdir()
            removers.append(os.open(first, os.O_RDONLY))
            lock(removers[0], fcntl.LOCK_EX)
            if operation & fcntl.LOCK_NB:
                os.close(removers[0])
                raise BlockingIOError
            first.rmdir()
            os.close(removers[0])
        lock(descriptor, operation)

    monkeypatch.setattr("sasrec_lab.files.fcntl.flock", flock)
    with draft_folder(tmp_path / "x") as draft:
        assert [draft] == list(tmp_path.iterdir())
        with pytest.raises(BlockingIOError):
            lock(os.open(draft, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_name_has_no_separators_and_is_not_long():
    assert folder_name("name=a/b c,seed=1") == "name=a-b-c,seed=1"
    long, longer = "x" * 300, "x" * 301
    assert len(folder_name(long)) == len(folder_name(longer)) == 200
    assert folder_name(long) != folder_name(longer)
    assert len(folder_name("ж" * 150).encode()) <= 200


def test_a_path_is_shown_as_typed_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert display_path(tmp_path / "inside" / "run") == "run"
    assert display_path(tmp_path / "run") == str(tmp_path / "run")


def test_a_missing_path_is_answered_with_its_nearest_neighbor(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "swee").write_text("")
    assert did_you_mean_path(tmp_path / "swe") == f"; did you mean {tmp_path / 'swee'}?"
    assert did_you_mean_path(tmp_path / "swe", only_folders=True) == f"; did you mean {tmp_path / 'sweep'}?"
    assert did_you_mean_path(tmp_path / "other") == ""
    assert did_you_mean_path(tmp_path / "no" / "run") == f"; its folder {tmp_path / 'no'} does not exist"


def test_only_small_regular_text_is_read(tmp_path):
    (tmp_path / "a").write_text("ä")
    assert read_small_text(tmp_path / "a") == "ä"
    (tmp_path / "large").write_bytes(b" " * ((4 << 20) + 1))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff")
    for name, reason in {"large": "4,194,305 bytes", "pipe": "not a regular file", "binary": "utf-8"}.items():
        with pytest.raises(ValueError, match=reason):
            read_small_text(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_small_text(tmp_path / "none")


def print_help(command: str, stdout) -> tuple[int, str]:
    """Return exit status and errors of a command's --help in a fresh process."""
    words = [sys.executable, "-m", f"sasrec_lab.{command}", "--help"]
    done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["train", "recommend"])
def test_help_into_a_closed_pipe_is_not_an_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        assert print_help(command, closed) == (0, "")


@pytest.mark.parametrize("command", ["train", "recommend"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_help_onto_a_full_disk_ends_in_one_line(command):
    with open("/dev/full", "w") as full:
        assert print_help(command, full) == (
            1,
            "error: stdout cannot be written: No space left on device; free some space\n",
        )


def test_yaml_is_read_without_aliases_or_deep_nesting(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, b]\n")
    assert read_small_yaml(path) == {"a": [1, "b"]}
    for text in ("a: &b [1]\nc: *b\n", "[" * 100_000, "{a: " * 60, "a: [", "a: 2020-13-45", "? [a]\n: b"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"nested|YAML|month") as caught:
            read_small_yaml(path)
        assert "\n" not in str(caught.value)
