"""Compare our vision tower with a plain transcription of the published one (gate), forward and backward on CPU.

    python -m bench.model_step [--model b32|b16|small] [--batch 4] [--rounds 5] [--threads 1]

The plain tower follows the papers and the released checkpoints literally: separate query, key and value matrices,
explicit scores and softmax, the proxies' keys repeated for every frame, x·sigmoid(1.702 x), every token through the
last block. Both have the same weights, and nothing is timed before their outputs and gradients agree. Then they
alternate, A B A B …, so that other work on the machine affects both; the ratio is the median over the rounds. Time is
the process's CPU time, because other work prolongs wall time by chance, one way and the other.

Traps: threads that wait for one another spend CPU time, too, so one thread is the default; another number of threads,
or a batch that exceeds the cache in one case only, changes the ratio; a single pair of runs on a shared machine proves
nothing.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig, video_flops
from training.models.clip_vip.weight_names import to_published

GATE = 0.88  # of the plain tower's time
_TEXT = TowerConfig(width=64, num_layers=1, num_heads=1, mlp_width=64)  # not run here
_BASE = TowerConfig(width=768, num_layers=12, num_heads=12, mlp_width=3072)
MODELS = {
    "b32": ModelConfig(vision=_BASE, text=_TEXT, embed_dim=512, vocab_size=8),
    "b16": ModelConfig(vision=_BASE, text=_TEXT, embed_dim=512, vocab_size=8, patch_size=16),
    "small": ModelConfig(
        vision=TowerConfig(width=256, num_layers=4, num_heads=4, mlp_width=1024), text=_TEXT, embed_dim=64, vocab_size=8
    ),
}


class PlainAttention(nn.Module):
    """Attention of the published formulation, literally."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, num_proxies: int, num_frames: int) -> Tensor:
        """Attend within each frame and its proxies; x is [B, tokens, width]."""
        batch, num_tokens, width = x.shape
        q = self._heads(self.q_proj(x) * self.scale)
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        proxies = self._attend(q[:, :num_proxies], k, v)
        q_frames = self._frames(q[:, num_proxies:], num_frames)
        k_frames, v_frames = (self._with_proxies(part, num_proxies, num_frames) for part in (k, v))
        patches = self._attend(q_frames, k_frames, v_frames).reshape(
            batch * self.num_heads, -1, width // self.num_heads
        )
        out = torch.cat([proxies, patches], dim=1)
        out = out.view(batch, self.num_heads, num_tokens, -1).transpose(1, 2).reshape(batch, num_tokens, width)
        return self.out_proj(out)

    def _heads(self, x: Tensor) -> Tensor:
        batch, num_tokens, width = x.shape
        x = x.view(batch, num_tokens, self.num_heads, -1).transpose(1, 2).contiguous()
        return x.view(batch * self.num_heads, num_tokens, -1)

    def _frames(self, x: Tensor, num_frames: int) -> Tensor:
        return x.reshape(len(x) * num_frames, -1, x.shape[-1])

    def _with_proxies(self, x: Tensor, num_proxies: int, num_frames: int) -> Tensor:
        proxies = x[:, None, :num_proxies].repeat(1, num_frames, 1, 1).flatten(0, 1)
        return torch.cat([proxies, self._frames(x[:, num_proxies:], num_frames)], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), v)


