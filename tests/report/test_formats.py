"""Escaping of texts from run folders in every format of the report."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written_runs import PUBLISHED, write_run

from sasrec_lab.report import formats
from sasrec_lab.report.contents import Report, build_report
from sasrec_lab.report.figures import draw_figures
from sasrec_lab.report.page import html_page
from sasrec_lab.report.runs import find_runs

HOSTILE = [
    '<script>alert(1)</script><img src=x onerror="alert(1)">',
    "[click](javascript:alert(1)) `code` *bold* | cell | $\\frac{1}$",
    "\\input{/etc/passwd} % # _ ^ ~ {a} & \\\\[1pt]",
    "\x1b[2J\x1b]0;title\x07\r\n\u202eevil\ud800",
    "=cmd|' /C calc'!A0",
]


@pytest.fixture
def hostile(tmp_path: Path) -> Report:
    """A report in which every text of the run folders is hostile."""
    everything = " ".join(HOSTILE)
    for number, text in enumerate([*HOSTILE, everything]):
        published = PUBLISHED | {
            "dataset": everything,
            "source": everything,
            "cells": {"default": {"test/ndcg@10": 0.3}, everything: {}},
        }
        folder = write_run(
            tmp_path / f"good{number}",
            f"loss.name={text}".replace("\ud800", ""),
            config={"published": published, "row": text, "n": number, "dataset": {"name": everything}},
            protocol={"dataset": everything, "seen_items": everything},
            git={"commit": f"{number}{everything}"},
            ranks=[1, 1, 1, number],
        )
        results = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(results | {"metrics": {"test/ndcg@10": 0.1 * number}}))
        failed = write_run(
            tmp_path / f"failed{number} {text[:20].replace('/', '').replace(chr(0), '')}".rstrip("\ud800")
        )
        (failed / "metrics.json").write_text(json.dumps({"status": "failed", "error": text}))
    found = find_runs([tmp_path])
    assert found.skipped == []
    report = build_report(found, [], None)
    assert len(report.parts[0].comparison.rows) == 6
    assert len(report.without_result["failed"]) == 6
    return report


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def test_plain_text_sends_no_control_characters(hostile):
    text = formats.plain_text(hostile)
    assert not CONTROL.search(text)
    assert r"\x1b[2J\x1b]0;title\x07\r\n\u202eevil\ud800" in text


class _Tags(HTMLParser):
    """Collects the tags of a page, and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}


def test_html_has_only_its_own_tags_and_attributes(hostile):
    figures = draw_figures(hostile)
    page = html_page(hostile, figures)
    found = _Tags()
    found.feed(page)
    own = "html meta title style body h1 h2 h3 p code ul li b div table tr th td figure img details summary"
    assert found.tags == set(own.split())
    allowed = {("html", "lang"), ("meta", "charset"), ("meta", "name"), ("meta", "content"), ("img", "alt")}
    allowed |= {("img", "style"), ("img", "src")} | {(tag, "class") for tag in ("ul", "li", "div", "tr", "figure")}
    assert found.attributes <= allowed
    assert not CONTROL.search(page)
    page.encode()


def test_figures_draw_hostile_text_as_it_is(hostile, tmp_path, recwarn):
    figures = draw_figures(hostile)
    for figure in figures:
        figure.save(tmp_path)
        assert "<script" not in figure.svg()
    assert {"rows", "time"} <= {figure.name for figure in figures}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("a|b", r"a\|b"),
        ("[a](javascript:b)", r"\[a\](javascript:b)"),
        ("`a` *b* ~~c~~ $d$", r"\`a\` \*b\* \~\~c\~\~ \$d\$"),
        ("no_norm _a_", r"no_norm \_a\_"),
        ("a\\|b", r"a\\\|b"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("a\n\nb", r"a\\n\\nb"),
    ],
)
def test_markdown_marks_are_escaped(text, escaped):
    assert formats._escape_markdown(text) == escaped


def test_markdown_cells_keep_their_minus():
    assert formats._escape_markdown("-0.5", starts_line=False) == "-0.5"


def test_markdown_tables_keep_their_columns(hostile):
    lines = [line for line in formats.markdown(hostile).splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines[:9]}
    assert len(counts) == 1


def test_latex_has_only_its_own_commands(hostile):
    text = formats.latex(hostile)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    own = "begin end caption label centering toprule midrule bottomrule par smallskip footnotesize linewidth pm"
    own += " textbackslash textasciicircum textasciitilde"
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= set(own.split())
    assert not re.search(r"\\\\\s*[\[*]", body)
    assert not re.search(r"(?<!\\)[%#&_](?! )", re.sub(r"\\(label|begin|end){[^}]*}", "", body).replace(" & ", " "))
    assert not CONTROL.search(text)


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1", "' =1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-1", "-1"),
        ("-0.5e-07", "-0.5e-07"),
        ("model.dim=8", "model.dim=8"),
        (-0.5, -0.5),
        (None, None),
    ],
)
def test_csv_guards_formulas_and_keeps_numbers(cell, written):
    assert formats._guard(cell) == written


def test_csv_of_negative_differences_has_numbers(tmp_path):
    write_run(tmp_path / "a", ranks=[1, 1, 1, 1], config={"published": PUBLISHED})
    write_run(tmp_path / "b", "model.dim=8", ranks=[5, 6, 7, 8])
    rows = list(csv.DictReader(formats.csv_text(build_report(find_runs([tmp_path]), [], None)).splitlines()))
    assert float(rows[0]["difference"]) == pytest.approx(-0.1)
    assert float(rows[2]["vs_baseline"]) < 0
