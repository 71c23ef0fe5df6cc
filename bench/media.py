"""Make the benchmark set: three long videos with hard cuts and a frame number in every picture, and spans to cut.

1280x720, 30 fps, H.264 with CABAC, deblocking and 3 B-frames in a pyramid, a keyframe at least every 150 frames, AAC.
The repo ships no footage, so the content is synthetic (a panned and zoomed texture, moving discs, grain); with
`--footage DIR` it is real videos, scaled and padded to the same size. Bit rates should lie between 1.3 and 2.2 Mb/s.

A synthetic video repeats a piece of 20 s, whose packets are copied, so the set is made in under a minute. Frame numbers
repeat with the piece (`period_s`). Footage does not repeat and takes minutes. Pieces and videos stay in the folder, by
default `clipmill-bench` in the folder for temporary files, and are used again.
"""

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.frame_code import draw_number
from clipmill.base.atomic_file import atomic_path

WIDTH, HEIGHT, FPS, DURATION_S = 1280, 720, 30, 185
PIECE_S = 20  # of a synthetic video, which repeats it
COLUMNS = 40  # frame-number blocks of 32 pixels: 11 after scaling to 256 lines
GRAIN = (0.56, 0.42, 0.60)  # of the three videos, so that their bit rates differ
DEFAULT_DIR = Path(tempfile.gettempdir()) / "clipmill-bench"

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]


def benchmark_set(
    folder: Path = DEFAULT_DIR, footage: Path | None = None, duration_s: float = DURATION_S
) -> list[dict]:
    """Make the videos that are missing; return [{"path", "spans": [[start_s, end_s], …], "period_s"}] of all three.

    Frame numbers of a video begin at 0 again every `period_s`.
    """
    folder = Path(folder) / ("footage" if footage else f"repeated-{PIECE_S}s")
    (folder / f"{duration_s:g}s").mkdir(parents=True, exist_ok=True)
    videos = []
    for index in range(3):
        path = folder / f"{duration_s:g}s" / f"bench{index}.mp4"
        if not path.exists():
            piece = folder / (f"{duration_s:g}s/" if footage else "") / f"piece{index}.mp4"
            if not piece.exists():
                num_frames = int((duration_s if footage else PIECE_S) * FPS)
                _encode(itertools.islice(pictures_of(index, footage), num_frames), piece)
            _repeat(piece, 1 if footage else math.ceil(duration_s / PIECE_S), path)
        period_s = duration_s if footage else PIECE_S
        videos.append({"path": str(path), "spans": spans_of(index, duration_s), "period_s": period_s})
    (folder / f"{duration_s:g}s" / "spans.json").write_text(json.dumps(videos, indent=1))
    return videos


def pictures_of(index: int, footage: Path | None = None) -> Iterator[Planes]:
    """Yield endless yuv420p frames of one of the three videos, 1280x720 at 30 fps."""
    return _footage(footage, index) if footage else _synthetic(index)


def spans_of(index: int, duration_s: float = DURATION_S) -> list[list[float]]:
    """Return spans like sentences: 4 to 28.5 s, mean near 12.4, most of them touching the one before."""
    rng = np.random.default_rng(110 + index)
    spans, at = [], float(rng.uniform(0.3, 1.5))
    while True:
        length = float(np.clip(rng.gamma(4.0, 3.1), 4.0, 28.5))
        if at + length > duration_s:
            return spans
        spans.append([round(at, 3), round(at + length, 3)])
        at += length + (float(rng.uniform(0.2, 1.2)) if rng.random() < 0.25 else 0.0)


def _synthetic(index: int) -> Iterator[Planes]:
    """Yield endless yuv420p frames: shots of 2 to 9 s, each with its own texture, camera move and discs."""
    import cv2

    rng = np.random.default_rng(index)
    grain = [rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8) for _ in range(4)]
    grain = [cv2.GaussianBlur(plane, (0, 0), 0.9) for plane in grain]
    number = 0
    while True:
        shot = _Shot(rng)
        for t in range(int(rng.uniform(2.0, 9.0) * FPS)):
            luma, blue, red = shot.frame(t / FPS)
            noise = grain[int(rng.integers(4))]
            strength = 0.1 * GRAIN[index]
            luma = cv2.addWeighted(luma, 1.0, noise, strength, -128 * strength)
            draw_number(luma, number, COLUMNS)
            yield luma, blue, red
            number += 1


