"""Pixels of a scene: `render_frame` draws pictures, `locate` gives an object's true position.

A frame is a prerendered background with antialiased sprites blended in, so it costs a copy and one or two small
multiplications. Backgrounds and sprites are cached per process. Drawing is a pure function of the scene: same scene,
same bytes.
"""

import math
from functools import lru_cache

import cv2
import numpy as np

from pipeline.demo.grammar import Background, Scene, Thing

# RGB, chosen so that no two colours can be confused after 4:2:0 video coding
COLOUR_RGB = {
    "red": (226, 35, 48),
    "orange": (255, 133, 15),
    "yellow": (255, 221, 33),
    "green": (46, 186, 78),
    "blue": (38, 112, 255),
    "purple": (150, 62, 238),
    "pink": (255, 105, 186),
    "white": (250, 250, 250),
}
BACKGROUND_RGB = {
    "navy": (25, 38, 84),
    "teal": (14, 104, 112),
    "gray": (122, 127, 136),
    "brown": (103, 67, 45),
    "beige": (233, 216, 184),
    "lavender": (199, 190, 236),
}
MASTER = 256  # side in pixels of the square in which a shape is drawn before it is scaled
MARGIN = 0.03  # of the short side: an object keeps this distance from the edges of its cell


# ---------------------------------------------------------------- positions


def locate(thing: Thing, t_s: float, width: int, height: int) -> tuple[float, float, float]:
    """Return (centre x, centre y, radius) in pixels at `t_s`; the object is entirely inside its cell.

    Motions repeat: an object that arrives starts again from the other end, so that its position in a single frame does
    not reveal its direction.
    """
    short = min(width, height)
    u = (thing.phase + t_s / thing.period_s) % 1.0
    growth = {"growing": u, "shrinking": 1.0 - u}.get(thing.motion, 0.0)
    radius = short * (thing.radius + (thing.max_radius - thing.radius) * growth)
    reach = short * (thing.max_radius + MARGIN)
    x0, x1 = thing.cell[0] * width + reach, thing.cell[2] * width - reach
    y0, y1 = thing.cell[1] * height + reach, thing.cell[3] * height - reach
    across, along = _path(thing, u)
    if thing.motion == "circling":  # a circle for any aspect ratio of the frame
        orbit = min(x1 - x0, y1 - y0) / 2
        return (x0 + x1) / 2 + orbit * across, (y0 + y1) / 2 + orbit * along, radius
    return x0 + (x1 - x0) * across, y0 + (y1 - y0) * along, radius


def _path(thing: Thing, u: float) -> tuple[float, float]:
    """Return (x, y) at fraction `u` of a period, in fractions of the available room (circling: -1..1)."""
    match thing.motion:
        case "left":
            return 1.0 - u, thing.lane
        case "right":
            return u, thing.lane
        case "up":
            return thing.lane, 1.0 - u
        case "down":
            return thing.lane, u
        case "bouncing":
            return thing.lane, (2.0 * u - 1.0) ** 2
        case "circling":
            angle = 2.0 * math.pi * (u if thing.clockwise else -u)  # y points down, so a growing angle is clockwise
            return math.cos(angle), math.sin(angle)
        case _:  # growing, shrinking and still stay where their phase puts them
            return thing.lane, (thing.lane * 7.0 + 0.3) % 1.0


# ---------------------------------------------------------------- frames


def render_frame(scene: Scene, t_s: float, width: int, height: int) -> np.ndarray:
    """Draw the scene `t_s` seconds after its start; return uint8 RGB [height, width, 3]."""
    frame = _background(scene.background, width, height).copy()
    for thing in scene.objects:
        x, y, radius = locate(thing, t_s, width, height)
        _blend(frame, _sprite(thing.shape, thing.colour, thing.texture, max(2, round(2 * radius))), x, y)
    return frame


