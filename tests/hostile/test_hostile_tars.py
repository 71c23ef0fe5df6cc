"""Hostile tars given to `verify` and to training on plain tars cost a row each, and nothing in them is opened."""

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.call_count import count_calls
from tests.helpers.shards import list_members, make_corpus, pack
from training.data.plain_tars import MAX_VIDEO_BYTES, index_tars

BLOCK = 512
GIB = 1 << 30


def header(name: bytes, size: int = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Return a USTAR header with any fields and a correct checksum."""
    info = tarfile.TarInfo("x")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:BLOCK])
    block[0:100] = name[:100].ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size if 0 <= size < 8 * GIB else b"\x80" + size.to_bytes(11, "big", signed=False)
    block[157:257] = link[:100].ljust(100, b"\0")
    return sealed(block)


def sealed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    lines = b""
    for key, value in records:
        line = b" %s=%s\n" % (key, value)
        length = len(line) + 1
        while length != len(line) + len(b"%d" % length):
            length = len(line) + len(b"%d" % length)
        lines += b"%d" % length + line
    return member(b"pax", lines, kind)


END = bytes(2 * BLOCK)
GOOD = member(b"good.mp4", b"picture") + member(b"good.txt", b"words")
negative = bytearray(header(b"back.mp4"))
negative[124:136] = b"\xff" * 12
sparse = bytearray(header(b"holes.mp4", 0, b"S"))
sparse[482] = 1

TORN = {
    "a size past the end of the file": header(b"big.mp4", 5 * GIB),
    "a size of 2^80": header(b"huge.mp4", 1 << 80),
    "a size that goes backwards": sealed(negative),
    "an extension header as large as memory": header(b"bomb", 100 * GIB, b"x"),
    "a long name as large as memory": header(b"bomb", 100 * GIB, b"L"),
    "an extension header with a length of nothing": member(b"p", b"0 path=x\n", b"x"),
    "an extension header with a length past its end": member(b"p", b"9999999 path=x\n", b"x"),
    "a million digits for a length": member(b"p", b"9" * 60_000, b"x"),
    "a sparse map over the members behind it": sealed(sparse) + b"\1" * 5 * BLOCK,
    "a size in an extension header past the end": pax((b"size", b"9" * 18)) + member(b"a.mp4", b"x"),
}


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory):
    """Import the readers once, so that tests measure only the reading."""
    path = tmp_path_factory.mktemp("first") / "t.tar"
    path.write_bytes(GOOD + END)
    assert index_tars([str(path)]).problems == []


def index(path: Path, content: bytes):
    path.write_bytes(content)
    tracemalloc.start()
    found, num_calls = count_calls(index_tars, [str(path)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_calls < 2000 + 100 * len(content) // BLOCK and peak < 20_000_000, f"{num_calls}, {peak / 1e6:.0f} MB"
    return found.samples["clip_id"].to_pylist(), [(p.error_class, p.item_id) for p in found.problems]


@pytest.mark.parametrize("attack", TORN)
def test_a_tar_that_lies_is_read_up_to_the_lie(tmp_path, attack):
    clips, problems = index(tmp_path / "t.tar", GOOD + TORN[attack] + GOOD + END)
    assert clips == ["good"] and problems[0] == ("torn-tar", str(tmp_path / "t.tar"))


def test_extension_headers_one_after_another_do_not_pile_up(tmp_path):
    """`tarfile` recurses once for each, up to Python's limit."""
    clips, problems = index(
        tmp_path / "t.tar", pax((b"path", b"nobody.mp4")) * 3000 + pax((b"comment", b"x")) + GOOD + END
    )
    assert clips == ["nobody"] and [error_class for error_class, _ in problems] == ["text-without-video"]


def test_digits_without_end_are_no_regular_expression_bomb(tmp_path):
    """CVE-2024-6232: `tarfile` of many Pythons takes quadratic time for an extension header of digits."""
    bombs = member(b"p", b"30 comment=" + b"1" * 18 + b"\n" + b"9" * 60_000, b"x") * 20
    assert index(tmp_path / "t.tar", GOOD + bombs + END)[0] == ["good"]


def test_links_and_holes_are_left_out_and_counted(tmp_path):
    attacks = [
        header(b"link.mp4", 0, b"2", b"/etc/passwd"),
        header(b"hard.mp4", 0, b"1", b"../../etc/passwd"),
        header(b"device.mp4", 0, b"3"),
        header(b"pipe.mp4", 0, b"6"),
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9" * 15)) + member(b"holes.mp4", b"0\n"),
        member(b"unknown.mp4", b"data", b"Z"),
        header(b"folder", 5 * GIB, b"5"),
    ]
    clips, problems = index(tmp_path / "t.tar", b"".join(attacks) + GOOD + END)
    assert clips == ["good"] and [kind for kind, _ in problems] == ["ignored-member"] * 4


def test_names_with_paths_and_any_bytes_are_names_and_nothing_else(tmp_path):
    names = [
        b"../../up.mp4",
        b"/etc/cron.d/x.mp4",
        b"a/../../b.mp4",
        b"line\nbreak.mp4",
        b"\xff\xfe.mp4",
        b"esc\x1b[2J.mp4",
    ]
    before = set(tmp_path.parent.iterdir())
    clips, problems = index(tmp_path / "t.tar", b"".join(member(name, b"x") for name in names) + END)
    assert len(clips) == len(names) and problems == []
    assert set(tmp_path.parent.iterdir()) == before


def test_a_clip_as_large_as_memory_is_left_out(tmp_path):
    path = tmp_path / "t.tar"
    with open(path, "wb") as file:  # the file has holes, so that it costs no disk
        file.write(GOOD + header(b"vast.mp4", MAX_VIDEO_BYTES + 1))
        file.seek(-(-(MAX_VIDEO_BYTES + 1) // BLOCK) * BLOCK, io.SEEK_CUR)
        file.write(member(b"after.mp4", b"x") + END)
    found = index_tars([str(path)])
    assert found.samples["clip_id"].to_pylist() == ["good", "after"]
    assert [problem.error_class for problem in found.problems] == ["clip-too-large"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"clip_id": ' + "9" * 100_000 + "}", '{"texts": [{}, null, 3, "\\ud800"]}']
)
def test_json_made_to_break_its_reader_costs_the_facts(tmp_path, text):
    clips, problems = index(tmp_path / "t.tar", member(b"a.mp4", b"x") + member(b"a.json", text.encode()) + END)
    assert clips == ["a"] and [kind for kind, _ in problems] in ([], ["bad-json"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("hostile") / "corpus", num_clips=5)
    pack(root)
    return root


@pytest.mark.parametrize("attack", [*TORN, "a link", "a path", "an extension header"])
def test_verify_reports_a_hostile_shard_and_continues(corpus, tmp_path, attack):
    more = {"a link": header(b"l.mp4", 0, b"2", b"/etc/passwd"), "a path": member(b"../../x.mp4", b"x")}
    more |= {"an extension header": pax((b"path", b"renamed.mp4"))}
    shard = sorted((corpus / "shards").glob("*.tar"))[0]
    whole = shard.read_bytes()
    cut = list_members(shard)[3].end
    try:
        shard.write_bytes(whole[:cut] + {**TORN, **more}[attack] + whole[cut:])
        with open_manifest(corpus) as connection:
            problems = verify(corpus, connection)
    finally:
        shard.write_bytes(whole)
    assert {(problem.path, problem.kind) for problem in problems} == {(f"shards/{shard.name}", "bad-tar")}


def test_texts_beside_clips_are_bounded(tmp_path):
    long = member(b"a.mp4", b"x") + member(b"a.txt", b"w" * (1 << 21)) + member(b"a.json", json.dumps({}).encode())
    found = index_tars([str(_written(tmp_path / "t.tar", long + END))])
    assert found.samples["subtitle"].to_pylist() == [None]
    assert [problem.error_class for problem in found.problems] == ["text-too-long"]


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_checksums_of_these_tars_are_right():
    """This ensures that the attack is refused, not the checksum."""
    for block in (header(b"x", 1), sealed(negative), sealed(sparse)):
        tarfile.TarInfo.frombuf(block, "utf-8", "replace")  # raises for a wrong one
