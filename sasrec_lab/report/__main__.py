"""The command `python -m sasrec_lab.report`."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from sasrec_lab.errors import InputError, did_you_mean
from sasrec_lab.files import atomic_write, tolerate_closed_pipe
from sasrec_lab.report import formats, runs, tables

_HELP = """\
Runs that differ only in the seed are one row: mean, standard deviation, n; beside the published value, and tested
against a baseline row. Runs of different protocols share no table.

  python -m sasrec_lab.report outputs/ml_100k/<time>                 a run, or a sweep: the table
  python -m sasrec_lab.report outputs/a outputs/b --html report.html one page with figures, to look at or to send
  python -m sasrec_lab.report outputs/a --baseline model.dim=50 --metric test/mrr --csv all.csv
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def entry() -> None:
    """Print the table, write what was asked for; a mistake is one line."""
    try:
        args = _parse(sys.argv[1:])
        found = runs.find(args.folders)
        report = tables.build(found, args.metric, args.baseline)
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may have no `±`
        with tolerate_closed_pipe():
            print(formats.terminal(report))
        if not report.parts:
            raise InputError("no run has finished, so there is no table")
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
        sys.exit(f"error: {error.filename or args.figures}: {error.strerror}; choose another place for it")
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="sasrec-report",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, sweeps, or folders above them")
    parser.add_argument(
        "--metric", action="append", default=[], help="a table for it; may be repeated, the first is drawn"
    )
    parser.add_argument("--baseline", metavar="ROW", help="the row to test the others against (without it: default)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="the tables, for \\input")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every metric in full precision")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with tables and figures")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="each figure as PNG and PDF")
    options = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            raise InputError(f"unknown option {option}{did_you_mean(option, options) or '; --help lists them'}")
    return parser.parse_args(words)


def _draw(report: tables.Report, html: Path | None, folder: Path | None) -> None:
    from sasrec_lab.report import figures, page

    drawn = figures.draw(report)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in drawn:
            figure.save(folder)
    if html:
        _write(html, page.html(report, drawn))


def _write(path: Path, text: str) -> None:
    """Whole or not at all; what is no plain file, such as /dev/stdout, is written to as it stands there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_plain = not path.is_symlink() and (path.is_file() or not path.exists())
        with atomic_write(path) if is_plain else nullcontext(path) as place:
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another place for it") from error


if __name__ == "__main__":
    entry()
