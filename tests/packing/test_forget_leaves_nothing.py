"""A forgotten video is hidden at once, removed to the last byte by `compact`, and never fetched again."""

import hashlib
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.base.errors import UserError
from clipmill.cli.forget import run_forget
from pipeline.engine.build import session
from pipeline.maintenance.forget import ForgetPlan, compact, find, forget
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.stages.download.fetch import DownloadSettings
from pipeline.stages.download.sniff import hash_file
from pipeline.stages.download.stage import run_download
from pipeline.stages.ingest.stage import ingest_sources
from pipeline.stages.pack import pack_state
from shards.corpus.manifest import is_current
from shards.corpus.source_ids import video_id_for
from shards.corpus.tombstones import FORGOTTEN, TOMBSTONE, hash_of, read_tombstones, write_tombstones
from shards.packing.tar import Blob, read_member, write_clips_tar
from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.builds import ask
from tests.helpers.shards import mp4_bytes
from tests.helpers.whole_corpus import VIDEOS, build_whole, pack_here, source_bytes, url_of, write_sources
from training.data.relocation import RelocationIndex

GONE = "video-b"  # in the group of video-e's first clip


@pytest.fixture
def corpus(whole, tmp_path):
    """Copy the session's corpus, whose build command named two URLs."""
    shutil.copytree(whole, tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def compacted(whole, tmp_path_factory):
    """Forget video-b and compact, for tests that only read the corpus."""
    root = tmp_path_factory.mktemp("compacted") / "corpus"
    shutil.copytree(whole, root)
    kill_a_download(root, GONE)
    forget_video(root, GONE)
    compact(root)
    return root


def kill_a_download(root: Path, video_id: str) -> None:
    """Write the files left by a worker that was killed while it downloaded a video again."""
    folder = root / "sources" / "u000000"
    (folder / f"{video_id}.part").mkdir(parents=True)
    (folder / f"{video_id}.part" / "media").write_bytes(source_bytes(video_id)[:100])
    (folder / f"{video_id}.part.lock").touch()


def forget_video(root: Path, *video_ids: str, reason: str | None = None) -> None:
    assert forget(root, find(root, list(video_ids), [], None), reason)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def lasting(root: Path) -> dict[str, bytes]:
    """Return every file that contains no times of its creation."""
    return {
        name: data
        for name, data in files(root).items()
        if not name.startswith((".clipmill", "manifest", "fragments/forgotten"))
    }


def clip_bytes(root: Path, video_id: str) -> list[bytes]:
    """Return the MP4s and pictures of a video's clips."""
    rows = ask(root, f"SELECT tar, mp4_offset, num_bytes, frames FROM clips WHERE video_id = '{video_id}'")
    pieces = [(tar, offset, size) for tar, offset, size, _ in rows]
    pieces += [(tar, frame["offset"], frame["num_bytes"]) for tar, _, _, frames in rows for frame in frames]
    return [read_member(root / tar, offset, size) for tar, offset, size in pieces]


def own_bytes(root: Path, video_id: str) -> list[bytes]:
    """Return a part of each medium that no other clip contains."""
    others = b"".join(piece for other in VIDEOS if other != video_id for piece in clip_bytes(root, other))
    pieces = []
    for data in clip_bytes(root, video_id):
        slices = (data[start : start + 48] for start in range(0, len(data) - 48, 48))
        pieces.append(next(piece for piece in slices if piece not in others))
    return pieces


def traces(root: Path, video_id: str, media: list[bytes]) -> list[str]:
    """Return the files that contain a video's id, URL, title, words or bytes."""
    words = [video_id, url_of(video_id), f"title of {video_id}", f"sesame{video_id}"]
    needles = [word.encode() for word in words] + [source_bytes(video_id)[:64], *media]
    found = {name for name in files(root) if video_id in name}
    for name, data in files(root).items():
        content = data + decoded_values(root / name)
        found |= {name for needle in needles if needle in content}
    return sorted(found)


def decoded_values(path: Path) -> bytes:
    """Return the values of a Parquet or DuckDB file, whose compression hides them from a search of its bytes."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return f"{table.to_pylist()} {table.schema.metadata}".encode()
    if path.suffix == ".duckdb":
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH '{path}' AS file (READ_ONLY)")
            tables = [name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
            return b" ".join(
                str(connection.sql(f'SELECT t::VARCHAR FROM file."{name}" t').fetchall()).encode() for name in tables
            )
    return b""


def test_every_query_leaves_it_out_at_once(corpus):
    forget_video(corpus, GONE)
    assert find(corpus, [GONE], [url_of(GONE)], None) == ForgetPlan(), "a second run finds nothing to do"
    for table in ("videos", "sentences", "spans", "clips", "samples", "catalog"):
        assert ask(corpus, f"SELECT count(*) FROM {table} WHERE video_id = '{GONE}'") == [(0,)], table
    for table in ("captions", "scores"):
        assert ask(corpus, f"SELECT count(*) FROM {table} WHERE clip_id LIKE '{GONE}.%'") == [(0,)], table
    assert ask(corpus, "SELECT count(*) FROM videos") == [(len(VIDEOS) - 1,)]
    assert ask(corpus, "SELECT len(places) FROM forgotten") == [(3,)]


def test_verify_says_what_waits_for_compact_and_calls_nothing_wrong(corpus):
    forget_video(corpus, GONE)
    with open_manifest(corpus) as connection:
        problems = verify(corpus, connection)
    assert {problem.kind for problem in problems} == {"forgotten"} and all(problem.is_warning for problem in problems)
    holds_it = ask(corpus, "SELECT count(DISTINCT shard) FROM samples")[0][0]
    assert 0 < len(problems) <= holds_it + 2


def test_no_byte_and_no_row_is_left(whole, compacted):
    media = own_bytes(whole, GONE)
    assert len(traces(whole, GONE, media)) > 10, "the search must find what is there"
    assert traces(compacted, GONE, media) == []


def test_all_else_is_as_it_was(whole, compacted):
    kept = f"WHERE video_id <> '{GONE}'"
    for table, columns in (
        ("videos", "*"),
        ("sentences", "*"),
        ("spans", "*"),
        ("samples", "* EXCLUDE (position, mp4_offset, jpg_offset, txt_offset, json_offset, json_bytes)"),
    ):
        sql = f"SELECT {columns} FROM {table} {kept} ORDER BY ALL"
        assert ask(compacted, sql) == ask(whole, sql), table
    for video_id in ("video-a", "video-e"):
        assert clip_bytes(compacted, video_id) == clip_bytes(whole, video_id)
    with open_manifest(compacted) as connection:
        assert verify(compacted, connection) == []


def test_only_the_touched_files_are_written_again(whole, compacted):
    before, after = lasting(whole), lasting(compacted)
    same = {name for name in after if before.get(name) == after[name]}
    holds_it = {shard for (shard,) in ask(whole, f"SELECT DISTINCT shard FROM samples WHERE video_id IN ('{GONE}')")}
    shards = {name.removeprefix("shards/") for name in before if name.startswith("shards/") and name.endswith(".tar")}
    assert shards - holds_it, "some shard must be untouched, or this proves nothing"
    assert {name for name in shards if f"shards/{name}" in same} == shards - holds_it
    other_units = {name for name in before if "-u000001-" in name or "-u000002-" in name}
    assert other_units and other_units <= same


def test_a_build_after_it_has_nothing_to_pack(compacted, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(compacted, root)
    before = files(root / "shards")
    with session(root, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        assert all(set(counts) <= {"done"} for counts in current.ledger.counts().values())
        current.publish()
        assert pack_state(current)["to_pack"] == 0
        assert pack_here(current).num_written == 0
    assert files(root / "shards") == before


def test_packing_without_compacting_moves_no_other_clip(whole, corpus):
    forget_video(corpus, "video-h")
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.refresh_state()
        current.publish()
        pack_here(current)
        current.publish()
    where = "SELECT clip_id, shard FROM samples WHERE video_id <> 'video-h' ORDER BY 1"
    assert ask(corpus, where) == ask(whole, where)


def test_the_same_list_does_not_bring_it_back(compacted, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(compacted, root)
    sources = write_sources(tmp_path / "list.jsonl", [*VIDEOS, "video-new"])
    with session(root, None, [], "test", create=False) as (current, _):
        report = ingest_sources(current, [str(sources)])
        current.refresh_state()
        assert (report.num_new, report.num_forgotten, report.num_problems) == (1, 1, 0)
        assert [item["video_id"] for item in current.ledger.work("download")] == ["video-new"]
    assert traces(root, GONE, []) == []


def test_a_url_can_be_forgotten_before_it_is_listed(corpus, tmp_path):
    forget(corpus, find(corpus, [], [url_of("video-later").replace("http:", "HTTP:")], None), None)
    sources = write_sources(tmp_path / "list.jsonl", ["video-later"])
    with session(corpus, None, [], "test", create=False) as (current, _):
        report = ingest_sources(current, [str(sources)])
    assert (report.num_new, report.num_forgotten) == (0, 1)


def test_copies_of_its_file_go_with_it(tmp_path):
    sources = write_sources(tmp_path / "list.jsonl", ["video-a", "video-b", "video-c"])
    build_whole(tmp_path / "corpus", sources, {"video-c": "video-a"})
    doomed = find(tmp_path / "corpus", [], [url_of("video-a")], None)
    assert [(video["video_id"], video["is_copy"]) for video in doomed.videos] == [("video-a", False), ("video-c", True)]
    forget(tmp_path / "corpus", doomed, None)
    compact(tmp_path / "corpus")
    assert traces(tmp_path / "corpus", "video-a", []) == traces(tmp_path / "corpus", "video-c", []) == []


def test_its_bytes_from_another_address_are_refused(corpus, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(mp4_bytes(1, 3, 0))
    tombstone = {"video_hash": "", "url_hash": "", "sha256": hash_file(film)[1], "at": datetime.now(UTC)}
    write_tombstones(corpus, [tombstone])
    source = {"video_id": "other", "url": str(film), "kind": "file", "subtitle": None, "language": None}
    item = {"item_id": "other", "key": "k", "attempts": 0, "cost": 1, **source}
    work = Task("download", "u000009", [item], DownloadSettings(reference_local_files=False), "f", str(corpus), "run")
    outcomes, _ = run_download(work)
    assert outcomes[0].failure.error_class == FORGOTTEN, outcomes[0].failure
    assert list((corpus / "sources" / "u000009").iterdir()) == []


@pytest.mark.parametrize("spell", [lambda url: url.replace("video-", "%76ideo%2D"), lambda url: f"{url}#t=10"])
def test_a_video_is_forgotten_by_any_spelling_of_its_url(corpus, spell):
    url = spell(url_of(GONE)).replace("http://", "HTTPS://")
    plan = find(corpus, [], [url], None)
    assert [video["video_id"] for video in plan.videos] == [GONE] and plan.urls == []


def test_tombstones_of_earlier_versions_know_the_spellings_that_follow_from_their_hashes(corpus, tmp_path):
    """They hold no further hashes; the other scheme and YouTube's pages are found all the same."""
    old = TOMBSTONE.remove(TOMBSTONE.get_field_index("other_hashes"))
    urls = ["http://e.example/x.mp4", "https://www.youtube.com/watch?v=dQw4w9WgXcQ"]
    rows = [
        {"video_hash": hash_of(video_id_for(url)), "url_hash": hash_of(url), "at": datetime.now(UTC)} for url in urls
    ]
    path = corpus / "fragments" / FORGOTTEN / "forget-old.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, old), path)
    listed = tmp_path / "list.txt"
    listed.write_text(
        "https://e.example:443/x.mp4\nhttp://youtube-nocookie.com:80/embed/dQw4w9WgXcQ\nhttp://e.example/y.mp4\n"
    )
    with session(corpus, None, [], "test", create=False) as (current, _):
        report = ingest_sources(current, [str(listed)])
        current.publish()
    assert (report.num_new, report.num_forgotten) == (1, 2)
    assert ask(corpus, "SELECT count(*) FROM forgotten WHERE other_hashes IS NULL") == [(2,)]


@pytest.mark.parametrize(
    ("forgotten", "listed"),
    [
        ("https://vimeo.com/76979871", "https://player.vimeo.com/video/76979871?h=1"),
        ("https://www.dailymotion.com/video/x5kesuj", "https://dai.ly/x5kesuj"),
        ("https://youtu.be/dQw4w9WgXcQ", "https://yewtu.be/watch?v=dQw4w9WgXcQ"),
        ("http://127.0.0.1/a%7eb.mp4", "https://127.0.0.1:443/./a~b.mp4"),
    ],
)
def test_a_source_listed_before_is_refused_before_anybody_is_asked(corpus, forgotten, listed):
    """A video may have been listed at another address before it was forgotten at this one."""
    forget(corpus, find(corpus, [], [forgotten], None), None)
    item = {"item_id": "other", "key": "k", "attempts": 0, "cost": 1, "video_id": "other", "url": listed, "kind": "url"}
    item["subtitle"] = None
    settings = DownloadSettings(proxy="http://127.0.0.1:9")  # whoever is asked, it fails otherwise
    outcomes, _ = run_download(Task("download", "u000009", [item], settings, "f", str(corpus), "run"))
    assert outcomes[0].failure.error_class == FORGOTTEN, outcomes[0].failure
    assert list((corpus / "sources" / "u000009").iterdir()) == []


def test_a_damaged_tombstone_is_not_passed_over(tmp_path):
    path = write_tombstones(tmp_path, [{"video_hash": "a", "url_hash": "b"}])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="is damaged .* Forget those videos again"):
        read_tombstones(tmp_path)


