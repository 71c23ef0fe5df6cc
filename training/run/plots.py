"""Draw the plots of runs, evaluations, the demo and the studies with matplotlib.

`bars` and `lines` return a Figure; `save` writes it as an SVG. The same figure gives the same bytes. The colours are
those of Okabe and Ito, which are distinct for people with any colour vision.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from clipmill.base.atomic_file import atomic_file

Value = float | tuple[float, float]  # a number, or a mean and its spread: drawn as mean ± spread
Point = tuple[float, float] | tuple[float, float, float]  # x, y, and optionally the spread of y

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#5f6b77")
INK, SOFT, GRID = "#1f2933", "#52606d", "#e4e7eb"
SIZE = (7.6, 4.4)  # inches, at matplotlib's 72 points an inch in SVG
LINE_LENGTH = 84  # characters that fit side by side below the x axis
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: searchable, and independent of the fonts of this machine
    "svg.hashsalt": "clipmill",  # element ids, and so the file's bytes, are the same every time
    "text.parse_math": False,  # "$" in a name stays a dollar sign
}


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, Value]],
    *,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    label: Callable[[float], str] = "{:.3g}".format,
    top: float | None = None,
) -> Figure:
    """Draw {group: {series: value}} as bars from zero, series in the order of first appearance.

    marks  chance levels of some groups, drawn as dashed lines across their bars
    label  formats the number above a bar
    top    upper end of the y axis; None: above all bars
    """
    figure, axes = _figure(title, y_label)
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(series)
    with matplotlib.rc_context(STYLE):
        for number, name in enumerate(series):
            values = {place: group[name] for place, group in enumerate(groups.values()) if name in group}
            pairs = [value if isinstance(value, tuple) else (value, 0.0) for value in values.values()]
            xs = [place - 0.4 + width * (number + 0.5) for place in values]
            heights, spreads = zip(*pairs, strict=True)
            axes.bar(xs, heights, 0.88 * width, color=COLOURS[number % len(COLOURS)], label=name, zorder=2)
            if any(spreads):
                axes.errorbar(xs, heights, spreads, fmt="none", ecolor=INK, elinewidth=1.2, zorder=3)
            for x, height, spread in zip(xs, heights, spreads, strict=True):
                axes.annotate(
                    label(height),
                    (x, max(height + spread, 0)),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    annotation_clip=False,
                    fontsize=8,
                    color=INK,
                )
        for place, name in enumerate(groups):
            if marks and name in marks:
                axes.hlines(marks[name], place - 0.45, place + 0.45, INK, "dashed", lw=1.2, zorder=3)
        if marks:
            axes.plot([], [], color=INK, ls="dashed", lw=1.2, label="chance")
        wrapped = ["\n".join(textwrap.wrap(name, max(8, LINE_LENGTH // len(groups)))) for name in groups]
        axes.set_xticks(range(len(groups)), wrapped)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.axhline(0, color=SOFT, lw=0.8, zorder=3)
        axes.margins(y=0.1)
        if top is not None:
            axes.set_ylim(top=top)
        _legend(figure)
    return figure


def lines(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a line per series, with dots if it has few points, and with a band for the spread.

    from_zero  start the y axis at 0
    log_x      use a logarithmic x axis
    marks      named levels, drawn as dashed horizontal lines
    """
    assert any(series.values()), f"nothing to draw in {title!r}"
    figure, axes = _figure(title, y_label)
    with matplotlib.rc_context(STYLE):
        for number, (name, points) in enumerate(series.items()):
            colour = COLOURS[number % len(COLOURS)]
            xs, ys, spreads = zip(*sorted((*point, 0.0)[:3] for point in points), strict=True)
            axes.plot(xs, ys, color=colour, lw=1.6, marker="o" if len(xs) <= 30 else "", ms=4, label=name, zorder=3)
            if any(spreads):
                low, high = zip(*((y - spread, y + spread) for y, spread in zip(ys, spreads, strict=True)), strict=True)
                axes.fill_between(xs, low, high, color=colour, alpha=0.16, lw=0, zorder=2)
        for number, (name, level) in enumerate((marks or {}).items()):
            axes.axhline(level, color=SOFT if number else INK, ls="dashed", lw=1.2, label=name, zorder=2)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(LogLocator(subs=()))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_xlabel(x_label, color=SOFT)
        if from_zero:
            axes.set_ylim(bottom=0)
        _legend(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as SVG, whole or not at all, and return its path."""
    with matplotlib.rc_context(STYLE), atomic_file(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": figure.axes[0].get_title(loc="left")})
    return Path(path)


def _figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
        axes.set_ylabel(y_label, color=SOFT)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(SOFT)
        axes.grid(axis="y", color=GRID, zorder=0)
        axes.tick_params(colors=SOFT, length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, axes


def _legend(figure: Figure) -> None:
    """Place the legend below the axes, in as many columns as its longest name leaves room for."""
    entries = zip(*figure.axes[0].get_legend_handles_labels(), strict=True)
    handles, names = zip(*sorted(entries, key=lambda entry: isinstance(entry[0], Line2D)), strict=True)  # bars first
    columns = max(1, LINE_LENGTH // (max(map(len, names)) + 8))
    figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, labelcolor=INK)
