"""A corpus in an S3 store equals one in a folder, from any machine and for every reader."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("moto", reason="no S3 server: moto is not installed")

import shards.corpus.tombstones  # noqa: E402
from clipmill.base.errors import UserError  # noqa: E402
from pipeline.engine.build import build, session, status  # noqa: E402
from pipeline.engine.registry import stage_names  # noqa: E402
from pipeline.maintenance.forget import compact, find, forget  # noqa: E402
from pipeline.maintenance.verify import verify_with_sandbox  # noqa: E402
from pipeline.stages import pack as pack_stage  # noqa: E402
from pipeline.stages.pack import VolumePacking, planned  # noqa: E402
from pipeline.stages.pack_notes import Pack  # noqa: E402
from shards.packing.pack import next_paths, write_shard  # noqa: E402
from shards.query.disk import disk_use  # noqa: E402
from shards.query.explain import explain  # noqa: E402
from shards.query.sql import open_manifest  # noqa: E402
from shards.storage import s3 as stores  # noqa: E402
from shards.storage.mirror import for_reading, mirror  # noqa: E402
from shards.storage.s3 import Store  # noqa: E402
from tests.helpers.builds import tables  # noqa: E402
from tests.helpers.loaders import MAX_TOKENS, SIZE  # noqa: E402
from tests.helpers.shards import shard_rows  # noqa: E402
from tests.helpers.stores import build_in, content, keys, keys_of  # noqa: E402
from tests.helpers.whole_corpus import pack_here  # noqa: E402
from tests.training.test_training_forgets import WORDS, read_all  # noqa: E402
from training.data.sample_reader import SampleReader  # noqa: E402
from training.data.selection import Selection, freeze  # noqa: E402
from training.data.tokenizer import TextEncoder  # noqa: E402
from training.settings import DataSettings  # noqa: E402

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(scope="module")
def stored(server, tmp_path_factory):
    """Return the URL of a complete corpus, for tests that only read it."""
    folder, url = tmp_path_factory.mktemp("stored"), "s3://corpora/whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPMILL_MIRROR", str(folder / "builder"))
        build_in(url, folder)
    return url


def content_of(folder: Path) -> dict[str, bytes]:
    files = [path for part in ("shards", "clips") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_it_has_the_bytes_and_rows_of_a_corpus_in_a_folder(stored, whole):
    assert content(stored) == content_of(whole)
    assert keys(stored) == keys_of(whole)
    assert tables(for_reading(stored, "manifest.duckdb")) == tables(whole)


def test_another_machine_has_nothing_to_do(stored, server):
    before = Store.of(stored).list("fragments/")
    report = build(stored, [], stages=stage_names(), recipe=None, assignments=[], command="test")
    assert not report.did_something and report.pack.num_samples == 24
    assert Store.of(stored).list("fragments/") == before
    assert status(stored, []).pack == {"packed": 24, "to_pack": 0}
    server.requests.clear()
    assert not build(stored, [], stages=stage_names(), recipe=None, assignments=[], command="test").did_something
    assert len(server.requests) <= 22, "existing files are not fetched again"


def test_a_merged_corpus_is_read_with_few_requests(server, machine, tmp_path):
    url, arguments = "s3://corpora/merged", {"stages": stage_names(), "recipe": None, "command": "test"}
    build_in(url, tmp_path)
    build(url, [], assignments=["engine.merge_commits=1"], **arguments)
    fragments = [key for key in keys(url) if key.startswith("fragments/")]
    merged = {key for key in fragments if "/merged-" in key}
    assert set(fragments) - merged == {key for key in fragments if "/ingest-" in key} and len(merged) == 9
    before, story = Store.of(url).list("fragments/"), explain(url, "video-b.1")
    machine("another machine")
    server.requests.clear()
    assert not build(url, [], assignments=[], **arguments).did_something
    assert sum("fragments/" in path for method, path in server.requests if method == "GET") <= len(fragments) + 1
    assert Store.of(url).list("fragments/") == before and explain(url, "video-b.1").attempts == story.attempts
    problems = verify_with_sandbox(url, False, Console(quiet=True), deep=True)[0]
    assert {problem.kind for problem in problems} <= {"missing-source", "missing-subtitle"}, "sources are not uploaded"


def test_every_reader_opens_it(stored, whole):
    with open_manifest(stored) as connection:
        assert connection.execute("SELECT count(*) FROM samples").fetchall() == [(24,)]
    story, expected = explain(stored, "video-b.1"), explain(whole, "video-b.1")
    places = [place for place in expected.places if place["what"] != "source"]  # sources are kept on this machine
    assert story.places == places and len(story.attempts) == len(expected.attempts)


def test_a_corpus_is_copied_into_a_store_and_out_of_one(whole, stored, tmp_path):
    """Objects have the names of files, so any copying tool works."""
    copied, folder = Store.of("s3://corpora/copied"), tmp_path / "folder"
    for name in {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}:
        if not name.startswith(".clipmill/"):
            copied.upload(name, whole / name)
    for name in Store.of(stored).list():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Store.of(stored).download(name, folder / name)
    sources = sorted((whole / "sources").rglob("*.mp4"))
    for corpus in (copied.url, folder):
        report = build(corpus, [], stages=stage_names(), recipe=None, assignments=[], command="test")
        assert not report.did_something and report.pack.num_samples == 24
    assert sources and {str(path.relative_to(whole)) for path in sources} <= keys(copied.url)


def test_verify_reads_shards_and_keeps_none(stored, machine):
    problems, checked = verify_with_sandbox(stored, False, Console(quiet=True))
    assert problems == [] and checked.startswith("6 shards, 24 samples")
    assert not list(machine("first machine").rglob("*.tar"))


def reader_of(corpus, folder: Path) -> SampleReader:
    freeze(folder / "selection.arrow", corpus)
    data = DataSettings(num_frames=2, apart=())
    return SampleReader(Selection(folder / "selection.arrow"), data, TextEncoder(WORDS, MAX_TOKENS), SIZE)


def test_training_reads_it_by_ranges_on_a_machine_that_has_nothing(stored, whole, tmp_path, machine, server):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    expected = read_all(reader_of(whole, tmp_path / "there"))
    reader = reader_of(stored, tmp_path / "here")
    server.requests.clear()
    found = read_all(reader)
    assert found.failures == [] and np.array_equal(found.pixels.frames_BTSS3, expected.pixels.frames_BTSS3)
    assert np.array_equal(found.pixels.stills_B1SS3, expected.pixels.stills_B1SS3)
    assert 0 < sum(path.endswith(".tar") for _, path in server.requests) <= 2 * 6, "a few reads for each shard"
    assert not list(machine("first machine").rglob("*.tar"))


def test_training_finds_what_moved_when_the_corpus_was_packed_anew(machine, tmp_path):
    url = "s3://corpora/moves"
    build_in(url, tmp_path, 2)
    machine("the trainer's")
    reader = reader_of(url, tmp_path)
    before = read_all(reader)
    machine("first machine")
    with session(url, None, ["pack.seed=5", "pack.max_samples=5"], "test", create=False) as (current, _):
        current.refresh_state()
        current.publish()
        assert pack_here(current).num_written
        current.publish()
    machine("the trainer's")
    after = read_all(reader)
    assert after.failures == [] and np.array_equal(after.pixels.frames_BTSS3, before.pixels.frames_BTSS3)
    assert verify_with_sandbox(url, False, Console(quiet=True))[0] == []


def test_a_node_that_has_nothing_fetches_what_it_packs(stored, whole, tmp_path):
    """A Ray task on another node does this."""
    with session(stored, None, [], "test", create=False) as (current, _), open_manifest(stored) as connection:
        _, [plan, *_] = next(planned(current.corpus.root, connection, Pack("", current.settings.pack)))
        rows = shard_rows(connection, plan)
        node = mirror(tmp_path / "another node" / "corpus", Store.of(stored))
        assert write_shard(plan, rows, node.root).failures == []
        assert (node.root / next_paths(plan)[0]).read_bytes() == (whole / "shards" / plan.name).read_bytes()
        current.corpus.files.remove_folder("shards/.next")


def test_shards_that_another_machine_has_written_are_put_in_place(stored, whole, tmp_path):
    """As Ray tasks do: nothing of this process has seen the files."""
    with session(stored, None, [], "test", create=False) as (current, _), open_manifest(stored) as connection:
        pack, files = Pack("", current.settings.pack), current.corpus.files
        volume, plans = next(planned(current.corpus.root, connection, pack))
        packing = VolumePacking(current, pack, volume, plans, redo=True)
        there = (tmp_path / "another node" / "corpus", Store.of(stored), False)
        tasks = [(plan, rows, *there) for plan, rows, *_ in packing.tasks(connection)]
        (tmp_path / "tasks").write_bytes(pickle.dumps(tasks))
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "tasks")], check=True)
        for _ in tasks:
            packing.add([])
        assert packing.commit().num_written == len(plans) > 1
        assert not files.sizes("shards/.next")
    assert content(stored) == content_of(whole)


WRITE = """
import pickle, sys
from pipeline.stages.pack import write_task
for task in pickle.load(open(sys.argv[1], "rb")):
    write_task(*task)
