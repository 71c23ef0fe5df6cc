"""Local files are used in place and objects of stores are copied, both with their side-cars."""

import json
import os
from pathlib import Path

import fsspec
import pytest

from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import MediaInfo
from pipeline.stages.download.fetch import DownloadSettings, fetch
from pipeline.stages.download.sniff import subtitle_format
from shards.corpus.schema import TABLES
from tests.helpers.http import make_video

SETTINGS = DownloadSettings(object_store_schemes=["memory", "s3"], retries=0)
SRT = "1\n00:00:00,000 --> 00:00:01,000\nhello\n"
VTT = "WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n"


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("video") / "v.mp4", duration_s=0.4)


def get(url, tmp_path: Path, settings: DownloadSettings = SETTINGS, kind: str = "file", **columns) -> dict:
    source = {"video_id": "v1", "url": str(url), "kind": kind, **columns}
    return fetch(source, tmp_path / "corpus" / "sources", settings, corpus_root=tmp_path / "corpus")


def failure(url, tmp_path: Path, settings: DownloadSettings = SETTINGS, **columns) -> str:
    with pytest.raises(ItemError) as caught:
        get(url, tmp_path, settings, **columns)
    assert not caught.value.transient
    assert os.listdir(tmp_path / "corpus" / "sources") == []
    return caught.value.error_class


def test_a_local_file_is_used_where_it_lies(tmp_path, video):
    path = tmp_path / "a video.mp4"
    path.write_bytes(video)
    row = get(path, tmp_path)
    assert set(row) == set(TABLES["downloads"].names)
    assert (row["path"], row["num_bytes"], row["extractor"]) == (str(path), len(video), "file")
    assert os.listdir(tmp_path / "corpus" / "sources") == []


def test_a_local_file_can_be_copied(tmp_path, video):
    path = tmp_path / "a.mp4"
    path.write_bytes(video)
    row = get(path, tmp_path, SETTINGS.model_copy(update={"reference_local_files": False}))
    assert row["path"] == "sources/v1.mp4"
    assert (tmp_path / "corpus" / row["path"]).read_bytes() == video


def test_side_cars_and_the_named_subtitle_come_along(tmp_path, video):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.mp4": video,
        "a.srt": SRT.encode(),
        "a.de.vtt": VTT.encode(),
        "ab.vtt": VTT.encode(),
        "n.vtt": VTT.encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    row = get(folder / "a.mp4", tmp_path, subtitle=str(folder / "n.vtt"), language="fr")
    assert [(Path(s["path"]).name, s["kind"], s["language"], s["format"]) for s in row["subtitles"]] == [
        ("n.vtt", "given", "fr", "vtt"), ("a.srt", "sidecar", None, "srt"), ("a.de.vtt", "sidecar", "de", "vtt"),
    ]  # fmt: skip
    row = get(folder / "a.mp4", tmp_path, subtitle=str(folder / "a.srt"))
    assert [s["kind"] for s in row["subtitles"]] == ["sidecar", "sidecar"], "a side-car is not given twice"


def test_an_invalid_side_car_is_recorded(tmp_path, video):
    (tmp_path / "a.mp4").write_bytes(video)
    (tmp_path / "a.vtt").write_text("<html>404</html>")
    row = get(tmp_path / "a.mp4", tmp_path, subtitle=str(tmp_path / "gone.srt"))
    assert row["subtitles"] == []
    notes = json.loads(row["meta"])["subtitle_errors"]
    assert [note["error_class"] for note in notes] == ["not-found", "bad-subtitle"]


def test_a_side_car_that_leads_out_of_its_folder_is_not_read(tmp_path, video):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(video)
    (tmp_path / "secret.vtt").write_text(VTT)
    (tmp_path / "in" / "a.vtt").symlink_to(tmp_path / "secret.vtt")
    assert get(tmp_path / "in" / "a.mp4", tmp_path)["subtitles"] == []


