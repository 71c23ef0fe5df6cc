"""Statistics of a corpus: the numbers that HD-VILA-100M reports, percentiles, the yield funnel, failures, histograms.

Everything is counted by SQL over the manifest's views; `render` draws it for a terminal of 80 columns or more.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from clipmill.base.text import visible
from shards.query.disk import DiskUse

# HD-VILA-100M as published (arXiv 2111.10337, table 1) and its category shares in percent of videos and of clips, read
# off the ring charts of its release: a reference for one's own corpus.
HD_VILA = {
    "num_videos": 3_300_000,
    "num_clips": 100_000_000,
    "num_sentences": 100_000_000,
    "mean_clip_s": 13.4,
    "words_per_sentence": 32.5,
    "clip_hours": 371_500,
    "resolution": "720p",
}
HD_VILA_CATEGORIES = {
    "Music": (1.3, 1.0),
    "Nonprofits & Activism": (1.4, 2.3),
    "Pets & Animals": (3.1, 3.3),
    "Travel & Events": (3.3, 4.1),
    "Comedy": (3.5, 4.8),
    "Gaming": (6.0, 5.1),
    "Film & Animation": (6.3, 7.2),
    "Autos & Vehicles": (6.5, 7.6),
    "Science & Technology": (7.1, 7.9),
    "Education": (7.0, 8.4),
    "Howto & Style": (8.2, 8.7),
    "Sports": (11.3, 9.2),
    "People & Blogs": (7.4, 9.3),
    "News & Politics": (17.7, 10.4),
    "Entertainment": (10.1, 10.5),
}
PERCENTILES = (5, 25, 50, 75, 95)
MAX_LINES = 20  # of a table whose length depends on the data
BLOCKS = " ▏▎▍▌▋▊▉█"  # eighths of a character

Row = dict[str, Any]


@dataclass(frozen=True)
class Statistics:
    """Rows of the views of the same names, and percentiles as {quantity: [one value per PERCENTILES]}."""

    totals: Row
    percentiles: dict[str, list[float]]
    funnel: list[Row]
    categories: list[Row]
    failures: list[Row]
    dropped_sentences: int
    resolutions: list[Row]
    clip_lengths: list[Row]
    words_per_sentence: list[Row]
    languages: list[Row]
    captioners: list[Row]
    disk: DiskUse | None = None  # None: not listed


def report(connection: duckdb.DuckDBPyConnection, disk: DiskUse | None = None) -> Statistics:
    """Count everything, in one or two seconds for a million clips."""
    views = ("funnel", "categories", "resolutions", "clip_lengths", "words_per_sentence", "languages", "captioners")
    return Statistics(
        totals=_rows(connection, "SELECT * FROM totals")[0],
        percentiles=_percentiles(connection),
        failures=_rows(connection, "SELECT * FROM failures_by_reason"),
        dropped_sentences=_rows(connection, "SELECT count(*) AS n FROM sentences WHERE clip_id IS NULL")[0]["n"],
        **{view: _rows(connection, f"SELECT * FROM {view}") for view in views},
        disk=disk,
    )


def render(stats: Statistics, console: Console) -> None:
    """Print the report; the histograms are as wide as `console.width` allows."""
    if not stats.totals["num_clips"]:
        console.print("[yellow]No clips yet:[/] the report covers the steps done so far.")
    lengths = {int(row["from_s"]): row["num_clips"] for row in stats.clip_lengths}
    length_bins = _bins(lengths, 2, lambda at: f"{at}–{at + 2} s", lambda at: f"≥ {at} s")
    words = {row["from_words"]: row["num_sentences"] for row in stats.words_per_sentence}
    word_bins = _bins(words, 5, lambda at: f"{at}–{at + 4}", lambda at: f"≥ {at}")
    parts = [
        ("Corpus", _overview(stats)),
        ("Yield", _funnel(stats.funnel)),
        ("Percentiles", _percentile_table(stats.percentiles)),
        ("Clip length", _histogram(length_bins, console.width)),
        ("Words per sentence", _histogram(word_bins, console.width)),
        ("Categories (HD-VILA-100M's published shares beside)", _category_table(stats.categories)),
        ("Source sizes", _resolution_table(stats.resolutions)),
        ("Languages", _language_table(stats.languages)),
        ("Captioners", _captioner_table(stats.captioners)),
        ("Failures", _failure_table(stats)),
        ("Files", _disk_table(stats.disk) if stats.disk else None),
    ]
    for title, part in parts:
        if part is not None:
            console.print(Text(f"\n{title}", style="bold cyan"))
            console.print(part)


# -- counting -------------------------------------------------------------------------------------------------------


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Row]:
    return connection.sql(sql).to_arrow_table().to_pylist()


def _percentiles(connection: duckdb.DuckDBPyConnection) -> dict[str, list[float]]:
    """Return discrete percentiles: each is a value that occurs."""
    at = [percent / 100 for percent in PERCENTILES]
    quantities = {
        "clip seconds": f"SELECT quantile_disc(duration_s, {at}) AS q FROM clips",
        "words per sentence": f"SELECT quantile_disc(num_words, {at}) AS q FROM sentences WHERE clip_id IS NOT NULL",
        "words per clip": f"SELECT quantile_disc(num_words, {at}) AS q FROM clips",
        "clips per video": f"SELECT quantile_disc(n, {at}) AS q FROM (SELECT count(*) n FROM clips GROUP BY video_id)",
        "motion": f"SELECT quantile_disc(motion, {at}) AS q FROM clips",
        "caption similarity": f"SELECT quantile_disc(caption_similarity, {at}) AS q FROM scores",
        "subtitle similarity": f"SELECT quantile_disc(subtitle_similarity, {at}) AS q FROM scores",
    }
    found = {name: _rows(connection, sql)[0]["q"] for name, sql in quantities.items()}
    return {name: values for name, values in found.items() if values}


# -- drawing --------------------------------------------------------------------------------------------------------


def _overview(stats: Statistics) -> Table:
    totals = stats.totals
    table = _table("", "here", "HD-VILA-100M")
    for label, name, shape in (
        ("videos", "num_videos", ",.0f"),
        ("clips", "num_clips", ",.0f"),
        ("sentences", "num_sentences", ",.0f"),
        ("mean clip length, s", "mean_clip_s", ".1f"),
        ("mean sentence length, words", "words_per_sentence", ".1f"),
    ):
        table.add_row(label, _number(totals[name], shape), _number(HD_VILA[name], shape))
    table.add_row("hours of clips", _hours(totals["clip_hours"]), _hours(HD_VILA["clip_hours"]))
    by_height: Counter[int] = Counter()
    for row in stats.resolutions:
        if row["width"] is not None:  # a file without a picture has none
            by_height[min(row["width"], row["height"])] += row["num_videos"]
    usual = max(by_height, key=lambda height: (by_height[height], height), default=None)
    table.add_row("resolution of most videos", f"{usual}p" if usual else "–", HD_VILA["resolution"])
    table.add_row("samples in shards", f"{totals['num_samples']:,} in {totals['num_shards']:,}", "")
    table.add_row("size of the clips", _size(totals["clip_bytes"]), "")
    return table


def _funnel(rows: list[Row]) -> Group:
    table = _table("step", "items", "kept", "hours")
    for row in rows:
        kept = "" if row["kept"] is None else f"{row['kept']:.1%}"
        table.add_row(row["step"], f"{row['num_items']:,}", kept, _hours(row["hours"]))
    spans, others = "for spans of the videos' hours", "for samples of the clips, for no clip of the videos"
    note = Text(f"kept: of the step before; {spans}, {others}", style="dim")
    return Group(table, note)


def _percentile_table(percentiles: dict[str, list[float]]) -> Table | None:
    if not percentiles:
        return None
    table = _table("", *(f"p{percent}" for percent in PERCENTILES))
    for name, values in percentiles.items():
        table.add_row(name, *(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in values))
    return table


def _bins(
    counts: dict[int, int], step: int, label: Callable[[int], str], label_rest: Callable[[int], str]
) -> list[tuple[str, int]]:
    """Return (label, count) of the first MAX_LINES bins, with empty ones, and one for the rest."""
    if not counts:
        return []
    first, end = min(counts), min(max(counts) + step, min(counts) + MAX_LINES * step)
    bins = [(label(at), counts.get(at, 0)) for at in range(first, end, step)]
    rest = sum(count for at, count in counts.items() if at >= end)
    return [*bins, (label_rest(end), rest)] if rest else bins


def _histogram(bins: list[tuple[str, int]], width: int) -> Text | None:
    if not bins:
        return None
    total, largest = sum(count for _, count in bins), max(count for _, count in bins)
    label_width = max(len(label) for label, _ in bins)
    count_width = len(f"{largest:,}")
    bar_width = max(10, min(60, width - label_width - count_width - 12))
    text = Text()
    for label, count in bins:
        text.append(f"{label:>{label_width}} ")
        text.append(f"{_bar(count / largest, bar_width):<{bar_width}}", style="cyan")
        text.append(f" {count:>{count_width},} {count / total:>6.1%}\n")
    text.rstrip()
    return text


def _bar(share: float, width: int) -> str:
    """Draw a bar with block characters in eighths; every value above 0 is visible."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, part = divmod(eighths, 8)
    return BLOCKS[8] * full + (BLOCKS[part] if part else "")


