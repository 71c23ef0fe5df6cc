"""`verify` reports no problems in a sound corpus and finds every kind of damage under its name."""

import io
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipmill.base.errors import ItemError
from shards.packing.index import read_index, read_stamp, write_index
from shards.packing.verify import SAME_CAPTION_MIN, verify
from shards.query.sql import open_manifest
from tests.helpers.manifests import make_manifest
from tests.helpers.shards import change_manifest, decode_frames, make_corpus, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("verify") / "corpus")
    pack(root)
    return root


@pytest.fixture
def corpus(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "corpus")


def kinds(root, **options):
    with open_manifest(root) as connection:
        return sorted({problem.kind for problem in verify(root, connection, **options)})


def problems(root, **options):
    with open_manifest(root) as connection:
        return verify(root, connection, **options)


def rewritten(path, change):
    """Rewrite a tar: `change` gets every (name, bytes) and returns the members to write."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_sound_corpus_has_no_problems_and_progress_is_reported(corpus):
    seen = []
    assert problems(corpus, decode_frames=decode_frames, workers=2, progress=lambda *step: seen.append(step)) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_flipped_bit_anywhere_in_a_clip_is_found(corpus):
    row = read_index(corpus / "shards/000001.parquet").to_pylist()[2]
    with open(corpus / "shards/000001.tar", "r+b") as file:
        file.seek(row["mp4_offset"] + row["mp4_bytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    [problem] = problems(corpus)
    assert (problem.kind, problem.item) == ("hash-mismatch", f"{row['key']}.mp4")
    assert problem.path == "shards/000001.tar" and not problem.is_warning


def test_decoding_is_asked_for_and_counted(corpus):
    assert kinds(corpus, decode_frames=lambda data: decode_frames(data) - 1) == ["frame-count"]

    def fails(data):
        raise ItemError("undecodable", "no frame")

    assert kinds(corpus, decode_frames=fails) == ["undecodable"]


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda members: members[:-1], "missing-member"),
        (lambda members: [*members, ("extra_0001.mp4", b"x")], "extra-member"),
        (lambda members: [members[1], members[0], *members[2:]], "misplaced-member"),
        (lambda members: [(n, b"{" if n.endswith("json") else d) for n, d in members], "bad-json"),
        (lambda members: [(n, b"[1]" if n.endswith("json") else d) for n, d in members], "bad-json"),
        (lambda members: [(n, b"{}" if n.endswith("json") else d) for n, d in members], "text-mismatch"),
        (lambda members: [(n, b"other" if n.endswith("txt") else d) for n, d in members], "text-mismatch"),
        (lambda members: [*members, ("../../etc/x.mp4", b"x")], "bad-tar"),
        (lambda members: [*members, members[0]], "bad-tar"),
    ],
    ids=["missing", "extra", "swapped", "torn json", "json no object", "json of nobody", "text", "path", "twice"],
)
def test_tar_members_other_than_indexed(corpus, change, kind):
    rewritten(corpus / "shards/000000.tar", change)
    found = problems(corpus)
    assert kind in {problem.kind for problem in found}
    assert {problem.path for problem in found} == {"shards/000000.tar"}


def test_a_truncated_tar_and_missing_files(corpus):
    with open(corpus / "shards/000000.tar", "r+b") as file:
        file.truncate(2000)
    (corpus / "shards/000001.tar").unlink()
    (corpus / "shards/000002.parquet").unlink()
    found = [(problem.path, problem.kind) for problem in problems(corpus)]
    assert found == [
        ("shards/000000.tar", "bad-tar"),
        ("shards/000001.tar", "missing-file"),
        ("shards/000002.parquet", "missing-file"),
    ]


def test_files_that_belong_to_nothing(corpus):
    for name in ("000009.tar", "notes.txt", ".tmp-1234-000000.tar"):
        (corpus / "shards" / name).write_bytes(b"")
    (corpus / "shards/.next").mkdir()
    found = problems(corpus)
    assert {problem.kind for problem in found} == {"orphan-file"} and len(found) == 4


def test_an_index_that_differs_from_the_manifest(corpus):
    path = corpus / "shards/000000.parquet"
    stamp, rows = read_stamp(path), read_index(path)
    wrong = rows.set_column(rows.column_names.index("mp4_bytes"), "mp4_bytes", pa.array([7] * rows.num_rows))
    write_index(path, wrong, stamp)
    assert kinds(corpus) == ["sample-mismatch"]
    write_index(path, rows.slice(1), stamp)
    assert kinds(corpus) == ["sample-mismatch"]
    path.write_bytes(b"PAR1 torn")
    assert kinds(corpus) == ["bad-index"]
    pq.write_table(rows, path)
    assert kinds(corpus) == ["bad-index"]


def test_a_clip_that_changed_or_went_after_packing(corpus):
    clip_id = read_index(corpus / "shards/000000.parquet")["clip_id"][0].as_py()
    change_manifest(corpus, f"UPDATE clips SET sha256 = 'other', num_frames = 99 WHERE clip_id = '{clip_id}'")
    assert [(p.kind, p.item) for p in problems(corpus)] == [("clip-mismatch", clip_id)] * 2
    change_manifest(corpus, f"DELETE FROM clips WHERE clip_id = '{clip_id}'")
    assert [(p.kind, p.item) for p in problems(corpus)] == [("unknown-clip", clip_id)]


def test_captions_newer_than_the_index(corpus):
    change_manifest(corpus, "UPDATE captions SET text = 'newer' WHERE current")
    found = problems(corpus)
    assert {problem.kind for problem in found} == {"stale-text"} and len(found) >= 10


def test_clips_that_could_not_be_packed_are_named(tmp_path):
    root = make_corpus(tmp_path / "corpus")
    change_manifest(root, "UPDATE clips SET mp4_offset = mp4_offset + 1 WHERE num_frames = 2")
    pack(root)
    found = problems(root)
    assert {problem.kind for problem in found} == {"missing-sample"}


def test_one_caption_on_many_unlike_clips_is_a_warning(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    make_manifest(root / "manifest.duckdb", 400)
    change_manifest(root, "DELETE FROM samples")
    some = f"(SELECT clip_id FROM clips ORDER BY clip_id LIMIT {SAME_CAPTION_MIN + 10})"
    change_manifest(root, "UPDATE captions SET text = clip_id")
    change_manifest(root, f"UPDATE captions SET text = 'a man is talking' WHERE clip_id IN {some}")
    [problem] = problems(root)
    assert problem.kind == "same-caption" and problem.is_warning and "'a man is talking'" in problem.message
    change_manifest(root, f"UPDATE scores SET duplicate_group = 'one' WHERE clip_id IN {some}")
    assert problems(root) == []