"""


def test_a_forgotten_video_is_hidden_on_every_machine(server, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.corpus.tombstones, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(shards.corpus.tombstones, "STORE_EVERY_S", 0.0)
    url = "s3://corpora/forgets"
    build_in(url, tmp_path, 3)
    reader = reader_of(url, tmp_path)
    assert read_all(reader).failures == []
    machine("another machine")
    assert forget(url, find(url, ["video-b"], [], None), None)
    machine("first machine")
    assert {failure.error.error_class for failure in read_all(reader).failures} == {"forgotten"}
    with open_manifest(url) as connection:
        assert connection.execute("SELECT count(*) FROM samples WHERE video_id = 'video-b'").fetchall() == [(0,)]
    machine("another machine")
    assert compact(url).num_samples == 3
    store = Store.of(url)
    assert [key for key in store.list() if b"video-b" in store.read(key).data or "video-b" in key] == []
    left = [path for path in machine("another machine").rglob("*") if path.is_file()]
    assert [path for path in left if b"video-b" in path.read_bytes()] == []


def test_transient_failures_are_retried(stored, server, monkeypatch):
    """In this test every request fails once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    stores._make_client.cache_clear()
    seen: set[tuple[str, str]] = set()

    def once(method: str, path: str) -> int | None:
        if (method, path) in seen:
            return None
        seen.add((method, path))
        return 503

    server.spoil = once
    try:
        with open_manifest(stored) as connection:
            assert connection.execute("SELECT count(*) FROM samples").fetchall() == [(24,)]
        assert seen
    finally:
        stores._make_client.cache_clear()


