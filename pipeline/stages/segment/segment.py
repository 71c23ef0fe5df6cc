"""Divide a video into spans: sentences merged or split into a length range (HD-VILA), given spans, or shots.

The input is the words of one video in order, its duration, its given spans and its shots. The output is the rows of
`sentences` and `spans`, and a count of everything that was left out, by reason.

Guarantees for spans made here (not for given ones):
  · they are in order, do not overlap, lie inside the video and last min_s to max_s;
  · every word is in exactly one sentence and in at most one span, and a span's text is the words spoken in its time;
  · a sentence is cut only if it is longer than max_s or if that is the only way to keep its neighbour above min_s.
A word longer than max_s counts as spoken in its first max_s seconds. Left out and counted: words that start after the
end of the video, speech that cannot be made min_s long, spans of fewer than min_words words, shots shorter than min_s.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from clipmill.base.errors import ItemError
from clipmill.base.settings import operational
from pipeline.stages.segment.sentences import (
    Sentence,
    SentenceSettings,
    break_cost,
    gap_after,
    restore_punctuation,
    sentence_of,
    split_sentences,
)
from pipeline.stages.segment.shots import ShotSettings
from pipeline.stages.transcribe.words import Word, join_words


class SegmentSettings(SentenceSettings):
    """Settings of the stage `segment`: how spans are chosen, and their lengths."""

    # Source of the spans. given-else-sentences uses the spans of the source list for videos that have any, as HD-VILA's
    # own lists do, and sentences for the others.
    mode: Literal["given-else-sentences", "sentences", "shots"] = "given-else-sentences"

    # Seconds that finding shots, or making spans of words, may take before it counts as hung. Ten minutes are far more
    # than a start and a short video need.
    timeout_base_s: float = operational(600.0, gt=0)
    # More seconds for finding shots, per second of video. 5 allows for a slow core and large pictures.
    timeout_per_second: float = operational(5.0, gt=0)
    # The longest limit for one video, because the length in a header may be wrong.
    timeout_most_s: float = operational(4 * 3600.0, gt=0)

    # Seconds that spans should last: the mean of HD-VILA's clips, 32.5 words of speech.
    target_s: float = Field(13.4, gt=0)
    # Shortest span in seconds: shorter clips show too little to learn from.
    min_s: float = Field(2.0, gt=0)
    # Longest span in seconds, at least 2 × min_s: a caption and 12 frames do not cover more.
    max_s: float = Field(30.0, gt=0)
    # Seconds of silence to include on both sides of speech, if the speech around allows it. 0: clips of speech only.
    pad_s: float = Field(0.0, ge=0)
    # Speech shorter than min_s: extend it by the silence around it, or drop it.
    short: Literal["extend", "drop"] = "extend"
    # Spans with fewer words are left out. 1 keeps all: a query can be stricter later, but cannot bring spans back.
    min_words: int = Field(1, ge=0)

    # Detection of shots, if mode or wordless asks for them.
    shots: ShotSettings = ShotSettings()

    # Videos without words: even spans of about target_s, shots, or no spans. HD-VILA keeps subtitled videos only; but
    # captions need no speech, and silent videos should not disappear unasked.
    wordless: Literal["fixed", "shots", "skip"] = "fixed"

    @model_validator(mode="after")
    def _range_is_wide_enough(self):
        """Check that target_s is in the range, and that any longer span can be split."""
        if not self.min_s <= self.target_s <= self.max_s:
            raise ValueError(
                f"target_s = {self.target_s} must lie between min_s = {self.min_s} and max_s = {self.max_s}"
            )
        if self.max_s < 2 * self.min_s:
            least = f"2 × min_s = {2 * self.min_s}"
            raise ValueError(f"max_s = {self.max_s} must be at least {least}, or long speech cannot be split")
        return self


@dataclass(frozen=True)
class Segmented:
    """The rows of one video."""

    sentences: list[dict]  # rows of the table of that name
    spans: list[dict]
    dropped: dict[str, int] = field(default_factory=dict)  # words (or shots: "short-shot") left out, by reason


@dataclass(frozen=True, slots=True)
class _Span:
    """An interval of the video, in seconds, with the words it holds."""

    start_s: float
    end_s: float
    first_word: int = 0
    stop_word: int = 0  # exclusive; equal to first_word without words

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def needs_shots(words: Sequence[Word], given_spans: Sequence[dict] | None, settings: SegmentSettings) -> bool:
    """Return whether `segment_video` needs the shots, which cost a decode of the video."""
    if settings.mode == "given-else-sentences" and given_spans:
        return False
    return settings.mode == "shots" or (not words and settings.wordless == "shots")


def segment_video(
    video_id: str,
    words: Sequence[Word],
    duration_s: float | None,
    given_spans: Sequence[dict] | None,
    shots: Sequence[tuple[float, float]] | None,
    settings: SegmentSettings,
    asr_segments: Sequence[dict] = (),
) -> Segmented:
    """Return the sentences and spans of one video.

    `words` are as `in_order` leaves them. A duration of None or 0 is unknown. `given_spans` are dicts with n (or None),
    start_s and end_s (None: the end of the video). `asr_segments` are those of the transcript. `shots` are (start_s,
    end_s), needed if `needs_shots`.
    Raises ItemError "duplicate-clip-id" if two given spans have one n, "unknown-duration", "punctuation-failed";
    UserError if `punctuate` does not name a function.
    """
    assert all(a.start_s <= b.start_s for a, b in pairwise(words)), "words out of order"
    words, costs = restore_punctuation(_not_overlapping(words), settings)
    dropped: Counter = Counter()
    if settings.mode == "given-else-sentences" and given_spans:
        spans = _with_words(words, [_given(span, duration_s) for span in given_spans])
        numbers = _numbers([span.get("n") for span in given_spans])
        held = {k for span in spans for k in range(span.first_word, span.stop_word)}
        dropped["outside-given-spans"] = len(words) - len(held)
        sentence_rows, span_rows = _rows(
            video_id, words, costs, split_sentences(words, settings), spans, numbers, "given", asr_segments
        )
    else:
        end_s = duration_s if duration_s and duration_s > 0 else math.inf
        count = sum(word.start_s < end_s for word in words)
        for k, word in enumerate(words[:count]):
            words[k] = replace(word, end_s=min(word.end_s, end_s, word.start_s + settings.max_s))
        origin, spans, sentences = _made_here(words[:count], end_s, shots, settings, dropped)
        for later in split_sentences(words[count:], settings):
            sentences.append(Sentence(later.text, later.first_word + count, later.last_word + count))
        dropped["past-the-end"] = len(words) - count
        numbers = range(len(spans))
        sentence_rows, span_rows = _rows(video_id, words, costs, sentences, spans, numbers, origin, asr_segments)
    return Segmented(sentence_rows, span_rows, dict(sorted((+dropped).items())))


def why_no_spans(
    segmented: Segmented, words: Sequence[Word], duration_s: float | None, settings: SegmentSettings
) -> ItemError:
    """Return the reason why a video has no spans, as a class and a sentence."""
    if segmented.dropped:
        reason = max(segmented.dropped, key=lambda name: (segmented.dropped[name], name))
        counts = ", ".join(f"{name} {count}" for name, count in segmented.dropped.items())
        unit = "shots" if set(segmented.dropped) == {"short-shot"} else "words"
        return ItemError(reason, f"no span is left; {unit} left out by reason: {counts}")
    if words:
        return ItemError("no-span", f"none of {len(words):,} words is in a span")
    if not duration_s or duration_s <= 0:
        return ItemError("unknown-duration", "it has no words, and its header gives no duration")
    if settings.wordless == "skip":
        return ItemError("no-words", "it has no words, and segment.wordless is skip")
    return ItemError("too-short", f"it has no words and lasts {duration_s:g} s; segment.min_s is {settings.min_s:g} s")


def _given(span: dict, duration_s: float | None) -> _Span:
    """Convert a given span; raises ItemError "unknown-duration"."""
    if span["end_s"] is None and not duration_s:
        problem = "a given span has no end_s, and the video's header gives no duration; give the span an end_s"
        raise ItemError("unknown-duration", problem)
    return _Span(float(span["start_s"]), float(duration_s if span["end_s"] is None else span["end_s"]))


def _not_overlapping(words: Sequence[Word]) -> list[Word]:
    """Give each of two overlapping words half of the overlap."""
    separate = list(words[:1])
    for word in words[1:]:
        before = separate[-1]
        if before.end_s > word.start_s:
            middle = max(before.start_s, (word.start_s + min(before.end_s, word.end_s)) / 2)
            separate[-1], word = replace(before, end_s=middle), replace(word, start_s=middle)
        separate.append(word)
    return separate


def _numbers(wanted: list[int | None]) -> list[int]:
    """Assign clip numbers: the list's own, else the position, or the next free number. Raises "duplicate-clip-id"."""
    given = [n for n in wanted if n is not None]
    if len(set(given)) < len(given):
        twice = min(n for n, count in Counter(given).items() if count > 1)
        problem = f"the source list gives clip number {twice} to more than one span of this video; numbers are unique"
        raise ItemError("duplicate-clip-id", problem)
    taken, numbers = set(given), []
    for position, n in enumerate(wanted):
        if n is None:
            n = next(k for k in range(position, position + len(wanted) + 1) if k not in taken)
            taken.add(n)
        numbers.append(n)
    return numbers


