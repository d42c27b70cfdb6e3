"""Short comparison of a sweep's rows, printed as the sweep ends."""

from pathlib import Path

from sasrec_lab.errors import InputError
from sasrec_lab.report.formats import plain_table
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.tables import build_report, short_table

_MAX_ROWS = 10


def compare_jobs(sweep: Path) -> str:
    """Return a table per protocol with the rows of a sweep, best on validation first; empty if no job has finished."""
    try:
        parts = build_report(find_runs([sweep]), [], None, with_tests=False).parts
    except InputError:  # no job has started
        return ""
    tables = [table for part in parts if (table := short_table(part, _MAX_ROWS))]
    return "\n".join(f"\n{plain_table(table)}" for table in tables)
