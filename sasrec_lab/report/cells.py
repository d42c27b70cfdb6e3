"""Numbers as the cells of a report's tables show them."""

import math
from typing import Any

from sasrec_lab.report.rows import Spread
from sasrec_lab.report.significance import PairedTest

EMPTY_CELL = "-"
SIGNIFICANT = 0.05


def mean_and_std(spread: Spread) -> str:
    """Return `mean ± std`, or the mean only if there is one value."""
    return format_number(spread.mean) + (f" ± {spread.std:.4f}" if spread.std is not None else "")


def format_duration(seconds: float) -> str:
    """Return a duration as `9.9 s`, `m:ss` or `h:mm:ss`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def format_number(value: float | None) -> str:
    """Return a metric with four decimals."""
    return EMPTY_CELL if value is None or math.isnan(value) else f"{value:.4f}"


def format_difference(test: PairedTest | None) -> str:
    """Return the difference of a test with half its interval."""
    return f"{test.difference:+z.4f} ± {test.margin:.4f}" if test else EMPTY_CELL


def format_p(test: PairedTest | None) -> str:
    """Return the corrected p of a test with four decimals, after a star if it is significant."""
    if test is None:
        return EMPTY_CELL
    star = "* " * (test.p_holm <= SIGNIFICANT)
    return star + (f"{test.p_holm:.4f}" if test.p_holm >= 0.0001 else "<0.0001")


def format_signed(value: float | None) -> str:
    """Return a difference with its sign."""
    return EMPTY_CELL if value is None else f"{value:+z.4f}"


def format_value(key: str, value: Any) -> str:
    """Return a value of a protocol as text, a checksum shortened."""
    return value[:12] if key == "sha256" and value else EMPTY_CELL if value is None else str(value)
