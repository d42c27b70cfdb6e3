"""Download a file over HTTP within limits of time, rate and size, and continue a download that broke off.

A download is received into a part, next to which `<part>.json` describes the answer that it belongs to. The next try
asks the server for the remaining bytes only, unless the file has changed there (Range and If-Range, RFC 9110).
"""

import json
import logging
import re
import shutil
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, ReadTimeoutError

from sasrec_lab.errors import InputError

log = logging.getLogger(__name__)

MAX_SECONDS = 3600  # for a source; what has come by then is kept, and continued by the next call
_MAX_BYTES = 8 << 30  # of a source that states no size
_CONNECT_SECONDS, _READ_SECONDS = 10, 60  # to connect, and to wait for the next bytes: a dead network is noticed
_ANSWER_SECONDS = 90  # until an answer begins, redirects included
_RATE_SECONDS, _MIN_RATE = 30, 4096  # bytes per second that must arrive, on average over this time
_BLOCK_BYTES = 1 << 16
_NETWORK_ERRORS = (HTTPError, requests.RequestException, UnicodeError)  # requests derives its errors from OSError
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)


@dataclass(frozen=True)
class Wanted:
    """A file to download: its address, its name in the log, its size if known, and whether its content is verified.

    Only a download that is verified, by a checksum or as a zip, is continued, or kept if its length is unknown.
    """

    url: str
    name: str
    size: int | None
    is_verified: bool


def download(wanted: Wanted, part: Path) -> None:
    """Download the file to `part`; if it breaks off, continue once.

    A failure leaves a part only if a later call can continue it.

    Raises:
        InputError: the source does not have the file, or is too slow; the message says why in a few words.
        OSError: the disk is full or cannot be written.
    """
    deadline = time.monotonic() + MAX_SECONDS
    try:
        try:
            _receive(wanted, part, deadline)
        except (HTTPError, requests.ConnectionError, requests.Timeout) as error:
            if not (received := _size_of(part)):
                raise
            log.info("%s: %s after %s; trying once more", wanted.url, _reason(error), format_bytes(received))
            _receive(wanted, part, deadline)
        _check_content(wanted, part)
    except BaseException as error:
        is_disk_error = isinstance(error, OSError) and not isinstance(error, _NETWORK_ERRORS)
        if is_disk_error or _read_mark(wanted.url, part) is None:
            discard(part)
        if isinstance(error, _NETWORK_ERRORS):
            raise InputError(_reason(error)) from error
        raise


def discard(part: Path) -> None:
    """Remove a part and its description."""
    part.unlink(missing_ok=True)
    _description(part).unlink(missing_ok=True)


def format_bytes(count: int) -> str:
    """Return a number of bytes for people, such as 4.92 MB."""
    return f"{count} bytes" if count < 1000 else re.sub(r"(?<=\d)(?=[a-zA-Z])", " ", tqdm.format_sizeof(count, "B"))


def check_space(folder: Path, count: int) -> None:
    """Raise InputError if the disk of the folder has less free space."""
    if count > (free := shutil.disk_usage(folder).free):
        raise InputError(f"it has {format_bytes(count)}, but {folder} has only {format_bytes(free)} of free space")


# One answer


def _receive(wanted: Wanted, part: Path, deadline: float) -> None:
    """Ask for the file, or for what the part lacks, and write it to the part."""
    answer, offset = _begin(wanted.url, part)
    with closing(answer):
        answer.raise_for_status()
        is_encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
        length = None if is_encoded else _integer(answer.headers.get("Content-Length"))
        total = None if length is None else offset + length
        try:
            _check_answer(wanted, answer, total, part.parent)
        except InputError:
            discard(part)
            raise
        if offset == 0:
            discard(part)
            if wanted.is_verified and not is_encoded and (mark := _mark(answer)):
                _description(part).write_text(json.dumps({"url": wanted.url, "mark": mark}))
        log.info(
            "fetching %s%s from %s%s",
            wanted.name,
            f" ({format_bytes(size)})" if (size := total or wanted.size) else "",
            wanted.url,
            f", continued at {format_bytes(offset)}" if offset else "",
        )
        _write(answer, part, offset, total, wanted, deadline)


def _begin(url: str, part: Path) -> tuple[requests.Response, int]:
    """Return an answer and the byte of the file at which it begins."""
    mark, offset = _read_mark(url, part), _size_of(part)
    if mark is None or offset == 0:
        return _ask(url, {}), 0
    answer = _ask(url, {"Range": f"bytes={offset}-", "If-Range": mark})
    if answer.status_code == 206:
        if answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-") and _mark(answer) in (mark, None):
            return answer, offset
    elif answer.status_code != 416:  # whole, because it has changed or the server continues nothing; or an error
        return answer, 0
    answer.close()
    return _ask(url, {}), 0