def _category_table(rows: list[Row]) -> Table | None:
    def cells(row: Row) -> list[Text | str]:
        of_videos, of_clips = HD_VILA_CATEGORIES.get(row["category"], (None, None))
        videos = [f"{row['num_videos']:,}", _percent(row["video_share"]), _number(of_videos, ".1f", "%")]
        clips = [f"{row['num_clips']:,}", _percent(row["clip_share"]), _number(of_clips, ".1f", "%")]
        return [_name(row["category"]), *videos, *clips]

    columns = ("category", "videos", "share", "HD-VILA", "clips", "share", "HD-VILA")
    return _data_table(columns, rows, cells)


def _resolution_table(rows: list[Row]) -> Table | None:
    def cells(row: Row) -> list[Text | str]:
        size = None if row["width"] is None else f"{row['width']}×{row['height']}"
        return [_name(size), f"{row['num_videos']:,}", f"{row['num_clips']:,}", _hours(row["hours"])]

    return _data_table(("size", "videos", "clips", "hours"), rows, cells)


def _language_table(rows: list[Row]) -> Table | None:
    return _data_table(
        ("language", "clips", "hours"),
        rows,
        lambda row: [_name(row["language"]), f"{row['num_clips']:,}", _hours(row["hours"])],
    )


def _captioner_table(rows: list[Row]) -> Table | None:
    def cells(row: Row) -> list[Text | str]:
        counts = [f"{row[name]:,}" for name in ("num_captions", "num_served", "num_empty")]
        return [_name(row["captioner"]), *counts, _number(row["mean_score"], ".3f")]

    return _data_table(("captioner", "captions", "served", "empty", "mean score"), rows, cells)


