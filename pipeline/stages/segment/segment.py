"""Words to spans: whole sentences merged or split into a length range (HD-VILA), given spans as they are, or shots.

Input: the words of one video in order, its duration, and spans of its source list or shots of `shots`. Output: the rows
of `sentences` and `spans`, and a count of everything that was left out, by reason.

For spans made here (not for given ones) it holds that
  · they are in order, do not overlap, lie inside the video and last min_s to max_s;
  · every word is in exactly one sentence and in at most one span, and a span's text is the words spoken in its time;
  · a sentence is cut only if it is longer than max_s or if that is the only way to keep its neighbour above min_s.
A word that outlasts max_s counts as spoken in its first max_s seconds. Left out and counted: words that begin after the
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
    # given-else-sentences: spans that the source list gives win, as HD-VILA's own lists want it
    mode: Literal["given-else-sentences", "sentences", "shots"] = "given-else-sentences"

    # Finding the shots of a video may take this long, and so much for each second that it lasts; making spans of its
    # words may take this long.
    timeout_base_s: float = operational(600.0, gt=0)
    timeout_per_second: float = operational(5.0, gt=0)
    # … and never longer than this, whatever a header says.
    timeout_most_s: float = operational(4 * 3600.0, gt=0)

    target_s: float = Field(13.4, gt=0)  # lengths are chosen around this: HD-VILA's mean clip, 32.5 words of speech
    min_s: float = Field(2.0, gt=0)  # shorter clips show too little to learn from
    max_s: float = Field(30.0, gt=0)  # one caption and 12 frames do not cover more; at least 2 × min_s
    pad_s: float = Field(0.0, ge=0)  # silence taken along on both sides of speech, as far as there is any
    short: Literal["extend", "drop"] = "extend"  # what is said in less than min_s: with silence around it, or not
    min_words: int = Field(1, ge=0)  # spans with fewer words are left out; SQL can be stricter later, never laxer

    shots: ShotSettings = ShotSettings()  # how shots are found, where mode or wordless asks for them

    # Videos in which nothing is said: even spans of about target_s, shots, or nothing. HD-VILA keeps subtitled videos
    # only; but captions need no speech, and a silent video that vanished would surprise.
    wordless: Literal["fixed", "shots", "skip"] = "fixed"

    @model_validator(mode="after")
    def _range_is_wide_enough(self):
        if not self.min_s <= self.target_s <= self.max_s:
            raise ValueError(f"target_s must lie between min_s = {self.min_s} and max_s = {self.max_s}")
        if self.max_s < 2 * self.min_s:
            raise ValueError(f"max_s must be at least 2 × min_s = {2 * self.min_s}, or long speech cannot be split")
        return self


@dataclass(frozen=True)
class Segmented:
    sentences: list[dict]  # rows of the table of that name
    spans: list[dict]
    dropped: dict[str, int] = field(default_factory=dict)  # words (or shots: "short-shot") left out, by reason


@dataclass(frozen=True, slots=True)
class _Span:
    start_s: float
    end_s: float
    first_word: int = 0  # the words it holds, as first..stop; none when equal
    stop_word: int = 0

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def needs_shots(words: Sequence[Word], given_spans: Sequence[dict] | None, settings: SegmentSettings) -> bool:
    """Whether `segment_video` will ask for shots, which cost a decode of the video."""
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
) -> Segmented:
    """Sentences and spans of one video. `words` as `in_order` leaves them; duration None or 0: not known.

    `given_spans` are dicts with n (or None), start_s, end_s (None: the end of the video). Raises ItemError
    "duplicate-clip-id" when two given spans claim one n, "unknown-duration", "punctuation-failed"; UserError when
    `punctuate` names nothing.
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
            video_id, words, costs, split_sentences(words, settings), spans, numbers, "given"
        )
    else:
        end_s = duration_s if duration_s and duration_s > 0 else math.inf
        count = sum(word.start_s < end_s for word in words)
        words = [_shortened(word, min(end_s, word.start_s + settings.max_s)) for word in words[:count]] + words[count:]
        origin, spans, sentences = _made_here(words[:count], end_s, shots, settings, dropped)
        sentences += [_moved(sentence, count) for sentence in split_sentences(words[count:], settings)]
        dropped["past-the-end"] = len(words) - count
        sentence_rows, span_rows = _rows(video_id, words, costs, sentences, spans, range(len(spans)), origin)
    return Segmented(sentence_rows, span_rows, dict(sorted((+dropped).items())))


def _given(span: dict, duration_s: float | None) -> _Span:
    if span["end_s"] is None and not duration_s:
        raise ItemError("unknown-duration", "the span goes to the end of the video, and its header does not say where")
    return _Span(float(span["start_s"]), float(duration_s if span["end_s"] is None else span["end_s"]))


