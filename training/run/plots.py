"""Plots as SVG files, without a plotting library: grouped bars and lines, each with axes, a legend and spreads.

Same arguments, same bytes. The picture brings its own light ground, so that it reads on a dark page as well, and the
colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from clipmill.base.atomic_file import write_text

Value = float | tuple[float, float]  # a number, or a mean and its spread: drawn as mean ± spread
Point = tuple[float, float] | tuple[float, float, float]  # x, y and perhaps the spread of y

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#5f6b77")
GROUND, INK, SOFT, GRID = "#ffffff", "#1f2933", "#52606d", "#e4e7eb"
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Helvetica, Arial, sans-serif"

WIDTH, HEIGHT = 760.0, 440.0
LEFT, RIGHT, BOTTOM = 68.0, 24.0, 58.0
TITLE_Y, LEGEND_Y, LEGEND_ROW, LABEL_LINE = 34.0, 60.0, 20.0, 16.0
CHARACTER = 6.7  # generous width of one of 12 pixels: text is not measured here


def bars(
    path: str | Path,
    title: str,
    groups: Mapping[str, Mapping[str, Value]],
    *,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    mark_label: str = "chance",
    label: Callable[[float], str] = "{:.3g}".format,
    top: float | None = None,
) -> Path:
    """Writes bars that stand on zero: {group: {series: value}}, the series in the order in which they first appear.

    A group's name is broken between words where it is wider than its bars.
    marks  a level for some of the groups, drawn as a dashed line across their bars (`mark_label` in the legend)
    label  the text above a bar
    top    where the y axis ends; None: above everything. A spread may reach beyond it
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    keys = [_Key(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)]
    keys += [_Key(mark_label, INK, dashed=True)] if marks else []
    pairs = [_pair(value) for group in groups.values() for value in group.values()]
    levels = [0.0, *(marks or {}).values(), *(value + sign * spread for value, spread in pairs for sign in (-1, 1))]
    labels = [textwrap.wrap(name, int((WIDTH - LEFT - RIGHT) / len(groups) / CHARACTER)) for name in groups]
    bottom = 26 + LABEL_LINE * max(map(len, labels))
    highest = max(levels) if top is None else top
    frame = _Frame(_legend_rows(keys) + (top is not None), 0, len(groups), min(levels), highest, bottom=bottom)
    parts = [*_y_axis(frame, y_label), *_legend(keys)]
    for position, (name, group) in enumerate(groups.items()):
        for row, line in enumerate(labels[position]):
            parts.append(_text(frame.x(position + 0.5), frame.bottom + 20 + row * LABEL_LINE, line))
        parts += _bar_group(frame, position, group, series, label)
        if marks and name in marks:
            y = frame.y(marks[name])
            parts.append(_line(frame.x(position + 0.05), y, frame.x(position + 0.95), y, INK, 1.5, dash="5 4"))
    return _write(path, title, parts)


