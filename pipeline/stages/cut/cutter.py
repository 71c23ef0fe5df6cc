"""Cut one video in one pass: decode and scale every wanted frame once, for all clips that contain it.

A clip's encoder opens with its first frame and closes with its last, so memory depends on the number of overlapping
spans, not on the video's length. The video is untrusted: this runs inside a sandbox.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np

from clipmill.base.errors import ItemError
from clipmill.media.decode import DecodeCounts, list_by_decoding, wanted_frames
from clipmill.media.encode import AUDIO_RATE, ENCODINGS, ClipEncoder, JpegSequence
from clipmill.media.frame_stats import ClipStats, FrameStats, Thumbnailer, perceptual_hash
from clipmill.media.frame_times import FrameTimes, caption_frames, choose_frames
from clipmill.media.packets import Limits, SourceFrames, Untrusted, list_frames
from clipmill.media.sound import SoundTrack
from pipeline.stages.cut.picture import PictureMaker, fitted
from pipeline.stages.cut.settings import CutResult, CutSettings, SpanRequest

FRAME_SAMPLES = 1024  # of an AAC frame


class ClipFrame:
    """A clip picture with its statistics, hash and JPEG, each computed at most once and only if needed."""

    def __init__(self, picture: av.VideoFrame, thumbnailer: Thumbnailer, jpeg_quality: int):
        self.picture, self._thumbnailer, self._quality = picture, thumbnailer, jpeg_quality

    def in_size(self, size: tuple[int, int]) -> "ClipFrame":
        """Return this frame, or one of another size where the shape of the video changes within a clip."""
        if (self.picture.width, self.picture.height) == size:
            return self
        return ClipFrame(fitted(self.picture, size), self._thumbnailer, self._quality)

    @cached_property
    def stats(self) -> FrameStats:
        return FrameStats.of(self._thumbnailer.colour(self.picture))

    @cached_property
    def hash(self) -> int:
        return perceptual_hash(self._thumbnailer.grey(self.picture))

    @cached_property
    def jpeg(self) -> bytes:
        return self._thumbnailer.jpeg(self.picture, self._quality)


class Clip:
    """A clip that is being made: the source frames it takes, its encoder, and its statistics so far."""

    def __init__(self, span: SpanRequest, chosen: np.ndarray, settings: CutSettings, times: FrameTimes):
        self.span, self.chosen, self.settings, self.times = span, chosen.tolist(), settings, times
        self.cursor = 0
        self.start_s = times.times_s[self.chosen[0]].item()
        self.end_s = times.end_of(self.chosen[-1])
        self.rate = None if settings.fps == "source" else Fraction(settings.fps).limit_denominator(1001)
        num_frames = len(self.chosen)
        self.duration_s = self.end_s - self.start_s if self.rate is None else float(num_frames / self.rate)
        self.captioned = dict.fromkeys(caption_frames(num_frames, settings.caption_frames))  # k → (time, JPEG)
        self.hashed = (0, num_frames // 2, num_frames - 1)
        self.hashes: dict[int, int] = {}
        self.measures = ClipStats()
        self.encoder: ClipEncoder | JpegSequence | None = None
        self.size = (0, 0)

    @property
    def sound_start_s(self) -> float:
        return self.start_s if self.rate is None else max(self.span.start_s, self.times.times_s[0].item())

    @property
    def complete(self) -> bool:
        return self.cursor == len(self.chosen)

    def missed(self, index: int) -> bool:
        """Return True if a frame that the clip needs before source frame `index` was not decoded."""
        return not self.complete and self.chosen[self.cursor] < index

    def add(self, index: int, frame: ClipFrame, with_sound: bool) -> None:
        """Append source frame `index` as often as the clip contains it."""
        if self.encoder is None:
            self._open(frame.picture, with_sound)
        frame = frame.in_size(self.size)
        begins_s = self.times.times_s[index].item() - self.start_s
        while not self.complete and self.chosen[self.cursor] == index:
            self.encoder.add(frame.picture, begins_s, self.times.end_of(index) - self.start_s)
            self.measures.add(frame.stats)
            if self.cursor in self.captioned:
                self.captioned[self.cursor] = (self.times.times_s[index].item(), frame.jpeg)
            if self.cursor in self.hashed:
                self.hashes[self.cursor] = frame.hash
            self.cursor += 1

    def _open(self, picture: av.VideoFrame, with_sound: bool) -> None:
        self.size = (picture.width, picture.height)
        encoding = ENCODINGS[self.settings.encoding]
        if encoding.codec == "jpeg-frames":
            self.encoder = JpegSequence(self.settings.jpeg_quality)
        else:
            sound_s = self.duration_s if with_sound else 0.0
            self.encoder = ClipEncoder(encoding, self.size, self.rate, len(self.chosen), sound_s)

    def columns(self) -> dict:
        """Return the columns of `clips` that do not depend on the encoded file."""
        num_frames = len(self.chosen)
        self.measures.hashes = [self.hashes[k] for k in self.hashed]
        return {
            "clip_id": self.span.clip_id,
            "n": self.span.n,
            "span_start_s": self.span.start_s,
            "span_end_s": self.span.end_s,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "duration_s": self.duration_s,
            "num_frames": num_frames,
            "fps": num_frames / self.duration_s,
            "width": self.size[0],
            "height": self.size[1],
            "codec": ENCODINGS[self.settings.encoding].name,
            **self.measures.columns(),
        }


class Cutter:
    """Cut one video; `counts` holds the counts of decoding."""

    def __init__(self, path: str | Path, settings: CutSettings):
        self.path, self.settings = path, settings
        self.limits = Limits(settings.max_pixels, settings.max_frames)
        self.counts = DecodeCounts()
        self.rows: dict[str, dict] = {}
        self.failures: dict[str, ItemError] = {}

    def cut(self, spans: list[SpanRequest], out_path: str | Path) -> CutResult:
        """Cut by the packets' times, then by decoded frames' times where those are wrong.

        Packets' times are wrong in damaged files, with separate fields, or absent altogether. See `cut_video`.
        """
        assert len({span.clip_id for span in spans}) == len(spans), "two spans with one clip_id"
        with open(out_path, "wb") as self.out:
            try:
                source = list_frames(self.path, self.limits)
                left = self._pass(source, spans)
            except Untrusted:
                self.rows, self.failures, left = {}, {}, spans
                self.out.seek(0)
                self.out.truncate()
            if left:
                source = list_by_decoding(self.path, self.limits, self.counts)
                for span in self._pass(source, left):
                    self._fail(span, ItemError("undecodable", "; ".join(sorted(self.counts.messages))))
        rows = [self.rows[span.clip_id] for span in spans if span.clip_id in self.rows]
        failures = [(span.clip_id, self.failures[span.clip_id]) for span in spans if span.clip_id in self.failures]
        counts = {**asdict(self.counts), "messages": sorted(self.counts.messages)}
        return CutResult(rows, failures, source.times.end_s, len(source.times), counts)

    def _pass(self, source: SourceFrames, spans: list[SpanRequest]) -> list[SpanRequest]:
        """Decode once and write all complete clips; return the spans of which a frame is missing."""
        waiting = sorted(self._planned(source, spans), key=lambda clip: clip.chosen[0], reverse=True)
        if not waiting:
            return []
        wanted = np.unique(np.concatenate([clip.chosen for clip in waiting]))
        sound = SoundTrack(self.path, source, AUDIO_RATE, "stereo") if self.settings.audio else None
        live: list[Clip] = []
        broken: list[SpanRequest] = []
        for index, frame in self._frames(source, wanted):
            while waiting and waiting[-1].chosen[0] <= index:
                live.append(waiting.pop())
            broken += [clip.span for clip in live if clip.missed(index)]
            live = [clip for clip in live if not clip.missed(index)]
            for clip in live:
                self._feed(clip, index, frame, sound)
            live = [clip for clip in live if not clip.complete and clip.span.clip_id not in self.failures]
            if sound is not None:
                sound.forget(min((clip.sound_start_s for clip in [*live, *waiting[-1:]]), default=0.0))
        if sound is not None:
            self.counts.num_errors += sound.num_errors
            sound.close()
        return broken + [clip.span for clip in [*live, *waiting]]

    def _planned(self, source: SourceFrames, spans: list[SpanRequest]) -> Iterator[Clip]:
        """Yield a Clip for each span that can be cut; record the others as failures."""
        rate = None if self.settings.fps == "source" else self.settings.fps
        for span in spans:
            try:
                chosen = choose_frames(source.times, span.start_s, span.end_s, rate, self.settings.min_frames)
            except ItemError as error:
                self._fail(span, error)
            else:
                yield Clip(span, chosen, self.settings, source.times)

    def _frames(self, source: SourceFrames, wanted: np.ndarray) -> Iterator[tuple[int, ClipFrame]]:
        """Yield (source frame index, clip picture) of the wanted frames in display order."""
        short_side = None if self.settings.short_side == "source" else self.settings.short_side
        maker, thumbnailer = PictureMaker(None, short_side), Thumbnailer()
        for index, frame, pixel_aspect in wanted_frames(self.path, source, wanted, self.limits, self.counts):
            yield index, ClipFrame(maker(frame, pixel_aspect), thumbnailer, self.settings.jpeg_quality)

    def _feed(self, clip: Clip, index: int, frame: ClipFrame, sound: SoundTrack | None) -> None:
        """Add a frame to a clip; with the last one, write the clip and release its encoder."""
        try:
            clip.add(index, frame, with_sound=sound is not None and sound.present)
            if clip.complete:
                self._write(clip, sound)
        except av.MemoryError:
            raise
        except av.FFmpegError as error:
            self._fail(clip.span, ItemError("encode-failed", str(error)))

    def _write(self, clip: Clip, sound: SoundTrack | None) -> None:
        """Append a complete clip and its caption frames to the output file and record its row of `clips`."""
        has_audio = getattr(clip.encoder, "sound", None) is not None
        data = clip.encoder.finish(_audio_frames(sound, clip) if has_audio else None)
        clip.encoder = None
        row = clip.columns() | {
            "has_audio": has_audio,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "mp4_offset": self._append(data),
        }
        row["frames"] = [
            {
                "time_s": time_s,
                "sha256": hashlib.sha256(jpeg).hexdigest(),
                "offset": self._append(jpeg),
                "num_bytes": len(jpeg),
            }
            for time_s, jpeg in clip.captioned.values()
        ]
        row |= {"frame_time_s": row["frames"][0]["time_s"], "frame_sha256": row["frames"][0]["sha256"]}
        self.rows[clip.span.clip_id] = row

    def _append(self, data: bytes) -> int:
        offset = self.out.tell()
        self.out.write(data)
        return offset

    def _fail(self, span: SpanRequest, error: ItemError) -> None:
        self.failures[span.clip_id] = error


def _audio_frames(sound: SoundTrack, clip: Clip) -> Iterator[av.AudioFrame]:
    """Yield AAC-sized frames of a clip's sound."""
    samples = sound.samples(clip.sound_start_s, clip.duration_s)
    for begin in range(0, samples.shape[1], FRAME_SAMPLES):
        piece = np.ascontiguousarray(samples[:, begin : begin + FRAME_SAMPLES])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = AUDIO_RATE, begin
        yield frame
