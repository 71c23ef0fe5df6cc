"""A volume that is done is merged: the same rows in few files, and the same bytes however it came about."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from shards.corpus import merged as merging
from shards.corpus.fragments import ledger_row, table_schema, write_commit
from shards.corpus.merged import can_be_merged, merge, merged_volumes, read_head, remove_merged
from shards.corpus.schema import LEDGER
from shards.corpus.tombstones import hash_of
from shards.corpus.volume_files import INDEX
from shards.corpus.working_database import WorkingDatabase
from shards.packing import compact as compaction
from shards.packing.compact import CompactReport, ForgottenIndex, compact_commits
from shards.storage.local import Files
from tests.helpers.ledgers import FragmentCorpus
from tests.storage.test_volumes_are_one_corpus import rows

FAILS = {"cut:v1_1": ItemError("made-up", "it fails", transient=True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Make a corpus of two volumes with two units each, in which nothing but a retry of `FAILS` is left to do."""
    corpus = FragmentCorpus(tmp_path_factory.mktemp("made") / "corpus")
    for unit in range(4):
        corpus.add_sources(*(f"v{unit}_{n}" for n in range(2)), unit=f"u{unit:06d}", volume=unit // 2)
    corpus.fail |= FAILS
    corpus.work_off()
    corpus.refresh_state()
    corpus.ledger.close()
    return corpus.root


@pytest.fixture
def corpus(made, tmp_path) -> FragmentCorpus:
    corpus = FragmentCorpus(Path(shutil.copytree(made, tmp_path / "corpus")))
    corpus.run, corpus.fail = 1, dict(FAILS)
    yield corpus
    corpus.ledger.close()


def merge_all(corpus: FragmentCorpus) -> None:
    corpus.refresh_state()
    corpus.ledger.merge_finished(1)


def merged_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("fragments/*/merged-*.parquet")}


def loose(root: Path) -> set[str]:
    """Return the names of the commits, besides lists, that have fragments."""
    paths = [path for path in root.glob("fragments/*/[!.]*.parquet") if path.parent.name not in ("runs", "forgotten")]
    names = {path.stem for path in paths}
    return {name for name in names if not name.startswith(("ingest-", "merged-"))}


def lose_cache(corpus: FragmentCorpus) -> None:
    corpus.ledger.close()
    shutil.rmtree(corpus.root / ".clipmill")
    corpus.open()


def merged_at_once(corpus: FragmentCorpus, before: Path) -> dict[str, bytes]:
    """Return the files of a corpus in which nothing was merged before, with the loose commits of this one besides."""
    for path in corpus.root.glob("fragments/*/[!.]*.parquet"):
        if not path.stem.startswith("merged-"):
            (before / "fragments" / path.parent.name).mkdir(exist_ok=True)
            shutil.copy(path, before / "fragments" / path.parent.name / path.name)
    other = FragmentCorpus(before)
    other.fingerprints = corpus.fingerprints
    merge_all(other)
    other.ledger.close()
    return merged_files(before)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_a_merged_corpus_has_the_same_rows_and_few_files(corpus):
    expected, commits = rows(corpus), loose(corpus.root)
    tables = {path.parent.name for path in corpus.root.glob("fragments/*/*-u000000-*.parquet")} - {"sources"}
    merge_all(corpus)
    assert loose(corpus.root) == set() and merged_volumes(corpus.root) == [0, 1]
    assert {name for volume in (0, 1) for name in read_head(corpus.root, volume).commits} == commits
    assert len(merged_files(corpus.root)) == 2 * (len(tables) + 1), "one of each table, and the head"
    assert rows(corpus) == expected
    corpus.reopen()
    assert corpus.synchronised == (0, 0) and rows(corpus) == expected
    lose_cache(corpus)
    assert corpus.synchronised == (len(commits) + 4, 0) and rows(corpus) == expected
    corpus.fail = {}
    assert corpus.work_off()["cut"] == 1, "the retry"


def test_a_small_or_unfinished_volume_is_not_merged(corpus):
    before = loose(corpus.root)
    corpus.add_sources("new", unit="u000009", volume=1)
    corpus.refresh_state()
    [most] = corpus.ledger._rows(f"SELECT count(*) FROM {INDEX}.fragments WHERE volume = 0 AND name NOT LIKE 'ingest%'")
    corpus.ledger.merge_finished(most[0] + 1)
    assert loose(corpus.root) == before
    corpus.ledger.merge_finished(most[0])
    assert merged_volumes(corpus.root) == [0], "volume 1 has pending work"