class PlainLayer(nn.Module):
    """A transformer block of the published formulation, literally."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.self_attn = PlainAttention(config.width, config.num_heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(config.width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, config.width)}
        )

    def forward(self, x: Tensor, num_proxies: int, num_frames: int) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), num_proxies, num_frames)
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class PlainTower(nn.Module):
    """The plain tower, whose parameters have the published names, so that both load the same weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.vision.width
        self.config = config
        self.embeddings = nn.ParameterDict(
            {
                "class_embedding": torch.empty(width),
                "added_cls": torch.empty(config.num_added, width),
                "temporal_embedding": torch.empty(1, config.num_times, width),
            }
        )
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + config.num_patches, width)
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(PlainLayer(config.vision) for _ in range(config.vision.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, T, 3, H, W]."""
        batch, num_frames = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.reshape(batch, num_frames, -1, x.shape[-1])
        x = x + self.embeddings["temporal_embedding"].unsqueeze(2)
        x = x + self.position_embedding.weight[1:]
        first = self.embeddings["class_embedding"].expand(batch, 1, -1) + self.position_embedding.weight[:1]
        added = self.embeddings["added_cls"].expand(batch, -1, -1) + self.position_embedding.weight[:1]
        x = self.pre_layrnorm(torch.cat([first, added, x.flatten(1, 2)], dim=1))
        for layer in self.layers:
            x = layer(x, self.config.num_proxies, num_frames)
        return self.post_layernorm(x[:, 0])


def plain_twin(model: ClipVip) -> PlainTower:
    """Make the plain tower with a model's weights."""
    published = to_published({f"vision.{name}": tensor.detach() for name, tensor in model.vision.state_dict().items()})
    state = {}
    for name, tensor in published.items():
        name = name.removeprefix("vision_model.").replace("encoder.", "")
        if name.startswith(("embeddings.patch", "embeddings.position")):
            name = name.removeprefix("embeddings.")
        state[name] = tensor
    plain = PlainTower(model.config)
    plain.load_state_dict(state)
    return plain


def step(tower: nn.Module, pixels: Tensor, cotangent: Tensor) -> Tensor:
    """Run a forward and backward pass; return the output."""
    tower.zero_grad(set_to_none=True)
    out = tower(pixels)
    (out * cotangent).sum().backward()
    return out.detach()


def assert_same_numbers(ours: nn.Module, plain: nn.Module, pixels: Tensor, cotangent: Tensor) -> dict[str, float]:
    """Assert that output and gradients agree; return their errors relative to the largest entry (float32: 2e-5)."""
    outputs = [step(tower, pixels, cotangent) for tower in (ours, plain)]
    block, layer = ours.blocks[0], plain.layers[0]
    width = len(block.out.weight)
    pairs = {
        "output": outputs,
        "class_embedding": [ours.class_embedding.grad, plain.embeddings["class_embedding"].grad],
        "first_key_matrix": [block.qkv.weight.grad[width : 2 * width], layer.self_attn.k_proj.weight.grad],
        "first_mlp_matrix": [block.fc1.weight.grad, layer.mlp["fc1"].weight.grad],
    }
    errors = {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}
    assert max(errors.values()) < 2e-5, errors
    return errors


def measure(model_name: str, batch: int, num_frames: int, rounds: int) -> dict[str, object]:
    """Compare the towers; return times and their ratio."""
    model = ClipVip(MODELS[model_name])
    model.initialise(seed=0)
    ours, plain = model.vision, plain_twin(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, num_frames, 3, 224, 224, generator=generator)
    cotangent = torch.randn(batch, model.config.vision.width, generator=generator)
    errors = assert_same_numbers(ours, plain, pixels, cotangent)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for name, tower in (("ours", ours), ("plain", plain)):
            started = time.process_time()
            step(tower, pixels, cotangent)
            seconds[name].append(time.process_time() - started)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "bench": "model_step",
        "model": model_name,
        "batch": batch,
        "num_frames": num_frames,
        "threads": torch.get_num_threads(),
        "ours_s": statistics.median(seconds["ours"]),
        "plain_s": statistics.median(seconds["plain"]),
        "ratio": statistics.median(ratios),
        "ratio_of_fastest": min(seconds["ours"]) / min(seconds["plain"]),
        "gflop_per_s": 3e-9 * batch * video_flops(model.config, num_frames) / min(seconds["ours"]),
        "largest_relative_errors": errors,
        "gate": GATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="b32")
    parser.add_argument("--batch", type=int, default=4, help="clips")
    parser.add_argument("--frames", type=int, default=12, help="frames of a clip")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.model, arguments.batch, arguments.frames, arguments.rounds)
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["ratio"] <= GATE else 1)


if __name__ == "__main__":
    main()