def _failure_table(stats: Statistics) -> Table | Text:
    if not stats.failures and not stats.dropped_sentences:
        return Text("none", style="green")
    table = _table("stage", "reason", "items", "retryable")
    table.columns[1].justify = "left"
    for row in stats.failures[:MAX_LINES]:
        retryable = f"{row['num_transient']:,}" if row["num_transient"] else ""
        table.add_row(_name(row["stage"]), _name(row["error_class"]), f"{row['num_items']:,}", retryable)
    if stats.dropped_sentences:
        table.add_row("segment", "sentences in no span", f"{stats.dropped_sentences:,}", "")
    return _with_rest(table, stats.failures)


def _disk_table(disk: DiskUse) -> Group:
    table = _table("kind", "files", "size")
    for kind, (num_files, num_bytes) in disk.kinds.items():
        table.add_row(kind, f"{num_files:,}", _size(num_bytes))
    table.add_row("in all", f"{disk.num_files:,}", _size(disk.num_bytes))
    notes = [Text(f"{setting} would free {_size(freed)}", style="dim") for setting, freed in disk.freed.items()]
    return Group(table, *notes)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _data_table(columns: tuple[str, ...], rows: list[Row], cells: Callable[[Row], list[Any]]) -> Table | None:
    """Return a table of the first MAX_LINES rows; None without rows."""
    if not rows:
        return None
    table = _table(*columns)
    for row in rows[:MAX_LINES]:
        table.add_row(*cells(row))
    return _with_rest(table, rows)


def _with_rest(table: Table, rows: list[Row]) -> Table:
    if len(rows) > MAX_LINES:
        table.caption, table.caption_justify = f"and {len(rows) - MAX_LINES:,} more", "left"
    return table


def _name(value: str | None) -> Text:
    return Text("(not known)", style="dim") if value is None else Text(visible(value)[:40])


def _number(value: float | None, shape: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{shape}}{unit}"


def _hours(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.4g} {unit}"