def test_local_files_that_cannot_be_used(tmp_path, video):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello " * 1000)
    (tmp_path / "cut.mp4").write_bytes(video[:-1000])
    os.mkfifo(tmp_path / "pipe.mp4")
    assert failure(tmp_path / "none.mp4", tmp_path) == "not-found"
    assert failure(tmp_path / "empty.mp4", tmp_path) == "empty-file"
    assert failure(tmp_path / "text.mp4", tmp_path) == "not-a-video"
    assert failure(tmp_path / "cut.mp4", tmp_path) == "truncated"
    assert failure(tmp_path / "pipe.mp4", tmp_path) == "not-a-video"
    assert failure("/dev/zero", tmp_path) == "not-a-video"
    assert failure(tmp_path, tmp_path) == "not-a-video"
    small = SETTINGS.model_copy(update={"max_bytes": 100})
    (tmp_path / "a.mp4").write_bytes(video)
    assert failure(tmp_path / "a.mp4", tmp_path, small) == "too-large"


def test_an_object_of_a_store_is_copied(tmp_path, video):
    with fsspec.open("memory://bucket/a.mp4", "wb") as file:
        file.write(video)
    row = get("memory://bucket/a.mp4", tmp_path, kind="url")
    assert (row["path"], row["extractor"]) == ("sources/v1.mp4", "fsspec")
    assert (tmp_path / "corpus" / row["path"]).read_bytes() == video


def test_objects_that_cannot_be_used(tmp_path, video):
    with fsspec.open("memory://bucket/a.mp4", "wb") as file:
        file.write(video)
    with fsspec.open("memory://bucket/empty.mp4", "wb") as file:
        file.write(b"")
    assert failure("memory://bucket/none.mp4", tmp_path, kind="url") == "not-found"
    assert failure("memory://bucket/empty.mp4", tmp_path, kind="url") == "empty-file"
    small = SETTINGS.model_copy(update={"max_bytes": 1000})
    assert failure("memory://bucket/a.mp4", tmp_path, small, kind="url") == "too-large"
    assert failure("github://a:b@main/c.mp4", tmp_path, kind="url") == "unsupported-url"
    assert failure("memory://x::file:///etc/passwd", tmp_path, kind="url") == "unsupported-url"


def test_a_store_whose_library_is_missing_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    settings = SETTINGS.model_copy(update={"object_store_schemes": ["gs"]})
    with pytest.raises(UserError, match="gs"):
        get("gs://bucket/a.mp4", tmp_path, kind="url", settings=settings)


def test_the_callers_probe_decides(tmp_path, video):
    (tmp_path / "a.mp4").write_bytes(video)
    source = {"video_id": "v1", "url": str(tmp_path / "a.mp4"), "kind": "file"}
    info = MediaInfo("mov", 12.5, 4, 3, 25.0, 90, "h264", None)
    row = fetch(source, tmp_path / "sources", SETTINGS, probe=lambda path: info)
    assert (row["duration_s"], row["rotation"], row["container"]) == (12.5, 90, "mov")

    def refuse(path):
        raise ItemError("sandbox-timeout", "hung", transient=False)

    with pytest.raises(ItemError, match="sandbox-timeout"):
        fetch(source, tmp_path / "sources", SETTINGS, probe=refuse)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", VTT.encode(), "vtt"),
        ("a", b"\xef\xbb\xbf" + VTT.encode(), "vtt"),
        ("a", VTT.encode("utf-16"), "vtt"),
        ("a.vtt", SRT.encode(), "srt"),
        ("a", SRT.encode("utf-16"), "srt"),
        ("a", b'<?xml version="1.0"?>\n<tt xmlns="http://www.w3.org/ns/ttml"><body/></tt>', "ttml"),
        ("a.json3", b'{"wireMagic": "pb3", "events": []}', "json3"),
        ("a", b"[Script Info]\nTitle: x\n", "ass"),
    ],
)
def test_subtitle_formats_are_recognised_by_content(tmp_path, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    assert subtitle_format(path) == expected


def test_real_footage(footage, tmp_path):
    for path in sorted(footage.glob("*.*")):
        if path.suffix == ".md":
            continue
        if path.suffix == ".flac":
            assert failure(path, tmp_path) == "no-video-stream"
        else:
            assert get(path, tmp_path)["width"] > 0
