"""Fuzz all that reads sources with mutated videos, subtitles and lists: `python -m bench.fuzz [--count N] [--seed S]`.

Each case is a pure function of (seed, number): a real or made video, subtitle or source list with bytes flipped, pieces
overwritten, moved, repeated or removed, and sizes and counts replaced by extreme ones. A video passes through probe,
shots, speech, its subtitle tracks, cut and the trainer's decoder, a subtitle through reading and word times, each in a
sandbox as in a build. A list passes through ingest, into an empty corpus and into the resulting one; `--target lists`
leaves out the others. `--target answers` mutates the answers of servers instead (`bench.fuzz_answers`), `--target
fragments` the files of tables (`bench.fuzz_fragments`).

A step may return a result or raise an error with a class of its own ("refused": a list that is the user's mistake as a
whole). Anything else is a finding, printed with the number that reproduces it:

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.fuzz_answers import fuzz_answers
from bench.fuzz_fragments import fuzz_fragments
from clipmill.base.errors import ItemError, UserError
from clipmill.media.probe import probe
from clipmill.media.sandbox import Sandbox
from pipeline.stages.cut.cut import CutSettings, SpanRequest, cut_video
from pipeline.stages.ingest.ingest import IngestSettings, ingest
from pipeline.stages.ingest.sidecars import SUBTITLE_EXTENSIONS
from pipeline.stages.segment.shots import detect_shots
from pipeline.stages.transcribe.cues import SubtitleSettings
from pipeline.stages.transcribe.speech import extract_speech
from pipeline.stages.transcribe.tracks import read_track, subtitle_tracks
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
    for name in (
        "av",
        "cv2",
        "duckdb",
        "pyarrow.csv",
        "pyarrow.parquet",
        "scenedetect",
        *(["training.data.clip_frames"] if trains else []),
    ):
        importlib.import_module(name)


def _cut(path: str) -> int:
    return len(cut_video(path, SPANS, CutSettings(audio=True, short_side=64), f"{path}.out").rows)


def _train(path: str) -> int:
    from training.data.clip_frames import Picture, decode_clip

    return len(decode_clip(Path(path).read_bytes(), lambda count: range(0, count, max(1, count // 4)), Picture(32)))


def _subtitle(path: str) -> int:
    """Read a subtitle; return its number of words."""
    files = [{"path": path, "language": "en", "kind": "manual", "format": None, "fps": 12.0}]
    transcript, problems = transcript_of_subtitles(files, TranscribeSettings())
    if problems:
        raise problems[0]
    return len(transcript.words) if transcript else 0


def _tracks(path: str) -> int:
    """Read the subtitle tracks of a video; return the number of their cues."""
    return sum(len(read_track(path, track["track"], SubtitleSettings()).cues) for track in subtitle_tracks(path))


def _list(path: str) -> int:
    """Ingest a list twice; return its number of sources. The second time adds nothing, and no row is lost silently."""
    import pyarrow as pa

    columns = {name: pa.string() for name in ("video_id", "url", "unit")}
    nothing = pa.table({name: pa.array([], type) for name, type in columns.items()})
    try:
        found = ingest([path], IngestSettings(), nothing)
    except UserError as error:
        raise ItemError("refused", str(error)) from error
    again = ingest([path], IngestSettings(), found.table)
    assert again.table.num_rows == 0 and not (again.grown and again.grown.num_rows), "the same list added something"
    assert found.num_seen >= found.table.num_rows + found.num_added + found.num_duplicates, "rows do not add up"
    return found.table.num_rows


def _shots(path: str) -> int:
    return len(detect_shots(path))


def _speech(path: str) -> int:
    return len(extract_speech(path, longest_s=60))


VIDEO_STEPS: dict[str, Callable[[str], object]] = {
    "probe": probe,
    "shots": _shots,
    "speech": _speech,
    "tracks": _tracks,
    "cut": _cut,
    "train": _train,
}


def fuzz(
    videos: list[Path],
    subtitles: list[Path],
    seed: int,
    numbers: Iterator[int],
    limit_s: float,
    lists: Sequence[Path] = (),
) -> Tally:
    """Run the cases of these numbers, one after another."""
    tally, seeds = Tally(), [*videos, *subtitles, *lists]
    steps = dict.fromkeys(videos, VIDEO_STEPS) | dict.fromkeys(subtitles, {"subtitle": _subtitle})
    steps |= dict.fromkeys(lists, {"list": _list})
    before = _resident_bytes()
    box = partial(Sandbox, MEMORY_BYTES, file_bytes=1 << 28, calls_per_child=1000)
    with box() as media, box() as trainer, TemporaryDirectory() as folder:
        with suppress(KeyboardInterrupt):  # report the cases done so far
            for number in numbers:
                rng = random.Random(f"{seed}:{number}")
                source = rng.choice(seeds)
                packed = ".csv" if source.suffix == ".gz" else ""
                case = Path(folder, f"case{packed}{source.suffix}")
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
    """Make small videos in many containers and codecs, and subtitles in every format, as seeds of mutations."""
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
    paragraphs = "".join(f'<p t="{n}000" d="900"><s>a</s><s t="400"> word{n}</s></p>' for n in range(9))
    columns = "Format: Layer,Start,End,Style,Name,MarginL,MarginR,MarginV,Effect,Text"
    texts = {
        "a.srt": blocks,
        "b.vtt": vtt,
        "c.ttml": f'<?xml version="1.0"?><tt xmlns="http://www.w3.org/ns/ttml"><body><div>{lines}</div></body></tt>',
        "d.json3": f'{{"wireMagic":"pb3","events":[{events}]}}',
        "e.ass": f"[Script Info]\n[Events]\n{columns}\n{dialogue}",
        "f.srv3": f'<timedtext format="3"><body>{paragraphs}</body></timedtext>',
        "g.smi": "<SAMI><BODY>" + "".join(f"<SYNC Start={n}000><P Class=EN>word {n}\n" for n in range(9)),
        "h.sub": "{1}{1}25\n" + "".join(f"{{{n}0}}{{{n}9}}word {n}|more\n" for n in range(1, 9)),
        "i.sbv": "".join(f"0:00:0{n}.000,0:00:0{n + 1}.000\nword {n}\n\n" for n in range(9)),
        "j.vtt": "".join(f"WEBVTT\nX-TIMESTAMP-MAP=MPEGTS:{n}0000,LOCAL:00:00.000\n{vtt[6:90]}\n\n" for n in range(9)),
        "k.srt": blocks.replace("word", "слово").encode("cp1251"),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, source, track, codec in (
        ("i.mp4", "a.mp4", "a.srt", "mov_text"), ("j.mkv", "c.mkv", "e.ass", "ass"), ("k.mkv", "c.mkv", "a.srt", "srt"),
        ("l.webm", "d.webm", "b.vtt", "webvtt"),
    ):  # fmt: skip
        inputs = ["-i", str(folder / source), "-i", str(folder / track), "-map", "0", "-map", "1"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *inputs, "-c:v", "copy", "-c:a", "copy"]
        subprocess.run([*command, "-c:s", codec, str(folder / name)], check=True, stdin=subprocess.DEVNULL)
        shapes[name] = codec
    return [folder / name for name in shapes], [folder / name for name in texts]


def made_lists(folder: Path) -> list[Path]:
    """Make a list in each format and notation of spans, with a row for each clip, as seeds of mutations."""
    import gzip
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": f"v{n // 2}", "url": f"http://h.example/{n // 2}.mp4", "title": f'No. {n}, "so called"\nü', "Title": n,
         "start": n * 2.5, "end": f"0:00:{n * 2 + 9:02d}.5", "caption": "it's here"}
        for n in range(8)
    ]  # fmt: skip
    cells = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
    table = "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in [list(rows[0]), *cells])
    panda = "".join(
        f"v{n},http://h.example/p{n}.mp4,\"[['0:00:0{n}.5', '0:00:1{n}'], ['0:20', '0:30']]\",\"['a', 'it is']\"\n"
        for n in range(5)
    )
    clips = [{"clip_id": f"x.{n}.mp4", "span": [f"00:00:0{n}.25", f"00:00:1{n}"], "text": "t"} for n in range(4)]
    hd_vila = "".join(json.dumps({"url": f"http://h.example/h{n % 2}.mp4", "clip": clips[n:]}) + "\n" for n in range(4))
    texts = {
        "l1.csv": table,
        "l2.tsv": table.replace(",", "\t"),
        "l3.csv": "sep=;\r" + table.replace(",", ";").replace("\n", "\r"),
        "l4.csv": "videoID,url,timestamp,caption\n" + panda,
        "l5.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "l6.json": json.dumps(rows),
        "l7.jsonl": hd_vila,
        "l8.txt": "# list\n" + "".join(f"http://h.example/{n}.mp4#t={n},9\n" for n in range(20)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "l9.csv").write_bytes(table.encode("utf-16"))
    (folder / "l10.csv.gz").write_bytes(gzip.compress(table.encode()))
    columns = {
        "url": pa.array([row["url"] for row in rows], pa.string_view()),
        "spans": pa.array([[[n, n + 1.5]] for n in range(8)], pa.large_list(pa.list_(pa.float64()))),
        "Note": pa.array(["a", "b"] * 4).dictionary_encode(),
        "note": pa.array([b"\xff"] * 8, pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "l11.parquet", compression="none")
    return [folder / name for name in [*texts, "l9.csv", "l10.csv.gz", "l11.parquet"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone")
    targets = ["sources", "lists", "answers", "fragments"]
    parser.add_argument(
        "--target", choices=targets, default="sources", help="what is mutated; sources: media and lists"
    )
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds per step of a case")
    parser.add_argument("--footage", type=Path, help="folder of videos and subtitles to mutate as well")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    numbers = [given.only] if given.only is not None else range(given.first, given.first + given.count)
    if given.target in ("answers", "fragments"):
        tally, begun = Tally(), time.monotonic()
        if given.target == "answers":
            fuzz_answers(given.seed, iter(numbers), tally)
        else:
            fuzz_fragments(given.seed, iter(numbers), tally, mutated)
        report(tally, given.seed, time.monotonic() - begun)
        return 1 if tally.findings else 0
    with TemporaryDirectory() as folder:
        videos, subtitles = ([], []) if given.target == "lists" else made_seeds(Path(folder))
        lists = made_lists(Path(folder))
        for path in sorted(given.footage.rglob("*")) if given.footage else []:
            if path.is_file() and path.stat().st_size < 3_000_000:
                (subtitles if path.suffix in SUBTITLE_EXTENSIONS else videos).append(path)
        begun = time.monotonic()
        tally = fuzz(videos, subtitles, given.seed, iter(numbers), given.limit_s, lists)
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
