"""A corpus of many volumes answers as one of a single volume, and a step of work touches the volumes it changes."""

import os
import shutil

import duckdb
import pytest

from clipmill.base.errors import ItemError
from shards.corpus.manifest import is_current, publish
from shards.corpus.schema import MANIFEST
from shards.corpus.tombstones import write_tombstones
from shards.corpus.volume_files import INDEX
from tests.helpers.builds import ask
from tests.helpers.ledgers import FragmentCorpus, sha

VIDEOS = 2  # in each unit
PRIVATE = {"volume", "at", "run_id"}  # columns that differ between two corpora, or two ways to divide one
SPANS = [{"n": 0, "start_s": 1.0, "end_s": 7.0}], [{"n": 0, "start_s": 9.0, "end_s": None}]


def rows(corpus: FragmentCorpus) -> dict[str, list[dict]]:
    """Publish the corpus and return the rows of its manifest, table by table."""
    corpus.refresh_state()
    publish(corpus.ledger)
    assert is_current(corpus.root, corpus.ledger)
    found = {}
    with duckdb.connect(str(corpus.root / "manifest.duckdb"), read_only=True) as connection:
        for table in [*MANIFEST, "catalog", "funnel"]:
            listed = connection.sql(f"FROM {table}").to_arrow_table().to_pylist()
            listed = [{name: value for name, value in row.items() if name not in PRIVATE} for row in listed]
            found[table] = sorted(listed, key=repr)
    return found


# What happens to both corpora: units come in any order, videos have equal bytes, items fail, settings change, files of
# fragments and the cache are lost.
STEPS = [
    ("add", 0, None), ("add", 2, SPANS[0]), ("bytes", "v0_1", "a"), ("bytes", "v2_0", "a"), ("work", None, None),
    ("publish", None, None), ("add", 1, SPANS[1]), ("bytes", "v1_0", "a"), ("fail", "v1_1", "segment"),
    ("lose", 9, None), ("setting", "cut", 2), ("work", None, None), ("drop cache", None, None),
    ("fail", "v2_1", "cut"), ("bytes", "v0_1", "b"), ("setting", "download", 2), ("work", None, None),
    ("lose", 4, None), ("work", None, None),
]  # fmt: skip


class Divided:
    """The same sources in two corpora: in one volume, and in a volume for each unit."""

    def __init__(self, folder):
        self.corpora = [FragmentCorpus(folder / name) for name in ("one", "many")]
        self.added: list[int] = []

    def do(self, step: str, a, b) -> None:
        for number, corpus in enumerate(self.corpora):
            if step == "add" and a not in self.added:
                ids = [f"v{a}_{n}" for n in range(VIDEOS)]
                ordinals = {"ordinal": a * VIDEOS}  # later units may come first: then the copy is the earlier video
                corpus.add_sources(ids[0], unit=f"u{a:06d}", volume=number * a, spans=b, **ordinals)
                corpus.add_sources(*ids[1:], unit=f"u{a:06d}", volume=number * a, ordinal=a * VIDEOS + 1)
            elif step == "bytes":
                corpus.bytes_of[a] = b
            elif step == "fail":
                corpus.fail[f"{b}:{a}"] = ItemError("made-up", "it fails", transient=False)
            elif step == "setting":
                corpus.fingerprints[a] = f"{a}-{b}"
            elif step == "lose":
                paths = sorted(p for p in corpus.root.glob("fragments/*/*.parquet") if not p.stem.startswith("ingest"))
                if len(paths) > a:
                    paths[a].unlink()
                    corpus.reopen()
            elif step == "work":
                corpus.work_off()
            elif step == "drop cache":
                corpus.ledger.close()
                shutil.rmtree(corpus.root / ".clipmill")
                corpus.open()
            elif step == "publish":
                corpus.refresh_state()
                publish(corpus.ledger, groups=False)
        if step == "add" and a not in self.added:
            self.added.append(a)

    def close(self) -> None:
        for corpus in self.corpora:
            corpus.ledger.close()


def test_many_volumes_hold_the_rows_of_one(tmp_path):
    divided = Divided(tmp_path)
    for step in STEPS:
        divided.do(*step)
    one, many = divided.corpora
    assert (one.ledger.volumes(), many.ledger.volumes()) == ([0], [0, 1, 2])
    assert one.refresh_state() == many.refresh_state()
    expected, found = rows(one), rows(many)
    for table in expected:
        assert found[table] == expected[table], table
    divided.close()