@pytest.mark.parametrize("condition", [" ", ";", " ; \n"])
def test_an_empty_condition_forgets_nothing(corpus, condition):
    with pytest.raises(UserError, match="the condition is empty"):
        find(corpus, [], [], condition)


def test_an_unknown_name_is_an_error_with_suggestions(corpus):
    with pytest.raises(UserError, match="no such video. Similar: video-"):
        find(corpus, ["vide-b"], [], None)
    with pytest.raises(UserError, match="no video meets this condition"):
        find(corpus, [], [], "title = 'nothing'")
    with pytest.raises(UserError, match="nothing to forget is given"):
        find(corpus, [], [], None)
    assert [v["video_id"] for v in find(corpus, [], [], "title LIKE '%video-c'").videos] == ["video-c"]
    with pytest.raises(UserError, match="pass --yes"):
        run_forget(corpus, [GONE], [], None, reason=None, yes=False, dry_run=False)
    assert run_forget(corpus, [GONE], [], None, reason=None, yes=False, dry_run=True) == 0
    assert ask(corpus, "SELECT count(*) FROM videos") == [(len(VIDEOS),)]


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from pathlib import Path
import shards.packing.compact, shards.packing.tar, shards.corpus.fragments, pipeline.maintenance.forget
left = {calls}
def dying(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
os.replace, os.unlink = dying(os.replace), dying(os.unlink)  # which pathlib calls, too
pipeline.maintenance.forget.compact(Path({root!r}))
"""


def commit_edits(root: Path) -> None:
    """Commit edited clips of video-a and video-b with a tar of their own, as `clipmill edit` does."""
    [path] = (root / "fragments" / "clips").glob("*-u000000-*.parquet")
    rows = [row for row in pq.read_table(path).to_pylist() if row["clip_id"] in ("video-a.1", "video-b.1")]
    items = [{"item_id": row["video_id"], "key": "k", "attempts": 0, "cost": 1} for row in rows]
    work = Task("edit", "u000000", items, None, "f", str(root), "run")
    blobs = [Blob(f"{row['clip_id']}.mp4", root / row["tar"], row["mp4_offset"], row["num_bytes"]) for row in rows]
    name, outcomes = f"clips/{work.name}.tar", []
    for row, member in zip(rows, write_clips_tar(root / name, blobs), strict=True):
        row |= {"editing": "e", "round": 1, "tar": name, "mp4_offset": member.offset, "frames": []}
        moved = {"editing": "e", "round": 1, "clip_id": row["clip_id"], "video_id": row["video_id"]}
        outcomes.append(Outcome(row["video_id"], {"edited_clips": [row], "clip_edits": [moved]}))
    commit(work, outcomes, [name])


def test_edited_clips_go_too_and_others_are_found_where_they_moved(corpus):
    commit_edits(corpus)
    forget_video(corpus, GONE)
    compact(corpus)
    assert traces(corpus, GONE, []) == []
    [(clip_id, sha256, tar, offset, size)] = ask(
        corpus, "SELECT clip_id, sha256, tar, mp4_offset, num_bytes FROM edited_clips"
    )
    data = read_member(corpus / tar, offset, size)
    assert clip_id == "video-a.1" and hashlib.sha256(data).hexdigest() == sha256
    assert ask(corpus, "SELECT clip_id FROM clip_edits") == [("video-a.1",)]
    [place] = RelocationIndex(corpus).find([bytes.fromhex(sha256)])
    assert read_member(corpus / place.shard, place.offset, place.num_bytes) == data


@pytest.mark.slow
def test_killed_while_compacting_and_run_again_it_ends_in_the_same_bytes(corpus, compacted):
    """Compacting is killed twice, each time before the nth file is renamed or removed."""
    forget_video(corpus, GONE)
    for number in (8, 30):
        script = KILLED.format(paths=sys.path, calls=number, root=str(corpus))
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not is_current(corpus), "a build must publish after a compaction that was killed"
    compact(corpus)
    assert lasting(corpus) == lasting(compacted)
    assert traces(corpus, GONE, []) == []
    with open_manifest(corpus) as connection:
        assert verify(corpus, connection) == []
