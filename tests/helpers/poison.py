"""Hang or kill the worker on certain pictures: a captioner for tests of failing workers."""

import io
import os
import re
import signal
from pathlib import Path

from PIL import Image, ImageStat

from captioning.captioner import Caption
from captioning.settings import CaptionSettings
from pipeline.runtime import watchdog


def expire_limits() -> None:
    """Expire this process's time limits at once, so that tests do not wait and only hanging work reaches them."""
    limits = watchdog._limits
    with limits.lock:
        limits.running = {number: (0.0, *rest) for number, (_, *rest) in limits.running.items()}
        limits._arm()


class Poisoned:
    """Hang at dark pictures, die at bright ones and caption the others; caption all once the file `antidote` exists."""

    name, fingerprint = "poisoned", "poisoned-1"

    def __init__(self, settings: CaptionSettings):
        self.antidote = Path(settings.options["antidote"])

    def caption(self, images):
        return [self._caption(image) for image in images]

    def _caption(self, image) -> Caption:
        (luma,) = ImageStat.Stat(Image.open(io.BytesIO(image)).convert("L")).mean
        if not self.antidote.exists():
            if luma < 60:
                expire_limits()
                re.match(r"(a+)+$", "a" * 60 + "b")  # never releases the interpreter
            if luma > 200:
                os.kill(os.getpid(), signal.SIGKILL)
        return Caption(f"a picture of brightness {luma:.0f}", None, 5)
