"""Trains the demo world's two models and writes them to `captioning/weights`; prints how well the shipped ones do.

    python -m captioning.train_demo_models captioner    an open_clip CoCa: about 35 minutes on one CPU core
    python -m captioning.train_demo_models clip         an open_clip CLIP: about 15 minutes
    python -m captioning.train_demo_models evaluate     the table of docs/captioning.md

Frames come from `demo_frames`, drawn once and kept under --cache. Everything is a function of --seed and --steps. Both
models see single frames and texts about looks; no text about motion is ever shown.

Shapes: B frames, N patches, K patches kept, L ids.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from captioning.demo import build
from captioning.demo_frames import DemoFrame, demo_frames
from captioning.identity import DEMO_WEIGHTS
from captioning.open_clip_models import LoadedModel
from pipeline.demo.grammar import (
    FILLER,
    SPOKEN_STILL,
    VOCABULARY,
    Background,
    Scene,
    Thing,
    background_words,
    still_text,
)

WORDS = [*VOCABULARY]
NUM_IDS = len(WORDS) + 4
CHUNK = 2000  # frames per cache file, each with a seed of its own
MAX_OBJECTS = 2


def _preprocess(size: int) -> dict:
    return {"size": size, "resize_mode": "squash", "interpolation": "bicubic"}


def captioner_config() -> dict[str, Any]:
    """96 pixels and patches of 8: the smallest shapes are an eighth of the short side, and must be told apart."""
    width, text = 128, {"context_length": 24, "vocab_size": NUM_IDS, "width": 128, "heads": 4}
    model = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 96,
            "patch_size": 8,
            "width": width,
            "layers": 4,
            "head_width": 32,
            "output_tokens": True,
        },
        "text_cfg": {**text, "layers": 1, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "layers": 2},
    }
    return {"model": model, "preprocess": _preprocess(96), "words": WORDS}


def clip_config() -> dict[str, Any]:
    """25 patches a frame: the video model that starts from it sees many frames at once."""
    model = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 80, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {"context_length": 48, "vocab_size": NUM_IDS, "width": 128, "heads": 4, "layers": 3},
        "quick_gelu": True,
    }
    return {"model": model, "preprocess": _preprocess(80), "words": WORDS}


# ---------------------------------------------------------------- frames


@dataclass
class FrameSet:
    pixels: np.ndarray  # uint8 [num, H, W, 3]
    boxes: np.ndarray  # float32 [num, objects, 4], fractions of the frame; zeros where there is no second object
    scenes: list[Scene]


def load_frames(num: int, size: int, seed: int, cache: Path) -> FrameSet:
    """Frames of a seed at a model's size, drawn where the cache lacks them."""
    chunks = [load_chunk(seed + n, size, cache) for n in range(math.ceil(num / CHUNK))]
    return FrameSet(
        np.concatenate([chunk.pixels for chunk in chunks]),
        np.concatenate([chunk.boxes for chunk in chunks]),
        [scene for chunk in chunks for scene in chunk.scenes],
    )


def load_chunk(seed: int, size: int, cache: Path) -> FrameSet:
    path = cache / f"frames-{seed:04d}.npz"
    if not path.exists():
        _write_chunk(seed, path)
    with np.load(path) as data:
        scenes = [_scene_from(record) for record in json.loads(str(data["scenes"]))]
        return FrameSet(data[f"pixels_{size}"], data["boxes"], scenes)


def _write_chunk(seed: int, path: Path) -> None:
    frames = list(itertools.islice(demo_frames(seed), CHUNK))
    boxes = np.zeros((CHUNK, MAX_OBJECTS, 4), np.float32)
    for row, frame in zip(boxes, frames, strict=True):
        row[: len(frame.boxes)] = frame.boxes
    pixels = {f"pixels_{size}": np.stack([_squashed(frame, size) for frame in frames]) for size in (80, 96)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, boxes=boxes, scenes=json.dumps([asdict(frame.scene) for frame in frames]), **pixels)
    temporary.rename(path)


def _squashed(frame: DemoFrame, size: int) -> np.ndarray:
    return np.asarray(frame.picture().resize((size, size), Image.Resampling.BICUBIC))


def _scene_from(record: dict) -> Scene:
    things = tuple(Thing(**{**thing, "cell": tuple(thing["cell"])}) for thing in record["objects"])
    return Scene(record["duration_s"], Background(**record["background"]), things)


# ---------------------------------------------------------------- texts


def caption_text(scene: Scene, rng: np.random.Generator) -> str:
    """The captioner says everything that one frame shows, always in the same order: nothing is left to chance."""
    return still_text(scene)


def varied_text(scene: Scene, rng: np.random.Generator) -> str:
    """Looks in many wordings, written and spoken, with filler talk around: what a subtitle may be, less the motion."""
    with_size, with_texture = rng.random(2) < 0.8
    if rng.random() < 0.6:
        text = still_text(scene, int(rng.integers(5)), bool(with_size), bool(with_texture))
    else:
        looks = still_text(scene, 0, bool(with_size), bool(with_texture))
        looks = looks.removesuffix(f" on a {background_words(scene)} background")
        text = SPOKEN_STILL[rng.integers(len(SPOKEN_STILL))].format(a=looks, b=background_words(scene))
    around = ["", ""]
    if rng.random() < 0.4:
        around[rng.integers(2)] = FILLER[rng.integers(len(FILLER))]
    return f"{around[0]} {text} {around[1]}".strip()


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    config: dict[str, Any]
    text: Any  # (scene, rng) → str
    steps: int
    batch_size: int
    lr: float = 1e-3
    patches_kept: int | None = None  # per frame until the last fifth of the steps; those under objects first
    weight_decay: float = 0.05
    warmup: int = 200
    save_every: int = 500


