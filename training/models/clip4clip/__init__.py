"""CLIP4Clip (docs/methods/clip4clip.md): CLIP frame by frame, and a head that compares texts with a video's frames."""

from typing import Any

from clipmill.base.errors import UserError
from training.models.clip4clip.settings import Clip4ClipSettings
from training.models.method import Method


def _refuse_proxies(settings: Any) -> None:
    for name in ("num_added", "num_times", "pooling"):
        if getattr(settings, name) is not None:
            raise UserError(f"model.{name} is for model.method = 'clip_vip'; here it is 'clip4clip'")


METHOD = Method(
    "clip4clip",
    code_in="training.models.clip4clip.build",
    settings=Clip4ClipSettings,
    check=_refuse_proxies,
    takes_frames_per_s=lambda settings: True,
)
