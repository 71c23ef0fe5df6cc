"""Sound stays with the picture: in clips that keep it, and in what a recogniser is given."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from media_support import SHORT_GOP, Shape, make_video, piece

from pipeline.audio import SPEECH_RATE, extract_speech
from pipeline.cut import CutSettings, SpanRequest, cut_video
from pipeline.errors import ItemError

SHAPES = [
    Shape("tone.mp4", num_frames=150, options=SHORT_GOP, sound_hz=440),
    Shape("tone.mkv", num_frames=150, options=SHORT_GOP, sound_hz=440, start_s=3.0),
    Shape("tone.ts", num_frames=150, options=SHORT_GOP, sound_hz=440),
]


def loud(samples: np.ndarray, rate: int, start_s: float, end_s: float) -> bool:
    part = samples[round(start_s * rate) : round(end_s * rate)]
    return float(np.sqrt(np.mean(part**2))) > 0.1


def sound_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    assert frames[0].pts == 0
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("fps", [3.0, "source"])
def test_a_clip_has_the_sound_of_its_own_interval(tmp_path, shape, fps):
    path = make_video(tmp_path, shape)
    spans = [SpanRequest("v.0", 0, 0.5, 2.5), SpanRequest("v.1", 1, 1.5, 4.5), SpanRequest("v.2", 2, 3.0, 4.0)]
    result = cut_video(path, spans, CutSettings(audio=True, fps=fps), tmp_path / "out")
    for span, row in zip(spans, result.rows, strict=True):
        data = piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"])
        samples = sound_of(data)
        assert row["has_audio"] and len(samples) / 48000 == pytest.approx(row["duration_s"], abs=0.05)
        for second in range(5):  # the tone sounds in every odd second: check the middle of each that lies inside
            start, end = second + 0.1 - span.start_s, second + 0.9 - span.start_s
            if start >= 0 and end <= span.end_s - span.start_s:
                assert loud(samples, 48000, start, end) == bool(second % 2), (span, second)


def test_no_sound_is_kept_unless_asked_for_and_none_is_made_up(tmp_path):
    with_sound = make_video(tmp_path, SHAPES[0])
    silent = make_video(tmp_path, Shape("silent.mp4"))
    span = [SpanRequest("v.0", 0, 0.0, 2.0)]
    for path, settings in ((with_sound, CutSettings()), (silent, CutSettings(audio=True))):
        (row,) = cut_video(path, span, settings, tmp_path / "out").rows
        with av.open(io.BytesIO(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))) as container:
            assert not row["has_audio"] and not container.streams.audio


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_speech_is_on_the_clock_of_the_picture(tmp_path, shape):
    samples = extract_speech(make_video(tmp_path, shape))
    assert samples.dtype == np.float32 and len(samples) / SPEECH_RATE == pytest.approx(5.0, abs=0.1)
    for second in range(5):
        assert loud(samples, SPEECH_RATE, second + 0.1, second + 0.9) == bool(second % 2)


@pytest.mark.parametrize("delay", [Fraction(1), Fraction(-1)])
def test_sound_that_starts_late_or_early_is_moved_to_the_picture(tmp_path, delay):
    """The picture is moved against the sound by a second: the tone moves with it."""
    original = make_video(tmp_path, SHAPES[0])
    shifted = tmp_path / "shifted.mkv"
    with av.open(str(original)) as source, av.open(str(shifted), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            late = 1 + (delay if packet.stream.type == "audio" else 0)
            packet.pts += int(late / packet.time_base)
            packet.dts += int(late / packet.time_base)
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    samples = extract_speech(shifted)
    for second in range(1, 4):
        assert loud(samples, SPEECH_RATE, second + 0.1, second + 0.9) == bool((second - delay) % 2)
    (row,) = cut_video(shifted, [SpanRequest("v.0", 0, 0.0, 3.0)], CutSettings(audio=True), tmp_path / "out").rows
    sound = sound_of(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
    for second in range(1, 3):
        assert loud(sound, 48000, second + 0.1, second + 0.9) == bool((second - delay) % 2)


def test_no_audio_is_an_error_of_its_own(tmp_path):
    with pytest.raises(ItemError) as caught:
        extract_speech(make_video(tmp_path, Shape("silent.mp4")))
    assert caught.value.error_class == "no-audio"


def test_a_time_limit_holds(tmp_path):
    with pytest.raises(ItemError) as caught:
        extract_speech(make_video(tmp_path, SHAPES[0]), timeout_s=0.001)
    assert caught.value.error_class == "timeout"


def test_real_speech_comes_out_whole(footage):
    samples = extract_speech(footage / "jfk.flac")
    assert len(samples) / SPEECH_RATE == pytest.approx(11.0, abs=0.05) and np.abs(samples).max() > 0.3
