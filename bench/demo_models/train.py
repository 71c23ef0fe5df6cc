"""Trains the demo world's two models and writes them to `captioning/weights`; prints how well the shipped ones do.

    python -m bench.demo_models.train captioner    an open_clip CoCa: 25 minutes on one CPU core
    python -m bench.demo_models.train clip         an open_clip CLIP: likewise
    python -m bench.demo_models.train evaluate     the table of docs/captioning.md

Frames come from `demo_frames`, drawn once (12 minutes) and kept under --cache. Everything is a function of --seed,
--frames and the steps. Both models see single frames and texts about looks; no text about motion is ever shown.

Shapes: B frames, N patches, K patches kept, L ids.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pos_embed import get_2d_sincos_pos_embed
from PIL import Image
from safetensors.torch import save as serialize

from bench.demo_models.frames import DemoFrame, demo_frames
from captioning.demo_models import build
from captioning.model_identity import DEMO_WEIGHTS
from captioning.open_clip_loader import LoadedModel
from clipmill.base.atomic_file import atomic_file
from pipeline.demo.grammar import (
    BACKGROUND_COLOURS,
    BACKGROUND_TEXTURES,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    VOCABULARY,
    Background,
    Scene,
    Thing,
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
    return {"model": model, "stem": [16, 48, 96], "preprocess": _preprocess(96), "words": WORDS}


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
    with atomic_file(path) as file:
        np.savez(file, boxes=boxes, scenes=json.dumps([asdict(frame.scene) for frame in frames]), **pixels)


def _squashed(frame: DemoFrame, size: int) -> np.ndarray:
    return np.asarray(frame.picture().resize((size, size), Image.Resampling.BICUBIC))


def _scene_from(record: dict) -> Scene:
    things = tuple(Thing(**{**thing, "cell": tuple(thing["cell"])}) for thing in record["objects"])
    return Scene(record["duration_s"], Background(**record["background"]), things)


# ---------------------------------------------------------------- texts


def caption_text(scene: Scene, rng: np.random.Generator) -> str:
    """The captioner says everything that one frame shows, always in the same order: nothing is left to chance."""
    return still_text(scene)


def written_text(scene: Scene, rng: np.random.Generator) -> str:
    """Looks in five wordings, as captions of pictures are written. Nothing spoken: no talk around, no "watch closely".

    So what is said in the videos is as foreign to the image model as subtitles are to one trained on alt texts: the gap
    that post-pretraining is there to close.
    """
    with_size, with_texture = rng.random(2) < 0.8
    return still_text(scene, int(rng.integers(5)), bool(with_size), bool(with_texture))


# ---------------------------------------------------------------- the vision tower alone


class PatchFacts(torch.nn.Module):
    """Heads over the vision tower, thrown away afterwards: which object lies on a patch, and where its edges are.

    One wrong word in ten is little for a vision tower to start from: without these heads it takes the colours at once
    and no shape for as long as we cared to wait.
    """

    def __init__(self, width: int, grid: int):
        super().__init__()
        centres = (torch.arange(grid) + 0.5) / grid
        self.centres_N2 = torch.stack([centres.repeat(grid), centres.repeat_interleave(grid)], -1)
        self.of_object = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(OBJECT_FACTS[name])) for name in OBJECT_FACTS}
        )
        self.of_scene = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(SCENE_FACTS[name])) for name in SCENE_FACTS}
        )
        self.edges = torch.nn.Linear(width, 4)

    def losses(self, tokens_BKD: torch.Tensor, keep_BK: torch.Tensor, facts: dict[str, torch.Tensor]) -> dict:
        """`facts`: boxes [B, objects, 4], per object fact labels [B, objects], per scene fact labels [B]."""
        entropy = torch.nn.functional.cross_entropy
        owner_BK = owners(self.centres_N2[keep_BK], facts["boxes"])
        row, place = torch.nonzero(owner_BK >= 0, as_tuple=True)
        owned_OD, owner_O = tokens_BKD[row, place], owner_BK[row, place]
        losses = {n: entropy(head(owned_OD), facts[n][row, owner_O]) for n, head in self.of_object.items()}
        mean_BD = tokens_BKD.mean(1)
        losses |= {n: entropy(head(mean_BD), facts[n]) for n, head in self.of_scene.items()}
        centre_O2 = self.centres_N2[keep_BK[row, place]]
        edges_O4 = (facts["boxes"][row, owner_O] - centre_O2.repeat(1, 2)) * 5  # about -1..1
        return losses | {"edges": torch.nn.functional.smooth_l1_loss(self.edges(owned_OD), edges_O4)}


OBJECT_FACTS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
SCENE_FACTS = {"background_colour": BACKGROUND_COLOURS, "background_texture": BACKGROUND_TEXTURES}


def owners(centres_BK2: torch.Tensor, boxes_BO4: torch.Tensor) -> torch.Tensor:
    """Which object's box holds each patch's centre [B, K]; -1: none."""
    centres = centres_BK2[:, :, None]
    inside_BKO = ((centres > boxes_BO4[:, None, :, :2]) & (centres < boxes_BO4[:, None, :, 2:])).all(-1)
    return torch.where(inside_BKO.any(-1), inside_BKO.float().argmax(-1), -1)


def labels_of(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Numbers for the facts of every scene; 0 where there is no second object (its box is empty)."""
    labels = {name: np.zeros((len(scenes), MAX_OBJECTS), np.int64) for name in OBJECT_FACTS}
    for i, scene in enumerate(scenes):
        for name, values in OBJECT_FACTS.items():
            labels[name][i, : len(scene.objects)] = [values.index(getattr(thing, name)) for thing in scene.objects]
    for name, values in SCENE_FACTS.items():
        attribute = name.removeprefix("background_")
        labels[name] = np.array([values.index(getattr(scene.background, attribute)) for scene in scenes])
    return labels


