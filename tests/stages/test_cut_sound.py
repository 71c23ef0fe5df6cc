"""Sound stays in sync with the picture in clips and in the samples for speech recognition."""

import io
import subprocess
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest

from clipmill.base.errors import ItemError
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.transcribe.speech import SPEECH_RATE, extract_speech
from tests.helpers.media import SHORT_GOP, Shape, make_video, piece

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


def pitch_hz(samples: np.ndarray, rate: int, start_s: float, end_s: float) -> float:
    part = samples[round(start_s * rate) : round(end_s * rate)]
    return np.count_nonzero(np.diff(np.signbit(part))) / 2 / (end_s - start_s)


@pytest.mark.parametrize("makes", [((2, 48000), (1, 44100), (2, 32000)), ((1, 44100), (2, 48000), (1, 16000))])
def test_sound_that_changes_its_rate_and_channels_midway_is_read_to_its_end(tmp_path, makes):
    """A broadcast does this when it switches to a programme from another source."""
    parts = []
    for start_s, (channels, rate) in zip((0, 2, 4), makes, strict=True):
        part = tmp_path / f"{start_s}.ts"
        picture = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2")
        sound = ("-f", "lavfi", "-i", "sine=440:duration=2", "-af", "volume=8", "-ac", f"{channels}", "-ar", f"{rate}")
        written = ("-g", "10", "-c:a", "aac", "-output_ts_offset", f"{start_s}", "-muxdelay", "0", f"{part}")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *picture, *sound, *written]
        subprocess.run(command, check=True)
        parts.append(part.read_bytes())
    path = tmp_path / "broadcast.ts"
    path.write_bytes(b"".join(parts))
    (row,) = cut_video(path, [SpanRequest("v.0", 0, 0.5, 5.5)], CutSettings(audio=True), tmp_path / "out").rows
    sound = sound_of(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
    assert len(sound) / 48000 == pytest.approx(5.0, abs=0.05)
    for start_s in (0.2, 1.7, 3.7):  # except for a moment at each change
        assert loud(sound, 48000, start_s, start_s + 1.1), start_s
        assert pitch_hz(sound, 48000, start_s, start_s + 1.1) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("delay", [Fraction(1), Fraction(-1)])
def test_sound_that_starts_late_or_early_is_moved_to_the_picture(tmp_path, delay):
    """The picture is shifted against the sound by a second; time 0 is that of the earlier one."""
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
    samples, begins = extract_speech(shifted), max(delay, 0)
    for second in range(1, 4):
        assert loud(samples, SPEECH_RATE, second + 0.1, second + 0.9) == bool((second - begins) % 2)
    (row,) = cut_video(shifted, [SpanRequest("v.0", 0, 1.0, 4.0)], CutSettings(audio=True), tmp_path / "out").rows
    assert row["start_s"] == pytest.approx(1.0, abs=0.03)
    sound = sound_of(piece(tmp_path / "out", row["mp4_offset"], row["num_bytes"]))
    for second in range(1, 3):
        assert loud(sound, 48000, second + 0.1, second + 0.9) == bool((second + 1 - begins) % 2)


def test_no_audio_is_an_error_of_its_own(tmp_path):
    with pytest.raises(ItemError) as caught:
        extract_speech(make_video(tmp_path, Shape("silent.mp4")))
    assert caught.value.error_class == "no-audio"


def test_real_speech_comes_out_whole(footage):
    samples = extract_speech(footage / "jfk.flac")
    assert len(samples) / SPEECH_RATE == pytest.approx(11.0, abs=0.05) and np.abs(samples).max() > 0.3