def test_a_store_that_does_not_answer_is_a_clear_message(stored, server):
    server.spoil = lambda method, path: 503
    with pytest.raises(UserError, match=r"s3://corpora/whole cannot be .*503.*again to continue"):
        build(stored, [], stages=stage_names(), recipe=None, assignments=[], command="test")


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ("s3://corpora", "write it as s3://BUCKET/PREFIX"),
        ("s3://no-such-bucket/corpus", "is not a corpus"),
        ("s3://corpora/nothing-here", "is not a corpus"),
    ],
)
def test_mistakes_are_errors_with_a_fix(corpus, said):
    with pytest.raises(UserError, match=said):
        build(corpus, [], stages=["cut"], recipe=None, assignments=[], command="test")
    with pytest.raises(UserError):
        open_manifest(corpus)


def test_shards_that_a_store_cannot_copy_are_refused(stored):
    with pytest.raises(UserError, match=r"pack.shard_bytes = 6000000000: at most 4000000000"):
        build(stored, [], stages=["pack"], recipe=None, assignments=["pack.shard_bytes=6000000000"], command="test")


def test_a_prefix_with_other_things_is_no_corpus():
    Store.of("s3://corpora/photos").write("summer.jpg", b"sea")
    for url, said in (
        ("s3://corpora/photos", "not empty and not a corpus"),
        ("s3://no-such/x", "bucket 'no-such' does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            build(url, [], stages=stage_names(), recipe=None, assignments=[], command="test")


@pytest.mark.parametrize(
    "name", ["fragments/../../../x.parquet", "fragments//etc/x.parquet", "a\tb", "fragments/..\\x"]
)
def test_a_key_that_leads_out_of_the_mirror_becomes_no_path(name):
    store = Store("corpora", f"hostile{len(name)}/")
    store.write(name, b"")
    with pytest.raises(UserError, match="does not belong to a corpus"):
        for_reading(store.url, "fragments/")
        store.list()


def test_large_files_go_up_in_parts_and_appear_whole(tmp_path, monkeypatch, server):
    monkeypatch.setattr(stores, "MOST_BYTES_AT_ONCE", 1_000_000)
    monkeypatch.setattr(stores, "PART_BYTES", 5 * 2**20)
    store, path = Store.of("s3://corpora/large"), tmp_path / "shard.tar"
    path.write_bytes(np.random.default_rng(0).bytes(6_000_000))
    store.upload("shard.tar", path, if_none_match=True)
    assert store.read("shard.tar").data == path.read_bytes()
    server.spoil = lambda method, path: 503 if method == "POST" else None
    with pytest.raises(UserError):
        store.upload("other.tar", path)
    assert store.head("other.tar") is None


def test_without_the_extra_it_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    stores._make_client.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'clipmill\[s3\]'"):
        status("s3://corpora/whole", [])
    stores._make_client.cache_clear()


def test_help_and_folders_need_no_client():
    code = "import sys, clipmill.cli.app, pipeline.engine.build; sys.exit('botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_a_named_pack_is_read_and_forgotten_on_every_machine(server, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_stage, "FEW_SHARDS", 1000)  # written in this process
    url = "s3://corpora/named-packs"
    build_in(url, tmp_path, 3)
    arguments = {"stages": ["pack"], "recipe": None, "command": "test", "pack": "no-twos"}
    build(url, [], assignments=["pack.where=clip_id NOT LIKE '%.2'"], **arguments)
    machine("another machine")
    assert verify_with_sandbox(url, False, Console(quiet=True))[0] == []
    freeze(tmp_path / "selection.arrow", url, pack="no-twos")
    selection = Selection(tmp_path / "selection.arrow")
    assert selection.num_clips == 6 and selection.column("shard")[0].as_py().startswith("shards/no-twos/")
    with open_manifest(url) as connection:
        use = disk_use(url, connection)
    objects = Store.of(url).list("shards/no-twos/")
    assert use.kinds["shards/no-twos"] == (len(objects), sum(each.num_bytes for each in objects.values()))
    assert build(url, [], assignments=[], **arguments).pack.num_written == 0, "with its recorded settings"
    assert forget(url, find(url, ["video-b"], [], None), None)
    compact(url)
    assert not any(b"video-b" in Store.of(url).read(key).data for key in Store.of(url).list("shards/"))
    assert verify_with_sandbox(url, False, Console(quiet=True))[0] == []
    assert build(url, [], assignments=[], **arguments).pack.num_written == 0


def test_clips_are_in_shards_alone_on_every_machine(server, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_stage, "FEW_SHARDS", 1000)  # written in this process
    url = "s3://corpora/released"
    build_in(url, tmp_path, 3)
    before = {key: Store.of(url).read(key).data for key in Store.of(url).list("shards/")}
    arguments = {"stages": ["pack"], "recipe": None, "command": "test"}
    build(url, [], assignments=["pack.keep_clips=false"], **arguments)
    assert list(Store.of(url).list("clips/")) == []
    machine("another machine")
    assert {key: Store.of(url).read(key).data for key in Store.of(url).list("shards/")} == before
    assert not build(url, [], assignments=[], **arguments).did_something
    build(url, [], assignments=["pack.max_samples=5", "pack.where=clip_id NOT LIKE '%.1'"], **arguments)
    assert [key.partition("-")[0] for key in Store.of(url).list("clips/")] == ["clips/kept"]
    problems = verify_with_sandbox(url, False, Console(quiet=True), deep=True)[0]
    assert [problem for problem in problems if not problem.is_warning] == []
    build(url, [], assignments=["pack.max_samples=4", "pack.where="], **arguments)
    assert {key: Store.of(url).read(key).data for key in Store.of(url).list("shards/")} == before
    assert list(Store.of(url).list("clips/")) == []
