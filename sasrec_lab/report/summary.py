"""Short comparison of a sweep's rows, printed as the sweep ends."""

from pathlib import Path

from sasrec_lab.errors import InputError
from sasrec_lab.report.contents import build_report
from sasrec_lab.report.formats import format_overrides, plain_table
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.tables import short_table

_MAX_ROWS = 10


def compare_jobs(sweep: Path) -> str:
    """Return a table per protocol with the rows of a sweep, best on validation first; empty if no job has finished."""
    try:
        parts = build_report(find_runs([sweep]), [], None, with_tests=False).parts
    except InputError:  # no job has started
        return ""
    shared = [part.comparison.shared for part in parts]
    each = [short_table(part, _MAX_ROWS, _differing(part.comparison.shared, shared)) for part in parts]
    tables = [table for table in each if table]
    return "\n".join(f"\n{plain_table(table)}" for table in tables)


def _differing(overrides: dict[str, str], of_all: list[dict[str, str]]) -> str:
    """Return the overrides that not all protocols have, without the data set, which a title names anyway."""
    return format_overrides(
        {
            key: value
            for key, value in overrides.items()
            if key != "dataset" and any(each.get(key) != value for each in of_all)
        }
    )
