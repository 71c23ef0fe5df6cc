"""Plots have bars as high as their numbers, lines through their points, text in the picture, and stable bytes."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.run.plots import bars, lines, save

GROUPS = {"R@1": {"start": 10.0, "after": (40.0, 3.0)}, "R@5 <&> $x$": {"start": 30.0}, "change": {"after": -5.0}}


def texts(path: Path) -> set[str]:
    return {"".join(element.itertext()) for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")}


def assert_text_stays_inside(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    shown = [axes._left_title, axes.xaxis.label, axes.yaxis.label, *ticks]
    for text in [*shown, *axes.texts, *figure.legends[0].get_texts()]:
        box = text.get_window_extent(canvas.get_renderer())
        if text.get_text():
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_bars_are_as_high_as_their_numbers() -> None:
    figure = bars("Title", GROUPS, y_label="percent", marks={"R@1": 5.0})
    axes = figure.axes[0]
    start, after = axes.containers[0], axes.containers[1]
    assert [bar.get_height() for bar in start] == [10, 30] and [bar.get_height() for bar in after] == [40, -5]
    assert all(bar.get_y() == 0 for bar in [*start, *after]), "bars stand on zero, or hang from it"
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in after] == [0, 2], "each bar is in its own group"
    assert [text.get_text() for text in axes.texts] == ["10", "30", "40", "-5"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"start", "after", "chance"}


def test_names_and_numbers_are_text_in_the_file(tmp_path: Path) -> None:
    path = save(bars("Title", GROUPS, y_label="percent"), tmp_path / "b.svg")
    assert {"Title", "percent", "start", "after", "40", "R@5 <&> $x$"} <= texts(path)


def test_long_names_of_groups_are_broken_between_words() -> None:
    groups = {f"a name of some length, number {n}": {"x": float(n)} for n in range(7)}
    figure = bars("T", groups, y_label="y")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [label.replace("\n", " ") for label in labels] == list(groups) and all("\n" in label for label in labels)
    assert_text_stays_inside(figure)


def test_the_same_plot_is_the_same_bytes_and_replaces_the_old_one(tmp_path: Path) -> None:
    first = save(bars("T", GROUPS, y_label="y"), tmp_path / "b.svg").read_bytes()
    assert save(bars("T", GROUPS, y_label="y"), tmp_path / "b.svg").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["b.svg"]


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_go_through_their_points(log_x: bool) -> None:
    series = {"rising": [(1000, 9.0, 0.1), (1, 1.0, 0.5), (10, 2.0, 0.5)], "flat": [(1, 3.0), (1000, 3.0)]}
    figure = lines("T", series, x_label="clips", y_label="R@1", log_x=log_x, marks={"zero-shot": 0.2})
    axes = figure.axes[0]
    drawn = {line.get_label(): [list(map(float, data)) for data in line.get_data()] for line in axes.lines}
    assert drawn["rising"] == [[1, 10, 1000], [1, 2, 9]] and drawn["flat"] == [[1, 1000], [3, 3]]
    assert set(drawn["zero-shot"][1]) == {0.2}
    [band] = axes.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((0.5, 9.1))
    assert axes.get_xscale() == ("log" if log_x else "linear")
    assert_text_stays_inside(figure)


def test_a_single_point_and_equal_values_are_drawn(tmp_path: Path) -> None:
    for series in ({"one": [(5, 2.0)]}, {"same": [(1, 2.0), (2, 2.0)]}, {"nothing": [(0, 0.0), (1, 0.0)]}):
        save(lines("T", series, x_label="x", y_label="y", from_zero=True), tmp_path / "l.svg")
    save(bars("T", {"a": {"x": 0.0}}, y_label="y"), tmp_path / "b.svg")


def test_an_axis_ends_where_it_should() -> None:
    groups = {"a": {"x": (98.0, 4.0)}}
    free, ended = (bars("T", groups, y_label="y", top=top).axes[0].get_ylim()[1] for top in (None, 100))
    assert free > 102 and ended == 100