def _ask(url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer when it begins.

    A thread asks, because a server that sends its headers byte by byte never exceeds the time limit of a socket.
    """
    answers: list[requests.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(
                requests.get(
                    url,
                    headers={"Accept-Encoding": "identity"} | headers,  # so that lengths are those of the file
                    stream=True,
                    timeout=(_CONNECT_SECONDS, _READ_SECONDS),
                    hooks={"response": lambda answer, **_: _close_redirect(answer)},
                )
            )
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not answers:
        raise requests.Timeout("no answer")
    answer = answers[0]
    if isinstance(answer, Exception):
        is_known = isinstance(answer, _NETWORK_ERRORS)
        raise answer if is_known else requests.exceptions.InvalidURL from answer  # others come from a broken redirect
    return answer


def _close_redirect(answer: requests.Response) -> None:
    """Close a redirect, whose body requests would read to its end, however long."""
    if answer.is_redirect:
        answer.raw.close()


def _check_answer(wanted: Wanted, answer: requests.Response, total: int | None, folder: Path) -> None:
    """Raise InputError if the answer is not the file, as far as its headers tell."""
    if wanted.url.startswith("https:") and not answer.url.startswith("https:"):
        raise InputError(f"it redirects from https to {answer.url}")
    if not wanted.is_verified:
        if re.match(r"\s*(text/html|application/xhtml)", answer.headers.get("Content-Type", ""), re.I):
            raise InputError("the answer is a web page (HTML), not the file")
        is_chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
        if total is None and wanted.size is None and not is_chunked:
            raise InputError("the answer has no length, so it may be incomplete; give the source a size or sha256")
    if total is not None:
        if wanted.size not in (None, total):
            raise InputError(f"it has {total:,} bytes, expected {wanted.size:,}")
        if wanted.size is None and total > _MAX_BYTES:
            raise InputError(_too_large(wanted))
        check_space(folder, total)


def _too_large(wanted: Wanted) -> str:
    if wanted.size is not None:
        return f"it has more than the expected {wanted.size:,} bytes"
    return f"it has more than {format_bytes(_MAX_BYTES)}; if that is right, give the source its size in bytes"


def _write(
    answer: requests.Response, part: Path, offset: int, total: int | None, wanted: Wanted, deadline: float
) -> None:
    """Append the answer to the part at the offset, as long as it is fast enough and within the size."""
    limit = wanted.size or _MAX_BYTES
    received = offset
    checked_at, checked = time.monotonic(), received
    progress = tqdm(
        initial=offset, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    )
    with progress, part.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        while block := answer.raw.read1(_BLOCK_BYTES, decode_content=True):  # returns what has arrived
            received += len(block)
            if received > limit:
                discard(part)
                raise InputError(_too_large(wanted))
            file.write(block)
            progress.update(len(block))
            now = time.monotonic()
            if now > deadline:
                raise InputError(f"it is not complete after {MAX_SECONDS // 60} minutes")
            if (seconds := now - checked_at) >= _RATE_SECONDS:
                if received - checked < _MIN_RATE * seconds:
                    raise InputError(f"it is slower than {format_bytes(_MIN_RATE)} per second")
                checked_at, checked = now, received
        file.truncate()


def _check_content(wanted: Wanted, part: Path) -> None:
    """Raise InputError, and discard the part, if it is complete but not the file."""
    size = _size_of(part)
    with part.open("rb") as file:
        start = file.read(1024)
    reason = ""
    if size == 0:
        reason = "the answer is empty"
    elif _HTML.match(start):
        reason = "the answer is a web page (HTML), not the file"
    elif wanted.size not in (None, size):
        reason = f"it has {size:,} bytes, expected {wanted.size:,}"
    if reason:
        discard(part)
        raise InputError(reason)


# Parts


def _description(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_mark(url: str, part: Path) -> str | None:
    """Return the mark of the version of the file that the part belongs to, or None if it cannot be continued."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it was edited by hand
        described = json.loads(_description(part).read_text())
        if described["url"] == url and isinstance(described["mark"], str):
            return described["mark"]
    return None


def _mark(answer: requests.Response) -> str | None:
    """Return the server's mark of this version of the file: a strong ETag, or the time of its last change."""
    etag = answer.headers.get("ETag", "")
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]+"', etag) else answer.headers.get("Last-Modified")


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _integer(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None


def _reason(error: Exception) -> str:
    """Return in a few words why a source failed: requests fills several lines about a dead network."""
    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, (requests.Timeout, ReadTimeoutError)):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "the certificate or the encryption of the connection is not valid"
    if isinstance(error, (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)):
        return "it redirects to an address that is not http or https"
    if isinstance(error, requests.TooManyRedirects):
        return "it redirects without end"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return "the connection broke off"
