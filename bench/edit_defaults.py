"""Measure how close edits move the demo's clips to the scenes their texts describe, by settings; informational.

    clipmill demo DIR && python -m bench.edit_defaults DIR

The demo's own run is the teacher and edits without a student, so rows differ by settings alone. A clip's truth is the
scenes whose sentences it contains. `IoU` compares the two; `inside` is the share of the clip that shows its scenes,
which lengthening alone cannot raise. Clips with late or early subtitles have their own figures. Trap: speech fills only
a part of its scene, so IoU rises with length; look at `inside`, too. Videos of the run's evaluation are left out, as in
`clipmill edit`.
"""

import argparse
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.editing.clips import Items, freeze_items
from pipeline.editing.frames import read_frames
from pipeline.editing.settings import resolve_edit
from pipeline.editing.worker import Teacher
from pipeline.engine.build import session
from training.data.selection import Selection
from training.data.selection_schema import EVAL_FILE
from training.editing.boundaries import Floats, Scorer, Spans, VideoClips, drift, edit_videos, iou
from training.editing.rounds import base_spans, fold_of
from training.editing.scores import FrameFeatures, FrameScorer, VideoScorer, draw_bank
from training.editing.settings import EditSettings
from training.run.folder import RunFolder

LENGTH_WEIGHTS, MIN_GAINS, BANKS = (0.005, 0.02), (0.002, 0.01, 0.03), (0, 512)
NUM_ROUNDS = 5
Truth = dict[str, tuple[float, float]]  # by clip_id