def _made_here(
    words: list[Word],
    end_s: float,
    shots: Sequence[tuple[float, float]] | None,
    settings: SegmentSettings,
    dropped: Counter,
) -> tuple[str, list[_Span], list[Sentence]]:
    """Return origin, spans and sentences in every mode but given spans; count left-out words and shots in `dropped`."""
    sentences = split_sentences(words, settings)
    assert shots is not None or settings.mode != "shots", "mode shots needs shots"
    if shots is not None and (settings.mode == "shots" or not words):
        return "shots", _spans_of_shots(words, shots, settings, dropped), sentences
    if not words:
        wanted = settings.wordless != "skip" and end_s < math.inf
        return "fixed", _even(0.0, end_s, settings) if wanted else [], sentences
    spans, sentences = _spans_of_speech(words, sentences, end_s, settings, dropped)
    return "sentences", spans, sentences


# --- speech --------------------------------------------------------------------------------------------------------


def _spans_of_speech(
    words: list[Word], sentences: list[Sentence], end_s: float, settings: SegmentSettings, dropped: Counter
) -> tuple[list[_Span], list[Sentence]]:
    """Split sentences longer than max_s, group the others; return the spans and all sentences."""
    parts: list[Sentence] = []
    for sentence in sentences:
        first, last = sentence.first_word, sentence.last_word
        too_long = words[last].end_s - words[first].start_s > settings.max_s
        parts += _cut_between_words(words, first, last, settings) if too_long else [sentence]
    groups = [group for island in _islands(words, parts, settings) for group in _merged(words, island, settings)]
    sentences = [sentence for group in groups for sentence in group]
    bounds = [(group[0].first_word, group[-1].last_word + 1) for group in groups]
    spans = [_Span(words[first].start_s, words[stop - 1].end_s, first, stop) for first, stop in bounds]
    return _in_range(words, spans, end_s, settings, dropped), sentences


