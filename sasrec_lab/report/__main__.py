"""The command `python -m sasrec_lab.report`."""

import io
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from sasrec_lab.config.arguments import Arguments
from sasrec_lab.errors import InputError
from sasrec_lab.files import atomic_write, tolerate_closed_pipe
from sasrec_lab.report import formats
from sasrec_lab.report.contents import Report, build_report
from sasrec_lab.report.runs import find_runs
from sasrec_lab.run import signals

_HELP = """\
Runs that differ only in their seed form one row (mean, std, n), next to the published value and tested against a
baseline row. Each protocol gets its own table.

  python -m sasrec_lab.report outputs/ml_100k/<time>                  print the table of a run or a sweep
  python -m sasrec_lab.report outputs/a outputs/b --html report.html  write one page with tables and figures
  python -m sasrec_lab.report outputs/a --baseline model.dim=50 --metric test/mrr --csv all.csv
"""


def entry() -> None:
    """Print the tables and write the requested files; an error is one line on stderr and exit status 1."""
    signals.exit_at_once()
    try:
        args = _parse(sys.argv[1:])
        found = find_runs(args.folders)
        report = build_report(found, args.metric, args.baseline, best_by=args.best_by)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # some encodings have no `±`
        with tolerate_closed_pipe():
            print(formats.plain_text(report))
        if not report.parts:
            raise InputError("no run has finished; finish one to get a table")
        signals.raise_exit()  # from here on drafts may have to be removed
        for path, text in (
            (args.markdown, formats.markdown),
            (args.csv, formats.csv_text),
            (args.latex, formats.latex),
        ):
            if path:
                _write(path, text(report))
        if args.html or args.figures:
            _draw(report, args.html, args.figures)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or args.figures}: {error.strerror}; choose another path")
    finally:
        signals.expect_exit()


def _parse(words: list[str]) -> Namespace:
    """Parse the command line; an unknown option is an InputError that names the nearest one."""
    parser = Arguments("sasrec-report", _HELP)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run, a sweep, or a folder that contains some"
    )
    parser.add_argument(
        "--metric", action="append", default=[], help="metric to tabulate; repeatable, figures use the first"
    )
    parser.add_argument(
        "--baseline", metavar="ROW", help="row to test the others against (without it: default, or the first of two)"
    )
    parser.add_argument(
        "--best-by",
        metavar="METRIC",
        help="validation metric that marks the best row (without it: the one that chose the checkpoints)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write the tables, for \\input")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every metric in full precision")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and figures")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write each figure as PNG and PDF")
    return parser.parse(words)


def _draw(report: Report, html: Path | None, folder: Path | None) -> None:
    """Draw the figures, and write them to a folder, to an HTML page, or both."""
    from sasrec_lab.report.figures import draw_figures
    from sasrec_lab.report.page import html_page

    figures = draw_figures(report)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            figure.save(folder)
    if html:
        _write(html, html_page(report, figures))


def _write(path: Path, text: str) -> None:
    """Write a file atomically; what is not a regular file, such as /dev/stdout, is written to directly."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_regular = not path.is_symlink() and (path.is_file() or not path.exists())
        with atomic_write(path) if is_regular else nullcontext(path) as target:
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another path") from error


if __name__ == "__main__":
    entry()