def train_vision(loaded: LoadedModel, frames: FrameSet, plan: "Plan", seed: int) -> None:
    """Teach the vision tower what lies on which patch, before any text."""
    visual, patches = loaded.model.visual, KeptPatches()
    heads = PatchFacts(visual.positional_embedding.shape[1], visual.grid_size[0])
    visual.patch_dropout, with_tokens, visual.output_tokens = patches, visual.output_tokens, True
    labels = labels_of(frames.scenes)
    optimizer = torch.optim.AdamW(_groups(torch.nn.ModuleList([visual, heads]), plan.weight_decay), betas=(0.9, 0.98))
    log = Log(f"{plan.name} vision", plan.vision_steps)
    for step, batch in enumerate(_batches(frames, plan, seed, plan.vision_steps, plan.vision_patches), 1):
        patches.keep_BK = batch.keep_BK
        _, tokens_BKD = visual(batch.pixels_BCHW)
        facts = {name: torch.from_numpy(values[batch.chosen]) for name, values in labels.items()}
        losses = heads.losses(tokens_BKD, batch.keep_BK, facts | {"boxes": batch.boxes_BO4})
        update(optimizer, losses, _learning_rate(step, plan.vision_steps, plan.vision_lr, plan.warmup))
        log(step, losses)
    visual.patch_dropout, visual.output_tokens = torch.nn.Identity(), with_tokens


# ---------------------------------------------------------------- frames and texts together


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    name: str
    config: dict[str, Any]
    text: Callable[[Scene, np.random.Generator], str]
    vision_steps: int
    vision_patches: int  # kept per frame, those under objects first: fewer are cheaper
    steps: int
    patches: int  # likewise, with texts; all of them in the last `whole` of the steps
    whole: float = 0.3
    batch_size: int = 48
    vision_lr: float = 2e-3
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 150
    save_every: int = 500


PLANS = {
    "captioner": Plan("demo_captioner", captioner_config(), caption_text, 2200, 36, steps=1600, patches=64),
    "clip": Plan("demo_clip", clip_config(), written_text, 3600, 25, steps=1000, patches=25, batch_size=80),
}


class KeptPatches(torch.nn.Module):
    """Takes the place of the vision tower's patch dropout: class token and the patches named in `keep_BK` stay."""

    keep_BK: torch.Tensor | None = None

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        if self.keep_BK is None:
            return x_BND
        keep = torch.cat([torch.zeros_like(self.keep_BK[:, :1]), self.keep_BK + 1], 1)
        return x_BND.gather(1, keep[..., None].expand(-1, -1, x_BND.shape[-1]))


def train(plan: Plan, num_frames: int, seed: int, cache: Path, output: Path) -> None:
    """Train and write `output`/NAME.safetensors (fp16) and .json; a first version early, the last at the end."""
    torch.manual_seed(seed)
    loaded = build(plan.name, plan.config)
    visual = loaded.model.train().visual
    with torch.no_grad():  # neighbours start as neighbours; learned from there on
        table = get_2d_sincos_pos_embed(visual.positional_embedding.shape[1], visual.grid_size[0], cls_token=True)
        visual.positional_embedding.copy_(torch.from_numpy(table) * 0.5)
    frames = load_frames(num_frames, plan.config["preprocess"]["size"], seed, cache)
    train_vision(loaded, frames, plan, seed)
    train_with_texts(loaded, frames, plan, seed, output)