def _cut_between_words(words: list[Word], first: int, last: int, settings: SegmentSettings) -> list[Sentence]:
    """Cut words first..last into parts of a good length, at pauses and commas where possible."""
    units = words[first : last + 1]
    cut_costs = [break_cost(words, k) for k in range(first, last + 1)]
    parts = partition([w.start_s for w in units], [w.end_s for w in units], cut_costs, [1] * len(units), settings)
    return [sentence_of(words, first + a, first + b) for a, b in parts]


def _islands(words: list[Word], sentences: list[Sentence], settings: SegmentSettings) -> list[list[Sentence]]:
    """Group sentences into runs without a silence longer than max_gap_s."""
    islands: list[list[Sentence]] = []
    for sentence in sentences:
        if islands and gap_after(words, sentence.first_word - 1) <= settings.max_gap_s:
            islands[-1].append(sentence)
        else:
            islands.append([sentence])
    return islands


def _merged(words: list[Word], island: list[Sentence], settings: SegmentSettings) -> list[list[Sentence]]:
    """Group the sentences of an island into spans.

    A group that stays too short, because its neighbours are too long to join, is merged with the shorter neighbour and
    the result is cut again between words, once per group: without silence nothing else lengthens it.
    """
    starts = [words[sentence.first_word].start_s for sentence in island]
    ends = [words[sentence.last_word].end_s for sentence in island]
    counts = [sentence.last_word - sentence.first_word + 1 for sentence in island]
    groups = [island[a : b + 1] for a, b in partition(starts, ends, [0.0] * len(island), counts, settings)]
    k = 0
    while k < len(groups):
        if len(groups) > 1 and _length(words, groups[k]) < settings.min_s:
            sides = [j for j in (k - 1, k + 1) if 0 <= j < len(groups)]
            other = min(sides, key=lambda j: (_length(words, groups[j]), j))
            low, high = min(k, other), max(k, other)
            first, last = groups[low][0].first_word, groups[high][-1].last_word
            cut = _cut_between_words(words, first, last, settings)
            if all(_length(words, [part]) >= settings.min_s for part in cut):
                groups[low : high + 1] = [_whole_sentences(words, groups[low] + groups[high], part) for part in cut]
        k += 1
    return groups