def _moved(sentence: Sentence, offset: int) -> Sentence:
    return replace(sentence, first_word=sentence.first_word + offset, last_word=sentence.last_word + offset)


def _not_overlapping(words: Sequence[Word]) -> list[Word]:
    """Words that overlap share the overlap, half and half."""
    apart = list(words[:1])
    for word in words[1:]:
        before = apart[-1]
        if before.end_s > word.start_s:
            middle = max(before.start_s, (word.start_s + min(before.end_s, word.end_s)) / 2)
            apart[-1], word = replace(before, end_s=middle), replace(word, start_s=middle)
        apart.append(word)
    return apart


def _shortened(word: Word, end_s: float) -> Word:
    return word if word.end_s <= end_s else replace(word, end_s=end_s)


def _numbers(wanted: list[int | None]) -> list[int]:
    """The clip numbers that a list gives, else positions; positions already taken move on to the next free number."""
    given = [n for n in wanted if n is not None]
    if len(set(given)) < len(given):
        twice = sorted({n for n in given if given.count(n) > 1})
        raise ItemError("duplicate-clip-id", f"the list gives clip number {twice[0]} to more than one span")
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
    """Origin, spans and sentences for every mode but given spans."""
    sentences = split_sentences(words, settings)
    assert shots is not None or settings.mode != "shots", "needs_shots() said that shots are needed"
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
    sentences = [part for sentence in sentences for part in _parts(words, sentence, settings)]
    groups = [group for island in _islands(words, sentences, settings) for group in _merged(words, island, settings)]
    sentences = [sentence for group in groups for sentence in group]
    bounds = [(group[0].first_word, group[-1].last_word + 1) for group in groups]
    spans = [_Span(words[first].start_s, words[stop - 1].end_s, first, stop) for first, stop in bounds]
    return _in_range(words, spans, end_s, settings, dropped), sentences


def _parts(words: list[Word], sentence: Sentence, settings: SegmentSettings) -> list[Sentence]:
    """A sentence that is too long, cut at pauses, commas, or just between words."""
    first, last = sentence.first_word, sentence.last_word
    if words[last].end_s - words[first].start_s <= settings.max_s:
        return [sentence]
    return _cut_between_words(words, first, last, settings)


def _cut_between_words(words: list[Word], first: int, last: int, settings: SegmentSettings) -> list[Sentence]:
    pieces = words[first : last + 1]
    hurts = [break_cost(words, k) for k in range(first, last + 1)]
    parts = partition([w.start_s for w in pieces], [w.end_s for w in pieces], hurts, [1] * len(pieces), settings)
    return [sentence_of(words, first + a, first + b) for a, b in parts]


def _islands(words: list[Word], sentences: list[Sentence], settings: SegmentSettings) -> list[list[Sentence]]:
    """Runs of sentences without a long silence between them."""
    islands: list[list[Sentence]] = []
    for sentence in sentences:
        if islands and gap_after(words, sentence.first_word - 1) <= settings.max_gap_s:
            islands[-1].append(sentence)
        else:
            islands.append([sentence])
    return islands


