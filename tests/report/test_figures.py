"""Content of figures: popularity, seeds, marks, titles, and axes of one size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from written_runs import PUBLISHED, write_run

from sasrec_lab.report.contents import build_report
from sasrec_lab.report.figures import Figure, draw_figures
from sasrec_lab.report.runs import find_runs


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
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_short_log_scale_has_several_ticks(tmp_path):
    for number, seconds in enumerate((2.4, 2.8, 43.0)):
        write_run(tmp_path / str(number), f"loss={number}x", config={"number": number}, seconds={"fit": seconds})
    axes = drawn(tmp_path)["time"].canvas.axes[0]
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == pytest.approx([5, 10, 20])


def test_a_long_line_has_published_values_and_a_log_scale(tmp_path):
    cells = {f"model.dim={dim}": {"test/ndcg@10": dim / 100} for dim in (4, 32)}
    for dim in (4, 8, 32):
        published = {"published": PUBLISHED | {"cells": cells}}
        write_run(tmp_path / str(dim), f"model.dim={dim}", config=published | {"model": {"dim": dim}})
    axes = drawn(tmp_path)["by-model.dim"].canvas.axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "published"]
    assert list(zip(*line.get_data(), strict=True)) == [(4, 0.04), (32, 0.32)]
    assert (axes.get_xscale(), list(axes.get_xticks())) == ("log", [4, 8, 32])


def test_a_heat_map_has_a_box_around_the_row_best_on_validation(tmp_path):
    for number, (dim, maxlen) in enumerate([(4, 5), (4, 9), (8, 5), (8, 9)]):
        run = write_run(tmp_path / str(number), f"model.dim={dim}", f"model.maxlen={maxlen}", ndcg=0.1 * number)
        results = json.loads((run / "metrics.json").read_text())
        results["metrics"]["val/ndcg@10"] = 0.9 if number == 1 else 0.1
        (run / "metrics.json").write_text(json.dumps(results))
    axes = drawn(tmp_path)["by-model.dim-model.maxlen"].canvas.axes[0]
    (box,) = axes.patches
    assert (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2) == pytest.approx((1, 0))


def test_bars_of_many_rows_are_the_best_and_the_baseline(tmp_path):
    for number in range(40):
        run = write_run(tmp_path / str(number), f"loss={number}x", ndcg=0.01 * number, config={"number": number})
        results = json.loads((run / "metrics.json").read_text())
        results["metrics"]["val/ndcg@10"] = 0.5 - 0.01 * number
        (run / "metrics.json").write_text(json.dumps(results))
    names = [label.get_text() for label in drawn(tmp_path, "loss=39x")["rows"].canvas.axes[0].get_yticklabels()]
    assert names[0] == "loss=39x"
    assert [name.partition("\n")[0] for name in names[1:31]] == [f"loss={number}x" for number in range(30)]
    assert names[31:] == ["popularity"]


def write_curves(folder: Path, rows: int, seeds: int) -> None:
    """Write rows with learning curves: that of row r and seed s has the value r + s + epoch."""
    from torch.utils.tensorboard import SummaryWriter

    for row in range(rows):
        for seed in range(seeds):
            run = write_run(folder / f"{row}-{seed}", f"loss={row}x", seed=seed, config={"row_number": row})
            with SummaryWriter(str(run / "tb")) as writer:
                for epoch in range(3):
                    writer.add_scalar("val/ndcg@10", row + seed + epoch, epoch + 1)


def test_few_learning_curves_share_a_frame_with_seeds_and_band(tmp_path):
    write_curves(tmp_path, rows=2, seeds=3)
    (axes,) = drawn(tmp_path)["curves"].canvas.axes
    lines = [line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
    assert lines[0] == [1, 2, 3]  # the mean of row 0, then its seeds
    assert lines[1:4] == [[seed, seed + 1, seed + 2] for seed in range(3)]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]  # epochs count from 1
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 4)  # mean ± std, which is 1


def test_many_learning_curves_have_a_frame_each(tmp_path):
    write_curves(tmp_path, rows=5, seeds=1)
    frames = drawn(tmp_path)["curves"].canvas.axes
    assert [frame.get_title(loc="left") for frame in frames] == [f"loss={row}x" for row in range(5)]
    for row, frame in enumerate(frames):
        assert frame.lines[0].get_ydata().tolist() == [row, row + 1, row + 2]
        (behind,) = frame.collections
        assert len(behind.get_segments()) == 5
