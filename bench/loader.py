"""Measure the samples per second and core of the training loader.

    python -m bench.loader [--footage DIR] [--write FILE]

A sample is what pre-training takes from a clip: 12 frames of 224x224, the middle frame, two texts. The clips are made
here (5 to 8 s, short side 256, 3 fps) and packed into shards: once in the default encoding, once as clips are usually
encoded (x264 medium: B-frames, CABAC, a keyframe every 250 frames). The ways alternate; figures are medians of rounds:

  loader      this loader in one process: bytes, pictures, tokens, batches of 32
  processes   the same through loader processes, with the time of all processes. Gate: at least 0.75 of bare
  bare        the same pictures of the same clips, nothing else: bytes in memory, no texts, no batch.
              Gate: the loader reaches at least 0.9 of it
  frames      decoding of the clips by PyAV without conversion to RGB: the minimum for this codec
  ordinary    a plain loader over the usual clips: open, decode, convert, resize, tokenise, stack a batch; with
              torchcodec where it is installed, else PyAV. Gate: the loader is at least twice as fast

Then the wall time from asking for step 1,000,000 to its batch of 32, without processes and with two. Gate: 2 s each.
With processes that is measured after the imports of their fork server, which a training process requests before it
loads the model; the imports have their own figure.

Traps. Wall time includes other work on the machine: figures are CPU time, user and system, of all processes; even so a
busy machine adds some 20 %, so ratios are taken within a round. The first pass pays for imports, page faults and the
page cache, and is not counted. Shards lie in the page cache, so disks are not measured. A way could be fast because it
decodes the wrong pictures: all are compared pixel by pixel first. Returning memory to the kernel after every clip costs
up to 1 ms a sample at times: it is kept here for all ways, as loader processes do. FFmpeg's default is a thread per
core, which costs half as much again: every decoder here has one thread. The cost of decoding depends on grain, of which
real footage has more or less than these pictures: `--footage` takes a folder of videos.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pyarrow as pa
import torch

from bench.media import FPS, pictures_of
from clipmill.media.encode import ENCODINGS, ClipEncoder, Encoding, x264
from clipmill.media.frame_stats import Thumbnailer
from pipeline.stages.cut.picture import PictureMaker
from shards.packing.tar import Sample, read_member, write_tar
from training.data.clip_frames import Picture, decode_clip
from training.data.epoch_files import Epochs, plan_spec
from training.data.epoch_plan import hash_selection
from training.data.frame_sampling import eval_indices, middle_index, resize
from training.data.loader import Loader, SampleReader
from training.data.reader_pool import Request, keep_freed_memory
from training.data.selection import Selection
from training.data.selection_schema import SELECTION
from training.data.tokenizer import TextEncoder
from training.settings import DataSettings

GATE_BARE, GATE_PROCESSES, GATE_ORDINARY, GATE_RESUME_S = 0.9, 0.75, 2.0, 2.0
SIZE, CLIP_FPS, SHORT_SIDE, BATCH = 224, 3, 256, 32
ORDINARY = x264(preset="medium", crf="23")
DEFAULT = ENCODINGS["fastdecode"]
WORDS = "so the first thing that we want to do here is take the wheel off of the bike and then we are going to look at"


@dataclass(frozen=True)
class Clip:
    """A clip in the default and the ordinary encoding."""

    default: bytes
    ordinary: bytes
    still: bytes
    num_frames: int


def make_clips(count: int, seconds: tuple[float, float], footage: Path | None) -> list[Clip]:
    """Make clips in both encodings, spread over the three videos of the benchmark set."""
    clips, random = [], np.random.default_rng(0)
    for index in range(3):
        maker, frames = PictureMaker(Fraction(1), SHORT_SIDE), pictures_of(index, footage)
        thinned = (_frame(planes) for planes in itertools.islice(frames, 0, None, FPS // CLIP_FPS))
        for _ in range((count + index) // 3):
            num_frames = round(random.uniform(*seconds) * CLIP_FPS)
            pictures = [maker(frame) for frame in itertools.islice(thinned, num_frames)]
            still = Thumbnailer().jpeg(pictures[num_frames // 2], 90)
            clips.append(Clip(_encoded(DEFAULT, pictures), _encoded(ORDINARY, pictures), still, num_frames))
    return clips


def _frame(planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> av.VideoFrame:
    """Make a yuv420p frame of its planes."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], "yuv420p")
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    return frame


