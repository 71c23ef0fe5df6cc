"""Make pictures for captioners and scorers."""

import io

import numpy as np
from PIL import Image


def random_jpeg(seed: int) -> bytes:
    """Return a JPEG of 60x50 with random smooth colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