def train_with_texts(loaded: LoadedModel, frames: FrameSet, plan: Plan, seed: int, output: Path) -> None:
    model, patches = loaded.model, KeptPatches()
    model.visual.patch_dropout = patches
    optimizer = torch.optim.AdamW(_groups(model, plan.weight_decay), betas=(0.9, 0.98))
    log, rng = Log(plan.name, plan.steps), np.random.default_rng([seed, 1])
    num_patches = model.visual.grid_size[0] ** 2
    for step, batch in enumerate(_batches(frames, plan, seed + 1, plan.steps, plan.patches), 1):
        whole = step > (1 - plan.whole) * plan.steps or plan.patches == num_patches
        patches.keep_BK = None if whole else batch.keep_BK
        ids_BL = loaded.tokenizer([plan.text(frames.scenes[i], rng) for i in batch.chosen])
        losses = text_losses(plan.name, model, batch.pixels_BCHW, ids_BL)
        update(optimizer, losses, _learning_rate(step, plan.steps, plan.lr, plan.warmup))
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        log(step, losses)
        if step % plan.save_every == 0 or step == plan.steps:
            save(plan.name, loaded, plan.config, output)


def text_losses(name: str, model: torch.nn.Module, pixels_BCHW: torch.Tensor, ids_BL: torch.Tensor) -> dict:
    if name == "demo_captioner":
        loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        return loss(**model(pixels_BCHW, ids_BL), output_dict=True)
    image_BD, text_BD, scale = model(pixels_BCHW, ids_BL)
    return open_clip.ClipLoss()(image_BD, text_BD, scale, output_dict=True)


def update(optimizer: torch.optim.Optimizer, losses: dict[str, torch.Tensor], lr: float) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed. Vectors and scalars are not, nor embeddings: words that no text holds stay as they are."""
    kept = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    return [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


class Log:
    """A line every hundred steps: smoothed losses, wall and CPU seconds."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.mean = name, steps, {}
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        for key, loss in losses.items():
            self.mean[key] = 0.97 * self.mean.get(key, loss.item()) + 0.03 * loss.item()
        if step % 100 == 0 or step == self.steps:
            said = "  ".join(f"{key} {value:.3f}" for key, value in self.mean.items())
            wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            print(f"{self.name} {step}/{self.steps}  {said}  {wall:.0f} s, CPU {cpu:.0f} s", flush=True)


@dataclass
class Batch:
    chosen: np.ndarray  # indices of the frames [B]
    pixels_BCHW: torch.Tensor
    boxes_BO4: torch.Tensor
    keep_BK: torch.Tensor  # indices of patches


def _batches(frames: FrameSet, plan: Plan, seed: int, steps: int, num_patches: int) -> Iterator[Batch]:
    """Frames in a new random order every epoch, mirrored half the time."""
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(rng.permutation(len(frames.scenes)) for _ in itertools.count())
    vision = plan.config["model"]["vision_cfg"]
    grid = vision["image_size"] // vision["patch_size"]
    for _ in range(steps):
        chosen = np.fromiter(itertools.islice(order, plan.batch_size), np.int64)
        mirrored = rng.random(len(chosen)) < 0.5
        pixels, boxes = frames.pixels[chosen], frames.boxes[chosen]
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        boxes[mirrored] = _mirrored(boxes[mirrored])
        keep = _kept_patches(boxes, grid, num_patches, rng)
        yield Batch(chosen, _normalised(pixels), torch.from_numpy(boxes), keep)


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
    return torch.from_numpy(np.argsort(rank, axis=1)[:, :num].copy())


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    pixels_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (pixels_BCHW - mean) / std


def save(name: str, loaded: LoadedModel, config: dict[str, Any], output: Path) -> None:
    """Weights in half precision, and the JSON that `demo.load_model` builds the model from."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in loaded.model.state_dict().items()}
    (output / f"{name}.safetensors").write_bytes(serialize(weights))
    (output / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("captioner", "clip", "evaluate"))
    parser.add_argument("--frames", type=int, default=40_000, help="different frames to train on")
    parser.add_argument("--vision-steps", type=int, help="steps of the vision tower alone (default: as shipped)")
    parser.add_argument("--steps", type=int, help="steps with texts (default: as the shipped models)")
    parser.add_argument("--seed", type=int, default=0, help="of frames, order and first weights; below 900")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("demo/training"), help="where drawn frames are kept")
    parser.add_argument("--output", type=Path, default=DEMO_WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.task == "evaluate":
        from bench.demo_models.evaluate import report

        print(report())
        return
    plan = PLANS[chosen.task]
    plan = replace(plan, steps=chosen.steps or plan.steps, vision_steps=chosen.vision_steps or plan.vision_steps)
    train(plan, chosen.frames, chosen.seed, chosen.cache, chosen.output)


if __name__ == "__main__":
    main()