def test_what_changes_under_its_name_or_cannot_be_made_again_is_not_merged():
    assert can_be_merged("cut-u000001-0123456789ab", ["fragments/clips/x.parquet", "clips/x.tar"])
    for name in ("ingest-u000001-0123456789ab", "ingest-problems-0123", "pack", "pack-000001", "pack-000001_named"):
        assert not can_be_merged(name, [])
    assert not can_be_merged("other-u000001-0123456789ab", ["fragments/of_another_package/x.parquet"])


# -- bytes -----------------------------------------------------------------------------------------------------------

NAMES = [f"stage{n % 3}-u{n % 4:06d}-{n:012x}" for n in range(12)]


def write(root: Path, number: int, version: int) -> str:
    """Write a commit of some rows of some tables; `version` changes them."""
    name = NAMES[number]
    shared = {"item_id": f"v{number}", "unit": name.split("-")[1], "key": "k"}
    captions = [{**shared, "clip_id": f"v{number}.{n}", "text": f"é{version} {n}" * n} for n in range(number % 5)]
    words = [{"text": f"w{n}", "start_s": n / 3, "end_s": None} for n in range(version)]
    tables = {
        "captions": pa.Table.from_pylist(captions, table_schema("captions")),
        "transcripts": pa.Table.from_pylist([{**shared, "words": words}], table_schema("transcripts")),
    }
    ledger = pa.Table.from_pylist([ledger_row("stage", "v", "k", run_id=f"run{version}")], LEDGER)
    ledger = ledger.set_column(13, "at", pa.array([version], LEDGER.field("at").type))
    write_commit(root, name, {"captions": tables["captions"]} if number % 3 else tables, ledger, [])
    return name


ROUNDS = st.lists(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), max_size=6), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25)
@given(ROUNDS, st.sets(st.integers(0, 11), max_size=3), st.integers(1, 9))
def test_the_bytes_are_those_of_the_last_rows_whatever_was_merged_before(rounds, removed, row_group):
    last = {number: version for commits in rounds for number, version in commits}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "ROWS", row_group)
        in_parts, once = Path(folder, "parts"), Path(folder, "once")
        for commits in rounds:
            merge(in_parts, 3, {write(in_parts, *commit) for commit in commits})
        if names := {NAMES[number] for number in removed} & {NAMES[number] for number in last}:
            remove_merged(in_parts, 3, names)
        merge(in_parts, 3, [])
        kept = [number for number in random.Random(1).sample(sorted(last), len(last)) if number not in removed]
        merge(once, 3, [write(once, number, last[number]) for number in kept])
        assert merged_files(in_parts) == merged_files(once)
        files = [path for path in once.glob("fragments/*/merged-*.parquet") if path.parent.name != "merged"]
        for path in [path for path in files if pq.read_metadata(path).num_rows]:
            metadata = pq.read_metadata(path)
            assert max(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)) <= row_group