def _length(words: list[Word], group: Sequence[Sentence]) -> float:
    """Return the seconds from the first to the last word of a group."""
    return words[group[-1].last_word].end_s - words[group[0].first_word].start_s


def _whole_sentences(words: list[Word], sentences: list[Sentence], part: Sentence) -> list[Sentence]:
    """Return the sentences, or pieces of them, that lie in a part."""
    bounds = [(max(s.first_word, part.first_word), min(s.last_word, part.last_word)) for s in sentences]
    return [sentence_of(words, first, last) for first, last in bounds if first <= last]


CUT_WEIGHT = 4.0  # a cut inside a phrase costs as much as a length some 50 % off the target
SHORT_WEIGHT = 1000.0  # a span that is too short costs more than anything but a span that is too long


def partition(
    starts: Sequence[float],
    ends: Sequence[float],
    cut_costs: Sequence[float],
    num_words: Sequence[int],
    settings: SegmentSettings,
) -> list[tuple[int, int]]:
    """Group neighbouring units (sentences or words) into spans; return inclusive (first, last) pairs.

    Minimises the sum over spans of seconds × squared relative distance from the target (weighted by seconds, so that
    many short spans do not cost less than a few right ones) plus the weighted `cut_costs`, 0..1 for a cut after each
    unit. A span is longer than max_s only where a single unit is, and shorter than min_s or min_words only where
    nothing else is possible. Dynamic programming: units × units per max_s steps.
    """
    count = len(starts)
    best, back = [0.0] + [math.inf] * count, [0] * (count + 1)
    totals = [0]
    for number in num_words:
        totals.append(totals[-1] + number)
    for stop in range(1, count + 1):
        cut_cost = CUT_WEIGHT * cut_costs[stop - 1] if stop < count else 0.0
        for first in range(stop - 1, -1, -1):
            length = ends[stop - 1] - starts[first]
            if length > settings.max_s and first < stop - 1:
                break
            cost = length * (length / settings.target_s - 1) ** 2 + cut_cost
            missing = max(0.0, settings.min_s - length) + max(0, settings.min_words - totals[stop] + totals[first])
            cost += best[first] + (SHORT_WEIGHT * (1 + missing) if missing else 0.0)
            if cost < best[stop]:
                best[stop], back[stop] = cost, first
    groups, stop = [], count
    while stop:
        groups.append((back[stop], stop - 1))
        stop = back[stop]
    return groups[::-1]


def _in_range(
    words: list[Word], spans: list[_Span], end_s: float, settings: SegmentSettings, dropped: Counter
) -> list[_Span]:
    """Widen spans into the silence around them, by `pad_s` and to min_s; leave out and count those still too short."""
    kept: list[_Span] = []
    for span in spans:
        free_from_s = kept[-1].end_s if kept else 0.0
        before = words[span.first_word - 1].end_s if span.first_word else -span.start_s
        after = words[span.stop_word].start_s if span.stop_word < len(words) else 2 * end_s - span.end_s
        pad = max(0.0, min(settings.pad_s, (settings.max_s - span.length_s) / 2))
        # Padding stops halfway to other speech, which may be padded, too. The video's ends are not speech: `before` and
        # `after` mirror the span in them, which puts halfway at the very end.
        start_s = max(span.start_s - pad, (before + span.start_s) / 2, free_from_s)
        padded = replace(span, start_s=start_s, end_s=min(span.end_s + pad, (span.end_s + after) / 2))
        if settings.short == "extend" and padded.length_s < settings.min_s:
            padded = _extended(padded, max(before, free_from_s), min(after, end_s), settings.min_s)
        if padded.length_s < settings.min_s - ROUNDING_S:
            dropped["too-short"] += span.stop_word - span.first_word
        elif span.stop_word - span.first_word < settings.min_words:
            dropped["too-few-words"] += span.stop_word - span.first_word
        else:
            kept.append(padded)
    return kept


ROUNDING_S = 1e-6  # error of sums of floating-point times


def _extended(span: _Span, before: float, after: float, length_s: float) -> _Span:
    """Lengthen the span to length_s, evenly on both sides as far as `before` and `after` allow."""
    missing = length_s - span.length_s
    room_left, room_right = span.start_s - before, after - span.end_s
    right = min(missing - min(missing / 2, room_left), room_right)
    left = min(missing - right, room_left)
    return replace(span, start_s=span.start_s - left, end_s=span.end_s + right)


# --- shots, even spans, given spans --------------------------------------------------------------------------------


