"""The loader decodes the right frames of any clip: upright, with the right colours and size."""

import io
import struct
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch

from bench.frame_code import read_number
from clipmill.base.errors import ItemError
from clipmill.media.encode import ENCODINGS, ClipEncoder, JpegSequence
from clipmill.media.packets import Limits
from pipeline.stages.cut.picture import PictureMaker
from tests.helpers.media import OPEN_GOP, SHORT_GOP, Shape, make_video
from tests.stages.test_cut_is_frame_accurate import SHAPES
from training.data import clip_frames as clip_video
from training.data.clip_frames import Picture, decode_clip, decode_still
from training.data.frame_sampling import eval_indices, middle_index, resize
from training.data.mp4_index import plain_track

CHOICES = [
    lambda n: np.append(eval_indices(n, 12), middle_index(n)),
    lambda n: [n - 1],
    lambda n: [0],
    lambda n: [5, 3, 3, n - 1, 0],
    lambda n: range(1, n, 7),
    lambda n: range(n),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


def _bytes(folder, shape: Shape) -> bytes:
    path = folder / shape.name
    return (path if path.exists() else make_video(folder, shape)).read_bytes()


def _numbers(pictures: np.ndarray) -> list[int]:
    return [read_number(picture[..., 1]) for picture in pictures]


def _all_frames(data: bytes) -> list[np.ndarray]:
    """Return the RGB of every frame as PyAV decodes it."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_frame_k_is_the_kth_that_is_shown(folder, shape):
    data = _bytes(folder, shape)
    asked = []
    for choose in CHOICES:
        pictures = decode_clip(data, lambda n, choose=choose: asked.append(n) or choose(n), Picture(224))
        assert _numbers(pictures) == list(choose(shape.num_frames))
    assert set(asked) == {shape.num_frames}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_of_clips(folder, name):
    data, pictures = _clip(folder, name)
    for choose in CHOICES:
        assert _numbers(decode_clip(data, choose, Picture(224))) == list(choose(len(pictures)))


def _clip(folder, name: str, num_frames: int = 24) -> tuple[bytes, list[av.VideoFrame]]:
    """Encode a clip as the cut stage does; return it with its source pictures."""
    maker, pictures = PictureMaker(Fraction(1), 256), []
    with av.open(str(folder / "long-gop.mp4") if _bytes(folder, Shape("long-gop.mp4")) else "") as container:
        for frame in container.decode(video=0):
            pictures.append(maker(frame))
    pictures = pictures[:num_frames]
    encoding, size = ENCODINGS[name], (pictures[0].width, pictures[0].height)
    if encoding.codec == "jpeg-frames":
        encoder = JpegSequence(90)
    else:
        encoder = ClipEncoder(encoding, size, Fraction(3), len(pictures), 0.0)
    for number, picture in enumerate(pictures):
        encoder.add(picture, number / 3, (number + 1) / 3)
    return encoder.finish(), pictures


@pytest.mark.parametrize(("name", "plain"), [("fastdecode", True), ("intra", True), ("small", False), ("av1", False)])
def test_plain_clips_need_no_container(folder, monkeypatch, name, plain):
    data, _ = _clip(folder, name)
    assert (plain_track(data) is not None) == plain
    monkeypatch.setattr(clip_video, "_from_container", lambda *arguments: (_ for _ in ()).throw(AssertionError))
    if plain:
        decode_clip(data, CHOICES[0], Picture(224))


@pytest.mark.parametrize("name", ["fastdecode", "intra", "ultrafast"])
def test_both_ways_give_the_same_pixels(folder, monkeypatch, name):
    data, _ = _clip(folder, name)
    for choose in CHOICES:
        direct = decode_clip(data, choose, Picture(224))
        with monkeypatch.context() as patch:
            patch.setattr(clip_video, "plain_track", lambda data: None)
            assert np.array_equal(decode_clip(data, choose, Picture(224)), direct)


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("name", ["fastdecode", "small", "jpeg-frames"])
def test_pixels_are_the_resize_of_the_decoded_rgb(folder, name, fit, antialias):
    """They are exactly `frames.resize` of the decoded 8-bit RGB. The same resize in floating point is one level off,
    and more where black meets white, because 8 bits clip the overshoot after each direction.
    """
    data, pictures = _clip(folder, name)
    if name == "jpeg-frames":
        files = clip_video.jpeg_frames(data)
        rgb = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB) for file in files]
    else:
        rgb = _all_frames(data)
    stacked = torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2)
    got = decode_clip(data, lambda n: range(n), Picture(96, fit, antialias))
    want = resize(stacked, 96, fit=fit, antialias=antialias)
    assert np.array_equal(got, want.permute(0, 2, 3, 1).numpy())
    exact = resize(stacked.float(), 96, fit=fit, antialias=antialias).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    off = np.abs(got - exact)
    assert off.mean() < 0.5 and np.mean(off > 1) < 0.02
    soft = stacked // 4 + 90  # no overshoot reaches 0 or 255
    in_8_bits, exact = (resize(pixels, 96, fit=fit, antialias=antialias) for pixels in (soft, soft.float()))
    assert (in_8_bits - exact).abs().max() <= 1.5  # one rounding after each direction


@pytest.mark.parametrize("size", [(454, 256), (320, 180), (66, 50), (256, 342)])
def test_sizes_whose_lines_are_padded_in_memory(folder, size):
    data = _bytes(folder, Shape(f"{size[0]}.mp4", num_frames=10, size=size, options={"bf": "0"}))
    rgb = torch.from_numpy(np.stack(_all_frames(data))).permute(0, 3, 1, 2)
    want = resize(rgb, 224).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(decode_clip(data, lambda n: range(n), Picture(224)), want)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40), (30, 90, 160)]
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}  # of red and of blue in luma


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bf", ["0", "3"])
def test_colours_follow_what_the_stream_says(matrix, full_range, bf):
    tag = {"bt601": 6, "bt709": 1}[matrix]
    data = _colour_video(matrix, full_range, {"colorspace": tag, "color_range": 2 if full_range else 1}, (64, 64), bf)
    _assert_colours(data)


@pytest.mark.parametrize(("size", "matrix"), [((64, 64), "bt601"), ((1280, 720), "bt709")])
def test_colours_of_a_stream_that_says_nothing_are_guessed_by_size(size, matrix):
    _assert_colours(_colour_video(matrix, False, {}, size, "0"))


def _assert_colours(data: bytes) -> None:
    pictures = decode_clip(data, lambda n: range(n), Picture(32)).astype(int)
    for colour, picture in zip(COLOURS, pictures, strict=True):
        assert np.abs(picture[16, 16] - colour).max() <= 3, (colour, picture[16, 16])


def _colour_video(matrix: str, full_range: bool, tags: dict[str, int], size: tuple[int, int], bf: str) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=3, options={"crf": "1", "preset": "veryfast", "bf": bf})
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.thread_count = *size, "yuv420p", 1
        for name, value in tags.items():
            setattr(context, name, value)
        for red, green, blue in COLOURS:
            frame = av.VideoFrame(*size, "yuv420p")
            for plane, value in zip(frame.planes, _yuv(red, green, blue, *WEIGHTS[matrix], full_range), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def _yuv(red: int, green: int, blue: int, of_red: float, of_blue: float, full_range: bool) -> tuple[int, int, int]:
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = (blue - luma) / (2 * (1 - of_blue)), (red - luma) / (2 * (1 - of_red))
    if full_range:
        return round(luma), *(min(255, round(128 + part)) for part in chroma)
    return round(16 + luma * 219 / 255), *(round(128 + part * 224 / 255) for part in chroma)


def test_only_what_is_needed_is_decoded(folder, monkeypatch):
    sent = []
    create = av.CodecContext.create

    class Counting:
        def __init__(self, decoder):
            object.__setattr__(self, "decoder", decoder)

        def __getattr__(self, name):
            return getattr(self.decoder, name)

        def __setattr__(self, name, value):
            setattr(self.decoder, name, value)

        def decode(self, packet):
            sent.append(packet is not None)
            return self.decoder.decode(packet)

    monkeypatch.setattr(clip_video.av.CodecContext, "create", lambda *a: Counting(create(*a)), raising=False)
    for name, expected in (("fastdecode", 13), ("intra", 3)):
        data, _ = _clip(folder, name)
        sent.clear()
        decode_clip(data, lambda n: [2, 7, 12, 7], Picture(224))
        assert sum(sent) == expected


# --- Files that are not so plain


def test_edited_fragmented_and_turned_files_are_left_to_ffmpeg(folder):
    for shape in (
        Shape("long-gop.mp4"),
        Shape("fragments.mp4", options={"bf": "0"}, muxer={"movflags": "frag_keyframe+empty_moov"}),
        Shape("turned.mp4", options={"bf": "0"}, rotation=90),
        Shape("late.mp4", options={"bf": "0"}, start_s=2.0),
    ):
        data = _bytes(folder, shape)
        assert plain_track(data) is None
        assert _numbers(decode_clip(data, CHOICES[0], Picture(224))) == CHOICES[0](shape.num_frames).tolist()


@pytest.mark.parametrize(
    "muxer", [{}, {"movflags": "faststart"}, {"write_btrt": "0"}, {"use_edts": "0"}, {"brand": "isom"}]
)
def test_plain_files_however_they_were_muxed(folder, muxer):
    shape = Shape(f"plain-{'-'.join(muxer.values())}.mp4", options={"bf": "0", "g": "25"}, sound_hz=300, muxer=muxer)
    data = _bytes(folder, shape)
    assert plain_track(data) is not None
    for choose in CHOICES:
        assert _numbers(decode_clip(data, choose, Picture(224))) == list(choose(90))


def test_two_fields_in_two_packets_are_one_picture(folder):
    shape = Shape("fields.mp4", options={"bf": "0", "flags": "+ildct+ilme", "x264-params": "interlaced=1"})
    data = _bytes(folder, shape)
    assert _numbers(decode_clip(data, CHOICES[0], Picture(224))) == CHOICES[0](90).tolist()


def test_a_picture_size_that_changes_in_the_middle(folder):
    """Both halves of the clip are resized to the same square."""
    small, large = (
        _bytes(folder, Shape(f"{width}.h264", num_frames=10, size=(width, 180), options={"bf": "0"}))
        for width in (320, 240)
    )
    pictures = decode_clip(small + large, lambda n: range(n), Picture(224))
    assert _numbers(pictures) == [*range(10), *range(10)]


def test_transparency_grey_and_many_bits(folder):
    for pix_fmt, codec, name in (("gray", "libx264", "grey.mp4"), ("yuv422p10le", "libx264", "ten.mp4")):
        shape = Shape(name, codec=codec, pix_fmt=pix_fmt, options=SHORT_GOP)
        assert _numbers(decode_clip(_bytes(folder, shape), CHOICES[0], Picture(224))) == CHOICES[0](90).tolist()


# --- Files that are nothing


def _error_class(data: bytes) -> str:
    with pytest.raises(ItemError) as raised:
        decode_clip(data, CHOICES[0], Picture(32))
    assert "/proc" not in raised.value.message
    return raised.value.error_class


@pytest.mark.parametrize(
    ("data", "error_class"),
    [
        (b"", "empty-file"),
        (b"hello", "not-a-video"),
        (bytes(10_000), "not-a-video"),
        (np.random.default_rng(0).bytes(10_000), "not-a-video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "not-a-video"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "not-a-video"),
        (b"JPGS", "not-jpeg-frames"),
        (struct.pack("<I", 0) + b"JPGS", "undecodable"),
        (b"junk" + struct.pack("<II", 4, 1) + b"JPGS", "bad-jpeg"),
    ],
)
def test_no_clip_at_all(data, error_class):
    assert _error_class(data) == error_class


def test_sound_alone_is_no_clip(folder):
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert _error_class(out.getvalue()) == "no-video-stream"


def test_pictures_beyond_the_limit_are_not_decoded(folder, monkeypatch):
    monkeypatch.setattr(clip_video, "LIMITS", Limits(max_pixels=100 * 100))
    for name in ("fastdecode", "small"):
        assert _error_class(_clip(folder, name)[0]) in ("too-large", "undecodable")
    still = cv2.imencode(".jpg", np.zeros((200, 200, 3), np.uint8))[1].tobytes()
    with pytest.raises(ItemError, match="too-large"):
        decode_still(still, Picture(32))


def test_damage_never_crashes(folder):
    """Bytes changed, removed or truncated anywhere give pictures or an ItemError, nothing else."""
    random = np.random.default_rng(5)
    clips = [_clip(folder, name, 6)[0] for name in ("fastdecode", "small", "jpeg-frames")]
    clips += [_bytes(folder, replace(shape, num_frames=12, name=f"short-{shape.name}")) for shape in SHAPES[-8:-1:2]]
    outcomes = set()
    for turn in range(120):
        data = bytearray(clips[turn % len(clips)])
        place = int(random.integers(len(data)))
        if turn % 3 == 0:
            del data[place:]
        elif turn % 3 == 1:
            del data[place : place + int(random.integers(1, 400))]
        else:
            for at in random.integers(len(data) // 4 if turn % 2 else len(data), size=20):
                data[at] ^= int(random.integers(1, 256))
        try:
            outcomes.add(decode_clip(bytes(data), CHOICES[0], Picture(32)).shape)
        except ItemError as error:
            outcomes.add(error.error_class)
    assert (13, 32, 32, 3) in outcomes and len(outcomes) > 3
    assert {outcome for outcome in outcomes if isinstance(outcome, tuple)} == {(13, 32, 32, 3)}


def test_a_still_is_turned_as_its_exif_says():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned clockwise
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20] = 250
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", exif=exif, quality=95)
    still = decode_still(out.getvalue(), Picture(32))
    assert still.shape == (32, 32, 3)
    assert still[:, 24:].min() > 200 and still[:, :8].max() < 50


def test_open_groups_of_pictures(folder):
    """A wanted picture may precede its keyframe in display order."""
    shape = Shape("open.mp4", options=OPEN_GOP, fps=3)
    data = _bytes(folder, shape)
    for index in range(0, 90, 5):
        assert _numbers(decode_clip(data, lambda n, index=index: [index], Picture(224))) == [index]
