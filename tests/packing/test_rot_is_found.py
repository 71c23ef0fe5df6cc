"""Damaged files are found, named with their repair, and made again; none stops a command with a traceback."""

import json
import os
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clipmill.base.errors import UserError
from clipmill.cli.display import verify_corpus
from pipeline.engine.build import Silent, session, status
from pipeline.maintenance.verify import verify_with_sandbox
from shards.corpus.fragments import write_commit
from shards.corpus.manifest import is_current
from shards.corpus.tombstones import hash_of, read_tombstones, write_tombstones
from shards.corpus.volume_files import remove_cache
from shards.packing.deep_verify import repair_of
from shards.storage.sealed_parquet import DamagedFile, check_parquet, read_metadata, read_parquet, write_parquet
from tests.helpers.builds import ask
from tests.helpers.whole_corpus import SETTINGS

TABLE = pa.table(
    {"text": ["white horse", None, "white house"] * 7, "n": range(21), "parts": [[{"at": 1.5}, None]] * 21}
).replace_schema_metadata({"clipmill.outputs": '{"clips/x.tar": 10240}'})


@pytest.fixture
def corpus(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "corpus")
    return tmp_path / "corpus"


def flip(path: Path, position: float = 0.5, bit: int = 3) -> None:
    """Change one bit; size and modification time stay, as they do when a disk rots."""
    data, before = bytearray(path.read_bytes()), path.stat()
    data[int(position * len(data))] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def one(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


# -- sealed files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "t.parquet"
    write_parquet(path, TABLE)
    return path


def test_a_sealed_file_is_plain_parquet_with_page_checksums(sealed):
    assert read_parquet(sealed).equals(TABLE) and pq.read_table(sealed).equals(TABLE)
    assert pq.read_table(sealed, page_checksum_verification=True).equals(TABLE)
    assert duckdb.sql(f"SELECT count(*), sum(n) FROM '{sealed}'").fetchall() == [(21, 210)]
    assert check_parquet(sealed)


def test_no_flipped_bit_changes_a_value(sealed, tmp_path):
    """Every bit of the file: it is found, or it is in the mark of the seal and changes nothing."""
    data, path = sealed.read_bytes(), tmp_path / "flipped.parquet"
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read_parquet(path)
        except DamagedFile:
            continue
        assert found.equals(TABLE) and read_metadata(path) == read_metadata(sealed), f"bit {bit}"


@given(st.data())
def test_damage_of_any_kind_is_found(sealed, tmp_path_factory, data):
    content = sealed.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    piece = data.draw(st.binary(max_size=64))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + piece + content[end:]
    path = sealed.with_name("changed.parquet")
    path.write_bytes(changed)
    try:
        assert read_parquet(path).equals(TABLE)
    except DamagedFile:
        pass
    else:
        assert changed == content or not check_parquet(path), "only the seal itself was damaged"


def test_files_of_earlier_versions_open(tmp_path):
    path = tmp_path / "old.parquet"
    pq.write_table(TABLE, path, compression="zstd")
    assert read_parquet(path).equals(TABLE) and not check_parquet(path)
    for size in (0, 3, 8, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DamagedFile):
            check_parquet(path)


# -- commits --------------------------------------------------------------------------------------------------------


def reopen(root: Path, *, fresh: bool = True, lists: bool = False, check: bool = False):
    """Open the corpus as a build does; return (counts of its stages, damaged files)."""
    if fresh:
        remove_cache(root)
    with session(root, None, SETTINGS, "test", create=False, replace_sources=lists) as (current, _):
        current.refresh_state()
        seen = []
        if check:
            display = Silent()
            display.damaged = seen.extend
            current.repair_damage(display)
        return current.ledger.counts(), dict(current.ledger.damaged), seen


def num_pending(counts: dict) -> dict[str, int]:
    return {stage: by["pending"] for stage, by in counts.items() if by.get("pending")}


@pytest.mark.parametrize("where", ["ledger", "data"])
@pytest.mark.parametrize("stage, table", [("cut", "clips"), ("caption", "captions"), ("download", "downloads")])
def test_a_damaged_fragment_never_happened_and_its_items_are_pending(corpus, stage, table, where):
    path = one(corpus, f"fragments/{'ledger' if where == 'ledger' else table}/{stage}-*.parquet")
    flip(path)
    counts, damaged, _ = reopen(corpus)
    assert list(damaged) == [str(path.relative_to(corpus))]
    assert stage in num_pending(counts) and not path.exists()


def test_a_damaged_fragment_of_an_earlier_version_never_happened(corpus):
    path = one(corpus, "fragments/captions/*.parquet")
    old = pq.read_table(path)
    pq.write_table(old.rename_columns([name.replace("text", "tezt") for name in old.column_names]), path)
    ledger = corpus / "fragments" / "ledger" / path.name
    outputs = {str(path.relative_to(corpus)): path.stat().st_size}
    rows = pq.read_table(ledger).replace_schema_metadata({"clipmill.outputs": json.dumps(outputs)})
    pq.write_table(rows, ledger)
    counts, damaged, _ = reopen(corpus)
    assert list(damaged) == [str(path.relative_to(corpus))] and num_pending(counts).get("caption")


@pytest.mark.parametrize("where", ["ledger", "sources"])
def test_a_damaged_record_of_sources_is_not_passed_over(corpus, where):
    """Without it the next packing would remove the clips of its videos."""
    path = one(corpus, f"fragments/{where}/ingest-*.parquet")
    flip(path)
    with pytest.raises(UserError, match=r"record of sources is damaged.*all lists"):
        reopen(corpus)
    assert path.exists(), "nothing is removed before the user has answered"
    _, damaged, _ = reopen(corpus, lists=True)
    assert list(damaged) == [str(path.relative_to(corpus))] and not path.exists()


def test_a_record_of_sources_that_a_build_has_loaded_is_written_again(corpus):
    reopen(corpus)
    path = one(corpus, "fragments/ledger/ingest-*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    counts, damaged, _ = reopen(corpus, fresh=False)
    assert list(damaged) == [str(path.relative_to(corpus))] and check_parquet(path)
    assert num_pending(counts) == {} and reopen(corpus)[1] == {}


def test_every_command_answers_with_damaged_fragments(corpus):
    for pattern in ("captions/caption-*", "ledger/score-*", "spans/segment-*", "runs/*"):
        flip(one(corpus, f"fragments/{pattern}.parquet"))
    flip(one(corpus, "shards/0*.parquet"))
    (corpus / ".clipmill" / "ledger.duckdb").unlink()
    assert num_pending(status(corpus, []).counts)
    assert verify_corpus(corpus, False) == 1 and verify_corpus(corpus, False, deep=True) == 1


# -- verify --deep, and the look of a build ------------------------------------------------------------------------


def deep(root: Path) -> list:
    problems, _ = verify_with_sandbox(root, False, Console(quiet=True), deep=True)
    return [problem for problem in problems if not problem.is_warning]


def test_a_sound_corpus_has_no_problem(corpus):
    assert deep(corpus) == []


DAMAGE = {
    "fragments/captions/*.parquet": ("damaged", "clipmill build"),
    "fragments/ledger/cut-*.parquet": ("damaged", "clipmill build"),
    "fragments/sources/*.parquet": ("damaged", "clipmill build"),
    "fragments/runs/*.parquet": ("damaged", "remove the file"),
    "fragments/forgotten/*.parquet": ("damaged", "clipmill forget"),
    "sources/*/video-c.mp4": ("changed-source", "clipmill build"),
    "clips/*.tar": ("changed-clip", "clipmill build"),
    "shards/*.tar": ("hash-mismatch", "clipmill build"),
    "shards/*.parquet": ("bad-index", "clipmill build"),
    "manifest.duckdb": ("damaged", "clipmill build"),
    "corpus.yaml": ("damaged", "clipmill build"),
}


@pytest.mark.parametrize("pattern", DAMAGE)
def test_verify_deep_finds_damage_in_every_kind_of_file(corpus, pattern):
    if "forgotten" in pattern:
        write_tombstones(corpus, [{"video_hash": hash_of("x"), "url_hash": hash_of("x"), "places": []}])
    path = one(corpus, pattern)
    if pattern == "corpus.yaml":
        path.write_text("format: 1\nsettings: {")
    elif path.suffix == ".tar":
        [(offset,)] = ask(corpus, f"SELECT min(mp4_offset) FROM {'clips' if 'clips' in pattern else 'samples'}")
        flip(path, (offset + 5) / path.stat().st_size)
    elif pattern == "manifest.duckdb":
        with open(path, "r+b") as file:
            for block in range(path.stat().st_size // 4096):  # the free part of a block has no value that could change
                file.seek(block * 4096 + 4096 // 2)
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 8]))
    else:
        flip(path)
    kind, repair = DAMAGE[pattern]
    found = [problem for problem in deep(corpus) if problem.path == str(path.relative_to(corpus))]
    assert kind in {problem.kind for problem in found}
    assert any(repair in repair_of(problem, str(corpus)) for problem in found)


@pytest.mark.parametrize("pattern", ["captions/*", "downloads/*", "ledger/cut-*", "sources/*", "ledger/ingest-u*"])
def test_a_build_writes_a_rotten_fragment_again_from_its_working_database(corpus, pattern):
    reopen(corpus)  # loads and checks the fragments
    path = one(corpus, f"fragments/{pattern}.parquet")
    rows = read_parquet(path)
    flip(path)
    deep(corpus)
    counts, _, seen = reopen(corpus, fresh=False, check=True)
    assert [problem.path for problem in seen] == [str(path.relative_to(corpus))]
    assert num_pending(counts) == {} and read_parquet(path).sort_by("item_id").equals(rows.sort_by("item_id"))
    assert deep(corpus) == []


def test_a_build_looks_at_a_random_part(corpus):
    path = one(corpus, "fragments/captions/*.parquet")
    reopen(corpus)
    flip(path)
    _, _, seen = reopen(corpus, fresh=False, check=True)
    assert [problem.path for problem in seen] == [str(path.relative_to(corpus))], "64 MB are all of this corpus"


@pytest.mark.parametrize(
    "pattern, stage", [("sources/*/video-c.mp4", "download"), ("clips/*.tar", "cut"), ("shards/*.tar", "pack")]
)
def test_a_build_makes_rotten_media_again(corpus, pattern, stage):
    path = one(corpus, pattern)
    offset = 0.3
    if path.suffix == ".tar":
        [(at,)] = ask(corpus, f"SELECT min(mp4_offset) FROM {'clips' if stage == 'cut' else 'samples'}")
        offset = (at + 5) / path.stat().st_size
    flip(path, offset)
    deep(corpus)
    with session(corpus, None, SETTINGS, "test", create=False) as (current, _):
        current.refresh_state()
        current.repair_damage(Silent())
        if stage == "pack":
            assert not path.with_suffix(".parquet").exists()
        else:
            assert num_pending(current.ledger.counts()).get(stage) == 1


def test_a_damaged_manifest_is_published_again(corpus):
    (corpus / "manifest.duckdb").write_bytes(b"\0" * 8192)
    assert not is_current(corpus)
    with session(corpus, None, SETTINGS, "test", create=False) as (current, _):
        current.publish()
    assert is_current(corpus) and ask(corpus, "SELECT count(*) FROM clips") == [(24,)]


def test_a_damaged_tombstone_is_never_passed_over(corpus):
    path = write_tombstones(corpus, [{"video_hash": hash_of("x"), "url_hash": hash_of("x"), "places": []}])
    flip(path)
    with pytest.raises(UserError, match="Forget those videos again"):
        read_tombstones(corpus)
    with pytest.raises(UserError, match="Forget those videos again"):
        status(corpus, [])


# -- fsync ----------------------------------------------------------------------------------------------------------


def test_what_a_commit_rests_on_is_on_the_disk_before_its_ledger_fragment(corpus, monkeypatch):
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(f"sync {os.readlink(f'/proc/self/fd/{fd}')}"), real_sync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"name {b}"), real_replace(a, b)))
    tar = one(corpus, "clips/*.tar")
    rows = {"captions": read_parquet(one(corpus, "fragments/captions/*.parquet"))}
    ledger = read_parquet(one(corpus, "fragments/ledger/caption-*.parquet"))
    write_commit(corpus, "caption-x", rows, ledger, [str(tar.relative_to(corpus))], fsync=True)
    data, mine = corpus / "fragments/captions/caption-x.parquet", corpus / "fragments/ledger/caption-x.parquet"
    appears = order.index(f"name {mine}")
    before = order[:appears]
    assert {f"sync {data}", f"sync {tar}", f"sync {data.parent}", f"sync {tar.parent}"} <= set(before)
    assert f"sync {mine.parent}" in order[appears:]
    order.clear()
    write_commit(corpus, "caption-x", rows, ledger, [], fsync=False)
    assert not any(step.startswith("sync") for step in order)