def _encoded(encoding: Encoding, pictures: list[av.VideoFrame]) -> bytes:
    """Encode pictures as a clip."""
    size = (pictures[0].width, pictures[0].height)
    encoder = ClipEncoder(encoding, size, Fraction(CLIP_FPS), len(pictures), 0.0)
    for picture in pictures:
        encoder.add(picture, 0.0, 0.0)
    return encoder.finish()


def make_selection(folder: Path, clips: list[Clip], kind: str) -> Selection:
    """Write shards of 16 samples; return the selection of all of them, with texts of the length of speech."""
    rows, random = [], np.random.default_rng(1)
    for start in range(0, len(clips), 16):
        shard = f"{kind}-{start // 16:06d}.tar"
        keys = {f"v{start}_{number:04d}": clip for number, clip in enumerate(clips[start : start + 16])}
        texts = {key: _sentence(random, 40) for key in keys}
        members = write_tar(
            folder / shard,
            (
                Sample(
                    key,
                    {
                        "mp4": getattr(clip, kind),
                        "jpg": clip.still,
                        "txt": texts[key].encode(),
                        "json": json.dumps({"clip_id": key, "start_s": 1.0, "end_s": 7.0, "text": texts[key]}).encode(),
                    },
                )
                for key, clip in keys.items()
            ),
        )
        places = {member.name: member for member in members}
        for key, clip in keys.items():
            mp4, jpg = places[f"{key}.mp4"], places[f"{key}.jpg"]
            rows.append(
                {"clip_id": key, "video_id": f"v{start}", "shard": shard, "num_frames": clip.num_frames}
                | {"mp4_offset": mp4.offset, "mp4_bytes": mp4.num_bytes, "subtitle": texts[key]}
                | {"jpg_offset": jpg.offset, "jpg_bytes": jpg.num_bytes, "caption": _sentence(random, 10)}
            )
    path = folder / f"{kind}.arrow"
    known = {
        "root": str(folder),
        "snapshot": "bench",
        "hash": hash_selection("bench", [row["clip_id"] for row in rows]),
    }
    with pa.ipc.new_file(path, SELECTION.with_metadata(known)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SELECTION))
    return Selection(path)


