"""Cutting the same source with the same settings gives the same bytes in every process."""

import io
from pathlib import Path

import av
import pytest

from clipmill.base.errors import ItemError
from clipmill.media.encode import ENCODINGS, cpu_flags, jpeg_frames
from clipmill.media.sandbox import Sandbox
from pipeline.maintenance.verify import count_frames
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_in_sandbox, cut_video
from tests.helpers.media import SHORT_GOP, Shape, make_video, numbers_in, piece

SPANS = [SpanRequest(f"v.{n}", n, 0.7 * n, 0.7 * n + 1.5) for n in range(4)]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    shape = Shape("noisy.mp4", num_frames=110, size=(456, 256), options=SHORT_GOP, sound_hz=300)
    return make_video(tmp_path_factory.mktemp("media"), shape)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_and_rows_are_the_same_in_every_process(video, tmp_path, encoding):
    settings = CutSettings(encoding=encoding, audio=True, caption_frames=2, fps=6.0)
    first = cut_video(video, SPANS, settings, tmp_path / "first")
    written = (tmp_path / "first").read_bytes()
    assert len(first.rows) == 4
    again = cut_video(video, SPANS, settings, tmp_path / "again")
    assert again.rows == first.rows and (tmp_path / "again").read_bytes() == written
    with Sandbox() as elsewhere:
        for name in ("there", "there again"):
            there = cut_in_sandbox(elsewhere, video, SPANS, settings, tmp_path / name)
            assert there.rows == first.rows and (tmp_path / name).read_bytes() == written


@pytest.mark.skipif("avx512f" not in cpu_flags(), reason="this processor has no AVX-512 to be kept from")
@pytest.mark.parametrize("encoding", [name for name, encoding in ENCODINGS.items() if encoding.codec == "libx264"])
def test_x264_is_kept_from_avx512(encoding):
    """Its AVX-512 code gives different bytes for one clip in 500 (`bench.clip_bytes`), too seldom to test."""
    names = dict([ENCODINGS[encoding].options["x264-params"].split("=")])["asm"].split(",")
    assert "AVX2" in names and "AVX512" not in names


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_shows_the_same_frames(video, tmp_path, encoding):
    for row in cut_video(video, SPANS, CutSettings(encoding=encoding), tmp_path / "out").rows:
        data = piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])
        expected = [21 * row["n"] + 10 * k for k in range(row["num_frames"])]
        assert row["codec"] == ENCODINGS[encoding].name
        assert (shown_by_jpegs(data) if encoding == "jpeg-frames" else numbers_in(data)) == expected
        assert count_frames(data) == row["num_frames"], "`clipmill verify` counts them"


def shown_by_jpegs(data: bytes) -> list[int]:
    import cv2
    import numpy as np

    from bench.frame_code import read_number

    images = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_GRAYSCALE) for file in jpeg_frames(data)]
    with av.open(io.BytesIO(data), format="mjpeg") as stream:  # an unchanged stream, which players know too
        assert sum(1 for _ in stream.decode(video=0)) == len(images)
    return [read_number(image) for image in images]


@pytest.mark.parametrize("data", [b"", b"JPGS", b"\xff\xff\xff\xffJPGS", b"x" * 40 + b"\1\0\0\0\1\0\0\0JPGS"])
def test_data_other_than_a_jpeg_sequence_is_refused(data):
    with pytest.raises(ItemError, match="not-jpeg-frames"):
        jpeg_frames(data)


def test_mp4s_carry_their_index_in_front_and_nothing_of_when_or_where_they_were_made(video, tmp_path):
    (row,) = cut_video(video, SPANS[:1], CutSettings(audio=True), tmp_path / "out").rows
    data = piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])
    boxes, at = [], 0
    while at < len(data):
        boxes.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    assert boxes.index(b"moov") < boxes.index(b"mdat") and at == len(data)
    with av.open(io.BytesIO(data)) as container:
        assert not {"creation_time", "encoder"} & set(container.metadata)
        assert all("creation_time" not in stream.metadata for stream in container.streams)
    assert b"Lavf" not in data and b"noisy" not in data


def test_offsets_follow_each_other_and_hashes_match(video, tmp_path):
    import hashlib

    result = cut_video(video, SPANS, CutSettings(caption_frames=2), tmp_path / "out")
    pieces = []
    for row in result.rows:
        pieces.append((row["mp4_offset"], row["num_bytes"], row["sha256"]))
        pieces += [(frame["offset"], frame["num_bytes"], frame["sha256"]) for frame in row["frames"]]
    end = 0
    for offset, num_bytes, sha256 in sorted(pieces):
        assert offset == end
        assert hashlib.sha256(piece(tmp_path / "out", offset, num_bytes)).hexdigest() == sha256
        end = offset + num_bytes
    assert end == (tmp_path / "out").stat().st_size


def test_rows_fit_the_table(video, tmp_path):
    """Rows have exactly the columns of the `clips` table that cutting knows, with the table's types."""
    import pyarrow as pa

    from shards.corpus.schema import TABLES

    rows = cut_video(video, SPANS, CutSettings(), tmp_path / "out").rows
    schema = TABLES["clips"]
    assert set(rows[0]) == set(schema.names) - {"video_id", "tar", "source_sha256"}
    table = pa.Table.from_pylist([row | {"video_id": "v", "tar": "t", "source_sha256": "s"} for row in rows], schema)
    assert table.num_rows == 4 and all(column.null_count == 0 for column in table.columns)


def test_settings_that_change_nothing_leave_the_fingerprint_alone():
    default = CutSettings()
    assert CutSettings(timeout_base_s=1, memory_mb=4000, max_pixels=10).fingerprint() == default.fingerprint()
    for change in ({"fps": 2.0}, {"short_side": 128}, {"audio": True}, {"encoding": "av1"}, {"caption_frames": 2}):
        assert CutSettings(**change).fingerprint() != default.fingerprint()
    assert set(CutSettings.model_json_schema()["properties"]["encoding"]["enum"]) == set(ENCODINGS)


@pytest.mark.parametrize(
    "wrong", [{"fps": 0}, {"fps": "fast"}, {"short_side": 255}, {"short_side": 8}, {"encoding": "h264"}, {"frames": 3}]
)
def test_wrong_settings_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CutSettings(**wrong)