def _merged(words: list[Word], island: list[Sentence], settings: SegmentSettings) -> list[list[Sentence]]:
    """The sentences of an island grouped into spans.

    A group that stays too short, because its neighbours are too long to take it in, is put together with the shorter
    one and both are cut anew between words, once per group: speech without silence has no other room to give.
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
    return words[group[-1].last_word].end_s - words[group[0].first_word].start_s


def _whole_sentences(words: list[Word], sentences: list[Sentence], part: Sentence) -> list[Sentence]:
    """The sentences, or pieces of them, that lie in a part."""
    bounds = [(max(s.first_word, part.first_word), min(s.last_word, part.last_word)) for s in sentences]
    return [sentence_of(words, first, last) for first, last in bounds if first <= last]


CUT_WEIGHT = 4.0  # a cut amid a phrase is worth a length some 50 % off the target
SHORT_WEIGHT = 1000.0  # nothing is worth a span that is too short, except a span that is too long


def partition(
    starts: Sequence[float],
    ends: Sequence[float],
    hurts: Sequence[float],
    num_words: Sequence[int],
    settings: SegmentSettings,
) -> list[tuple[int, int]]:
    """The best grouping of neighbouring units (sentences or words) into spans, as inclusive (first, last) pairs.

    Least sum, over spans, of seconds × squared relative distance from the target (so that many short spans do not look
    better than few right ones) and of `hurts`, the cost 0..1 of a cut after each unit. No span is longer than max_s
    unless a single unit is; spans shorter than min_s or of fewer than min_words words occur only where nothing else is
    possible. Dynamic programming: units × units per max_s steps.
    """
    count = len(starts)
    best, back = [0.0] + [math.inf] * count, [0] * (count + 1)
    totals = [0]
    for number in num_words:
        totals.append(totals[-1] + number)
    for stop in range(1, count + 1):
        hurt = CUT_WEIGHT * hurts[stop - 1] if stop < count else 0.0
        for first in range(stop - 1, -1, -1):
            length = ends[stop - 1] - starts[first]
            if length > settings.max_s and first < stop - 1:
                break
            cost = length * (length / settings.target_s - 1) ** 2 + hurt
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
    """Spans widened into the silence around them, by `pad_s` and to min_s; what stays too short is left out."""
    kept: list[_Span] = []
    for span in spans:
        taken_s = kept[-1].end_s if kept else 0.0
        before = words[span.first_word - 1].end_s if span.first_word else -span.start_s
        after = words[span.stop_word].start_s if span.stop_word < len(words) else 2 * end_s - span.end_s
        pad = max(0.0, min(settings.pad_s, (settings.max_s - span.length_s) / 2))
        # Padding stops halfway to other speech, whose own padding may come from there. (The video's ends are not
        # speech: mirroring the span in them puts halfway at the very end.)
        start_s = max(span.start_s - pad, (before + span.start_s) / 2, taken_s)
        padded = replace(span, start_s=start_s, end_s=min(span.end_s + pad, (span.end_s + after) / 2))
        if settings.short == "extend" and padded.length_s < settings.min_s:
            padded = _extended(padded, max(before, taken_s), min(after, end_s), settings.min_s)
        if padded.length_s < settings.min_s - ROUNDING_S:
            dropped["too-short"] += span.stop_word - span.first_word
        elif span.stop_word - span.first_word < settings.min_words:
            dropped["too-few-words"] += span.stop_word - span.first_word
        else:
            kept.append(padded)
    return kept


ROUNDING_S = 1e-6  # what sums of floating-point times may be off by


def _extended(span: _Span, before: float, after: float, length_s: float) -> _Span:
    """The span made length_s long, evenly on both sides as far as before and after allow."""
    lacking = length_s - span.length_s
    room_left, room_right = span.start_s - before, after - span.end_s
    right = min(lacking - min(lacking / 2, room_left), room_right)
    left = min(lacking - right, room_left)
    return replace(span, start_s=span.start_s - left, end_s=span.end_s + right)


# --- shots, even spans, given spans --------------------------------------------------------------------------------


def _even(start_s: float, end_s: float, settings: SegmentSettings) -> list[_Span]:
    """Spans of equal length, as near to the target as the range allows; none where all is shorter than min_s."""
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
    """One span per shot; long shots in even pieces, short ones left out: joining them would cross the cut."""
    spans = []
    for start_s, end_s in shots:
        pieces = _even(start_s, end_s, settings)
        dropped["short-shot"] += not pieces
        spans += _with_words(words, pieces)
    dropped["outside-shots"] += len(words) - sum(span.stop_word - span.first_word for span in spans)
    return [span for span in spans if _enough_words(span, settings, dropped)]


def _enough_words(span: _Span, settings: SegmentSettings, dropped: Counter) -> bool:
    """Shots in which nothing is said are wanted as they are; min_words is about shots in which too little is."""
    count = span.stop_word - span.first_word
    if 0 < count < settings.min_words:
        dropped["too-few-words"] += count
        return False
    return True


def _with_words(words: Sequence[Word], spans: Sequence[_Span]) -> list[_Span]:
    """The spans with the words spoken in them: those whose middle is."""
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
) -> tuple[list[dict], list[dict]]:
    """Rows of `sentences` and of `spans`. A sentence belongs to the span that holds most of its words."""
    clip_ids = [f"{video_id}.{n}" for n in numbers]
    held_by: list[int | None] = [None] * len(words)
    for k, span in reversed(list(enumerate(spans))):
        held_by[span.first_word : span.stop_word] = [k] * (span.stop_word - span.first_word)
    sentence_rows = []
    for n, sentence in enumerate(sentences):
        first, stop = sentence.first_word, sentence.last_word + 1
        holders = Counter(k for k in held_by[first:stop] if k is not None).most_common(1)
        sentence_rows.append(
            {
                "video_id": video_id,
                "n": n,
                "start_s": words[first].start_s,
                "end_s": words[stop - 1].end_s,
                "text": sentence.text,
                "num_words": stop - first,
                "align_cost": _mean(costs[first:stop]),
                "clip_id": clip_ids[holders[0][0]] if holders else None,
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
        }
        for span, n, clip_id in zip(spans, numbers, clip_ids, strict=True)
    ]
    return sentence_rows, span_rows


def _mean(costs: Sequence[float]) -> float | None:
    return sum(costs) / len(costs) if len(costs) else None