@pytest.fixture
def done(tmp_path) -> FragmentCorpus:
    """Make a corpus of three volumes with nothing to do."""
    corpus = FragmentCorpus(tmp_path / "corpus")
    for unit in range(3):
        corpus.add_sources(*(f"v{unit}_{n}" for n in range(VIDEOS)), unit=f"u{unit:06d}", volume=unit)
    corpus.work_off()
    corpus.refresh_state()
    publish(corpus.ledger)
    yield corpus
    corpus.ledger.close()


def test_only_the_volume_that_changed_is_derived_and_published(done, monkeypatch):
    done.add_sources("new", unit="u000003", volume=2)
    derived: list[int] = []
    fill = type(done.ledger)._fill_tables

    def noted(ledger, scope):
        derived.append(scope.volume)
        fill(ledger, scope)

    monkeypatch.setattr(type(done.ledger), "_fill_tables", noted)
    assert done.refresh_state(run_id="another run")["download"] == {"done": 6, "pending": 1}
    publish(done.ledger)
    assert set(derived) == {2}
    with duckdb.connect(str(done.root / "manifest.duckdb"), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM videos WHERE volume = 2").fetchall() == [(3,)]
        assert connection.sql("SELECT count(*) FROM clips").fetchall() == [(12,)]


def test_a_copy_in_another_volume_is_found_and_lost_again(done):
    """The volume of the first video is derived again when a later volume stops to hold a copy, and the other way."""
    done.bytes_of |= {"v0_0": "same", "v2_1": "same"}
    done.fingerprints["download"] = "download-2"
    done.work_off()
    copies = "SELECT video_id, duplicate_of FROM videos WHERE duplicate_of IS NOT NULL"
    assert [(row["video_id"], row["duplicate_of"]) for row in rows(done)["videos"] if row["duplicate_of"]] == [
        ("v2_1", "v0_0")
    ], copies
    done.bytes_of["v0_0"] = "other"
    done.fingerprints["download"] = "download-3"
    done.work_off()
    done.work_off()
    assert not [row for row in rows(done)["videos"] if row["duplicate_of"]]
    assert {row["video_id"] for row in rows(done)["clips"]} >= {"v0_0", "v2_1"}


def test_a_late_copy_in_an_earlier_volume_changes_what_is_published(done):
    """The clips of the other volume stop to count, although none of its rows has changed."""
    done.bytes_of |= {"v0_0": "same", "v2_1": "same"}
    done.fail["download:v0_0"] = ItemError("server-error", "503", transient=True)
    done.fingerprints["download"] = "download-2"
    done.work_off()
    publish(done.ledger)
    clips = "SELECT DISTINCT video_id FROM clips WHERE video_id IN ('v0_0', 'v2_1')"
    volume = "SELECT content FROM volumes WHERE volume = (SELECT volume FROM videos WHERE video_id = 'v2_1')"
    assert ("v2_1",) in ask(done.root, clips)
    before = ask(done.root, volume)
    done.fail.clear()
    done.work_off()
    done.refresh_state()
    publish(done.ledger)
    assert ask(done.root, clips) == [("v0_0",)]
    assert ask(done.root, volume) != before, "packing plans the volume again"


def test_the_file_of_a_volume_that_is_lost_or_torn_is_made_again(done):
    expected = rows(done)
    done.ledger.close()
    folder = done.root / ".clipmill" / "volumes"
    (folder / "000000.duckdb").unlink()
    os.truncate(folder / "000001.duckdb", 5000)
    shutil.copy(folder / "000002.duckdb", folder / "000001.duckdb.copy")
    done.open()
    assert done.synchronised == (0, 0)
    done.fingerprints["score"] = "score-2"  # so that every volume is read
    done.work_off()
    found = rows(done)
    for table in ("videos", "spans", "clips", "captions"):
        assert found[table] == expected[table]


def test_a_file_of_another_index_is_not_believed(done):
    expected = rows(done)
    done.ledger.close()
    (done.root / ".clipmill" / "ledger.duckdb").unlink()
    done.open()
    assert rows(done) == expected
    assert len(done.ledger._rows(f"FROM {INDEX}.volume_files")) == 3


def test_counts_are_of_the_units_or_of_the_whole_corpus(done):
    assert done.refresh_state(units=["u000001"])["cut"] == {"done": 2}
    assert done.refresh_state()["cut"] == {"done": 6}


def test_more_volumes_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.corpus.volume_files.MOST_ATTACHED", 2)
    corpus = FragmentCorpus(tmp_path / "corpus")
    for unit in range(5):
        corpus.add_sources(f"v{unit}", unit=f"u{unit:06d}", volume=unit)
    corpus.work_off()
    assert {row["video_id"] for row in rows(corpus)["clips"]} == {f"v{unit}" for unit in range(5)}
    corpus.ledger.close()


def test_units_beyond_six_digits_have_their_volume(tmp_path):
    corpus = FragmentCorpus(tmp_path / "corpus")
    for volume, unit in enumerate(("u000005", "u999999", "u1000000")):
        corpus.add_sources(f"v{volume}", unit=unit, volume=volume)
    assert [corpus.ledger.volume_of(unit) for unit in ("u000005", "u000007", "u999999", "u1000000", "u1000001")] == [
        0, 0, 1, 2, 2
    ]  # fmt: skip
    corpus.work_off()
    assert {row["video_id"]: row["unit"] for row in rows(corpus)["videos"]}["v2"] == "u1000000"
    assert sha("v2") in {row["sha256"] for row in rows(corpus)["videos"]}
    corpus.ledger.close()


class Killed(BaseException):
    pass


class DiesBefore:
    """A connection that ends before the first statement that begins so, as a killed process does."""

    def __init__(self, connection, statement: str):
        self.connection, self.statement = connection, statement

    def execute(self, sql: str, *parameters):
        self.look_at(sql)
        return self.connection.execute(sql, *parameters)

    def executemany(self, sql: str, *parameters):
        self.look_at(sql)
        return self.connection.executemany(sql, *parameters)

    def look_at(self, sql: str) -> None:
        if sql.startswith(self.statement):
            raise Killed

    def __getattr__(self, name: str):
        return getattr(self.connection, name)


def change_and_forget(root, statement: str | None) -> bool:
    """Give a video of one volume the bytes of one in the other, forget a third; return whether it was killed."""
    corpus, died = FragmentCorpus(root), False
    corpus.bytes_of = {"v1_0": "v0_0"}
    corpus.fingerprints["download"] = "download-2"
    corpus.refresh_state()
    corpus.ledger.show(1)
    work, connection = corpus.ledger.work("download"), corpus.ledger.connection
    if statement:
        corpus.ledger.connection = DiesBefore(connection, statement)
    try:
        corpus._do("download", work)
        corpus.refresh_state()
        write_tombstones(root, [FORGOTTEN])
        corpus.refresh_state()
    except Killed:
        died = True
    connection.close()
    return died


FORGOTTEN = {"video_hash": sha("v1_1"), "url_hash": sha("http://x"), "other_hashes": []}


def test_killed_between_changes_of_the_index_the_next_process_finds_the_same(tmp_path):
    begun = FragmentCorpus(tmp_path / "begun")
    for unit in range(2):
        begun.add_sources(*(f"v{unit}_{n}" for n in range(VIDEOS)), unit=f"u{unit:06d}", volume=unit)
    begun.work_off()
    begun.refresh_state()
    begun.ledger.close()
    places = ("INSERT INTO {}.fragments", "INSERT INTO {}.copies", "DELETE FROM {}.all_sources WHERE sha256",
              "INSERT INTO {}.applied_tombstones", None)  # fmt: skip
    for number, place in enumerate(places):
        root = tmp_path / str(number)
        shutil.copytree(begun.root, root)
        assert change_and_forget(root, place and place.format(INDEX)) == (place is not None), place
        write_tombstones(root, [FORGOTTEN])
        corpus = FragmentCorpus(root)
        corpus.bytes_of, corpus.fingerprints["download"] = {"v1_0": "v0_0"}, "download-2"
        corpus.work_off()
        videos = {row["video_id"]: row["duplicate_of"] for row in rows(corpus)["videos"]}
        assert videos == {"v0_0": None, "v0_1": None, "v1_0": "v0_0"}, place
        corpus.ledger.close()
