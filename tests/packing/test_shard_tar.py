"""Tars are deterministic and readable by tarfile, with exact offsets; the strict reader refuses all other forms."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.base.errors import ItemError
from shards.packing.tar import Blob, Sample, read_member, scan, write_clips_tar, write_tar
from tests.helpers.shards import list_members

KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=60)
MEMBERS = st.dictionaries(st.sampled_from(["mp4", "jpg", "txt", "json"]), st.binary(max_size=2000), min_size=1)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(KEYS, MEMBERS, min_size=1, max_size=5))
def test_every_member_lies_where_the_writer_says_and_tarfile_agrees(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    members = write_tar(path, [Sample(key, files) for key, files in content.items()])
    wanted = {f"{key}.{ext}": data for key, files in content.items() for ext, data in files.items()}
    assert {m.name: read_member(path, m.offset, m.num_bytes) for m in members} == wanted
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
        assert [(i.name, i.offset_data, i.size) for i in infos] == [(m.name, m.offset, m.num_bytes) for m in members]
        assert {(i.mtime, i.uid, i.gid, i.mode, i.pax_headers == {}) for i in infos} == {(0, 0, 0, 0o644, True)}
    assert [(m.name, m.offset, m.num_bytes) for m in list_members(path)] == [
        (i.name, i.offset_data, i.size) for i in infos
    ]


def test_same_samples_give_the_same_bytes_and_no_trace_of_the_temporary_file(tmp_path):
    samples = [Sample(f"v_{n:04d}", {"mp4": bytes([n]) * 3000, "json": b"{}"}) for n in range(20)]
    write_tar(tmp_path / "a.tar", samples)
    write_tar(tmp_path / "b.tar", iter(samples), fsync=True)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [Sample("old", {"txt": b"old"})])
    before = path.read_bytes()

    def samples():
        yield Sample("new", {"txt": b"new"})
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_tar(path, samples())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_clips_tar_copies_pieces_of_files_and_hashes_them(tmp_path):
    source = tmp_path / "blob"
    source.write_bytes(bytes(range(256)) * 12_000)  # 3 MB: more than one chunk
    blobs = [Blob("v.1.mp4", source, 100, 2_500_000), Blob("v.1.0.jpg", source, 5, 7), Blob("v.2.mp4", source, 0, 0)]
    members = write_clips_tar(tmp_path / "clips.tar", blobs)
    for blob, member in zip(blobs, members, strict=True):
        wanted = source.read_bytes()[blob.offset : blob.offset + blob.num_bytes]
        assert read_member(tmp_path / "clips.tar", member.offset, member.num_bytes) == wanted
    digests = [digest for _, digest in scan(tmp_path / "clips.tar", lambda member: lambda chunk: None)]
    assert digests == [member.sha256 for member in members]


def test_a_blob_that_is_shorter_than_promised_is_an_item_error(tmp_path):
    (tmp_path / "blob").write_bytes(b"x" * 1000)
    with pytest.raises(ItemError) as failure:
        write_clips_tar(tmp_path / "clips.tar", [Blob("v.1.mp4", tmp_path / "blob", 500, 501)])
    assert failure.value.error_class == "truncated-blob"
    assert not (tmp_path / "clips.tar").exists()


def test_reading_past_the_end_and_a_missing_tar_are_item_errors(tmp_path):
    write_tar(tmp_path / "a.tar", [Sample("a", {"txt": b"hi"})])
    with pytest.raises(ItemError, match="truncated-tar"):
        read_member(tmp_path / "a.tar", 512, 1_000_000)
    with pytest.raises(ItemError, match="tar-missing"):
        read_member(tmp_path / "none.tar", 0, 1)


@pytest.mark.parametrize("key", ["../up", "a/b", "dotted.key", "", "é", "k" * 120])
def test_keys_that_readers_would_misread_cannot_be_written(tmp_path, key):
    with pytest.raises(AssertionError):
        write_tar(tmp_path / "a.tar", [Sample(key, {"txt": b""})])


def _tar(path: Path, *infos: tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def _info(name: str, type: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = type, size, link
    return info


@pytest.mark.parametrize(
    "info",
    [
        _info("link.mp4", tarfile.SYMTYPE, link="/etc/passwd"),
        _info("hard.mp4", tarfile.LNKTYPE, link="a.mp4"),
        _info("folder", tarfile.DIRTYPE),
        _info("device", tarfile.CHRTYPE),
        _info("../../up.mp4"),
        _info("/absolute.mp4"),
        _info("folder/a.mp4"),
        _info(".."),
        _info("esc\x1b[31m.mp4"),
    ],
    ids=lambda info: repr(info.name),
)
def test_links_folders_devices_and_paths_are_refused(tmp_path, info):
    path = _tar(tmp_path / "a.tar", _info("a.mp4", size=10), info)
    with pytest.raises(ItemError) as failure:
        list_members(path)
    assert failure.value.error_class == "bad-tar"


def test_extension_headers_are_refused_because_they_can_rename_what_follows(tmp_path):
    long_name = _info("x" * 300)
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with pytest.raises(ItemError, match="bad-tar"):
            list_members(_tar(tmp_path / f"{number}.tar", long_name, format=format))


def test_damaged_tars_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [Sample("a", {"mp4": b"x" * 5000}), Sample("b", {"mp4": b"y" * 5000})])
    whole = path.read_bytes()
    lying = bytearray(whole)
    info = tarfile.TarInfo("a.mp4")
    info.size = 10**9
    lying[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    flipped = bytearray(whole)
    flipped[3] ^= 1
    twice = _tar(tmp_path / "twice.tar", _info("a.mp4", size=3), _info("a.mp4", size=3)).read_bytes()
    for damaged in (b"", whole[:700], whole[:6000], whole[:-10240], whole + b"x" * 10240, lying, flipped, twice):
        path.write_bytes(damaged)
        with pytest.raises(ItemError) as failure:
            list_members(path)
        assert failure.value.error_class == "bad-tar"
