"""Settings of a demo world, and the plan of each of its videos before anything is drawn or written.

A plan is a function of (settings, index) alone. Attributes such as format or subtitle kind follow a low-discrepancy
sequence over the index, so that even a small world has every kind in about the requested shares. Times are seconds from
the first frame. Imports are light; `frames_of` draws pixels on demand.
"""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from clipmill.base.settings import Settings, operational
from pipeline.demo import grammar
from pipeline.demo.grammar import Combination, Scene
from pipeline.demo.narration import SUBTITLE_WRITERS

FADE_S = 0.5  # a cross-fade begins at the cut and lasts this long
CATEGORIES = (  # YouTube's, the 15 that HD-VILA-100M covers
    "Autos & Vehicles",
    "Comedy",
    "Education",
    "Entertainment",
    "Film & Animation",
    "Gaming",
    "Howto & Style",
    "Music",
    "News & Politics",
    "Nonprofits & Activism",
    "People & Blogs",
    "Pets & Animals",
    "Science & Technology",
    "Sports",
    "Travel & Events",
)


@dataclass(frozen=True)
class Format:
    """Container and codecs of a video. `weight` is its share in a world of all formats."""

    extension: str
    encoder: str
    codec: str  # the name that probing reports
    audio_encoder: str
    weight: float
    options: dict[str, str] = field(default_factory=dict)


_X264 = {"preset": "ultrafast", "crf": "24", "x264-params": "scenecut=40:keyint=120"}
_VPX = {"deadline": "realtime", "cpu-used": "8", "b": "400k"}

FORMATS: dict[str, Format] = {
    "h264-mp4": Format("mp4", "libx264", "h264", "aac", 0.44, _X264),
    "h264-b-mp4": Format("mp4", "libx264", "h264", "aac", 0.13, _X264 | {"bf": "2", "b_strategy": "0", "refs": "2"}),
    "h264-mkv": Format("mkv", "libx264", "h264", "aac", 0.12, _X264),
    "h264-ts": Format("ts", "libx264", "h264", "aac", 0.08, _X264),
    "hevc-mp4": Format(
        "mp4",
        "libx265",
        "hevc",
        "aac",
        0.05,
        {"preset": "ultrafast", "crf": "26", "x265-params": "pools=none:frame-threads=1:info=0:log-level=error"},
    ),
    "vp8-webm": Format("webm", "libvpx", "vp8", "libopus", 0.06, _VPX),
    "vp9-webm": Format("webm", "libvpx-vp9", "vp9", "libopus", 0.06, _VPX),
    "mpeg4-mov": Format("mov", "mpeg4", "mpeg4", "libmp3lame", 0.04, {"b": "300k", "g": "60"}),
    "av1-mkv": Format(
        "mkv", "libsvtav1", "av1", "libopus", 0.02, {"preset": "12", "crf": "35", "svtav1-params": "lp=1"}
    ),
}
VARIABLE_RATE = ("h264-mp4", "h264-mkv", "vp9-webm")  # formats for videos with a variable frame rate

SIZES = {"320x240": 0.42, "426x240": 0.26, "240x320": 0.18, "640x360": 0.14}
RATES = {"12.5": 0.3, "15": 0.3, "24": 0.12, "25": 0.12, "29.97": 0.1, "variable": 0.06}
_RATES = {"12.5": Fraction(25, 2), "15": Fraction(15), "24": Fraction(24), "25": Fraction(25)}
_RATES["29.97"] = Fraction(30000, 1001)

SizeName = Literal["320x240", "426x240", "240x320", "640x360"]
RateName = Literal["12.5", "15", "24", "25", "29.97", "variable"]
FormatName = Literal[
    "h264-mp4", "h264-b-mp4", "h264-mkv", "h264-ts", "hevc-mp4", "vp8-webm", "vp9-webm", "mpeg4-mov", "av1-mkv"
]
BrokenKind = Literal[
    "not-found", "html", "truncated", "empty", "unknown-host", "audio-only", "unavailable-once", "cut-off", "duplicate"
]
ROTATED_INDEX, ROTATED_EVERY = 3, 40  # the index is among the first four, so that small worlds have a rotated video


