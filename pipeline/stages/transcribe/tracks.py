"""Read the subtitle tracks inside a video file: mov_text, SubRip, ASS, WebVTT and other texts.

Videos are untrusted: call these functions inside a sandbox. Tracks of pictures (DVD, Blu-ray, DVB) have no text and are
not listed.
"""

import re
from dataclasses import replace
from pathlib import Path

from clipmill.media.clock import play_start_s
from clipmill.media.probe import open_media
from pipeline.stages.transcribe.cues import Cue, Cues, Reading, SubtitleSettings, marked_up_cue, moved, unreadable
from pipeline.stages.transcribe.line_formats import ASS_FIELDS, ass_cue
from pipeline.stages.transcribe.subtitles import MAX_FILE_BYTES, finished

KIND = "embedded"


def subtitle_tracks(path: str | Path) -> list[dict]:
    """Return the text tracks of a video as dicts with path, language (or None), kind, format and track (its index).

    The default track comes first, and tracks of forced subtitles, which translate a few lines only, come last. Raises
    ItemError as `open_media` does.
    """
    from av.stream import Disposition

    found = []
    with open_media(path) as container:
        for stream in container.streams.subtitles:
            if stream.codec_context is None or not stream.codec_context.codec.text_sub:
                continue
            forced = bool(stream.disposition & Disposition.forced)
            rank = (forced, not stream.disposition & Disposition.default, stream.index)
            found.append((rank, stream.index, _language(stream.metadata), _codec(stream)))
    return [
        {"path": str(path), "language": language, "kind": KIND, "format": name, "track": index}
        for _, index, language, name in sorted(found, key=lambda entry: entry[0])
    ]


def _language(metadata: dict[str, str]) -> str | None:
    """Return a track's language as the shortest code: containers hold three letters ("eng")."""
    from langcodes import LanguageTagError, standardize_tag

    code = next((value for name, value in metadata.items() if name.lower() == "language"), "")
    try:
        return None if code.lower() in ("", "und", "mis", "mul", "zxx") else standardize_tag(code)
    except LanguageTagError:
        return None


def read_track(path: str | Path, index: int, settings: SubtitleSettings) -> Cues:
    """Read one subtitle track into cues; second 0 is the start of play, as in a subtitle file.

    Raises ItemError "subtitle-unreadable", and as `open_media` does.
    """
    import av
    from av.stream import Discard

    reading, cues, num_bytes = Reading(settings), [], 0
    with open_media(path) as container:
        if index >= len(container.streams) or container.streams[index].type != "subtitle":
            raise unreadable(f"stream {index} is not a subtitle track")
        stream = container.streams[index]
        for other in container.streams:
            other.discard = Discard.default if other.index == index else Discard.all
        start_s = _start_of_play_s(container)
        try:
            for packet in container.demux(stream):
                num_bytes += packet.size
                if num_bytes > MAX_FILE_BYTES:
                    raise unreadable(f"track {index} is larger than {MAX_FILE_BYTES >> 20} MiB")
                if packet.pts is None or not packet.size:
                    continue
                begin_s = float(packet.pts * stream.time_base)
                end_s = begin_s + float((packet.duration or 0) * stream.time_base)
                try:
                    found = _cues_of(packet, _codec(stream), begin_s, end_s, reading)
                    cues += [moved(cue, -start_s) for cue in found]
                except (av.FFmpegError, ValueError, LookupError):
                    reading.repairs["bad-cue"] += 1
        except av.FFmpegError as error:
            if not cues:
                raise unreadable(f"track {index}: {error}") from error
            reading.repairs["cut-off"] += 1  # the packets before the damage are good
        if reading.repairs["bad-cue"] and not cues:
            raise unreadable(f"none of the texts of track {index} can be read")
        return finished(cues, _codec(stream), reading, _language(stream.metadata))


def _codec(stream) -> str:
    return stream.codec_context.codec.canonical_name


def _start_of_play_s(container) -> float:
    """Return the time on the container's clock, in seconds, at which a player starts."""
    known = [stream for stream in container.streams.video if stream.start_time is not None]
    pictures = [float(stream.start_time * stream.time_base) for stream in known]
    return play_start_s(container, min(pictures, default=(container.start_time or 0) / 1_000_000))


def _cues_of(packet, codec: str, start_s: float, end_s: float, reading: Reading) -> list[Cue]:
    """Return the cues of a packet. Raises av.FFmpegError, ValueError or LookupError for a broken one."""
    data = bytes(packet)
    if codec in ("subrip", "webvtt", "text"):
        cue = marked_up_cue(start_s, end_s, data.decode("utf-8", "ignore"), reading.settings)
        return [_with_absolute_marks(cue)]
    if codec == "mov_text":
        return [marked_up_cue(start_s, end_s, _mov_text(data), reading.settings)]
    if codec == "ass":
        return [ass_cue(start_s, end_s, _ass_text(data), reading)]
    # FFmpeg turns every other text into ASS.
    shown = [ass_cue(start_s, end_s, _ass_text(subtitle.ass), reading) for subtitle in packet.decode() or ()]
    return [cue for cue in shown if cue.text]


def _with_absolute_marks(cue: Cue) -> Cue:
    """Return a cue whose word times count from the file's start; Matroska's WebVTT counts them from the cue's start."""
    tags = [mark.start_s for mark in cue.marks[1:]]
    if not tags or min(tags) >= cue.start_s or max(tags) > cue.end_s - cue.start_s:
        return cue
    marks = [replace(mark, start_s=mark.start_s + cue.start_s) for mark in cue.marks[1:]]
    return replace(cue, marks=(cue.marks[0], *marks))


def _mov_text(data: bytes) -> str:
    """Return the text of a sample (3GPP TS 26.245, section 5.17): its length, then UTF-8 or UTF-16."""
    length = int.from_bytes(data[:2], "big")
    text = data[2 : 2 + length]
    wide = text[:2] in (b"\xfe\xff", b"\xff\xfe")
    return text.decode("utf-16" if wide else "utf-8", "ignore").replace("\r\n", "\n").replace("\r", "\n")


def _ass_text(data: bytes) -> str:
    """Return the text of an ASS packet: the last of its fields, which ReadOrder and Layer begin, without times."""
    line = data.decode("utf-8", "ignore")
    if match := re.match(r"Dialogue:\s*(.*)", line, re.S):  # of old files, with times
        return match[1].split(",", len(ASS_FIELDS) - 1)[-1]
    fields = line.split(",", len(ASS_FIELDS) - 2)
    if len(fields) < len(ASS_FIELDS) - 1:
        raise ValueError("too few fields")
    return fields[-1]