def _sentence(random: np.random.Generator, num_words: int) -> str:
    return " ".join(random.choice(WORDS.split(), int(random.integers(num_words // 2, num_words + num_words // 2))))


# --- The ways


def choose(total: int) -> np.ndarray:
    """Choose the frames of a training sample without jitter: the same ones for every way."""
    return np.append(eval_indices(total, 12), middle_index(total))


def bare(data: bytes) -> np.ndarray:
    return np.asarray(decode_clip(data, choose, Picture(SIZE)))


def frames_alone(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def ordinary(data: bytes) -> torch.Tensor:
    """Return uint8 [13, 3, S, S], resized by torch on its fast path, as torchvision does."""
    frames = _by_torchcodec(data) if _torchcodec() else _by_pyav(data)
    return resize(frames, SIZE)


def ordinary_loader(selection: Selection, wanted: list[Request]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches of a plain loader."""
    encode = TextEncoder(None, DataSettings().max_text_tokens)
    for request in wanted:
        samples = []
        for clip in selection.take(request.rows).to_pylist():
            data = read_member(Path(selection.root) / clip["shard"], clip["mp4_offset"], clip["mp4_bytes"])
            samples.append((ordinary(data), encode([clip["subtitle"]])[0], encode([clip["caption"]])[0]))
        yield tuple(torch.stack(column) for column in zip(*samples, strict=True))


def _by_pyav(data: bytes) -> torch.Tensor:
    """Decode the wanted frames by PyAV to uint8 [13, 3, H, W]."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    pictures = [frames[k].to_ndarray(format="rgb24", threads=1) for k in choose(len(frames))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _by_torchcodec(data: bytes) -> torch.Tensor:
    decoder = _torchcodec().VideoDecoder(data, num_ffmpeg_threads=1)
    return decoder.get_frames_at(choose(len(decoder)).tolist()).data


def _torchcodec():
    """Import torchcodec's decoders; return None where they are not installed."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError):  # RuntimeError: FFmpeg's libraries are missing
        return None
    return torchcodec.decoders


def requests(num_clips: int) -> list[Request]:
    order = np.random.default_rng(2).permutation(num_clips)
    return [Request(order[start : start + BATCH], 0) for start in range(0, num_clips, BATCH)]


def reader_of(selection: Selection, **changes: object) -> SampleReader:
    data = DataSettings(**changes)
    return SampleReader(selection, data, TextEncoder(None, data.max_text_tokens), SIZE)


# --- Measuring


def resume_s(clips: list[Clip], folder: Path) -> dict[str, float]:
    """Measure the wall seconds from a new loader to the first batch of a late step."""
    selection, step = make_selection(folder, clips, "default"), 1_000_000
    data = DataSettings(apart=())
    epochs = Epochs(folder / "plan", plan_spec(selection, data, BATCH), selection.path)
    seconds: dict[str, float] = {}
    reader_of(selection).read([0], 0)  # do the imports first, as training has by then
    for name, num_processes in (("fork server", 2), ("with processes", 2), ("without", 0)):
        begun = time.perf_counter()
        with Loader(reader_of(selection), num_processes=num_processes) as loader:
            next(loader.batches(epochs, slice(0, BATCH), step, step + 10))
            seconds[name] = time.perf_counter() - begun
    return seconds


class Together:
    """A loader whose processes live through all rounds, so that their CPU time can be read."""

    def __init__(self, reader: SampleReader, wanted: list[Request]):
        self.loader, self.wanted = Loader(reader, num_processes=2, prefetch_samples=64), wanted

    def __enter__(self) -> "Together":
        self.batches = self.loader.read(itertools.cycle(self.wanted))
        return self

    def __exit__(self, *error: object) -> None:
        self.loader.close()

    def read(self) -> None:
        """Read the wanted batches; the processes then read ahead up to their limit, as before each round."""
        for _ in self.wanted:
            next(self.batches)
        spent = -1.0
        while spent < (spent := cpu_s(loader_processes())):
            time.sleep(0.3)


def cpu_s(processes: list[int]) -> float:
    """Return the user and system seconds of these processes."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(clips: list[Clip], folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Measure the CPU milliseconds per sample of every way, a figure per round."""
    selection, plain = (make_selection(folder, clips, kind) for kind in ("default", "ordinary"))
    check(clips, selection, plain)
    wanted = requests(len(clips))
    alone = Loader(reader_of(selection), num_processes=0)

    def each(work: Callable[[bytes], object]) -> None:
        for clip in clips:
            work(clip.default)

    ways: dict[str, Callable[[], object]] = {
        "loader": lambda: [None for _ in alone.read(wanted)],
        "bare": lambda: each(bare),
        "frames": lambda: each(frames_alone),
        "ordinary": lambda: [None for _ in ordinary_loader(plain, wanted)],
    }
    figures = _in_turn(ways, num_rounds)
    with Together(reader_of(selection), wanted) as together:
        beside = {"processes": together.read, "bare, beside processes": lambda: each(bare)}
        figures |= _in_turn(beside, num_rounds)
    return {name: [1000 * spent_s / len(clips) for spent_s in spent] for name, spent in figures.items()}


def _in_turn(ways: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Run all ways in each round; return their CPU seconds in every round but the first."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_rounds + 1):
        for name in np.roll(list(ways), turn):  # so that no way always follows the same other
            processes = loader_processes()
            begun = cpu_s(processes) + time.process_time()
            ways[name]()
            spent = cpu_s(processes) + time.process_time() - begun
            if turn:
                figures[name].append(spent)
    return figures


def loader_processes() -> list[int]:
    """Return the processes forked from this process's fork server."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    servers = {process for process, parent in parents.items() if parent == os.getpid()}
    return [process for process, parent in parents.items() if parent in servers]


def check(clips: list[Clip], selection: Selection, plain: Selection) -> None:
    """Assert that every way reads the right pictures."""
    for kind, work, chosen in (("default", bare, selection), ("ordinary", ordinary, plain)):
        part = reader_of(chosen, jitter=False).read(np.arange(8), 0)
        assert not part.failures, part.failures
        for slot, clip in enumerate(clips[:8]):
            pictures = work(getattr(clip, kind))
            if kind == "ordinary":
                pictures = pictures.permute(0, 2, 3, 1).numpy()
            off = np.abs(np.stack(part.pixels.sample(slot)).astype(int) - pictures)
            assert off.mean() < 1, f"{kind} clip {slot}: {off.mean():.1f} levels off"
    assert all(frames_alone(clip.default) == clip.num_frames for clip in clips[:8])


def report(figures: dict[str, list[float]], seconds: dict[str, float], clips: list[Clip]) -> tuple[str, list[str]]:
    """Return the table, and the gates that failed."""
    num_frames = statistics.mean(clip.num_frames for clip in clips)
    sizes = [statistics.mean(len(getattr(clip, kind)) for clip in clips) / 1000 for kind in ("default", "ordinary")]
    lines = [
        f"{len(clips)} clips of {num_frames:.1f} frames: {sizes[0]:.0f} KB by default, {sizes[1]:.0f} KB ordinarily",
        f"ordinary clips read with {'torchcodec' if _torchcodec() else 'PyAV'}; {len(figures['loader'])} rounds",
        "",
        "| way | samples/s/core, median | CPU ms a sample: least to most | loader's speed to it, median |",
        "| --- | --- | --- | --- |",
    ]
    rates = {name: 1000 / statistics.median(ms) for name, ms in figures.items()}
    ratios = {name: _median_ratio(ms, figures["loader"]) for name, ms in figures.items()}
    lines += [
        f"| {name} | {rates[name]:.1f} | {min(ms):.2f} to {max(ms):.2f} | {ratios[name]:.2f} |"
        for name, ms in figures.items()
    ]
    lines += ["", f"first batch of all, with the fork server's start: {seconds.pop('fork server'):.1f} s"]
    gates = [
        ("loader to bare", ratios["bare"], GATE_BARE),
        ("processes to bare", _median_ratio(figures["bare, beside processes"], figures["processes"]), GATE_PROCESSES),
        ("loader to ordinary", ratios["ordinary"], GATE_ORDINARY),
    ]
    verdicts = [
        f"gate: {name}: {value:.2f}, at least {least:g}: {'passed' if value >= least else 'FAILED'}"
        for name, value, least in gates
    ]
    verdicts += [
        f"gate: step 1,000,000, {name}: {spent:.2f} s, at most {GATE_RESUME_S:g}: "
        f"{'passed' if spent <= GATE_RESUME_S else 'FAILED'}"
        for name, spent in seconds.items()
    ]
    return "\n".join([*lines, "", *verdicts]), [line for line in verdicts if line.endswith("FAILED")]


def _median_ratio(costs: list[float], ours: list[float]) -> float:
    """Return how many times as fast as the others `ours` is, the median over the rounds."""
    return statistics.median(other / own for other, own in zip(costs, ours, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--seconds", type=float, nargs=2, default=(5.0, 8.0), help="shortest and longest clip")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--footage", type=Path, help="a folder of real videos instead of made pictures")
    parser.add_argument("--write", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    clips = make_clips(options.clips, tuple(options.seconds), options.footage)
    with TemporaryDirectory() as folder:
        seconds = resume_s(clips, Path(folder))
        figures = measure(clips, Path(folder), options.rounds)
    text, broken = report(figures, seconds, clips)
    print(text)
    if options.write:
        options.write.write_text(text + "\n")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
