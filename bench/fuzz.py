"""Fuzz everything that reads sources with mutated videos and subtitles: `python -m bench.fuzz [--count N] [--seed S]`.

`--target answers` mutates the answers of servers instead (`bench.fuzz_answers`).

Each case is a pure function of (seed, number): a real or made video or subtitle with bytes flipped, pieces overwritten,
moved, repeated or removed, and sizes and counts replaced by extreme ones. A video passes through probe, shots, speech,
cut and the trainer's decoder, a subtitle through reading and word times, each in a sandbox as in a build. A step may
return a result or raise an error with a class of its own. Anything else is a finding, printed with the number that
reproduces it:

  internal-error   an exception without a class
  hang             a time limit was reached (informational: a build records it and continues)
  crash, memory    contained by the sandbox (informational as well), with the decoder's last output
  escape           the sandbox's own process died, or this process grew beyond the limit: never allowed
"""

import argparse
import importlib
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.fuzz_answers import fuzz_answers
from clipmill.base.errors import ItemError
from clipmill.media.probe import probe
from clipmill.media.sandbox import Sandbox
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.transcribe import TranscribeSettings, transcript_of_subtitles

EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1")
MEMORY_BYTES = 1 << 30
GROWTH_BYTES = 300 << 20  # of this process over all cases, which handles their results
CONTAINED = {"timeout": "hang", "decoder-crash": "crash", "out-of-memory": "memory"}
IMPORT_S = 300.0
SPANS = [SpanRequest("v.0", 0, 0.0, 0.8), SpanRequest("v.1", 1, 0.5, 2.0)]