def lines(
    path: str | Path,
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Path:
    """Writes a line per series, a dot per point where there are few; a spread becomes a band around its line.

    from_zero  the y axis begins at 0      log_x  the x axis is logarithmic (all x above 0)
    marks      named levels, drawn as dashed lines from side to side
    """
    keys = [_Key(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)]
    mark_keys = [_Key(name, INK if i == 0 else SOFT, dashed=True) for i, name in enumerate(marks or {})]
    points = [_triple(point) for line in series.values() for point in line]
    assert points, f"nothing to draw in {title!r}"
    xs = [x for x, _, _ in points]
    ys = [y + sign * spread for _, y, spread in points for sign in (-1, 1)] + list((marks or {}).values())
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    frame = _Frame(_legend_rows(keys + mark_keys), min(xs), max(xs), low, high, log_x=log_x)
    parts = [*_y_axis(frame, y_label), *_x_axis(frame, x_label), *_legend(keys + mark_keys)]
    for key, level in zip(mark_keys, (marks or {}).values(), strict=True):
        parts.append(_line(LEFT, frame.y(level), WIDTH - RIGHT, frame.y(level), key.colour, 1.5, dash="5 4"))
    for key, line in zip(keys, series.values(), strict=True):
        parts += _curve(frame, key.colour, sorted(_triple(point) for point in line))
    return _write(path, title, parts)


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round numbers (1, 2 or 5 times a power of ten) from at most `low` to at least `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


# --- Where things go


@dataclass(frozen=True)
class _Key:
    """An entry of the legend."""

    name: str
    colour: str
    dashed: bool = False


class _Frame:
    """From values to pixels. The y axis is widened to round numbers, the x axis is as wide as the data."""

    def __init__(
        self,
        num_rows: int,
        x_low: float,
        x_high: float,
        y_low: float,
        y_high: float,
        log_x: bool = False,
        bottom: float = BOTTOM,
    ):
        self.top, self.bottom = LEGEND_Y + num_rows * LEGEND_ROW, HEIGHT - bottom
        self.y_ticks = ticks(y_low, y_high)
        self.log_x = log_x
        x_high = x_high if x_high > x_low else x_low + (abs(x_low) or 1.0)
        self.x_low, self.x_high = x_low, x_high
        self.x_ticks = self._log_ticks() if log_x else [t for t in ticks(x_low, x_high, 8) if x_low <= t <= x_high]

    def x(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log_x else v for v in (self.x_low, self.x_high, value))
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.x_low)), math.ceil(math.log10(self.x_high)) + 1)
        steps = (1, 2, 5) if len(decades) < 5 else (1,)
        candidates = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in candidates if self.x_low * 0.999 <= tick <= self.x_high * 1.001]


# --- Parts of a picture


def _bar_group(
    frame: _Frame, position: int, group: Mapping[str, Value], series: list[str], label: Callable[[float], str]
) -> list[str]:
    parts, slot = [], 0.8 / len(series)
    for number, name in enumerate(series):
        if name not in group:
            continue
        value, spread = _pair(group[name])
        left, right = (frame.x(position + 0.1 + slot * (number + side)) for side in (0.06, 0.94))
        middle, top, bottom = (left + right) / 2, frame.y(max(value, 0)), frame.y(min(value, 0))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_shape("rect", x=left, y=top, width=right - left, height=bottom - top, fill=colour))
        if spread:
            parts.append(_line(middle, frame.y(value - spread), middle, frame.y(value + spread), INK, 1.5))
        parts.append(_text(middle, frame.y(max(value + spread, 0)) - 6, label(value), size=11))
    return parts


def _curve(frame: _Frame, colour: str, points: list[tuple[float, float, float]]) -> list[str]:
    middle = [(frame.x(x), frame.y(y)) for x, y, _ in points]
    upper = [(frame.x(x), frame.y(y + spread)) for x, y, spread in points]
    lower = [(frame.x(x), frame.y(y - spread)) for x, y, spread in reversed(points)]
    parts = []
    if any(spread for _, _, spread in points):
        parts.append(_shape("polygon", points=_path(upper + lower), fill=colour, fill_opacity=0.16))
    parts.append(_shape("polyline", points=_path(middle), fill="none", stroke=colour, stroke_width=2))
    if len(points) <= 30:
        parts += [_shape("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in middle]
    return parts


def _y_axis(frame: _Frame, label: str) -> list[str]:
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, SOFT if tick in (0, frame.y_ticks[0]) else GRID, 1))
        parts.append(_text(LEFT - 8, y + 4, _number(tick), anchor="end", size=12, colour=SOFT))
    middle = (frame.top + frame.bottom) / 2
    return [*parts, _text(18, middle, label, size=12, colour=SOFT, turned=True)]


def _x_axis(frame: _Frame, label: str) -> list[str]:
    parts = []
    for tick in frame.x_ticks:
        x = frame.x(tick)
        parts.append(_line(x, frame.bottom, x, frame.bottom + 5, SOFT, 1))
        parts.append(_text(x, frame.bottom + 20, _number(tick), size=12, colour=SOFT))
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, label, size=12, colour=SOFT)]


def _legend_places(keys: list[_Key]) -> list[tuple[_Key, float, int]]:
    """(entry, x, row): from left to right, a new row where the next would leave the picture."""
    places, x, row = [], LEFT, 0
    for key in keys:
        width = 34 + CHARACTER * len(key.name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, row = LEFT, row + 1
        places.append((key, x, row))
        x += width
    return places


def _legend_rows(keys: list[_Key]) -> int:
    return 1 + max((row for _, _, row in _legend_places(keys)), default=0)


def _legend(keys: list[_Key]) -> list[str]:
    parts = []
    for key, x, row in _legend_places(keys):
        y = LEGEND_Y + row * LEGEND_ROW
        if key.dashed:
            parts.append(_line(x, y - 4, x + 16, y - 4, key.colour, 1.5, dash="5 4"))
        else:
            parts.append(_shape("rect", x=x, y=y - 10, width=12, height=12, rx=2, fill=key.colour))
        parts.append(_text(x + (22 if key.dashed else 18), y, key.name, anchor="start", size=12))
    return parts


# --- SVG


def _write(path: str | Path, title: str, parts: list[str]) -> Path:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}" '
        f'height="{HEIGHT:g}" role="img" aria-label={quoteattr(title)} font-family="{FONT}">'
    )
    ground = _shape("rect", x=0, y=0, width=WIDTH, height=HEIGHT, rx=8, fill=GROUND)
    heading = _text(LEFT, TITLE_Y, title, anchor="start", size=16, weight=600)
    write_text(path, "\n".join([head, ground, heading, *parts, "</svg>", ""]))
    return Path(path)


def _text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "middle",
    size: int = 12,
    colour: str = INK,
    weight: int = 400,
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {_short(x)} {_short(y)})"' if turned else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return (
        f'<text x="{_short(x)}" y="{_short(y)}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{bold}{turn}>'
        f"{escape(content)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dash: str | None = None) -> str:
    extra = {"stroke_dasharray": dash} if dash else {}
    return _shape("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, **extra)


def _shape(name: str, **attributes: float | str) -> str:
    texts = {key: value if isinstance(value, str) else _short(value) for key, value in attributes.items()}
    return f"<{name} " + " ".join(f'{key.replace("_", "-")}="{text}"' for key, text in texts.items()) + "/>"


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{_short(x)},{_short(y)}" for x, y in points)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _pair(value: Value) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, 0.0)


def _triple(point: Point) -> tuple[float, float, float]:
    return point if len(point) == 3 else (*point, 0.0)