def _even(start_s: float, end_s: float, settings: SegmentSettings) -> list[_Span]:
    """Divide an interval into spans of equal length near the target; return none if it is shorter than min_s."""
    length = end_s - start_s
    if length < settings.min_s:
        return []
    count = max(round(length / settings.target_s), math.ceil(length / settings.max_s))
    count = max(1, min(count, int(length / settings.min_s)))
    edges = [start_s + length * k / count for k in range(count)] + [end_s]
    return [_Span(a, b) for a, b in pairwise(edges)]


def _spans_of_shots(
    words: list[Word], shots: Sequence[tuple[float, float]], settings: SegmentSettings, dropped: Counter
) -> list[_Span]:
    """Make a span of each shot: long shots are divided evenly, short ones left out, as joining them would cross a cut.

    A shot without words is kept; one with fewer than min_words words is left out.
    """
    spans = []
    for start_s, end_s in shots:
        pieces = _even(start_s, end_s, settings)
        dropped["short-shot"] += not pieces
        spans += _with_words(words, pieces)
    dropped["outside-shots"] += len(words) - sum(span.stop_word - span.first_word for span in spans)
    kept = []
    for span in spans:
        count = span.stop_word - span.first_word
        if 0 < count < settings.min_words:
            dropped["too-few-words"] += count
        else:
            kept.append(span)
    return kept


def _with_words(words: Sequence[Word], spans: Sequence[_Span]) -> list[_Span]:
    """Give each span the words whose middle lies in it."""
    middles = [(word.start_s + word.end_s) / 2 for word in words]
    filled = []
    for span in spans:
        first = bisect_left(middles, span.start_s)
        filled.append(replace(span, first_word=first, stop_word=max(first, bisect_left(middles, span.end_s))))
    return filled


# --- rows ----------------------------------------------------------------------------------------------------------


def _rows(
    video_id: str,
    words: Sequence[Word],
    costs: Sequence[float],
    sentences: Sequence[Sentence],
    spans: Sequence[_Span],
    numbers: Sequence[int],
    origin: str,
    asr_segments: Sequence[dict],
) -> tuple[list[dict], list[dict]]:
    """Return the rows of `sentences` and of `spans`. A sentence belongs to the span with most of its words."""
    clip_ids = [f"{video_id}.{n}" for n in numbers]
    held_by: list[int | None] = [None] * len(words)
    for k, span in reversed(list(enumerate(spans))):
        held_by[span.first_word : span.stop_word] = [k] * (span.stop_word - span.first_word)
    sentence_rows = []
    for n, sentence in enumerate(sentences):
        first, stop = sentence.first_word, sentence.last_word + 1
        by_span = Counter(k for k in held_by[first:stop] if k is not None).most_common(1)
        sentence_rows.append(
            {
                "video_id": video_id,
                "n": n,
                "start_s": words[first].start_s,
                "end_s": words[stop - 1].end_s,
                "text": sentence.text,
                "num_words": stop - first,
                "align_cost": _mean(costs[first:stop]),
                "clip_id": clip_ids[by_span[0][0]] if by_span else None,
                **_confidences(words[first].start_s, words[stop - 1].end_s, asr_segments),
            }
        )
    sentence_of_word = [
        n for n, sentence in enumerate(sentences) for _ in range(sentence.first_word, sentence.last_word + 1)
    ]
    span_rows = [
        {
            "video_id": video_id,
            "clip_id": clip_id,
            "n": n,
            "start_s": span.start_s,
            "end_s": span.end_s,
            "origin": origin,
            "text": join_words(word.text for word in words[span.first_word : span.stop_word]),
            "num_words": span.stop_word - span.first_word,
            "num_sentences": len(set(sentence_of_word[span.first_word : span.stop_word])),
            "align_cost": _mean(costs[span.first_word : span.stop_word]),
            **_confidences(span.start_s, span.end_s, asr_segments),
        }
        for span, n, clip_id in zip(spans, numbers, clip_ids, strict=True)
    ]
    return sentence_rows, span_rows


def _mean(costs: Sequence[float]) -> float | None:
    return sum(costs) / len(costs) if len(costs) else None


def _confidences(start_s: float, end_s: float, asr_segments: Sequence[dict]) -> dict[str, float | None]:
    """Return the means of what the recogniser said of the segments in an interval, weighted by their seconds in it."""
    shares = [max(0.0, min(end_s, each["end_s"]) - max(start_s, each["start_s"])) for each in asr_segments]
    total = sum(shares)
    return {
        name: sum(share * each[name] for share, each in zip(shares, asr_segments, strict=True)) / total
        if total
        else None
        for name in ("avg_logprob", "no_speech_prob", "compression_ratio")
    }