CHANGES = {
    "a setting": lambda corpus: corpus.fingerprints.update(caption="caption-2"),
    "the first stage": lambda corpus: (corpus.bytes_of.update(v0_0="b"), corpus.fingerprints.update(download="2")),
    "a retry": lambda corpus: corpus.fail.clear(),
    "new sources": lambda corpus: corpus.add_sources("new", "new2", unit="u000009", volume=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_merged_volume_is_opened_again_and_ends_in_the_bytes_of_one_merge(corpus, made, tmp_path, change):
    before = Path(shutil.copytree(made, tmp_path / "before"))
    merge_all(corpus)
    CHANGES[change](corpus)
    assert corpus.work_off() and loose(corpus.root)
    corpus.work_off()
    expected = rows(corpus)
    once = merged_at_once(corpus, before)
    merge_all(corpus)
    assert merged_files(corpus.root) == once and not loose(corpus.root)
    lose_cache(corpus)
    assert rows(corpus) == expected and corpus.work_off() == {}


def test_a_task_done_again_counts_and_a_leftover_does_not(corpus):
    """Both are loose commits with the name of a merged one. The first has other rows."""
    [name] = {path.stem for path in fragment_paths(corpus.root, "cut-u000001-*")}
    shutil.copytree(corpus.root / "fragments", corpus.root.parent / "before")
    merge_all(corpus)
    corpus.ledger.close()
    shutil.copytree(corpus.root.parent / "before", corpus.root / "fragments", dirs_exist_ok=True)
    corpus.open()
    assert corpus.synchronised == (0, 0) and not loose(corpus.root)
    files = merged_files(corpus.root)
    corpus.fail.clear()
    assert corpus.work_off()["cut"] == 1
    [retried] = {path.stem for path in fragment_paths(corpus.root, "cut-u000001-*")}
    expected = rows(corpus)
    assert merged_files(corpus.root) == files and len(expected["failures"]) == 0
    for again in range(2):
        lose_cache(corpus)
        assert rows(corpus) == expected and loose(corpus.root) >= {retried}, again
    assert name


def fragment_paths(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(f"fragments/ledger/{pattern}.parquet"))


# -- killed, and read meanwhile --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from shards.corpus.working_database import WorkingDatabase
left = int(sys.argv[2])
def watch(event, arguments):
    global left
    if event in ("os.rename", "os.remove") and "/fragments/" in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
database = WorkingDatabase(Path(sys.argv[1]))
database.sync()
sys.addaudithook(watch)
for volume in (0, 1):
    database.merged.merge(volume)
print(int(sys.argv[2]) - left)
"""


def merge_killed_at(root: Path, number: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", KILLED, str(root), str(number)], capture_output=True, text=True)


def test_killed_at_file_operations_the_next_process_ends_in_the_same_bytes(corpus, made, tmp_path):
    expected = rows(corpus)
    merge_all(corpus)
    quiet = merged_files(corpus.root)
    whole = merge_killed_at(Path(shutil.copytree(made, tmp_path / "whole")), 10**6)
    num_calls, num_files = int(whole.stdout), len(quiet) // 2
    # Before a file of rows, before and after the head, among ledger fragments and others, at the end of a volume.
    places = [2, num_files, num_files + 1, num_files + 6, num_calls // 2 - 3, num_calls]
    for place in places:
        root = Path(shutil.copytree(made, tmp_path / f"killed{place}"))
        died = merge_killed_at(root, place)
        assert died.returncode == -signal.SIGKILL, died.stderr
        if place % 2:
            shutil.rmtree(root / ".clipmill")
        after = FragmentCorpus(root)
        after.run = corpus.run
        after.ledger.remove_orphans()
        assert rows(after) == expected, place
        merge_all(after)
        after.ledger.close()
        assert merged_files(root) == quiet and not loose(root), place


def test_a_reader_sees_each_commit_once_at_any_moment(corpus, monkeypatch, tmp_path):
    names = loose(corpus.root) | {path.stem for path in fragment_paths(corpus.root, "ingest-*")}
    seen = []

    def look() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as cache:
            reader = WorkingDatabase(corpus.root, cache=Path(cache))
            reader.sync()
            found = [name for (name,) in reader._rows(f"SELECT name FROM {INDEX}.fragments")]
            num_rows = sum(reader._rows("SELECT count(*) FROM ledger")[0][0] for _ in reader.each_volume())
            reader.close()
        seen.append((len(found), set(found) == names, num_rows))

    look()
    monkeypatch.setattr(Files, "upload", lambda files, *relatives: look())
    remove = Files.remove

    def remove_half(files, *relatives) -> None:
        remove(files, *relatives[: len(relatives) // 2])
        look()
        remove(files, *relatives)

    monkeypatch.setattr(Files, "remove", remove_half)
    corpus.refresh_state()
    corpus.ledger.merged.merge(0)
    assert len(seen) > 9 and set(seen) == {(len(names), True, seen[0][2])}


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGED = {"captions": {"caption"}, "clips": {"cut"}, "ledger": None, "merged": None}


@pytest.mark.parametrize("table", DAMAGED)
def test_a_damaged_file_is_written_again_by_who_has_loaded_it(corpus, table):
    merge_all(corpus)
    corpus.reopen()
    before = merged_files(corpus.root)
    [path] = (corpus.root / "fragments" / table).glob("merged-000000*.parquet")
    stamp = path.stat()
    flip(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    corpus.ledger.rewrite(path.stem)
    assert merged_files(corpus.root) == before and list(corpus.ledger.damaged) == [str(path.relative_to(corpus.root))]
    path.unlink() if table != "merged" else path.write_bytes(b"torn")
    corpus.reopen()
    assert merged_files(corpus.root) == before and corpus.synchronised == (0, 0)


@pytest.mark.parametrize("change", ["a retry", "a changed setting"])
def test_it_is_written_again_without_the_commits_that_do_not_count(corpus, change):
    merge_all(corpus)
    if change == "a retry":
        corpus.fail.clear()
    else:
        corpus.fingerprints["cut"] = "cut-2"
    corpus.work_off()
    corpus.refresh_state()
    corpus.ledger.tidy(clips=True, sources=False)
    expected = rows(corpus)
    [path] = (corpus.root / "fragments" / "ledger").glob("merged-000000*.parquet")
    flip(path)
    corpus.ledger.rewrite(path.stem)
    assert list(corpus.ledger.damaged) == [str(path.relative_to(corpus.root))]
    for again in range(2):
        corpus.reopen() if again else lose_cache(corpus)
        assert corpus.ledger.damaged == {} and rows(corpus) == expected


@pytest.fixture
def made_again(tmp_path) -> FragmentCorpus:
    """Make a corpus with a merged commit of failures, and the same commit made again without them."""
    corpus = FragmentCorpus(tmp_path / "again")
    corpus.add_sources("a", "b")
    clips = [f"{video}.{n}" for video in "ab" for n in range(2)]
    corpus.fail |= {f"caption:{clip}": ItemError("server-error", "503", transient=True) for clip in clips}
    corpus.work_off()
    [name] = {path.stem for path in fragment_paths(corpus.root, "caption-*")}
    merge_all(corpus)
    corpus.fail.clear()
    corpus.work_off()
    assert loose(corpus.root) >= {name} and name in read_head(corpus.root, 0).commits
    yield corpus
    corpus.ledger.close()


def test_a_commit_made_again_survives_damage_to_its_merged_twin(made_again):
    expected = rows(made_again)
    [path] = (made_again.root / "fragments" / "ledger").glob("merged-000000*.parquet")
    flip(path)
    made_again.ledger.rewrite(path.stem)
    assert rows(made_again) == expected and made_again.work_off() == {}
    lose_cache(made_again)
    assert rows(made_again) == expected and made_again.work_off() == {}


def test_a_commit_made_again_survives_compaction(made_again, monkeypatch):
    def write_clips(path: Path, *_) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    monkeypatch.setattr(compaction, "write_clips", write_clips)
    monkeypatch.setattr(compaction, "_fragments", lambda root, table: [])  # leaves the lists, which are not the point
    captions = texts_of_b(made_again)
    forgotten = ForgottenIndex(frozenset({hash_of("a")}), ("a",), ("u000000",))
    compact_commits(made_again.root, forgotten, CompactReport(), lambda name: None)
    lose_cache(made_again)
    assert texts_of_b(made_again) == captions and len(captions) == 2


def texts_of_b(corpus: FragmentCorpus) -> list[str]:
    return [row["text"] for row in rows(corpus)["captions"] if row["clip_id"].startswith("b.")]


@pytest.mark.parametrize("table", DAMAGED)
def test_elsewhere_the_commits_with_rows_in_it_never_happened(corpus, table):
    corpus.fail.clear()
    corpus.work_off()
    expected = rows(corpus)
    merge_all(corpus)
    [path] = (corpus.root / "fragments" / table).glob("merged-000000*.parquet")
    flip(path)
    lose_cache(corpus)
    assert list(corpus.ledger.damaged) == [str(path.relative_to(corpus.root))]
    counts = corpus.refresh_state()
    assert counts["download"]["done"] == (4 if table in ("ledger", "merged") else 8), "the other volume is whole"
    again = corpus.work_off()
    assert DAMAGED[table] in (None, again.keys()) and rows(corpus) == expected
    assert corpus.work_off() == {}
    merge_all(corpus)
    lose_cache(corpus)
    assert corpus.ledger.damaged == {} and rows(corpus) == expected and corpus.work_off() == {}


def test_rotten_fragments_are_mended_before_they_are_merged(corpus):
    expected = rows(corpus)
    for path in (fragment_paths(corpus.root, "cut-u000000-*")[0], next(corpus.root.glob("fragments/captions/*"))):
        flip(path)
    merge_all(corpus)
    merge_all(corpus)
    assert len(corpus.ledger.damaged) == 2 and not loose(corpus.root)
    lose_cache(corpus)
    assert rows(corpus) == expected


def test_removed_commits_of_a_merged_volume_stay_removed(corpus):
    merge_all(corpus)
    corpus.fingerprints["cut"] = "cut-2"
    corpus.work_off()
    merge_all(corpus)
    corpus.ledger.tidy(clips=True, sources=False)
    expected = rows(corpus)
    assert [read_head(corpus.root, volume).num_removed for volume in (0, 1)] == [2, 2]
    for again in range(2):
        corpus.reopen() if again else lose_cache(corpus)
        assert rows(corpus) == expected and corpus.refresh_state()["cut"] == {"done": 7, "failed": 1}
    corpus.ledger.merged.merge(0)
    assert read_head(corpus.root, 0).num_removed == 0 and rows(corpus) == expected
