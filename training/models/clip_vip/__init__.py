"""CLIP-ViP (docs/methods/clip_vip.md): CLIP's two towers, the vision tower with video proxies."""

from training.models.method import Method

METHOD = Method("clip_vip", code_in="training.models.clip_vip.build")
