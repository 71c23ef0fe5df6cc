"""Sentences and spans recovered from typical subtitle files match the words that were spoken, and their times."""

import numpy as np
import pytest

from pipeline.demo.grammar import sample_scene
from pipeline.demo.narration import SUBTITLE_WRITERS, Sentence, narrate
from pipeline.stages.segment.segment import SegmentSettings, segment_video
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcribe_video
from pipeline.stages.transcribe.words import Word


def narration(seed: int, num_scenes: int = 30) -> tuple[list[Sentence], float]:
    """Return a narration of scenes, and the end of the last one."""
    rng, at, scenes = np.random.default_rng(seed), 0.0, []
    for _ in range(num_scenes):
        scene = sample_scene(rng, float(rng.uniform(6, 15)))
        scenes.append((at, scene))
        at += scene.duration_s + (3.0 if rng.random() < 0.2 else 0.0)
    return narrate(scenes, rng, filler_fraction=0.2), at


def transcript(folder, kinds: list[str], sentences: list[Sentence]) -> list[Word]:
    files = []
    for kind in kinds:
        extension, write = SUBTITLE_WRITERS[kind]
        path = folder / f"{kind}.{extension}"
        path.write_text(write(sentences, True))
        files.append({"path": str(path), "kind": kind.split("-")[0], "language": "en", "format": extension})
    row = transcribe_video(files, "video.mp4", TranscribeSettings(whisper=None))
    return [Word(**word) for word in row["words"]]


def bare(text: str) -> str:
    return "".join(ch for ch in text.casefold() if ch.isalnum() or ch == "'")


@pytest.mark.parametrize("kind", SUBTITLE_WRITERS)
def test_every_subtitle_kind_gives_back_the_words_that_were_said(tmp_path, kind):
    sentences, _ = narration(1)
    found = transcript(tmp_path, [kind], sentences)
    said = [part for sentence in sentences for word in sentence.words for part in word.text.replace("-", " ").split()]
    heard = [part for word in found for part in word.text.replace("-", " ").split()]
    assert [bare(word) for word in heard] == [bare(word) for word in said]


@pytest.mark.parametrize("kinds", [["manual-vtt", "auto-vtt"], ["manual-srt", "auto-json3"]])
def test_sentence_boundaries_are_within_a_fifth_of_a_second(tmp_path, kinds):
    sentences, end_s = narration(2)
    result = segment_video("v", transcript(tmp_path, kinds, sentences), end_s, None, None, SegmentSettings())
    assert [row["text"] for row in result.sentences] == [sentence.text for sentence in sentences]
    errors = [abs(row["start_s"] - said.start_s) for row, said in zip(result.sentences, sentences, strict=True)]
    errors += [abs(row["end_s"] - said.end_s) for row, said in zip(result.sentences, sentences, strict=True)]
    assert np.median(errors) <= 0.2
    assert result.dropped == {}


def test_word_times_come_from_the_automatic_captions_where_there_are_such(tmp_path):
    sentences, _ = narration(3)
    truth = [word.start_s for sentence in sentences for word in sentence.words]

    def error_s(kinds: list[str]) -> float:
        found = [word.start_s for word in transcript(tmp_path, kinds, sentences)]
        return float(np.mean(np.abs(np.array(found) - truth)))

    assert error_s(["manual-vtt", "auto-vtt"]) < 0.01 < error_s(["manual-vtt"])


@pytest.mark.parametrize("kind", ["auto-vtt", "auto-json3"])
def test_spans_of_automatic_captions_hold_what_is_said_in_their_time(tmp_path, kind):
    sentences, end_s = narration(4)
    result = segment_video("v", transcript(tmp_path, [kind], sentences), end_s, None, None, SegmentSettings())
    truth = [word for sentence in sentences for word in sentence.words]
    for span in result.spans:
        inside = [w.text for w in truth if span["start_s"] - 0.01 <= (w.start_s + w.end_s) / 2 < span["end_s"] + 0.01]
        assert [bare(word) for word in span["text"].split()] == [bare(word) for word in " ".join(inside).split()]
