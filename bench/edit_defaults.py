"""How far edits of the demo's clips bring them to the scenes that their texts are about, by settings; informational.

    clipmill demo DIR && python -m bench.edit_defaults DIR

The demo's own run is the teacher and edits without a student, so rows differ by settings alone. A clip's truth is the
scenes whose sentences it says. `IoU` is with them; `inside` is the share of the clip that shows them, which growing
alone cannot raise. Clips of late or early subtitles are told apart. Trap: speech fills only a part of its scene, so IoU
rises with length; look at `inside` beside it. Videos of the run's evaluation are left out, as in `clipmill edit`.
"""

import argparse
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.build import session
from training.edit_clips import Items, freeze_items
from training.edit_frames import read_frames
from training.edit_rounds import base_spans, fold_of
from training.edit_scores import FrameFeatures, FrameScorer, draw_bank
from training.edit_settings import EditSettings, resolve_edit
from training.edit_worker import Teacher
from training.run_folder import RunFolder
from training.selection import EVAL_FILE, Selection
from training.video_editing import Floats, Spans, VideoClips, drift, edit_videos, iou

LENGTH_WEIGHTS, MIN_GAINS, BANKS = (0.005, 0.02), (0.002, 0.01, 0.03), (0, 512)
NUM_ROUNDS = 5
Features = tuple[dict[str, FrameFeatures], dict[str, np.ndarray], float]  # by video, by clip, the logit scale
Truth = dict[str, tuple[float, float]]  # by clip_id


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
        features = _features(demo / "corpus", items, teacher)
    print("length_weight min_gain margin_s rings | … | after 0, 1, 3 and 5 rounds: edits of the last one, IoU, inside")
    print("(of videos with late or early subtitles: IoU, inside), change of the median length")
    for settings in _settings():
        _play(settings, items, features, scenes, offsets)


def _settings() -> Iterator[EditSettings]:
    for bank, weight, gain in itertools.product(BANKS, LENGTH_WEIGHTS, MIN_GAINS):
        yield EditSettings(length_weight=weight, min_gain=gain, bank_size=bank)
    for changes in ({"margin_s": 2.0}, {"rings": 2}, {"same_caption": 0.9}):
        yield EditSettings(**changes)


def _prepared(demo: Path, folder: Path) -> tuple[Items, Teacher]:
    run = RunFolder(demo / "run").require()
    settings = resolve_edit(run.load().settings, None, [])
    never = frozenset(Selection.open(run.root / EVAL_FILE).column("video_id").to_pylist())
    freeze_items(folder / "clips.arrow", demo / "corpus", "", settings.edit, trains=False, never=never)
    weights = run.checkpoints.path(run.checkpoints.find_latest()) / "model.safetensors"
    return Items(folder / "clips.arrow"), Teacher(str(weights), settings)


def _shifted(items: Items, shift_s: float) -> Items:
    """Every video's clips early or late, as its id says; no further than the video goes."""
    for video in items.videos if shift_s else ():
        by_s = shift_s if fold_of(video.video_id) else -shift_s
        for item in video.items:
            start_s = min(max(item["base_start_s"] + by_s, 0.0), max(item["duration_s"] - 0.5, 0.0))
            end_s = min(item["base_end_s"] + by_s, item["duration_s"])
            item |= {"base_start_s": start_s, "base_end_s": max(end_s, start_s + 0.5)}
    return items


def _features(corpus: Path, items: Items, teacher: Teacher) -> Features:
    with session(corpus, None, [], "", create=False) as (current, _):
        cut = current.settings.cut
    frames, texts = {}, {}
    for video in items.videos:
        wide = video.clips(EditSettings())
        times_F, pixels = read_frames(corpus, video, wide, EditSettings(), cut, teacher.picture)
        frames[video.video_id] = FrameFeatures(times_F, teacher.frame_features(pixels))
        features = teacher.text_features([item["text"] for item in video.items])
        texts |= {item["clip_id"]: feature for item, feature in zip(video.items, features, strict=True)}
    return frames, texts, teacher.log_scale


def _truth(path: Path, items: Items) -> tuple[Truth, Mapping[str, float]]:
    """The scenes that a clip's sentences are about, where all of it is about any; the subtitles' offset by video."""
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


def _play(
    settings: EditSettings, items: Items, features: Features, scenes: Truth, offsets: Mapping[str, float]
) -> None:
    frames, texts, log_scale = features
    videos = [video.clips(settings) for video in items.videos]
    owners = [video.video_id for video in videos for _ in video.clip_ids]
    bank = draw_bank(owners, np.stack([texts[c] for video in videos for c in video.clip_ids]), settings.bank_size)
    scorer = FrameScorer(frames, texts, bank if settings.bank_size else None, log_scale, settings.same_caption)
    spans, told = base_spans(videos), [_told(0, videos, base_spans(videos), scenes, offsets, settings)]
    for number in range(1, NUM_ROUNDS + 1):
        edited = edit_videos(videos, spans, scorer, settings, round_number=number, teacher="demo")
        spans, num_accepted = edited.spans, sum(edited.rows["accepted"].to_pylist())
        if number in (1, 3, 5):
            told.append(_told(num_accepted, videos, spans, scenes, offsets, settings))
    name = f"{settings.length_weight:5g} {settings.min_gain:5g} {settings.margin_s:3g} {settings.rings}"
    other = {"same_caption": settings.same_caption, "bank_size": settings.bank_size}
    print(name, *(f"{k}={v}" for k, v in other.items() if v != EditSettings.model_fields[k].default), *told, sep=" | ")


def _told(
    num_accepted: int,
    videos: Sequence[VideoClips],
    spans: Spans,
    scenes: Truth,
    offsets: Mapping[str, float],
    settings: EditSettings,
) -> str:
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