@dataclass(frozen=True)
class Seen:
    """The teacher's features of all videos, computed once."""

    teacher: Teacher
    frames: dict[str, FrameFeatures]  # by video
    pixels: dict[str, tuple[np.ndarray, np.ndarray]]  # by video: times and frames
    texts: dict[str, np.ndarray]  # by clip

    def scorer(self, videos: Sequence[VideoClips], settings: EditSettings) -> Scorer:
        """Make the teacher's scorer for these settings."""
        owners = [(video.video_id, clip_id) for video in videos for clip_id in video.clip_ids]
        features = np.stack([self.texts[clip_id] for _, clip_id in owners])
        bank = draw_bank([owner for owner, _ in owners], features, settings.bank_size) if settings.bank_size else None
        by_frames = FrameScorer(self.frames, self.texts, bank, self.teacher.log_scale, settings.same_caption)
        if not settings.reencode:
            return by_frames
        again = {
            name: VideoScorer(by_frames, partial(self.teacher.video_features, *pixels), settings.reencode)
            for name, pixels in self.pixels.items()
        }
        return lambda video, offered: again[video.video_id](video, offered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder of `clipmill demo`")
    parser.add_argument("--shift", type=float, default=0, help="seconds that every video's clips are early or late")
    asked = parser.parse_args()
    demo = asked.demo
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        items, teacher = _prepared(demo, Path(folder))
        items = _shifted(items, asked.shift)
        scenes, offsets = _truth(demo / "world" / "truth.jsonl", items)
        seen = _seen(demo / "corpus", items, teacher)
    print("length_weight min_gain margin_s rings | … | after 0, 1, 3 and 5 rounds: edits of the last one, IoU, inside")
    print("(of videos with late or early subtitles: IoU, inside), change of the median length")
    for settings in _settings():
        with torch.no_grad():
            _play(settings, items, seen, scenes, offsets)


def _settings() -> Iterator[EditSettings]:
    """Yield the settings to compare."""
    for bank, weight, gain in itertools.product(BANKS, LENGTH_WEIGHTS, MIN_GAINS):
        yield EditSettings(length_weight=weight, min_gain=gain, bank_size=bank, reencode=0)
    for changes in ({"margin_s": 2.0}, {"rings": 2}, {"same_caption": 0.9}):
        yield EditSettings(reencode=0, **changes)
    for changes in ({}, {"bank_size": 0}, {"bank_size": 0, "reencode": 4}):
        yield EditSettings(**changes)


def _prepared(demo: Path, folder: Path) -> tuple[Items, Teacher]:
    """Freeze the clips of the demo's corpus and load its teacher."""
    run = RunFolder(demo / "run").require()
    settings = resolve_edit(run.load().settings, None, [])
    never = frozenset(Selection(run.root / EVAL_FILE).column("video_id").to_pylist())
    freeze_items(folder / "clips.arrow", demo / "corpus", "", settings.edit, trains=False, never=never)
    weights = run.checkpoints.path(run.checkpoints.find_latest()) / "model.safetensors"
    return Items(folder / "clips.arrow"), Teacher(str(weights), settings)


def _shifted(items: Items, shift_s: float) -> Items:
    """Shift every video's clips, early or late by its id, inside the video; changes `items`."""
    for video in items.videos if shift_s else ():
        by_s = shift_s if fold_of(video.video_id) else -shift_s
        for item in video.items:
            start_s = min(max(item["base_start_s"] + by_s, 0.0), max(item["duration_s"] - 0.5, 0.0))
            end_s = min(item["base_end_s"] + by_s, item["duration_s"])
            item |= {"base_start_s": start_s, "base_end_s": max(end_s, start_s + 0.5)}
    return items


def _seen(corpus: Path, items: Items, teacher: Teacher) -> Seen:
    """Encode all frames and texts by the teacher."""
    with session(corpus, None, [], "", create=False) as (current, _):
        cut = current.settings.cut
    seen = Seen(teacher, {}, {}, {})
    for video in items.videos:
        clips = video.clips(EditSettings())
        times_F, pixels = seen.pixels[video.video_id] = read_frames(
            corpus, video, clips, EditSettings(), cut, teacher.picture
        )
        seen.frames[video.video_id] = FrameFeatures(times_F, teacher.frame_features(pixels))
        features = teacher.text_features([item["text"] for item in video.items])
        seen.texts.update((item["clip_id"], feature) for item, feature in zip(video.items, features, strict=True))
    return seen


def _truth(path: Path, items: Items) -> tuple[Truth, Mapping[str, float]]:
    """Return the span of the scenes that each clip describes, if it describes nothing else, and subtitle offsets."""
    worlds = {row["video_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    truth: Truth = {}
    for video in items.videos:
        world = worlds[video.video_id]
        for item in video.items:
            spoken = _words(item["text"])
            scenes = [w for w in world["scenes"] if any(_words(said["text"]) in spoken for said in w["narration"])]
            if scenes and not any(scene["filler"] for scene in scenes):
                truth[item["clip_id"]] = scenes[0]["start_s"], scenes[-1]["end_s"]
    return truth, {name: (world["subtitle"] or {}).get("offset_s") or 0.0 for name, world in worlds.items()}


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _play(settings: EditSettings, items: Items, seen: Seen, scenes: Truth, offsets: Mapping[str, float]) -> None:
    """Edit for some rounds with these settings and print a row."""
    videos = [video.clips(settings) for video in items.videos]
    scorer = seen.scorer(videos, settings)
    spans, columns = base_spans(videos), [_describe(0, videos, base_spans(videos), scenes, offsets, settings)]
    for number in range(1, NUM_ROUNDS + 1):
        edited = edit_videos(videos, spans, scorer, settings, round_number=number, teacher="demo")
        spans, num_accepted = edited.spans, sum(edited.rows["accepted"].to_pylist())
        if number in (1, 3, 5):
            columns.append(_describe(num_accepted, videos, spans, scenes, offsets, settings))
    name = f"{settings.length_weight:5g} {settings.min_gain:5g} {settings.margin_s:3g} {settings.rings}"
    other = {"same_caption": settings.same_caption, "bank_size": settings.bank_size, "reencode": settings.reencode}
    print(
        name, *(f"{k}={v}" for k, v in other.items() if v != EditSettings.model_fields[k].default), *columns, sep=" | "
    )


def _describe(
    num_accepted: int,
    videos: Sequence[VideoClips],
    spans: Spans,
    scenes: Truth,
    offsets: Mapping[str, float],
    settings: EditSettings,
) -> str:
    """Return the figures after a round as text."""
    rows = [
        (span, scenes[clip_id], offsets[video.video_id] != 0)
        for video in videos
        for clip_id, span in zip(video.clip_ids, spans[video.video_id], strict=True)
        if clip_id in scenes
    ]
    found, true = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    shifted = np.array([row[2] for row in rows])
    values = (iou(found, true), _inside(found, true))
    both = [f"{value[mask].mean():.3f}" for mask in (np.ones_like(shifted), shifted) for value in values]
    change = drift(videos, spans, settings).median_change
    return f"{num_accepted:3d} {both[0]} {both[1]} ({both[2]} {both[3]}) {change:+.0%}"


def _inside(found_N2: Floats, true_N2: Floats) -> Floats:
    low, high = np.maximum(found_N2[:, 0], true_N2[:, 0]), np.minimum(found_N2[:, 1], true_N2[:, 1])
    return (high - low).clip(0) / (found_N2[:, 1] - found_N2[:, 0])


if __name__ == "__main__":
    main()
