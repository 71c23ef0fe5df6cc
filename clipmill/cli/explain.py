"""The command `explain`: the history of a source, clip or sample in lines that fit 80 columns."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clipmill.base.text import visible
from pipeline.engine.registry import stages
from shards.query.explain import Row, Story, explain
from shards.query.explain import as_json as story_as_json

WIDTH = 80
SHOWN = 30  # clips of a source, and lines of its history


def run_explain(root: str | Path, name: str, *, as_json: bool) -> int:
    """Print the history of what `name` stands for; return the exit code."""
    story = explain(root, name)
    print(story_as_json(story) if as_json else "\n".join(told(story)))
    return 0


def told(story: Story) -> Iterator[str]:
    """Yield lines of at most 80 characters without control characters."""
    for line in _lines(story):
        line = visible(line)
        yield line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _lines(story: Story) -> Iterator[str]:
    yield f"{story.kind} {story.id}"
    if story.tombstone:
        row = story.tombstone
        yield f"  forgotten at {row['at']}" + (f", reason: {row['reason']}" if row["reason"] else "")
        yield "  no build downloads it again; `clipmill compact` deletes its bytes"
        return
    yield from _source_lines(story.source)
    yield from _clip_lines(story) if story.kind == "clip" else _clips_lines(story.clips)
    yield from _history_lines(story)
    if story.failures:
        yield f"{len(story.failures)} current failures"
    for row in story.failures:
        yield from _folded(f"  {row['stage']} {row['error_class']}: ", " ".join((row["message"] or "").split()))
    yield from _place_lines(story.places)


def _source_lines(source: Row) -> Iterator[str]:
    yield from _folded("  url      ", source["url"])
    yield f"  title    {source['title'] or '-'}"
    yield f"  video_id {source['video_id']}  unit {source['unit']}  source number {source['ordinal']}"
    facts = [
        f"{source[name]}" for name in ("category", "language", "licence", "channel", "upload_date") if source[name]
    ]
    if facts:
        yield f"  facts    {' · '.join(facts)}"
    if source["path"]:
        yield (
            f"  video    {source['duration_s'] or 0:.1f} s, {source['width']}x{source['height']}, "
            f"{source['num_bytes']:,} bytes, by {source['extractor']}"
        )
    if source["duplicate_of"]:
        yield f"  same file as {source['duplicate_of']}, so no clips are cut from it"
    if source["transcript_origin"]:
        yield f"  words    {source['num_words']}, origin: {source['transcript_origin']}, times: {source['word_times']}"


def _clip_lines(story: Story) -> Iterator[str]:
    clip = story.clip
    if not clip:
        yield "  clip     not cut yet"
        return
    yield (
        f"  clip     {clip['span_start_s']:.2f}–{clip['span_end_s']:.2f} s, {clip['num_frames']} frames, "
        f"{clip['width']}x{clip['height']}, span by {clip['origin']}"
    )
    yield from _folded("  speech   ", clip["text"] or "-")
    for text in story.texts:
        yield from _folded("  text     ", text)
    for caption in story.captions:
        made_by = f"{caption['captioner']}, settings {caption['fingerprint'][:8]}"
        state = "" if caption["current"] else ", not in use"
        yield from _folded("  caption  ", f"{caption['text']} ({made_by}{state})")
    numbers = {name: value for name, value in story.scores.items() if isinstance(value, float)}
    if numbers:
        yield from _folded("  scores   ", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for table, rows in story.stages.items():
        for row in rows:
            known = ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)
            yield from _folded(f"  {table:<8} ", known)
    if story.scores.get("duplicate_group"):
        yield f"  near-duplicate group {story.scores['duplicate_group']}"


def _clips_lines(clips: list[Row]) -> Iterator[str]:
    if not clips:
        return
    yield f"{len(clips)} clips"
    for clip in clips[:SHOWN]:
        shard = f"{clip['shard']} #{clip['position']}" if clip["shard"] else "not in a shard"
        state = shard if clip["tar"] else "not cut yet"
        yield (
            f"  {clip['clip_id']:<20} {clip['start_s']:8.2f}–{clip['end_s']:8.2f} s  "
            f"{clip['num_captions']} captions  {state}"
        )
    if len(clips) > SHOWN:
        yield f"  … and {len(clips) - SHOWN} more (--json lists all)"


def _history_lines(story: Story) -> Iterator[str]:
    yield f"history ({len(story.attempts)} attempts in {len(story.runs)} runs)"
    clip_stages = {"edit", *(stage.name for stage in stages() if stage.item == "clip")}
    of_clips = [row for row in story.attempts if story.kind == "source" and row["stage"] in clip_stages]
    for stage in dict.fromkeys(row["stage"] for row in of_clips):
        ended = Counter(row["status"] for row in of_clips if row["stage"] == stage).items()
        yield f"  {stage} of clips: {', '.join(f'{count} {status}' for status, count in ended)} (--json lists each)"
    for row in [row for row in story.attempts if row not in of_clips][-SHOWN:]:
        part = row["item_id"].removeprefix(story.source["video_id"]) or "-"
        took = f"{row['wall_s']:.1f} s" if row["wall_s"] else ""
        state = row["status"] if row["status"] == "done" else f"{row['error_class']} (try {row['attempts']})"
        yield (
            f"  {row['at'][:19].replace('T', ' ')} {row['stage']:<10} {part:<12} {state:<18} "
            f"{row['fingerprint'][:8]} {took}"
        )
    for run in story.runs:
        yield from _folded(f"  run {run['run_id']}: ", run["command"])


def _place_lines(places: list[Row]) -> Iterator[str]:
    if places:
        yield "bytes"
    for place in places:
        yield f"  {place['what']:<18} {place['num_bytes']:>12,} bytes at {place['offset']:,}"
        yield from _folded("    of ", place["file"])
        if place["sha256"]:
            yield f"    sha256 {place['sha256']}"


def _folded(head: str, text: str) -> Iterator[str]:
    """Yield a text on as many lines as it needs, the later ones indented."""
    text, room = visible(text), WIDTH - len(head)
    for start in range(0, max(len(text), 1), room):
        yield (head if start == 0 else " " * len(head)) + text[start : start + room]
