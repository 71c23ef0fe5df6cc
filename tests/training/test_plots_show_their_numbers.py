"""The plots as SVG: well-formed, the same bytes each time, bars as high as their numbers, everything in the picture."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.run.plots import COLOURS, HEIGHT, WIDTH, bars, lines, ticks

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = {"R@1": {"start": 10.0, "after": (40.0, 3.0)}, "R@5 <&>": {"start": 30.0}, "change": {"after": -5.0}}


def elements(path: Path, name: str) -> list[dict[str, str]]:
    return [element.attrib for element in ET.parse(path).iter(SVG + name)]


def texts(path: Path) -> list[str]:
    return [element.text for element in ET.parse(path).iter(SVG + "text")]


def points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def test_bars_are_as_high_as_their_numbers(tmp_path: Path) -> None:
    path = bars(tmp_path / "b.svg", "Title", GROUPS, y_label="percent", marks={"R@1": 5.0})
    by_colour: dict[str, list[tuple[float, float]]] = {}
    for rect in elements(path, "rect"):
        if float(rect["width"]) > 12 and rect["fill"] in COLOURS:
            by_colour.setdefault(rect["fill"], []).append((float(rect["height"]), float(rect["y"])))
    (start_1, _), (start_5, _) = by_colour[COLOURS[0]]
    (after, _), (below, below_y) = by_colour[COLOURS[1]]
    assert start_5 / start_1 == pytest.approx(3, abs=0.01) and after / start_1 == pytest.approx(4, abs=0.01)
    assert below / start_1 == pytest.approx(0.5, abs=0.01)
    zero = next(float(rect["y"]) + start_1 for rect in elements(path, "rect") if rect["height"] == f"{start_1:g}")
    assert below_y == pytest.approx(zero, abs=0.02)  # a negative bar hangs from zero
    assert {"Title", "percent", "start", "after", "chance", "R@5 <&>", "40"} <= set(texts(path))


def test_long_names_of_groups_are_broken_between_words(tmp_path: Path) -> None:
    groups = {f"a name of some length, number {n}": {"x": float(n)} for n in range(7)}
    path = bars(tmp_path / "b.svg", "T", groups, y_label="y")
    named = [
        element for element in elements(path, "text") if element["font-size"] == "12" and "transform" not in element
    ]
    places = {element["x"] for element in named if element["text-anchor"] == "middle"}
    shown = [text for text in texts(path) if text in " ".join(groups) and text != "0"]
    assert len(places) == 7 and len(shown) > 7 and max(map(len, shown)) * 6.7 < WIDTH / 7
    lowest = max(float(text["y"]) for text in elements(path, "text"))
    assert lowest <= HEIGHT - 8


def test_the_same_plot_is_the_same_bytes_and_replaces_the_old_one(tmp_path: Path) -> None:
    first = bars(tmp_path / "b.svg", "T", GROUPS, y_label="y").read_bytes()
    assert bars(tmp_path / "b.svg", "T", GROUPS, y_label="y").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["b.svg"]


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_stay_inside_and_rise_where_their_numbers_rise(tmp_path: Path, log_x: bool) -> None:
    series = {"rising": [(1, 1.0, 0.5), (10, 2.0, 0.5), (1000, 9.0, 0.1)], "flat": [(1, 3.0), (1000, 3.0)]}
    path = lines(tmp_path / "l.svg", "T", series, x_label="clips", y_label="R@1", log_x=log_x, marks={"zero-shot": 0.2})
    rising, flat = (points(line["points"]) for line in elements(path, "polyline"))
    assert rising[0][1] > rising[1][1] > rising[2][1] and flat[0][1] == flat[1][1]
    if log_x:
        assert (rising[1][0] - rising[0][0]) * 2 == pytest.approx(rising[2][0] - rising[1][0], abs=0.02)
    [band] = (points(polygon["points"]) for polygon in elements(path, "polygon"))
    assert len(band) == 6
    for x, y in [*rising, *flat, *band]:
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    for text in elements(path, "text"):
        assert 0 <= float(text["x"]) <= WIDTH and 0 <= float(text["y"]) <= HEIGHT
    assert {"rising", "flat", "zero-shot", "clips", "R@1"} <= set(texts(path))


def test_a_single_point_and_equal_values_are_drawn(tmp_path: Path) -> None:
    for series in ({"one": [(5, 2.0)]}, {"same": [(1, 2.0), (2, 2.0)]}, {"nothing": [(0, 0.0), (1, 0.0)]}):
        path = lines(tmp_path / "l.svg", "T", series, x_label="x", y_label="y")
        for line in elements(path, "polyline"):
            assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(line["points"]))
    bars(tmp_path / "b.svg", "T", {"a": {"x": 0.0}}, y_label="y")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_reach_around_the_data(low: float, width: float) -> None:
    found = ticks(low, low + width)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-6 and found[-1] >= low + width - step * 1e-6
    assert 2 <= len(found) <= 8 and found == sorted(found)


def test_an_axis_ends_where_it_is_told(tmp_path: Path) -> None:
    groups = {"a": {"x": (98.0, 4.0)}}
    free, ended = (texts(bars(tmp_path / f"{top}.svg", "T", groups, y_label="y", top=top)) for top in (None, 100))
    assert "150" in free and "100" in ended and "150" not in ended