class _Shot:
    """A shot of a texture under a slowly moving camera, crossed by a few discs."""

    def __init__(self, rng: np.random.Generator):
        import cv2

        scale = int(rng.integers(5, 8))
        size = (HEIGHT * 3 // 2, WIDTH * 3 // 2)
        base = np.zeros(size, np.float32)
        for octave in range(2, 2 + scale):
            cells = rng.normal(size=(3 * 2**octave // 2 + 2, 2 * 3 * 2**octave // 2 + 2)).astype(np.float32)
            base += cv2.resize(cells, size[::-1], interpolation=cv2.INTER_CUBIC) / 1.5**octave
        base = (base - base.min()) / (base.max() - base.min())
        self.texture = (30 + 190 * base).astype(np.uint8)
        self.chroma = [int(v) for v in rng.integers(80, 176, 2)]
        self.pan = rng.uniform(-70, 70, 2)  # pixels per second
        self.zoom = float(rng.uniform(-0.03, 0.03))
        self.discs = [
            (*rng.uniform(0.1, 0.9, 2), *rng.uniform(-0.25, 0.25, 2), rng.uniform(0.03, 0.12)) for _ in range(10)
        ]
        self.tones = rng.integers(40, 220, (10, 3))

    def frame(self, t: float) -> Planes:
        """Draw the picture at time `t` in seconds."""
        import cv2

        zoom = 1.0 / (1.15 + self.zoom * t)
        dx, dy = WIDTH * 0.2 + self.pan[0] * t, HEIGHT * 0.2 + self.pan[1] * t
        camera = np.float32([[zoom, 0, dx], [0, zoom, dy]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        luma = cv2.warpAffine(self.texture, camera, (WIDTH, HEIGHT), flags=flags, borderMode=cv2.BORDER_REFLECT)
        half = cv2.resize(luma, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
        blue = cv2.addWeighted(half, 0.25, half, 0.0, self.chroma[0] - 32)
        red = cv2.addWeighted(half, -0.2, half, 0.0, self.chroma[1] + 26)
        for (x, y, vx, vy, radius), tone in zip(self.discs, self.tones, strict=True):
            centre = (((x + vx * t) % 1.0) * WIDTH, ((y + vy * t) % 1.0) * HEIGHT)
            for plane, value, part in ((luma, tone[0], 1), (blue, tone[1], 2), (red, tone[2], 2)):
                at = (int(centre[0] / part), int(centre[1] / part))
                cv2.circle(plane, at, int(radius * HEIGHT / part), int(value), -1, cv2.LINE_AA)
        return luma, blue, red


def _footage(folder: Path, index: int) -> Iterator[Planes]:
    """Yield endless yuv420p frames of the folder's videos in turn, scaled and padded; `index` sets the first one."""
    import av

    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".mp4", ".webm", ".mkv"))
    paths = paths[index * len(paths) // 3 :] + paths[: index * len(paths) // 3]
    number = 0
    while True:
        for path in paths:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    planes = _padded(frame)
                    draw_number(planes[0], number, COLUMNS)
                    yield planes
                    number += 1


def _padded(frame) -> Planes:
    """Scale and pad a frame to 1280x720."""
    scale = min(WIDTH / frame.width, HEIGHT / frame.height)
    width, height = int(frame.width * scale) // 4 * 4, int(frame.height * scale) // 4 * 4
    packed = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC", threads=1).to_ndarray()
    luma = packed[:height]
    chroma = packed[height:].reshape(2, height // 2, width // 2)
    planes = np.full((HEIGHT, WIDTH), 16, np.uint8), *np.full((2, HEIGHT // 2, WIDTH // 2), 128, np.uint8)
    for plane, part in zip(planes, (luma, *chroma), strict=True):
        top, left = (plane.shape[0] - part.shape[0]) // 2, (plane.shape[1] - part.shape[1]) // 2
        plane[top : top + part.shape[0], left : left + part.shape[1]] = part
    return planes


def _encode(frames: Iterator[Planes], path: Path) -> None:
    """Encode frames to a video file without sound."""
    import ffmpeg
    import imageio_ffmpeg

    video = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="yuv420p", s=f"{WIDTH}x{HEIGHT}", r=FPS)
    # the preset hardly changes the cost of decoding at the same bit rate, but that of encoding threefold
    options = {"c:v": "libx264", "preset": "veryfast", "crf": 21, "g": 150, "bf": 3}
    with atomic_path(path) as temporary:
        command = ffmpeg.output(video, str(temporary), **options).overwrite_output()
        process = command.global_args("-v", "error").run_async(imageio_ffmpeg.get_ffmpeg_exe(), pipe_stdin=True)
        for planes in frames:
            for plane in planes:
                process.stdin.write(np.ascontiguousarray(plane).data)
        process.stdin.close()
        if process.wait() != 0:
            raise RuntimeError(f"ffmpeg failed on {temporary}")


def _repeat(piece: Path, times: int, path: Path) -> None:
    """Copy a piece's packets `times` times into one video, and add noise as sound."""
    import ffmpeg
    import imageio_ffmpeg

    video = ffmpeg.input(str(piece), stream_loop=times - 1)
    audio = ffmpeg.input("anoisesrc=color=pink:amplitude=0.1:seed=1:sample_rate=44100", format="lavfi")
    options = {"c:v": "copy", "c:a": "aac", "b:a": "96k", "shortest": None}
    with atomic_path(path) as temporary:
        command = ffmpeg.output(video, audio, str(temporary), **options).overwrite_output()
        command.global_args("-v", "error").run(imageio_ffmpeg.get_ffmpeg_exe())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_DIR, help="where the set is kept")
    parser.add_argument("--footage", type=Path, help="a folder of real videos to use as content")
    parser.add_argument("--duration-s", type=float, default=DURATION_S, help="length of each video")
    arguments = parser.parse_args()
    videos = benchmark_set(arguments.folder, arguments.footage, arguments.duration_s)
    spans = [end - start for video in videos for start, end in video["spans"]]
    for video in videos:
        num_bytes = Path(video["path"]).stat().st_size
        length_s = math.ceil(arguments.duration_s / video["period_s"]) * video["period_s"]
        rate = num_bytes * 8 / length_s / 1e6
        print(f"{video['path']}: {rate:.2f} Mb/s, {len(video['spans'])} spans")
    print(f"{len(spans)} spans, {min(spans):.1f} to {max(spans):.1f} s, mean {np.mean(spans):.1f} s")


if __name__ == "__main__":
    main()
