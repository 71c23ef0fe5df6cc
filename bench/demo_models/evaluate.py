"""Evaluate the demo models on unseen frames: truth of captions, and matching of frames with texts."""

import itertools
from collections import Counter

import torch

from bench.demo_models.frames import DemoFrame, correct, demo_frames
from captioning.captioner import load_captioner
from captioning.demo_models import load_model
from captioning.model_identity import DEMO_WEIGHTS
from captioning.settings import CaptionSettings, ScoreSettings
from pipeline.demo.grammar import still_text

UNSEEN_SEED = 1000  # training seeds are below
GREEDY = CaptionSettings(captioner="demo", generation="top_k", device="cpu")
PROPERTIES = ("colour", "shape", "size", "texture", "background colour", "background texture", "everything")


def unseen_frames(num: int, pair_fraction: float, seed: int = UNSEEN_SEED) -> list[DemoFrame]:
    """Draw frames of scenes that training never draws, each with its own background."""
    return list(itertools.islice(demo_frames(seed, pair_fraction, per_background=1), num))


def caption_accuracy(frames: list[DemoFrame], settings: CaptionSettings = GREEDY) -> dict[str, float]:
    """Return the share of frames whose caption is exactly true, per property."""
    captions = load_captioner(settings).caption([frame.jpeg for frame in frames])
    counts: Counter[str] = Counter()
    for caption, frame in zip(captions, frames, strict=True):
        counts.update(name for name, is_true in correct(caption.text, frame.scene).items() if is_true)
    return {name: counts[name] / len(frames) for name in PROPERTIES}


def matching_accuracy(name: str, frames: list[DemoFrame]) -> dict[str, float]:
    """Return top-1 accuracy of matching frames with texts, in both directions, by a shipped model.

    Frames with the same true text count as matches of each other.
    """
    loaded = load_model(name, ScoreSettings(model="demo", device="cpu"), "score")
    texts = [still_text(frame.scene) for frame in frames]
    with torch.inference_mode():
        pixels, ids = loaded.pixels([frame.picture() for frame in frames]), loaded.tokenizer(texts)
        image_BD = torch.nn.functional.normalize(loaded.model.encode_image(pixels), dim=-1)
        text_BD = torch.nn.functional.normalize(loaded.model.encode_text(ids), dim=-1)
    similarity_BB = image_BD @ text_BD.T
    to_text = [texts[i] == texts[j] for i, j in enumerate(similarity_BB.argmax(1).tolist())]
    to_frame = [texts[i] == texts[j] for j, i in enumerate(similarity_BB.argmax(0).tolist())]
    return {"frame → text": sum(to_text) / len(texts), "text → frame": sum(to_frame) / len(texts)}


def report(num_frames: int = 500) -> str:
    """Return the table of docs/captioning.md."""
    single, pairs = unseen_frames(num_frames, 0.0), unseen_frames(num_frames, 1.0, UNSEEN_SEED + 1)
    rows = [("demo captioner, true of %", "one object", "two objects")]
    one, two = caption_accuracy(single), caption_accuracy(pairs)
    rows += [(name, f"{one[name]:.1%}", f"{two[name]:.1%}") for name in PROPERTIES]
    mixed = unseen_frames(100, 0.3, UNSEEN_SEED + 2)
    rows.append(("match among 100 unseen", "frame → text", "text → frame"))
    for name in sorted(path.stem for path in DEMO_WEIGHTS.glob("*.safetensors")):
        rows.append((name, *(f"{value:.1%}" for value in matching_accuracy(name, mixed).values())))
    return "\n".join(f"| {first:25} | {second:>12} | {third:>12} |" for first, second, third in rows)