@dataclass
class Tally:
    """Results by step and class, and the findings."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    contained: list[str] = field(default_factory=list)
    num_cases: int = 0
    slowest_s: float = 0.0
    growth_mb: float = 0.0


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Apply one to eight mutations, half of them near the start or end, where headers and indexes are."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if len(content) < 16:
            break
        at, length = _place(rng, len(content)), rng.choice((1, 4, 16, 256, 4096))
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                value = rng.choice(EXTREMES)
                content[at : at + len(value)] = value
            case 2:
                content[at : at + length] = rng.randbytes(min(length, len(content) - at))
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 16))
            case 5:
                other = _place(rng, len(content))
                content[at : at + length] = content[other : other + length]
    return bytes(content[: rng.randrange(1, len(content) + 1)]) if rng.random() < 0.1 else bytes(content)


def _place(rng: random.Random, size: int) -> int:
    near = min(size, 4096)
    return rng.choice((rng.randrange(size), rng.randrange(near), size - 1 - rng.randrange(near)))


def _warm_up(trains: bool) -> None:
    """Import everything, so that no case is charged for it."""
    for name in ("av", "cv2", "scenedetect", *(["training.data.clip_frames"] if trains else [])):
        importlib.import_module(name)


def _cut(path: str) -> int:
    return len(cut_video(path, SPANS, CutSettings(audio=True, short_side=64), f"{path}.out").rows)


def _train(path: str) -> int:
    from training.data.clip_frames import Picture, decode_clip

    return len(decode_clip(Path(path).read_bytes(), lambda count: range(0, count, max(1, count // 4)), Picture(32)))


def _subtitle(path: str) -> int:
    """Read a subtitle; return its number of words."""
    files = [{"path": path, "language": "en", "kind": "manual", "format": None}]
    transcript, problems = transcript_of_subtitles(files, TranscribeSettings())
    if problems:
        raise problems[0]
    return len(transcript.words) if transcript else 0


def _shots(path: str) -> int:
    return len(detect_shots(path))


def _speech(path: str) -> int:
    return len(extract_speech(path, longest_s=60))


VIDEO_STEPS: dict[str, Callable[[str], object]] = {
    "probe": probe,
    "shots": _shots,
    "speech": _speech,
    "cut": _cut,
    "train": _train,
}


def fuzz(videos: list[Path], subtitles: list[Path], seed: int, numbers: Iterator[int], limit_s: float) -> Tally:
    """Run the cases of these numbers, one after another."""
    tally, seeds = Tally(), [*videos, *subtitles]
    steps = dict.fromkeys(videos, VIDEO_STEPS) | dict.fromkeys(subtitles, {"subtitle": _subtitle})
    before = _resident_bytes()
    box = partial(Sandbox, MEMORY_BYTES, file_bytes=1 << 28, calls_per_child=1000)
    with box() as media, box() as trainer, TemporaryDirectory() as folder:
        with suppress(KeyboardInterrupt):  # report the cases done so far
            for number in numbers:
                rng = random.Random(f"{seed}:{number}")
                source = rng.choice(seeds)
                case = Path(folder, f"case{source.suffix}")
                case.write_bytes(mutated(source.read_bytes(), rng))
                for name, step in steps[source].items():
                    sandbox = trainer if step is _train else media
                    sandbox.call(_warm_up, step is _train, timeout_s=IMPORT_S)
                    _run(sandbox, name, step, case, f"--seed {seed} --only {number} ({source.name})", limit_s, tally)
                tally.num_cases += 1
    tally.growth_mb = (_resident_bytes() - before) / (1 << 20)
    if tally.growth_mb > GROWTH_BYTES / (1 << 20):
        tally.findings.append(f"escape: this process grew by {tally.growth_mb:,.0f} MB")
    return tally


def _run(sandbox: Sandbox, name: str, step: Callable, case: Path, again: str, limit_s: float, tally: Tally) -> None:
    """Run a step of a case in the sandbox and tally the result."""
    begun = time.monotonic()
    try:
        sandbox.call(step, str(case), timeout_s=limit_s)
        outcome = "ok"
    except ItemError as error:
        outcome = error.error_class
        finding = f"{CONTAINED.get(outcome, outcome)}: {name} {again}: {error.message.strip()[-400:]}"
        if outcome == "internal-error":
            tally.findings.append(finding)
        elif outcome in CONTAINED:
            tally.contained.append(finding)
    elapsed_s = time.monotonic() - begun
    tally.outcomes[name, outcome] += 1
    tally.slowest_s = max(tally.slowest_s, elapsed_s)
    if elapsed_s > limit_s + 10:
        tally.findings.append(f"escape: {name} {again} took {elapsed_s:.0f} s, its limit is {limit_s:.0f}")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def made_seeds(folder: Path) -> tuple[list[Path], list[Path]]:
    """Make small videos in eight containers and codecs, and subtitles in five formats, as seeds of mutations."""
    import subprocess

    import imageio_ffmpeg

    picture = "testsrc2=s=96x64:r=12:d=2"
    shapes = {
        "a.mp4": "-c:v libx264 -bf 2 -g 8 -c:a aac",
        "b.mp4": "-c:v libx264 -movflags frag_keyframe+empty_moov -c:a aac",
        "c.mkv": "-c:v libx265 -x265-params log-level=none -c:a libopus",
        "d.webm": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -c:a libvorbis",
        "e.avi": "-c:v mpeg4 -bf 2 -c:a mp3",
        "f.ts": "-c:v libx264 -g 8 -c:a aac",
        "g.flv": "-c:v flv1 -an",
        "h.gif": "-an",
    }
    for name, options in shapes.items():
        inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", "sine=d=2"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *inputs, *options.split(), "-threads", "1"]
        subprocess.run([*command, str(folder / name)], check=True, stdin=subprocess.DEVNULL)
    cue = "{0:02d}:00:{1:02d}{2}000"
    blocks = "".join(
        f"{n}\n{cue.format(0, n, ',')} --> {cue.format(0, n + 1, ',')}\nword {n} <i>more</i>\n\n" for n in range(9)
    )
    vtt = "WEBVTT\n\n" + blocks.replace(",", ".").replace("word", "a<00:00:00.500><c> word</c>")
    lines = "".join(f'<p begin="00:00:0{n}.0" end="00:00:0{n + 1}.0">word {n}<br/>more</p>' for n in range(9))
    events = ",".join(f'{{"tStartMs":{n}000,"dDurationMs":1000,"segs":[{{"utf8":"w{n} x"}}]}}' for n in range(9))
    dialogue = "".join(f"Dialogue: 0,0:00:0{n}.00,0:00:0{n + 1}.00,Default,,0,0,0,,word {n}\n" for n in range(9))
    columns = "Format: Layer,Start,End,Style,Name,MarginL,MarginR,MarginV,Effect,Text"
    texts = {
        "a.srt": blocks,
        "b.vtt": vtt,
        "c.ttml": f'<?xml version="1.0"?><tt xmlns="http://www.w3.org/ns/ttml"><body><div>{lines}</div></body></tt>',
        "d.json3": f'{{"wireMagic":"pb3","events":[{events}]}}',
        "e.ass": f"[Script Info]\n[Events]\n{columns}\n{dialogue}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in shapes], [folder / name for name in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--target", choices=["media", "answers"], default="media", help="what is mutated")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds per step of a case")
    parser.add_argument("--footage", type=Path, help="folder of videos and subtitles to mutate as well")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    numbers = [given.only] if given.only is not None else range(given.first, given.first + given.count)
    if given.target == "answers":
        tally, begun = Tally(), time.monotonic()
        fuzz_answers(given.seed, iter(numbers), tally)
        report(tally, given.seed, time.monotonic() - begun)
        return 1 if tally.findings else 0
    with TemporaryDirectory() as folder:
        videos, subtitles = made_seeds(Path(folder))
        for path in sorted(given.footage.rglob("*")) if given.footage else []:
            if path.is_file() and path.stat().st_size < 3_000_000:
                (subtitles if path.suffix in (".vtt", ".srt", ".ttml", ".json3", ".ass") else videos).append(path)
        begun = time.monotonic()
        tally = fuzz(videos, subtitles, given.seed, iter(numbers), given.limit_s)
    report(tally, given.seed, time.monotonic() - begun)
    return 1 if tally.findings else 0


def report(tally: Tally, seed: int, elapsed_s: float) -> None:
    """Print the tally."""
    for (step, outcome), count in sorted(tally.outcomes.items()):
        print(f"{step:10} {outcome:22} {count:8,}")
    for line in [*tally.contained, *tally.findings]:
        print(line)
    print(
        f"{tally.num_cases:,} cases, seed {seed}: {len(tally.findings)} findings, {len(tally.contained)} contained by "
        f"the sandbox; slowest step {tally.slowest_s:.1f} s, this process grew by {tally.growth_mb:.0f} MB, "
        f"{elapsed_s:,.0f} s in all"
    )


if __name__ == "__main__":
    from bench import fuzz  # the sandbox imports its steps by their module's name

    sys.exit(fuzz.main())
