"""The speech of a video as a recogniser wants it: 16 kHz mono samples on the clock of the picture."""

import os
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.probe import SHUT_IN, open_media

SPEECH_RATE = 16_000  # Hz, what Whisper takes
CHUNK_BYTES = 1 << 20


def extract_speech(path: str | Path, timeout_s: float = 1800.0, longest_s: float = 6 * 3600.0) -> np.ndarray:
    """float32 [num_samples] in -1..1 at 16 kHz; sample 0 is the moment of the first displayed frame.

    Sound before that moment is left out and late sound is preceded by silence, so that word times found in it are times
    of the video; gaps in the sound stay gaps. A file without video starts with its sound. At most `longest_s` seconds.
    Raises ItemError: no-audio, undecodable-audio, timeout, empty-file, not-a-video. Call it in a sandbox.
    """
    import ffmpeg
    import imageio_ffmpeg

    origin_s = _origin_s(path)
    source = ffmpeg.input(f"file:{path}", **SHUT_IN)
    sound = source.audio.filter("asetpts", f"PTS-({origin_s:.6f})/TB")
    sound = sound.filter("aresample", SPEECH_RATE, **{"async": 1, "first_pts": 0})
    output = sound.output("pipe:", format="f32le", ac=1, ar=SPEECH_RATE, t=longest_s)
    command = output.global_args("-copyts", "-nostdin", "-v", "error", "-threads", "1")
    samples, errors = _output_of(command.compile(imageio_ffmpeg.get_ffmpeg_exe()), timeout_s)
    if not samples:
        raise ItemError("undecodable-audio", errors or "no sample came out")
    return np.frombuffer(samples, np.float32, len(samples) // 4)


def _output_of(command: list[str], timeout_s: float) -> tuple[bytearray, str]:
    """What a command writes, held once, and the end of what it complains about."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
        over = threading.Event()
        timer = threading.Timer(timeout_s, lambda: (over.set(), process.kill()))
        timer.start()
        try:
            data = bytearray()
            while part := process.stdout.read(CHUNK_BYTES):
                data += part
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if over.is_set():
            raise ItemError("timeout", f"extracting the sound took more than {timeout_s:.0f} s")
        complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 1500))
        return data, complaints.read().decode(errors="replace")


def _origin_s(path: str | Path) -> float:
    """The first displayed frame on the container's clock."""
    from clipmill.media.packets import Limits, Untrusted, list_frames

    with open_media(path) as container:
        if not container.streams.audio:
            raise ItemError("no-audio", f"{Path(path).name} has no audio stream")
        start_s = container.streams.audio[0].start_time or 0
        start_s = float(start_s * container.streams.audio[0].time_base)
    try:
        return list_frames(path, Limits()).origin_s
    except Untrusted:  # containers without presentation times start both streams together
        return start_s
    except ItemError as error:
        if error.error_class in ("no-video-stream", "undecodable"):
            return start_s
        raise
