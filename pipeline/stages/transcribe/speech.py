"""Decode the speech of a video for a recogniser: 16 kHz mono samples on the clock of the picture.

Videos are untrusted: call these functions inside a sandbox.
"""

from pathlib import Path

import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.packets import Limits, SourceFrames, Untrusted, list_frames

SPEECH_RATE = 16_000  # Hz, Whisper's input


def extract_speech(path: str | Path, longest_s: float = 6 * 3600.0) -> np.ndarray:
    """Return float32 [num_samples] in -1..1 at 16 kHz; sample 0 is at the start of play, as for the pictures.

    Late sound is preceded by silence, so that word times found in the samples are times of the video; gaps in the
    sound stay gaps. A file without video starts with its sound. At most `longest_s` seconds are decoded. Raises
    ItemError: no-audio, undecodable-audio, empty-file, not-a-video.
    """
    from clipmill.media.sound import SoundTrack

    name = Path(path).name
    track = SoundTrack(path, _pictures(path), SPEECH_RATE, "mono")
    try:
        if not track.exists:
            raise ItemError("no-audio", f"{name} has no audio stream")
        samples = track.first_channel(longest_s)
    finally:
        track.close()
    if not len(samples):
        why = "no sample of its audio stream can be decoded" if track.present else "no decoder for its audio stream"
        raise ItemError("undecodable-audio", f"{name}: {why}")
    return samples


def _pictures(path: str | Path) -> SourceFrames | None:
    """List the pictures of a file, None if it has none. Raises ItemError."""
    from clipmill.media.decode import DecodeCounts, list_by_decoding

    try:
        try:
            return list_frames(path, Limits())
        except Untrusted:
            return list_by_decoding(path, Limits(), DecodeCounts())
    except ItemError as error:
        if error.error_class in ("no-video-stream", "undecodable"):
            return None
        raise