def cross_fade(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Blend two pictures; `weight` is that of the second one, 0 gives only the first."""
    return cv2.addWeighted(first, 1.0 - weight, second, weight, 0.0)


def _blend(frame: np.ndarray, sprite: tuple[np.ndarray, np.ndarray], x: float, y: float) -> None:
    """Draw a sprite centred at (x, y) into the frame, clipped at its edges."""
    colour, keep = sprite  # premultiplied colour (uint16), 255 - alpha (uint16)
    side = colour.shape[0]
    left, top = round(x - side / 2), round(y - side / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + side, frame.shape[1]), min(top + side, frame.shape[0])
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    region = frame[y0:y1, x0:x1]
    region[...] = (region * keep[inside] + colour[inside]) >> 8


# ---------------------------------------------------------------- sprites


@lru_cache(maxsize=4096)
def _sprite(shape: str, colour: str, texture: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object of `side` pixels, antialiased.

    Returns (premultiplied colour x 256, 256 - alpha), both uint16.
    """
    alpha, picture = _master(shape, colour, texture)
    alpha = cv2.resize(alpha, (side, side), interpolation=cv2.INTER_AREA)[..., None]
    picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return np.rint(picture * 256.0).astype(np.uint16), np.rint(256.0 * (1.0 - alpha)).astype(np.uint16)


@lru_cache(maxsize=256)
def _master(shape: str, colour: str, texture: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a shape at high resolution; return (alpha in 0..1, RGB in 0..255 times alpha), both float32."""
    inside = _shape_mask(shape)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rgb = np.array(COLOUR_RGB[colour], np.float32)
    dark = rgb * (0.62 if colour == "white" else 0.5)
    picture = np.where(_pattern(texture)[..., None], dark, rgb)
    outline = depth[..., None] < 0.022 * MASTER  # so that it stands out from any background
    picture = np.where(outline, rgb * 0.38, picture)
    alpha = inside.astype(np.float32)
    return alpha, (picture * alpha[..., None]).astype(np.float32)


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of every pixel of the master square, in -1..1, y pointing down."""
    axis = (np.arange(MASTER, dtype=np.float32) + 0.5) / (MASTER / 2) - 1.0
    return np.broadcast_to(axis, (MASTER, MASTER)), np.broadcast_to(axis[:, None], (MASTER, MASTER))


def _pattern(texture: str) -> np.ndarray:
    """Return the mask of the texture's darker tone, bool [MASTER, MASTER]."""
    x, y = _grid()
    if texture == "striped":
        return np.mod(x + y, 0.56) < 0.24
    if texture == "spotted":
        return np.hypot(np.mod(x + 0.21, 0.42) - 0.21, np.mod(y + 0.21, 0.42) - 0.21) < 0.12
    return np.zeros((MASTER, MASTER), bool)


def _shape_mask(shape: str) -> np.ndarray:
    """Return uint8 [MASTER, MASTER], 1 inside the shape; all shapes have about the same size."""
    x, y = _grid()
    if shape in ("star", "triangle"):
        return _polygon(shape)
    heart_x, heart_y = x * 1.22, -y * 1.22 + 0.12
    inside = {
        "circle": np.hypot(x, y) < 0.92,
        "ring": np.abs(np.hypot(x, y) - 0.7) < 0.24,
        "square": np.maximum(np.abs(x), np.abs(y)) < 0.8,
        "diamond": np.abs(x) / 0.74 + np.abs(y) / 0.98 < 1.0,
        "cross": (np.minimum(np.abs(x), np.abs(y)) < 0.29) & (np.maximum(np.abs(x), np.abs(y)) < 0.92),
        "heart": (heart_x**2 + heart_y**2 - 1.0) ** 3 - heart_x**2 * heart_y**3 < 0.0,  # the sextic heart curve
    }[shape]
    return inside.astype(np.uint8)


def _polygon(shape: str) -> np.ndarray:
    if shape == "triangle":
        points = [(0.0, -0.9), (0.95, 0.76), (-0.95, 0.76)]
    else:
        radii = [0.98, 0.42] * 5
        angles = [math.pi * (n / 5 - 0.5) for n in range(10)]
        points = [(r * math.cos(a), r * math.sin(a) + 0.06) for r, a in zip(radii, angles, strict=True)]
    corners = np.rint((np.array(points) + 1.0) * (MASTER / 2)).astype(np.int32)
    return cv2.fillPoly(np.zeros((MASTER, MASTER), np.uint8), [corners], 1)


# ---------------------------------------------------------------- backgrounds


@lru_cache(maxsize=8)
def _background(background: Background, width: int, height: int) -> np.ndarray:
    """Draw a background, with patterns scaled to the short side; return uint8 RGB [height, width, 3]."""
    rng = np.random.default_rng(background.variant)
    unit = min(width, height) / 240.0
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(unit)
    tone = _TEXTURES[background.texture](x, y, rng)  # -1..1
    rgb = np.array(BACKGROUND_RGB[background.colour], np.float32)
    light, dark = rgb + (255.0 - rgb) * 0.2, rgb * 0.78
    mixed = rgb + np.clip(tone, 0, 1)[..., None] * (light - rgb) - np.clip(-tone, 0, 1)[..., None] * (rgb - dark)
    return np.ascontiguousarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    angle = math.pi / 4 * int(rng.integers(4))
    return math.cos(angle), math.sin(angle)


def _plain(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros_like(x)


def _shaded(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = _direction(rng)
    ramp = (x * dx + y * dy) * (1.0 if rng.random() < 0.5 else -1.0)
    return 2.6 * (ramp - ramp.min()) / (ramp.max() - ramp.min()) - 1.3


def _striped(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dx, dy = _direction(rng)
    period = rng.uniform(34.0, 52.0)
    return np.where(np.mod(x * dx + y * dy, period) < period / 2, 0.9, -0.6)


def _checked(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = rng.uniform(28.0, 40.0)
    return np.where((np.floor(x / side) + np.floor(y / side)) % 2 == 0, 0.8, -0.6)


def _dotted(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    step = rng.uniform(26.0, 36.0)
    row = np.floor(y / step)
    across = np.mod(x + (row % 2) * step / 2, step) - step / 2
    return np.where(np.hypot(across, np.mod(y, step) - step / 2) < step * 0.24, 1.0, -0.3)


def _grainy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return specks of a fixed size, which stay visible in small pictures."""
    size = 4.0
    rows, columns = np.floor(y / size).astype(np.int64), np.floor(x / size).astype(np.int64)
    specks = rng.uniform(-1.1, 1.1, (int(rows.max()) + 1, int(columns.max()) + 1))
    return specks[rows, columns]


_TEXTURES = {
    "plain": _plain,
    "shaded": _shaded,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
    "grainy": _grainy,
}