class WorldSettings(Settings):
    """Size, looks, files, subtitles and broken sources of a demo world."""

    # Working videos, of about 9 scenes each.
    num_videos: int = Field(24, ge=1)
    # Seed of all random choices.
    seed: int = Field(0, ge=0)
    # Least seconds of a video; lengths are uniform between this and max_video_s.
    min_video_s: float = Field(30.0, ge=1.0)
    # Most seconds of a video.
    max_video_s: float = Field(120.0, ge=1.0)
    # Least seconds of a scene: a shorter one leaves no time for a sentence.
    min_scene_s: float = Field(3.0, ge=1.0)
    # Most seconds of a scene. HD-VILA's mean clip is 13.4 s.
    max_scene_s: float = Field(15.0, ge=1.0)

    # Share of scenes with two objects, among those long enough to describe both.
    pair_fraction: float = Field(0.3, ge=0, le=1)
    # Share of cuts that are cross-fades of half a second.
    fade_fraction: float = Field(0.1, ge=0, le=1)
    # Combinations of colour, shape and motion that scenes show, for tests on unseen ones.
    combinations: Literal["all", "seen", "held-out"] = "all"
    # Share of the combinations that are "held-out", not "seen".
    held_out_fraction: float = Field(0.15, gt=0, lt=1)
    # Seed that decides which combinations are held out; keep it the same in both worlds.
    held_out_seed: int = Field(0, ge=0)

    # Picture sizes, of which each video gets one by a weighted choice.
    sizes: tuple[SizeName, ...] = Field(tuple(SIZES), min_length=1)
    # Frame rates, of which each video gets one by a weighted choice.
    rates: tuple[RateName, ...] = Field(tuple(RATES), min_length=1)
    # Containers and codecs, of which each video gets one by a weighted choice.
    formats: tuple[FormatName, ...] = Field(FormatName.__args__, min_length=1)
    # Rotate one MP4 in forty, and one of the first four, by metadata, as phones do.
    rotation: bool = True
    # Share of videos with a quiet audio track without speech.
    audio_fraction: float = Field(0.4, ge=0, le=1)

    # Share of videos without subtitles.
    missing_fraction: float = Field(0.1, ge=0, le=1)
    # Share of the subtitles that are written by people, with punctuation; the others are automatic.
    manual_fraction: float = Field(0.4, ge=0, le=1)
    # Share of the subtitles that are late or early.
    shifted_fraction: float = Field(0.15, ge=0, le=1)
    # Most seconds by which these are late or early; the least is one.
    max_shift_s: float = Field(2.0, ge=1.0)
    # Share of scenes with unrelated speech.
    filler_fraction: float = Field(0.15, ge=0, le=1)

    # Kinds of broken sources: some never work, some fail at first, and one is a copy of another.
    broken: tuple[BrokenKind, ...] = ()

    # Processes that write the world; 0: one per core.
    workers: int = operational(0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "WorldSettings":
        if self.min_video_s > self.max_video_s:
            raise ValueError(f"min_video_s = {self.min_video_s} must not be above max_video_s = {self.max_video_s}")
        if self.min_scene_s > self.max_scene_s:
            raise ValueError(f"min_scene_s = {self.min_scene_s} must not be above max_scene_s = {self.max_scene_s}")
        if "variable" in self.rates and not set(self.formats) & set(VARIABLE_RATE):
            needed = ", ".join(VARIABLE_RATE)
            raise ValueError(f"rates: 'variable' needs one of {needed} in formats; add one, or remove 'variable'")
        return self


# The three levels of subtitle noise that studies compare
NOISE_LEVELS: dict[str, dict[str, float]] = {
    "low": {"filler_fraction": 0.0, "shifted_fraction": 0.0, "missing_fraction": 0.0},
    "medium": {"filler_fraction": 0.25, "shifted_fraction": 0.25, "missing_fraction": 0.1},
    "high": {"filler_fraction": 0.6, "shifted_fraction": 0.5, "missing_fraction": 0.2},
}


# ---------------------------------------------------------------- one video


@dataclass(frozen=True)
class VideoPlan:
    """A video before it is drawn: its file format, scenes, frame times and subtitles."""

    video_id: str
    format_name: str
    extension: str
    size: tuple[int, int]  # as displayed
    rate: Fraction | None  # None: variable
    rotation: int
    has_audio: bool
    category: str
    subtitle_kind: str | None
    subtitle_offset_s: float
    scenes: tuple[tuple[float, Scene], ...]  # (start second, scene), without gaps
    fades: tuple[bool, ...]  # True for a scene that is faded in over its predecessor's end
    frame_times: tuple[Fraction, ...]

    @property
    def file(self) -> str:
        return f"videos/{self.video_id}.{self.extension}"

    @property
    def subtitle_file(self) -> str | None:
        kind = self.subtitle_kind
        return f"subtitles/{self.video_id}.en.{SUBTITLE_WRITERS[kind][0]}" if kind else None

    @property
    def duration_s(self) -> float:
        start_s, scene = self.scenes[-1]
        return start_s + scene.duration_s


def plan_video(settings: WorldSettings, index: int) -> VideoPlan:
    """Plan the world's video number `index`."""
    rng = np.random.default_rng([settings.seed, index, 0])
    choose = _Chooser(settings.seed, index)
    rotated = settings.rotation and index % ROTATED_EVERY == ROTATED_INDEX and "h264-mp4" in settings.formats
    rate_name = choose("rate", {name: RATES[name] for name in settings.rates})
    capable = VARIABLE_RATE if rate_name == "variable" else FORMATS
    formats = {name: FORMATS[name].weight for name in settings.formats if name in capable}
    format_name = "h264-mp4" if rotated else choose("format", formats)
    rate = _RATES.get(rate_name)
    scenes = _plan_scenes(settings, rng)
    times = _frame_times(sum(scene.duration_s for scene in scenes), rate, rng)
    placed = _snap(scenes, times)
    kind, offset_s = _plan_subtitles(settings, choose, rng)
    width, height = choose("size", {name: SIZES[name] for name in settings.sizes}).split("x")
    return VideoPlan(
        video_id=f"w{settings.seed}v{index:05d}",
        format_name=format_name,
        extension=FORMATS[format_name].extension,
        size=(int(width), int(height)),
        rate=rate,
        rotation=(90, 270)[index // ROTATED_EVERY % 2] if rotated else 0,
        has_audio=choose.share("audio") < settings.audio_fraction,
        category=choose("category", dict.fromkeys(CATEGORIES, 1.0)),
        subtitle_kind=kind,
        subtitle_offset_s=offset_s,
        scenes=placed,
        fades=(False, *(bool(rng.random() < settings.fade_fraction) for _ in placed[1:])),
        frame_times=times,
    )


class _Chooser:
    """Weighted choices, evenly spread over neighbouring indices by one Kronecker sequence per attribute."""

    STEPS = {"rate": 2, "format": 3, "size": 5, "audio": 7, "category": 11, "subtitles": 13, "kind": 17, "shift": 19}

    def __init__(self, seed: int, index: int):
        self.seed, self.index = seed, index

    def share(self, attribute: str) -> float:
        """Return the sequence's value in [0, 1) for an attribute at this index."""
        prime = self.STEPS[attribute]
        start = np.random.default_rng([self.seed, prime]).random()
        return float((start + self.index * prime**0.5) % 1.0)

    def __call__(self, attribute: str, weights: dict[str, float]) -> str:
        bounds = list(accumulate(weights.values()))
        return list(weights)[bisect(bounds[:-1], self.share(attribute) * bounds[-1])]


def _plan_scenes(settings: WorldSettings, rng: np.random.Generator) -> list[Scene]:
    """Sample scenes that together last between `min_video_s` and `max_video_s`."""

    def allowed(combination: Combination) -> bool:
        if settings.combinations == "all":
            return True
        is_held_out = grammar.held_out(combination, settings.held_out_fraction, settings.held_out_seed)
        return is_held_out == (settings.combinations == "held-out")

    low, high = settings.min_scene_s, settings.max_scene_s
    left_s = max(low, float(rng.uniform(settings.min_video_s, settings.max_video_s)))
    scenes: list[Scene] = []
    while left_s > 0:
        duration_s = float(rng.triangular(low, low + 0.35 * (high - low), high)) if high > low else low
        if left_s - duration_s < low:  # the rest would be too short for a scene
            duration_s = left_s if left_s <= high or left_s < 2 * low else left_s / 2
        scenes.append(grammar.sample_scene(rng, duration_s, allowed, settings.pair_fraction))
        left_s -= duration_s
    return scenes


def _frame_times(duration_s: float, rate: Fraction | None, rng: np.random.Generator) -> tuple[Fraction, ...]:
    """Return the times of all frames. A variable rate has 8 to 30 frames per second, at whole milliseconds."""
    if rate:
        return tuple(k / rate for k in range(round(duration_s * rate)))
    steps_ms = rng.integers(33, 125, int(duration_s * 31))
    times_ms = np.concatenate([[0], np.cumsum(steps_ms)])
    return tuple(Fraction(int(t), 1000) for t in times_ms[times_ms < duration_s * 1000])


def _snap(scenes: list[Scene], times: tuple[Fraction, ...]) -> tuple[tuple[float, Scene], ...]:
    """Return (start, scene) with starts moved to frame times. A cut is at the time of the first frame after it."""
    grid = np.array([float(t) for t in times])
    ends = np.cumsum([scene.duration_s for scene in scenes])
    inner = [float(grid[np.searchsorted(grid, end - 1e-9)]) for end in ends[:-1]]
    bounds = [0.0, *inner, float(times[-1] + (times[-1] - times[-2]))]
    return tuple(
        (start, replace(scene, duration_s=end - start))
        for start, end, scene in zip(bounds, bounds[1:], scenes, strict=False)
    )


def _plan_subtitles(settings: WorldSettings, choose: _Chooser, rng: np.random.Generator) -> tuple[str | None, float]:
    """Return (kind, offset in seconds), (None, 0.0) for a video without subtitles."""
    sign, shift_s = (1 if rng.random() < 0.6 else -1), float(rng.uniform(1.0, settings.max_shift_s))
    if choose.share("subtitles") < settings.missing_fraction:
        return None, 0.0
    manual, automatic = settings.manual_fraction, 1.0 - settings.manual_fraction
    shares = {"manual-vtt": 0.6 * manual, "manual-srt": 0.4 * manual}
    shares |= {"auto-vtt": 0.75 * automatic, "auto-json3": 0.25 * automatic}
    offset_s = round(sign * shift_s, 3) if choose.share("shift") < settings.shifted_fraction else 0.0
    return choose("kind", shares), offset_s


def frames_of(plan: VideoPlan) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Yield (time in seconds, uint8 RGB [H, W, 3] as displayed) of every frame, with cross-fades."""
    from pipeline.demo.render import cross_fade, render_frame

    n = 0
    for time in plan.frame_times:
        while n + 1 < len(plan.scenes) and float(time) >= plan.scenes[n + 1][0]:
            n += 1
        start_s, scene = plan.scenes[n]
        t_s = float(time) - start_s
        picture = render_frame(scene, t_s, *plan.size)
        if plan.fades[n] and t_s < FADE_S:
            before_s, before = plan.scenes[n - 1]
            old = render_frame(before, float(time) - before_s, *plan.size)
            picture = cross_fade(old, picture, t_s / FADE_S)
        yield time, picture
