"""A build of a list with hostile ids, titles, paths, addresses and files: each costs a row, the sound videos are done.

Defences: an id becomes a path only when it is plain, paths go to no shell and no SQL, addresses are checked before they
are connected to, files are opened by `clipmill.media.probe` alone, and nothing of a local file is quoted.
"""

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.helpers.builds import ask, build_here
from tests.helpers.http import media_server
from tests.helpers.media import flat_video

pytestmark = pytest.mark.slow

STAGES = ("ingest", "download", "transcribe", "segment", "cut", "caption", "pack")
STEER = "\x1b[2J\u202e\u200b'; DROP TABLE videos; --\x00<script>"
SETTINGS = [
    "transcribe.whisper=null",
    "segment.mode=shots",
    "caption.captioner=tests.helpers.poison:Poisoned",
    "caption.timeout_base_s=600",
    "download.allow_private_addresses=false",
    "download.retries=0",
    "download.max_bytes=1000000",
    "ingest.unit_videos=8",
]


class Hostile:
    """Hold the corpus, its list, and the requests that reached servers which must not be contacted."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.corpus = folder, folder / "corpus"
        self.videos = folder / "videos"
        self.videos.mkdir()
        (folder / "antidote").touch()
        (folder / "secret.txt").write_text("the-secret-of-this-machine\n" * 100)
        self.good = self._good()
        self.rows = [*self.good, *self._addresses(port), *self._files(), *self._not_even_sources()]

    def _good(self) -> list[dict]:
        names = [
            "plain.mp4",
            "$(touch RAN);`touch RAN`.mp4",
            "line\nbreak 'quote\".mp4",
            "\u202egpj\u200b.mp4",
            "-y.mp4",
        ]
        ids = ["sound", "../../../../tmp/owned", "x'; DROP TABLE clips; --", "nul\x00byte", "-rf"]
        flat_video(self.videos / "first.mp4", 0x70)
        for luma, name in enumerate(names, 0x70):
            shutil.copy(self.videos / "first.mp4", self.videos / name)
            with open(self.videos / name, "ab") as file:  # another video, by its hash
                file.write(b"\0\0\0\x09free" + bytes([luma]))
        (self.videos / "first.mp4").unlink()
        return [
            {"url": str(self.videos / name), "id": given, "title": STEER, "category": STEER}
            for name, given in zip(names, ids, strict=True)
        ]

    def _addresses(self, port: int) -> list[dict]:
        hosts = [
            "127.0.0.1",
            "localhost",
            "2130706433",
            "0177.0.0.1",
            "0x7f000001",
            "[::1]",
            "[::ffff:7f00:1]",
            "127.1",
        ]
        return [{"url": f"http://{host}:{port}/secret.mp4", "id": f"address{n}"} for n, host in enumerate(hosts)]

    def _files(self) -> list[dict]:
        hls = f"#EXTM3U\n#EXTINF:1,\n{(self.folder / 'secret.txt').as_uri()}\n"
        (self.videos / "playlist.mp4").write_text(hls)
        (self.videos / "noise.mp4").write_bytes(bytes(range(256)) * 50)
        (self.videos / "page.mp4").write_text("<html>nothing</html>")
        os.mkfifo(self.videos / "pipe.mp4")
        listed = {
            "playlist": str(self.videos / "playlist.mp4"),
            "noise": str(self.videos / "noise.mp4"),
            "page": str(self.videos / "page.mp4"),
            "pipe": str(self.videos / "pipe.mp4"),
            "device": "/dev/zero",
            "secret": str(self.folder / "secret.txt"),
            "fileurl": (self.folder / "secret.txt").as_uri(),
        }
        rows = [{"url": url, "id": name} for name, url in listed.items()]
        return rows[:-1] + [rows[-1] | {"url": rows[-1]["url"].replace("secret.txt", "videos/../secret.txt")}]

    def _not_even_sources(self) -> list[dict]:
        return [
            {"url": f"subfile,,start,0,end,99,,:{self.folder / 'secret.txt'}", "id": "subfile"},
            {"url": f"concat:{self.folder / 'secret.txt'}", "id": "concat"},
            {"url": "http://example.com\r\nHost: inside/x.mp4", "id": "crlf"},
            {"url": "gopher://127.0.0.1/x.mp4", "id": "gopher"},
            {"url": "data:video/mp4;base64,AAAA", "id": "data"},
            {"url": "\x00", "id": "nul"},
        ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, local_ray):
    folder = tmp_path_factory.mktemp("hostile")
    with media_server() as server:
        server.add("/secret.mp4", b"secret")
        hostile = Hostile(folder, server.port)
        hostile.good[0]["subtitle"] = str(folder / "secret.txt")
        listed = folder / "list.jsonl"
        listed.write_text("".join(json.dumps(row) + "\n" for row in hostile.rows))
        settings = [*SETTINGS, f"caption.options={{antidote: {folder / 'antidote'}}}"]
        hostile.report = build_here(hostile.corpus, [str(listed)], *settings, stages=STAGES)
        hostile.asked = list(server.requests)
    return hostile


def failures(hostile: Hostile, like: str) -> set[tuple[str, str]]:
    sql = f"SELECT v.source_id, f.error_class FROM failures f JOIN videos v ON v.video_id = f.item_id WHERE {like}"
    return set(ask(hostile.corpus, sql))


def test_the_sound_videos_are_done_whatever_they_are_called(hostile):
    assert ask(hostile.corpus, "SELECT count(DISTINCT video_id), count(*) FROM samples") == [(5, 5)]
    assert ask(hostile.corpus, "SELECT count(*) FROM captions") == [(5,)]


def test_ids_become_names_only_when_they_are_plain(hostile):
    ids = [video_id for (video_id,) in ask(hostile.corpus, "SELECT video_id FROM videos")]
    assert ids and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", video_id) for video_id in ids)
    given = {row["id"] for row in hostile.good} - {"nul\x00byte"}
    assert given <= {source_id for (source_id,) in ask(hostile.corpus, "SELECT source_id FROM videos")}
    names = [str(path.relative_to(hostile.corpus)) for path in hostile.corpus.rglob("*")]
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in names), "every file has a name of ours"
    for shard in (hostile.corpus / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(mp4|jpg|txt|json)", name) for name in tar.getnames())


def test_nothing_was_run_and_nothing_written_elsewhere(hostile):
    assert not list(hostile.folder.rglob("RAN")) and not Path("RAN").exists() and not Path("/tmp/owned").exists()
    made = {path.name for path in hostile.folder.iterdir()}
    assert made == {"corpus", "videos", "antidote", "secret.txt", "list.jsonl"}


def test_no_form_of_a_private_address_is_connected_to(hostile):
    assert failures(hostile, "f.item_id LIKE 'address%'") == {(f"address{n}", "private-address") for n in range(8)}
    assert hostile.asked == []


def test_files_that_are_no_videos_are_rows(hostile):
    names = ("playlist", "noise", "page", "pipe", "device", "secret")
    wanted = {(name, "not-a-video") for name in names}
    assert failures(hostile, f"f.item_id IN {names}") == wanted


def test_an_invalid_address_is_a_row_of_its_line(hostile):
    rows = ask(hostile.corpus, "SELECT error_class FROM failures WHERE stage = 'ingest'")
    refused = ask(hostile.corpus, "SELECT error_class FROM failures WHERE item_id = 'gopher'")
    assert [row for row in rows if row == ("bad-url",)] == [("bad-url",)] * 5 and refused == [("unsupported-url",)]


def test_nothing_of_a_local_file_is_quoted(hostile):
    secret = b"the-secret-of-this-machine"
    assert ask(hostile.corpus, "SELECT count(*) FROM failures WHERE error_class = 'bad-subtitle'") == [(1,)]
    for table in ("failures", "videos"):
        assert secret.decode() not in str(ask(hostile.corpus, f"SELECT t::VARCHAR FROM {table} t"))


def test_tables_are_whole_and_titles_as_given(hostile):
    assert ask(hostile.corpus, "SELECT count(*) FROM videos") == [(5 + 8 + 6 + 1,)]  # the secret twice, and gopher
    titles = {title for (title,) in ask(hostile.corpus, "SELECT title FROM videos WHERE source_id = 'sound'")}
    assert titles == {STEER}
