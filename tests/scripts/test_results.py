"""docs/results/ and the pages that scripts/render_results.py writes from it."""

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import render_results

ROOT = Path(__file__).resolve().parents[2]
STAMP = {"measured", "commit", "dirty", "machine", "threads", "versions", "command", "note", "rows"}
FILES = sorted((ROOT / "docs/results").glob("*.json"))
DATA = {
    "measured": "2026-11-25",
    "commit": "dfbe3ed1c296d750306d8bea4d66cd04084eb661",
    "dirty": False,
    "machine": {"cpu": "AMD EPYC", "cores": 2},
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "command": "make it",
    "note": "on a busy machine",
    "rows": [
        {"implementation": "fast", "ndcg": {"mean": 0.1758, "std": 0.0012, "n": 3}, "recall": 0.3},
        {"implementation": "reference", "ndcg": {"mean": 0.5, "std": None, "n": 2}, "recall": None, "note": "a note"},
    ],
}
PAGE = """Before.

<!-- results:reference -->
old
<!-- /results -->

<!-- result:reference/fast/ndcg/mean -->0.9<!-- /result --> of <!-- result:reference/fast/ndcg -->1<!-- /result -->
"""
RENDERED = """Before.

<!-- results:reference -->

| implementation | NDCG@10 | recall@10 | remarks |
|---|---|---|---|
| fast | 0.1758 ± 0.0012 (3) | 0.3000 |  |
| reference | 0.5000 (2) |  | a note |

*Mean ± standard deviation (number of seeds). Measured 2026-11-25 at dfbe3ed on AMD EPYC, 2 cores, 1 thread, torch 2.13.0: `make it`. On a busy machine.*

<!-- /results -->

<!-- result:reference/fast/ndcg/mean -->0.1758<!-- /result --> of <!-- result:reference/fast/ndcg -->0.1758 ± 0.0012 (3)<!-- /result -->
"""  # noqa: E501


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/reference.json").write_text(json.dumps(DATA))
    (tmp_path / "docs/page.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("no table\n")
    return tmp_path


def test_tables_and_numbers_are_written_from_the_data(project):
    names = ["reference", "reference/fast/ndcg/mean", "reference/fast/ndcg"]
    stale = [f"docs/page.md: {name} differs from its data" for name in names]
    assert render_results.render(project, write=False) == stale
    assert (project / "docs/page.md").read_text() == PAGE
    assert render_results.render(project, write=True) == stale
    assert (project / "docs/page.md").read_text() == RENDERED
    assert render_results.render(project, write=False) == []


def test_unknown_fields_are_omitted_from_the_caption():
    stamp = {"measured": "2026-11-25", "commit": None, "machine": None, "threads": None, "versions": None}
    stamp |= {"command": None, "note": None}
    assert render_results.caption(stamp, "Measured", seeds=False) == "*Measured 2026-11-25.*"
    stamp |= {"commit": 40 * "a", "dirty": True, "threads": 2}
    measured = "2026-11-25 at aaaaaaa with local changes, 2 threads"
    assert render_results.caption(stamp, "Measured", seeds=False) == f"*Measured {measured}.*"


def test_rows_with_dates_of_their_own_are_told_from_the_others(project):
    date = {"measured": "2026-11-26"}
    for second, heading, caption in (({}, "remarks", "Rows without a date: measured"), (date, "measured", "On a busy")):
        rows = [row | own for row, own in zip(DATA["rows"], (date, second), strict=True)]
        (project / "docs/results/reference.json").write_text(json.dumps(DATA | {"rows": rows}))
        render_results.render(project, write=True)
        page = (project / "docs/page.md").read_text()
        assert f"| recall@10 | {heading} |" in page
        assert f"*Mean ± standard deviation (number of seeds). {caption}" in page


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        ("<!-- results:refrence -->\n<!-- /results -->", "results:refrence is not a table; use one of "),
        ("<!-- result:reference/slow/ndcg --><!-- /result -->", "result:reference/slow/ndcg has no row"),
        ("<!-- result:reference/fast/x --><!-- /result -->", "result:reference/fast/x must be TABLE/WORD/.../FIELD"),
    ],
)
def test_a_marker_without_data_names_its_page(project, marker, error):
    (project / "docs/page.md").write_text(marker)
    with pytest.raises(render_results.PageError, match=f"docs/page.md: {re.escape(error)}"):
        render_results.render(project, write=True)


def test_ablations_show_their_change_against_the_default(project):
    cells = [("default", 0.5, 0.4), ("blocks_0", 0.4, 0.44)]
    rows = [
        {"data": "x", "row": row, "ndcg": {"mean": ours, "std": None, "n": 1}, "published": published}
        for row, ours, published in cells
    ]
    (project / "docs/results/paper_table4.json").write_text(json.dumps(DATA | {"rows": rows}))
    lines = render_results.block("paper_table4", project / "docs/results").splitlines()
    assert lines[3:5] == [
        "| x | `default` | 0.5000 (1) |  | 0.4000 |  |",
        "|  | `blocks_0` | 0.4000 (1) | -20 % | 0.4400 | +10 % |",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_results_file_is_stamped(file):
    data = json.loads(file.read_text())
    assert set(data) == STAMP
    for stamp in [data, *data["rows"]]:
        if "measured" in stamp:
            assert date.fromisoformat(stamp["measured"]).year >= 2026
            assert re.fullmatch("[0-9a-f]{40}", stamp["commit"])
        if stamp.get("machine"):
            assert set(stamp["machine"]) == {"cpu", "cores"}
    assert data["rows"]
    assert not data["dirty"], "results of uncommitted code are not published"


def test_every_table_can_be_rendered_and_uses_its_file():
    for name in render_results.TABLES:
        assert render_results.block(name, ROOT / "docs/results").count("\n|") > 2, name
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    printed = set(re.findall(r"<!-- results:(\w+)_output -->", pages))
    assert {file for file, _, _ in render_results.TABLES.values()} | printed == {file.stem for file in FILES}


def test_faults_are_survived_and_their_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for row in json.loads((ROOT / "docs/results/reliability.json").read_text())["rows"]:
        assert row["tried"] == row["survived"] > 0, row["fault"]
        if target := re.fullmatch(r"make (\w+)", row["command"]):
            assert re.search(rf"^{target[1]}:", makefile, re.M), row["command"]
        else:
            file, *names = row["command"].split("::")
            source = (ROOT / file).read_text()
            assert all(re.search(rf"^def {name}\(", source, re.M) for name in names), row["command"]


def test_the_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/render_results.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
