"""Decode the speech of a video for a recogniser: 16 kHz mono samples on the clock of the picture.

Videos are untrusted: call these functions inside a sandbox.
"""

import os
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.probe import SHUT_IN, open_media

SPEECH_RATE = 16_000  # Hz, Whisper's input
CHUNK_BYTES = 1 << 20


def extract_speech(path: str | Path, timeout_s: float = 1800.0, longest_s: float = 6 * 3600.0) -> np.ndarray:
    """Return float32 [num_samples] in -1..1 at 16 kHz; sample 0 is at the time of the first displayed frame.

    Earlier sound is left out and late sound is preceded by silence, so that word times found in the samples are times
    of the video; gaps in the sound stay gaps. A file without video starts with its sound. At most `longest_s` seconds
    are decoded. Raises ItemError: no-audio, undecodable-audio, timeout, empty-file, not-a-video.
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
        raise ItemError(
            "undecodable-audio", errors or f"{Path(path).name}: ffmpeg decoded no sample of its audio stream"
        )
    return np.frombuffer(samples, np.float32, len(samples) // 4)


def _output_of(command: list[str], timeout_s: float) -> tuple[bytearray, str]:
    """Run a command; return its standard output, held in memory once, and the end of its standard error.

    Raises ItemError "timeout".
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
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
            raise ItemError("timeout", f"extracting the sound took longer than the limit of {timeout_s:.0f} s")
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 1500))
        return data, stderr.read().decode(errors="replace")


def _origin_s(path: str | Path) -> float:
    """Return the time of the first displayed frame on the container's clock, in seconds; raises ItemError."""
    from clipmill.media.packets import Limits, Untrusted, list_frames

    with open_media(path) as container:
        if not container.streams.audio:
            raise ItemError("no-audio", f"{Path(path).name} has no audio stream")
        start_s = container.streams.audio[0].start_time or 0
        start_s = float(start_s * container.streams.audio[0].time_base)
    try:
        return list_frames(path, Limits()).origin_s
    except Untrusted:  # a container without presentation times starts both streams together
        return start_s
    except ItemError as error:
        if error.error_class in ("no-video-stream", "undecodable"):
            return start_s
        raise
