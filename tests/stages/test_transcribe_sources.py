"""A video's words come from the best of its usable subtitles."""

import math
from pathlib import Path

import pytest

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcribe_video
from shards.corpus.schema import TABLES

FILES = Path(__file__).parents[1] / "data" / "subtitles"


def subtitle(path: Path, kind: str = "manual", language: str | None = "en", format: str | None = None) -> dict:
    return {"path": str(path), "kind": kind, "language": language, "format": format}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def srt(text: str, start_s: int = 1, end_s: int = 4) -> str:
    return f"1\n00:00:{start_s:02d},000 --> 00:00:{end_s:02d},000\n{text}\n"


def never(*_):
    raise AssertionError("the video must not be transcribed")


def transcribe(files: list[dict], problems: list | None = None, **settings) -> dict:
    return transcribe_video(
        files, "video.mp4", TranscribeSettings(**{"whisper": None, **settings}), never, never, problems
    )


def text_of(row: dict) -> str:
    return " ".join(word["text"] for word in row["words"])


def test_the_row_has_the_columns_of_the_table(tmp_path):
    row = transcribe([subtitle(write(tmp_path, "a.srt", srt("Hello there")))])
    stamped = ("video_id", "source_sha256", "digest")
    assert list(row) == [name for name in TABLES["transcripts"].names if name not in stamped]
    assert row == {
        "language": "en",
        "origin": "manual",
        "word_times": "cues",
        "words": [
            {"text": "Hello", "start_s": 1.0, "end_s": 2.5},
            {"text": "there", "start_s": 2.5, "end_s": 4.0},
        ],
        "num_words": 2,
        "encoding": "utf-8",
        "encoding_guessed": False,
        "repairs": None,
        "asr_segments": None,
    }


def test_without_subtitles_and_without_a_model_there_are_no_words():
    row = transcribe([])
    assert (row["origin"], row["language"], row["word_times"], row["words"]) == ("none", None, "none", [])


@pytest.mark.parametrize(
    ("files", "settings", "chosen"),
    [
        (["auto en", "manual en"], {}, "manual en"),
        (["auto en", "manual en"], {"prefer": "auto"}, "auto en"),
        (["manual fr", "auto en"], {}, "auto en"),
        (["manual fr", "manual de"], {"languages": ["de", "fr"]}, "manual de"),
        (["manual en-GB", "manual en"], {}, "manual en"),
        (["manual fr", "manual en_US"], {}, "manual en_US"),
        (["manual en", "sidecar -"], {}, "sidecar -"),
        (["sidecar fr", "sidecar en"], {}, "sidecar en"),
        (["manual en", "given fr"], {}, "given fr"),
        (["manual fr"], {}, "manual fr"),
        (["manual fr", "manual -"], {}, "manual -"),
        (["manual fr"], {"other_languages": False}, "none"),
    ],
)
def test_what_the_user_gave_comes_first_then_language_then_kind(tmp_path, files, settings, chosen):
    given = []
    for name in files:
        kind, language = name.split()
        path = write(tmp_path, f"{name}.srt", srt(name))
        given.append(subtitle(path, kind, None if language == "-" else language))
    row = transcribe(given, **settings)
    assert (text_of(row) or "none") == chosen
    assert row["origin"] == chosen.split()[0]


def test_the_file_s_own_header_gives_a_missing_language():
    assert transcribe([subtitle(FILES / "automatic.vtt", "sidecar", None)])["language"] == "en"


def test_an_unusable_subtitle_is_passed_over_and_reported(tmp_path):
    bad = write(tmp_path, "bad.vtt", b"<html>404</html>")
    good = write(tmp_path, "good.srt", srt("Hello"))
    problems = []
    row = transcribe([subtitle(bad), subtitle(good, "auto")], problems)
    assert (row["origin"], text_of(row)) == ("auto", "Hello")
    assert [problem.error_class for problem in problems] == ["subtitle-unreadable"]
    assert "bad.vtt" in problems[0].message


def test_a_video_whose_only_subtitle_is_unusable_fails(tmp_path):
    with pytest.raises(ItemError, match=r"subtitle-unreadable: bad\.vtt"):
        transcribe([subtitle(write(tmp_path, "bad.vtt", b"<html>404</html>"))])


def test_a_subtitle_with_too_few_words_is_ignored(tmp_path):
    music = write(tmp_path, "music.srt", srt("[Music] Hello"))
    assert transcribe([subtitle(music)])["num_words"] == 1
    assert transcribe([subtitle(music)], min_words=2)["origin"] == "none"


# --- manual text on automatic times --------------------------------------------------------------------------------

SPOKEN = "red circles move past the blue square and then they stop for good".split()
STARTS = [0.5 + 0.4 * k + (1.7 if k > 6 else 0.0) for k in range(len(SPOKEN))]


def clock(seconds: float) -> str:
    return f"00:00:{math.floor(seconds):02d}.{round(seconds % 1 * 1000):03d}"


def automatic(words: list[str] = SPOKEN) -> str:
    tagged = words[0] + "".join(f"<{clock(t)}><c> {w}</c>" for w, t in zip(words[1:], STARTS[1:], strict=False))
    return f"WEBVTT\n\n{clock(STARTS[0])} --> 00:00:12.000\n \n{tagged}\n"


MANUAL = srt("Red circles move past the blue square, and then they stop for good.", 0, 12)


def test_manual_text_takes_the_word_times_of_the_automatic_captions(tmp_path):
    manual, auto = write(tmp_path, "manual.srt", MANUAL), write(tmp_path, "auto.vtt", automatic())
    row = transcribe([subtitle(manual), subtitle(auto, "auto")])
    assert (row["origin"], row["word_times"]) == ("manual", "tags")
    assert text_of(row) == "Red circles move past the blue square, and then they stop for good."
    assert [word["start_s"] for word in row["words"]] == pytest.approx(STARTS, abs=0.002)


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (automatic(), {"align_manual_to_auto": False}),
        (automatic("this has nothing whatever in common with anything that anybody said".split()), {}),
        (srt("Red circles move past the blue square and then they stop for good", 0, 9), {}),  # no word times in it
        ("garbage", {}),
    ],
    ids=["off", "other words", "no tags", "unreadable"],
)
def test_manual_cue_times_stay_where_the_automatic_ones_do_not_serve(tmp_path, other, settings):
    manual, auto = write(tmp_path, "manual.srt", MANUAL), write(tmp_path, "auto.vtt", other)
    row = transcribe([subtitle(manual), subtitle(auto, "auto")], **settings)
    assert row == transcribe([subtitle(manual)])
    assert row["word_times"] == "cues"


def test_automatic_captions_in_another_language_do_not_time_the_text(tmp_path):
    manual, auto = write(tmp_path, "manual.srt", MANUAL), write(tmp_path, "auto.vtt", automatic())
    assert transcribe([subtitle(manual), subtitle(auto, "auto", "fr")])["word_times"] == "cues"