PLANS = {
    "demo_captioner": Plan(captioner_config(), caption_text, steps=4000, batch_size=48, patches_kept=64),
    "demo_clip": Plan(clip_config(), varied_text, steps=3000, batch_size=96),
}


class KeptPatches(torch.nn.Module):
    """Takes the place of the vision tower's patch dropout: class token and the patches named in `keep_BK` stay."""

    keep_BK: torch.Tensor | None = None

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        if self.keep_BK is None:
            return x_BND
        keep = torch.cat([torch.zeros_like(self.keep_BK[:, :1]), self.keep_BK + 1], 1)
        return x_BND.gather(1, keep[..., None].expand(-1, -1, x_BND.shape[-1]))


def train(name: str, plan: Plan, num_frames: int, seed: int, cache: Path, output: Path) -> None:
    """Train and write `output`/NAME.safetensors (fp16) and .json; a first version early, the last at the end."""
    torch.manual_seed(seed)
    loaded = build(name, plan.config)
    frames = load_frames(num_frames, plan.config["preprocess"]["size"], seed, cache)
    model, patches = loaded.model.train(), KeptPatches()
    model.visual.patch_dropout = patches
    optimizer = torch.optim.AdamW(_groups(model, plan.weight_decay), lr=plan.lr, betas=(0.9, 0.98))
    started, mean = time.perf_counter(), None
    for step, (pixels, ids, keep) in enumerate(_batches(frames, loaded, plan, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, plan)
        patches.keep_BK = keep
        losses = _losses(name, model, pixels, ids)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        values = torch.stack(list(losses.values())).detach()
        mean = values if mean is None else mean.lerp(values, 0.02)
        if step % 100 == 0:
            said = "  ".join(f"{key} {value:.3f}" for key, value in zip(losses, mean.tolist(), strict=True))
            print(f"{name} {step}/{plan.steps}  {said}  {time.perf_counter() - started:.0f} s", flush=True)
        if step % plan.save_every == 0 or step == plan.steps:
            save(name, loaded, plan.config, output)


def _losses(name: str, model: torch.nn.Module, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if name == "demo_captioner":
        loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        return loss(**model(pixels, ids), output_dict=True)
    image, text, scale = model(pixels, ids)
    return open_clip.ClipLoss()(image, text, scale, output_dict=True)


def _learning_rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < plan.warmup:
        return plan.lr * step / plan.warmup
    return plan.lr * 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / (plan.steps - plan.warmup)))


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed. Vectors and scalars are not, nor embeddings: words that no text holds stay as they are."""
    kept = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    return [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _batches(frames: FrameSet, loaded: LoadedModel, plan: Plan, seed: int) -> Iterator[Batch]:
    """Pixels [B, 3, H, W] (mirrored half the time), ids [B, L] and the patches to keep [B, K] for every step."""
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(rng.permutation(len(frames.scenes)) for _ in itertools.count())
    transform = plan.config["model"]["vision_cfg"]
    grid = transform["image_size"] // transform["patch_size"]
    for step in range(plan.steps):
        chosen = np.fromiter(itertools.islice(order, plan.batch_size), np.int64)
        mirrored = rng.random(len(chosen)) < 0.5
        pixels, boxes = frames.pixels[chosen], frames.boxes[chosen]
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        boxes[mirrored] = _mirrored(boxes[mirrored])
        texts = [plan.text(frames.scenes[i], rng) for i in chosen]
        keep = None
        if plan.patches_kept and step < 0.8 * plan.steps:
            keep = _kept_patches(boxes, grid, plan.patches_kept, rng)
        yield _normalised(pixels), loaded.tokenizer(texts), keep


def _mirrored(boxes: np.ndarray) -> np.ndarray:
    present = (boxes[..., 2:3] > 0).astype(np.float32)
    return np.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1) * present


def _kept_patches(boxes: np.ndarray, grid: int, num: int, rng: np.random.Generator) -> torch.Tensor:
    """Indices [B, K] of patches: all that an object touches (as many as fit), then random ones."""
    edge = np.arange(grid) / grid
    x0, y0, x1, y1 = (boxes[..., i, None] for i in range(4))
    across = (edge < x1) & (edge + 1 / grid > x0)  # [B, objects, grid]
    down = (edge < y1) & (edge + 1 / grid > y0)
    touched = (down[..., :, None] & across[..., None, :]).any(1).reshape(len(boxes), -1)
    rank = rng.random(touched.shape) - touched
    return torch.from_numpy(np.argpartition(rank, num, axis=1)[:, :num].copy())


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    pixels_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (pixels_BCHW - mean) / std


def save(name: str, loaded: LoadedModel, config: dict[str, Any], output: Path) -> None:
    """Weights in half precision, and the JSON that `demo.load_model` builds the model from."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in loaded.model.state_dict().items()}
    save_file(weights, output / f"{name}.safetensors")
    (output / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("captioner", "clip", "evaluate"))
    parser.add_argument("--frames", type=int, default=40_000, help="different frames to train on")
    parser.add_argument("--steps", type=int, help="training steps (default: as the shipped models)")
    parser.add_argument("--seed", type=int, default=0, help="of frames, order and first weights; below 900")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("demo/training"), help="where drawn frames are kept")
    parser.add_argument("--output", type=Path, default=DEMO_WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.task == "evaluate":
        from captioning.evaluate_demo_models import report

        print(report())
        return
    name = f"demo_{chosen.task}"
    plan = replace(PLANS[name], steps=chosen.steps or PLANS[name].steps)
    train(name, plan, chosen.frames, chosen.seed, chosen.cache, chosen.output)


if __name__ == "__main__":
    main()
