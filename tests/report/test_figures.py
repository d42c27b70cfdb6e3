"""Content of figures: popularity, seeds, marks, titles, and axes of one size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from written_runs import write_run

from sasrec_lab.report.figures import Figure, draw_figures
from sasrec_lab.report.runs import find_runs
from sasrec_lab.report.tables import build_report


def write_rows(folder: Path, seeds: int, *overrides: str, users: int = 100) -> None:
    """Write two rows of some seeds; the second is better than the first, on validation and for every user."""
    for seed in range(seeds):
        for number, row in enumerate(overrides):
            run = write_run(
                folder / f"{number}-{seed}",
                row,
                seed=seed,
                ndcg=0.2 * (number + 1) + 0.01 * seed,
                ranks=[9 - number] * users,
                users=list(range(users)),
                config={"number": number},
            )
            results = json.loads((run / "metrics.json").read_text())
            results["metrics"]["val/ndcg@10"] = 0.1 * (number + 1)
            (run / "metrics.json").write_text(json.dumps(results))


def drawn(folder: Path, baseline: str | None = None) -> dict[str, Figure]:
    """Return the figures of a folder by name."""
    return {figure.name: figure for figure in draw_figures(build_report(find_runs([folder]), [], baseline))}


def texts(axes: Axes) -> list[str]:
    """Return all texts in and around the axes."""
    canvas = axes.get_figure()
    legends = [text.get_text() for legend in canvas.legends for text in legend.get_texts()]
    ticks = [label.get_text() for label in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    return [*legends, *ticks, *(text.get_text() for text in (*axes.texts, *canvas.texts))]


@pytest.mark.parametrize(
    ("words", "name"),
    [(("loss=bce", "loss=gbce"), "rows"), (("loss=bce", "loss=gbce"), "time"), (("a.b=1", "a.b=2"), "by-a.b")],
)
def test_figures_have_popularity_a_title_and_marks(tmp_path, words, name):
    write_rows(tmp_path, 2, *words)
    figure = drawn(tmp_path)[name]
    found = texts(figure.canvas.axes[0])
    assert any("popularity" in text for text in found)
    assert any("best on validation" in text for text in found)
    assert any("*" in text for text in found)
    title, details = (text.get_text() for text in figure.canvas.texts[-2:])
    assert title.startswith("small: test/ndcg@10")
    assert details.startswith("last item of 4 users; all 9 items except those already seen")
    assert f"differs from {words[0]} (p" in details.replace("\xa0", " ").replace("\n", " ")


@pytest.mark.parametrize(("seeds", "bands"), [(2, 0), (3, 1)])
def test_two_seeds_are_points_and_no_band(tmp_path, seeds, bands):
    write_rows(tmp_path, seeds, "a.b=1", "a.b=2")
    axes = drawn(tmp_path)["by-a.b"].canvas.axes[0]
    assert len(axes.collections) == bands
    points = [line for line in axes.lines if line.get_markersize() == 3]
    assert sorted(len(line.get_xdata()) for line in points) == [seeds, seeds]


def test_figures_that_share_a_line_have_axes_of_one_height(tmp_path):
    """Legends and titles may differ in height; they are outside of the axes."""
    write_rows(tmp_path / "few", 2, "loss=bce", "loss=gbce")
    write_rows(tmp_path / "line", 2, "a.b=1", "a.b=2")
    heights = []
    for folder, name in (("few", "rows"), ("few", "time"), ("line", "by-a.b")):
        figure = drawn(tmp_path / folder)[name]
        figure.svg()  # lays the figure out
        heights.append(figure.canvas.axes[0].get_position().height * figure.canvas.get_figheight())
    assert max(heights) / min(heights) < 1.1


def test_bars_of_two_seeds_have_no_error_bar(tmp_path):
    write_rows(tmp_path / "two", 2, "loss=bce", "loss=gbce")
    write_rows(tmp_path / "three", 3, "loss=bce", "loss=gbce")
    assert "std over seeds" not in texts(drawn(tmp_path / "two")["rows"].canvas.axes[0])
    assert "std over seeds" in texts(drawn(tmp_path / "three")["rows"].canvas.axes[0])


def test_legends_do_not_change_the_size_of_axes(tmp_path):
    sizes = []
    for count in (2, 9):
        words = [f"loss={'very_long_name_' * (count - 2)}{number}" for number in range(count)]
        write_rows(tmp_path / str(count), 1, *words)
        figure = drawn(tmp_path / str(count))["time"]
        figure.svg()  # lays the figure out
        box = figure.canvas.axes[0].get_position()
        sizes.append((box.width * figure.width, box.height * figure.canvas.get_figheight()))
    for one, other in zip(*sizes, strict=True):
        assert one == pytest.approx(other, rel=0.05)


def test_named_rows_are_the_best_on_validation(tmp_path):
    """Eight rows have a color besides the baseline; test results do not choose them."""
    for number in range(12):
        run = write_run(tmp_path / str(number), f"loss={number}x", ndcg=0.01 * number, config={"number": number})
        results = json.loads((run / "metrics.json").read_text())
        results["metrics"]["val/ndcg@10"] = 0.5 - 0.01 * number
        (run / "metrics.json").write_text(json.dumps(results))
    found = texts(drawn(tmp_path)["time"].canvas.axes[0])
    assert any(text.startswith("loss=0x") for text in found)
    assert "loss=7x" in found
    assert "loss=11x" not in found
    assert "4 others" in found


def test_letters_that_a_font_lacks_are_no_warning(tmp_path):
    write_run(tmp_path / "runs/a", "loss=\U0001f600")
    write_run(tmp_path / "runs/b", "loss=$\\frac")
    words = [sys.executable, "-m", "sasrec_lab.report", "runs", "--figures", "figures"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_short_log_scale_has_several_ticks(tmp_path):
    for number, seconds in enumerate((2.4, 2.8, 43.0)):
        write_run(tmp_path / str(number), f"loss={number}x", config={"number": number}, seconds={"fit": seconds})
    axes = drawn(tmp_path)["time"].canvas.axes[0]
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == pytest.approx([5, 10, 20])
