"""Draw a frame's number into its picture as Gray-code blocks, and read it back after scaling and encoding.

Layout along the top edge: one black and one white reference block, then `BITS` data blocks, most significant first,
each `width / columns` pixels wide and as high. With Gray code a blur of two neighbouring frames is at most off by one.
"""

import numpy as np

BITS = 16
COLUMNS = 20  # blocks that would fit into the width; 18 are used
BLACK, WHITE = 24, 228


def draw_number(luma: np.ndarray, number: int, columns: int = COLUMNS) -> None:
    """Write `number` into the top row of a uint8 [H, W] luma plane, in place."""
    size = luma.shape[1] / columns
    for i, lit in enumerate(_blocks(number)):
        luma[: int(size), int(i * size) : int((i + 1) * size)] = WHITE if lit else BLACK


def read_number(luma: np.ndarray, columns: int = COLUMNS) -> int:
    """Read the number in a [H, W] luma plane of any size; raises ValueError without the reference blocks."""
    size = luma.shape[1] / columns
    rows = slice(int(size * 0.3), max(int(size * 0.7), int(size * 0.3) + 1))
    starts = [int(size * (i + 0.3)) for i in range(BITS + 2)]
    levels = [float(luma[rows, x : x + max(1, int(size * 0.4))].mean()) for x in starts]
    black, white, *bits = levels
    if white - black < 100:
        raise ValueError(f"no frame number: the reference blocks are {black:.0f} and {white:.0f}, not dark and bright")
    code = 0
    for level in bits:
        code = code << 1 | (level > (black + white) / 2)
    return _ungrey(code)


def _blocks(number: int) -> list[bool]:
    code = number ^ number >> 1
    return [False, True] + [bool(code >> bit & 1) for bit in reversed(range(BITS))]


def _ungrey(code: int) -> int:
    """Convert a Gray code to a number."""
    number = 0
    while code:
        number ^= code
        code >>= 1
    return number
