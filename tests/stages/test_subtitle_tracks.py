"""Subtitle tracks inside a video become words, in the wanted language, on the clock of play."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest

from clipmill.base.errors import ItemError
from pipeline.stages.transcribe.cues import SubtitleSettings
from pipeline.stages.transcribe.subtitles import words_of
from pipeline.stages.transcribe.tracks import read_track, subtitle_tracks
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcribe_video

ENGLISH = "1\n00:00:01,000 --> 00:00:02,000\nHello <i>there</i>\n\n2\n00:00:03,000 --> 00:00:04,500\nNOTE two\n{}& 42\n"
GERMAN = "1\n00:00:01,000 --> 00:00:02,000\nHallo da\n"
ASS = (
    "[Script Info]\nScriptType: v4.00+\n[V4+ Styles]\nFormat: Name\nStyle: Default\n[Events]\n"
    "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    "Dialogue: 0,0:00:01.00,0:00:03.00,Default,,0,0,0,,{\\k50}Red{\\i0} {\\k50}circles, yes.\n"
)
VTT = "WEBVTT\n\n00:01.000 --> 00:02.000\nred<00:00:01.250> blue<00:00:01.500> green\n"


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def video(folder: Path, name: str, codec: str, tracks: list[tuple[str, str, str]], options: str = "") -> Path:
    """Make a video of 5 s with the tracks (file name, its text, language)."""
    path, inputs, maps, languages = folder / name, [], ["-map", "0:v"], []
    for number, (file, text, language) in enumerate(tracks):
        (folder / file).write_text(text)
        inputs += [*options.split(), "-i", folder / file]
        maps += ["-map", str(number + 1)]
        languages += [f"-metadata:s:s:{number}", f"language={language}"]
    picture = [*options.split(), "-f", "lavfi", "-i", "testsrc=d=5:s=64x48:r=5"]
    coder = ["-c:v", "libvpx" if name.endswith("webm") else "libx264", "-c:s", codec]
    ffmpeg(*picture, *inputs, *maps, *coder, *languages, *(["-copyts"] if options else []), path)
    return path


def words(path: Path, track: dict) -> tuple[list[tuple[str, float]], str]:
    found, word_times = words_of(read_track(path, track["track"], SubtitleSettings()))
    return [(word.text, word.start_s) for word in found], word_times


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "mov_text"), ("v.mov", "mov_text"), ("v.mkv", "srt")])
def test_each_track_has_its_language_and_its_words(tmp_path, name, codec):
    path = video(tmp_path, name, codec, [("de.srt", GERMAN, "ger"), ("en.srt", ENGLISH.format(""), "eng")])
    tracks = subtitle_tracks(path)
    assert [(track["language"], track["kind"]) for track in tracks] == [("de", "embedded"), ("en", "embedded")]
    spoken = words_of(read_track(path, tracks[1]["track"], SubtitleSettings()))[0]
    assert [word.text for word in spoken] == ["Hello", "there", "NOTE", "two &", "42"]
    assert (spoken[0].start_s, spoken[2].start_s, spoken[-1].end_s) == (1.0, 3.0, 4.5)


def test_ass_and_webvtt_tracks_keep_their_word_times(tmp_path):
    path = video(tmp_path, "v.mkv", "copy", [("en.ass", ASS, "eng")])
    assert words(path, subtitle_tracks(path)[0]) == ([("Red", 1.0), ("circles,", 1.5), ("yes.", 2.5)], "tags")
    path = video(tmp_path, "v.webm", "copy", [("en.vtt", VTT, "eng")])
    assert words(path, subtitle_tracks(path)[0]) == ([("red", 1.0), ("blue", 1.25), ("green", 1.5)], "tags")


def test_the_times_of_a_track_count_from_the_start_of_play(tmp_path):
    path = video(tmp_path, "v.mkv", "copy", [("en.vtt", VTT, "eng")], options="-itsoffset 2")
    assert words(path, subtitle_tracks(path)[0])[0][0] == ("red", 1.0)


def transcript(path: Path, files: list[dict] = (), **settings) -> dict:
    files = [*files, *subtitle_tracks(path)]
    return transcribe_video(files, path, TranscribeSettings(**{"whisper": None, **settings}))


def test_a_track_in_the_wanted_language_is_used_after_files_that_the_user_gave(tmp_path):
    path = video(tmp_path, "v.mkv", "srt", [("de.srt", GERMAN, "ger"), ("en.srt", ENGLISH.format(""), "eng")])
    row = transcript(path)
    assert (row["origin"], row["language"], row["words"][0]["text"]) == ("embedded", "en", "Hello")
    assert transcript(path, languages=["deu"])["words"][0]["text"] == "Hallo"
    assert transcript(path, languages=["fr"], other_languages=False)["origin"] == "none"
    given = tmp_path / "given.srt"
    given.write_text(GERMAN.replace("da", "du"))
    files = [{"path": str(given), "language": "de", "kind": "sidecar", "format": "srt"}]
    assert [word["text"] for word in transcript(path, files)["words"]] == ["Hallo", "du"]
    auto = [{**files[0], "kind": "auto", "language": "en"}]
    assert transcript(path, auto)["origin"] == "embedded"
    assert transcript(path, auto, prefer="auto")["origin"] == "auto"


def test_a_forced_track_comes_last(tmp_path):
    path = video(tmp_path, "v.mkv", "srt", [("a.srt", GERMAN, "eng"), ("en.srt", ENGLISH.format(""), "eng")])
    marked = tmp_path / "forced.mkv"
    ffmpeg("-i", path, "-map", "0", "-c", "copy", "-disposition:s:0", "forced", marked)
    assert transcript(marked)["words"][0]["text"] == "Hello"


def test_an_impossible_character_in_a_track_costs_no_word(tmp_path):
    path = video(tmp_path, "v.mkv", "copy", [("en.srt", ENGLISH.format("&#99999999999; "), "eng")])
    assert [word["text"] for word in transcript(path)["words"]] == ["Hello", "there", "NOTE", "two &", "42"]


def test_a_video_without_text_tracks_has_none_and_another_stream_is_refused(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=d=1:s=64x48:r=5", tmp_path / "v.mp4")
    assert subtitle_tracks(tmp_path / "v.mp4") == []
    for index in (0, 7):
        with pytest.raises(ItemError, match="is not a subtitle track"):
            read_track(tmp_path / "v.mp4", index, SubtitleSettings())


def test_a_damaged_track_is_read_or_refused(tmp_path):
    path = video(tmp_path, "v.mkv", "srt", [("en.srt", ENGLISH.format(""), "eng")])
    data = path.read_bytes()
    for length in range(0, len(data), len(data) // 23):
        path.write_bytes(data[:length])
        try:
            for track in subtitle_tracks(path):
                read_track(path, track["track"], SubtitleSettings())
        except ItemError as error:
            assert error.error_class in ("subtitle-unreadable", "not-a-video", "empty-file")
