"""Finding and reading the file of a data set."""

import gzip
import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.sources import SourceConfig
from sasrec_lab.data import source
from sasrec_lab.errors import InputError
from sasrec_lab.ops import memory

ROWS = b"1\t2\t3\t4\n"
SHA = hashlib.sha256(ROWS).hexdigest()


def published(*sources: SourceConfig, sha256: str | None = SHA) -> DatasetConfig:
    dataset = load(["dataset=ml_100k"]).dataset
    dataset.path, dataset.sha256, dataset.sources = "ml/u.data", sha256, list(sources)
    return dataset


def own(path: Path | str) -> DatasetConfig:
    return load(["dataset=csv", f"dataset.path={path}"]).dataset


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Finding


def test_data_root(tmp_path):
    assert source.data_root(str(tmp_path)) == tmp_path
    assert source.data_root(None).name == "sasrec_lab"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_existing_published_file_is_not_fetched(tmp_path, suffix):
    there = tmp_path / "ml" / f"u.data{suffix}"
    there.parent.mkdir()
    there.write_bytes(gzip.compress(ROWS) if suffix else ROWS)
    found = source.find(published(SourceConfig(url="http://127.0.0.1:1/never-asked")), tmp_path)
    assert found == there
    assert source.content(found) == ROWS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_user_file_is_found_by_its_path_or_in_the_root(tmp_path, monkeypatch, suffix):
    here, root = tmp_path / "here", tmp_path / "root"
    here.mkdir()
    root.mkdir()
    (here / f"a.csv{suffix}").write_bytes(ROWS)
    (root / f"b.csv{suffix}").write_bytes(ROWS)
    monkeypatch.chdir(here)
    assert source.find(own("a.csv"), root).resolve() == here / f"a.csv{suffix}"
    assert source.find(own(here / "a.csv"), root) == here / f"a.csv{suffix}"
    assert source.find(own("b.csv"), root) == root / f"b.csv{suffix}"


def test_a_missing_user_file_suggests_the_nearest_name(tmp_path):
    (tmp_path / "interactions.csv").write_bytes(ROWS)
    wrong = tmp_path / "interaction.csv"
    assert refusal(source.find, own(wrong), tmp_path) == (
        f"dataset.path={wrong}: no such file; did you mean {tmp_path}/interactions.csv? (nor is it in {tmp_path})"
    )
    nowhere = tmp_path / "nowhere" / "x.csv"
    assert refusal(source.find, own(nowhere), tmp_path) == (
        f"dataset.path={nowhere}: no such file; its folder {tmp_path}/nowhere does not exist (nor is it in {tmp_path})"
    )


# Reading


def test_a_wrong_checksum(tmp_path):
    path, found = tmp_path / "u.data", hashlib.sha256(b"other").hexdigest()
    source.check(path, SHA, SHA, is_published=False)
    start, end = f"{path} has sha256 {found}, expected {SHA}; ", ", or set dataset.sha256=null to use this version"
    for is_published, fix in {
        False: "restore that version",
        True: "delete it, so that training fetches the published one (for your own file write dataset=csv)",
    }.items():
        assert refusal(partial(source.check, is_published=is_published), path, found, SHA) == f"{start}{fix}{end}"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_digest_and_blocks_are_those_of_the_whole_file(tmp_path, monkeypatch, suffix):
    content = b"1,2\r\n\n" + 30 * b"3,4\n" + b"a line longer than a block\n5,6"
    path = tmp_path / f"u.data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert source.digest(path, is_text=True) == hashlib.sha256(content).hexdigest()
    for size in (1, 7, 1000):
        monkeypatch.setattr(source, "_BLOCK_BYTES", size)
        blocks = list(source.blocks(path))
        assert b"".join(blocks) == content
        assert all(block.endswith(b"\n") for block in blocks[:-1])
        assert source.digest(path, is_text=True) == source.digest(path, is_text=False)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_of_gigabytes_ends_within_megabytes(tmp_path, suffix):
    path = tmp_path / f"u.data{suffix}"
    with gzip.open(path, "wb", compresslevel=1) if suffix else path.open("wb") as file:
        file.write(b"user,item\n")
        if suffix:
            file.write(bytes(30 << 20))
        else:
            file.truncate(1 << 40)  # a file of holes
    message = (
        f"{path} has a line of over 16,777,216 bytes; name a text file with shorter lines, each ended by a line feed"
    )
    assert refusal(lambda: list(source.blocks(path))) == message
    assert refusal(source.digest, path, True) == message


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_content_ends_before_it_fills_the_memory(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"u.data{suffix}"
    path.write_bytes(gzip.compress(1000 * ROWS) if suffix else 1000 * ROWS)
    monkeypatch.setattr(source, "_BLOCK_BYTES", 1000)
    assert source.content(path) == 1000 * ROWS
    monkeypatch.setattr(memory, "available_bytes", lambda _: 7000)
    message = f"{path} is too large for this machine; use a part of it, or more memory"
    assert refusal(source.content, path) == message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(ROWS, mtime=0)[:-9], "Compressed file ended before the end-of-stream marker was reached"),
        (ROWS, "Not a gzipped file (b'1\\t')"),
    ],
)
def test_a_broken_gzip(tmp_path, content, reason):
    path = tmp_path / "u.data.gz"
    path.write_bytes(content)
    message = f"{path} is a broken gzip file ({reason}); replace it with a complete one"
    assert refusal(source.content, path) == message
    assert refusal(source.digest, path, True) == message


@pytest.mark.parametrize(("name", "content"), [("u.data", b""), ("u.data.gz", gzip.compress(b"", mtime=0))])
def test_an_empty_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    check = partial(source.check, is_published=False)
    found = source.digest(path, is_text=True)
    assert refusal(check, path, found, SHA) == f"{path} is empty; dataset.path must name a file with interactions"


def test_a_folder_cannot_be_read(tmp_path):
    assert refusal(source.content, tmp_path) == (
        f"{tmp_path} cannot be read (Is a directory); name a file that you may read"
    )


@pytest.mark.parametrize("path", [".", "", "folder"])
def test_a_folder_is_not_found_as_a_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    message = refusal(source.find, replace(own("x.csv"), path=path), tmp_path)
    if path:
        assert message == (
            f"dataset.path={path} is a folder without Parquet files; name a file in it, of text (plain or .gz), or a"
            " folder of .parquet files"
        )
    else:
        assert message == "dataset.path must not be empty; set it to a file"
