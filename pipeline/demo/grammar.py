"""Scenes of the demo world and the sentences that are true about them. Their pixels are in `render`.

A scene is one or two coloured shapes on a textured background. Colour, shape, size, texture and background are visible
in any single frame. Motion is not: an object's position (or size) at a random moment has the same distribution for left
and right, up and down, growing and shrinking, since every object repeats its path with a random phase. So only the
order of several frames confirms a text about motion, while any single frame confirms a text about looks.

`VOCABULARY` has all words of all texts here.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "spotted")
MOTIONS = ("left", "right", "up", "down", "circling", "bouncing", "growing", "shrinking", "still")
BACKGROUND_COLOURS = ("navy", "teal", "gray", "brown", "beige", "lavender")
BACKGROUND_TEXTURES = ("plain", "shaded", "striped", "checked", "dotted", "grainy")

# Motions of two objects in one scene: both along rows (one above the other) or both along columns (side by side).
ROW_MOTIONS = ("left", "right", "growing", "shrinking", "still")
COLUMN_MOTIONS = ("up", "down", "bouncing", "growing", "shrinking", "still")
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}

Combination = tuple[str, str, str]  # (colour, shape, motion)


@dataclass(frozen=True)
class Background:
    colour: str
    texture: str
    variant: int  # seed of stripe direction, grain and other looks that no text mentions


@dataclass(frozen=True)
class Thing:
    """An object. Radii are fractions of the frame's short side, cells fractions of its width and height."""

    shape: str
    colour: str
    size: str
    texture: str
    motion: str
    radius: float  # of a bounding circle; the smallest one while growing or shrinking
    max_radius: float  # equal to `radius` unless growing or shrinking
    phase: float  # position on its path at t = 0, in [0, 1)
    period_s: float  # duration of one pass, bounce or round
    clockwise: bool  # used for circling only
    lane: float  # position across the direction of motion, in [0, 1] of the available room
    cell: tuple[float, float, float, float]  # x0, y0, x1, y1: the part of the frame that it never leaves

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def combination(self) -> Combination:
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class Scene:
    duration_s: float
    background: Background
    objects: tuple[Thing, ...]  # one or two; two differ in both colour and shape

    @property
    def passing(self) -> bool:
        """Return True if two objects pass each other: opposite directions at the same pace."""
        return len(self.objects) == 2 and OPPOSITES.get(self.objects[0].motion) == self.objects[1].motion


# ---------------------------------------------------------------- sampling

WHOLE_FRAME = (0.0, 0.0, 1.0, 1.0)
ROWS = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))
COLUMNS = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
# (smallest, largest) radius; the ranges of small and large never overlap, even while an object grows
SINGLE_RADII = {"small": (0.065, 0.125), "large": (0.175, 0.31)}
PAIR_RADII = {"small": (0.065, 0.120), "large": (0.165, 0.235)}
PERIODS_S = {"bouncing": (1.5, 2.4), "circling": (3.0, 5.0)}
PAIR_MIN_S = 6.0  # describing two objects and their motions takes a speaker about five seconds
PASS_PERIOD_S = (3.0, 6.0)  # a 4-second clip sees most of a pass

Allowed = Callable[[Combination], bool]


def sample_scene(
    rng: np.random.Generator,
    duration_s: float | None = None,
    allowed: Allowed | None = None,
    pair_fraction: float = 0.3,
) -> Scene:
    """Sample a scene of 3–15 s (or of `duration_s`) whose objects' combinations are all `allowed` (default: any).

    `pair_fraction` of the scenes that are long enough to describe it have two objects.
    """
    duration_s = float(rng.uniform(3.0, 15.0)) if duration_s is None else duration_s
    background = Background(_pick(rng, BACKGROUND_COLOURS), _pick(rng, BACKGROUND_TEXTURES), int(rng.integers(1 << 31)))
    pair = duration_s >= PAIR_MIN_S and rng.random() < pair_fraction
    while True:
        objects = _sample_pair(rng) if pair else (_sample_thing(rng, _pick(rng, MOTIONS)),)
        if allowed is None or all(allowed(thing.combination) for thing in objects):
            return Scene(duration_s, background, objects)


def held_out(combination: Combination, fraction: float, seed: int) -> bool:
    """Return True if `seed` reserves this combination for testing.

    It reserves `fraction` of all combinations, by a hash of their names.
    """
    text = f"{seed}:{'/'.join(combination)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_thing(
    rng: np.random.Generator,
    motion: str,
    cell: tuple[float, float, float, float] = WHOLE_FRAME,
    radii: dict[str, tuple[float, float]] = SINGLE_RADII,
    without: tuple[str, ...] = (),
) -> Thing:
    """Sample an object with the given motion, inside `cell`; its shape and colour are not in `without`."""
    size = _pick(rng, SIZES)
    low, high = radii[size]
    radius = max_radius = float(low + (high - low) * rng.uniform(0.35, 0.65))
    if motion in ("growing", "shrinking"):
        radius, max_radius = low, high
    return Thing(
        shape=_pick(rng, [s for s in SHAPES if s not in without]),
        colour=_pick(rng, [c for c in COLOURS if c not in without]),
        size=size,
        texture=_pick(rng, TEXTURES),
        motion=motion,
        radius=radius,
        max_radius=max_radius,
        phase=float(rng.random()),
        period_s=float(rng.uniform(*PERIODS_S.get(motion, PASS_PERIOD_S))),
        clockwise=bool(rng.random() < 0.5),
        lane=float(rng.uniform(0.1, 0.9)),
        cell=cell,
    )


def _sample_pair(rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Sample two objects in the halves of the frame; a third of the pairs pass each other."""
    motions, cells = (ROW_MOTIONS, ROWS) if rng.random() < 0.5 else (COLUMN_MOTIONS, COLUMNS)
    first_motion = _pick(rng, motions)
    second_motion = _pick(rng, motions)
    if rng.random() < 0.4:
        first_motion = motions[int(rng.integers(2))]
        second_motion = OPPOSITES[first_motion]
    if rng.random() < 0.5:
        cells = cells[::-1]
    first = _sample_thing(rng, first_motion, cells[0], PAIR_RADII)
    second = _sample_thing(rng, second_motion, cells[1], PAIR_RADII, without=(first.shape, first.colour))
    if OPPOSITES.get(first.motion) == second.motion:  # so that they meet in the middle of each pass
        second = replace(second, phase=first.phase, period_s=first.period_s)
    return first, second


# ---------------------------------------------------------------- texts

# {a}: objects with article and all their looks; {b}: background, such as "striped navy"
STILL_TEMPLATES = (
    "{a} on a {b} background",
    "{a} in front of a {b} background",
    "a {b} background with {a}",
    "there is {a} on a {b} background",
    "a picture of {a} on a {b} background",
)
MOTION_PHRASES = {
    "left": ("moves to the left", "slides left", "travels from right to left"),
    "right": ("moves to the right", "slides right", "travels from left to right"),
    "up": ("moves up", "rises to the top", "travels from bottom to top"),
    "down": ("moves down", "sinks to the bottom", "travels from top to bottom"),
    "circling": ("goes round and round", "keeps circling", "travels around the middle"),
    "bouncing": ("bounces up and down", "keeps bouncing", "jumps again and again"),
    "growing": ("grows", "gets bigger", "becomes larger and larger"),
    "shrinking": ("shrinks", "gets smaller", "becomes smaller and smaller"),
    "still": ("stands still", "does not move", "stays in its place"),
}
PASSING_PHRASES = ("pass each other", "go past each other")
JOINERS = ("and", "while")
UNNAMED = ("something", "something else")

# {a} and {b} as above; {m}: the objects' names and motions
SPOKEN_STILL = (
    "Here you can see {a} on a {b} background.",
    "Now we have {a} in front of a {b} background.",
    "This is {a} and the background is {b}.",
)
SPOKEN_MOTION = ("Look how {m}.", "You can see that {m}.", "Now {m}.", "Watch closely as {m}.")
SPOKEN_MIXED = (
    "On the {b} background {m}.",
    "Here is {a} and {m}.",
    "We are looking at {a} on a {b} background and {m}.",
)
SPOKEN_BRIEF = ("Now {m}.", "{m}.")
SPOKEN_AGAIN = ("Once more {m}.", "And again {m}.", "See it one more time, {m}.", "That is it, {m}.")

FILLER = (
    "Hey everybody, welcome back to the channel.",
    "Thank you so much for watching.",
    "Do not forget to like and subscribe.",
    "Let me know what you think in the comments.",
    "Before we start, a word from our sponsor.",
    "I had such a nice time this week.",
    "Anyway, let us get back to it.",
    "So, what is new with you today?",
    "Okay, I am really happy that you are here.",
    "See you next time on the channel.",
)


def still_text(scene: Scene, index: int = 0, with_size: bool = True, with_texture: bool = True) -> str:
    """Return a true caption that any one frame can confirm. `index` chooses the wording, modulo their number."""
    template = STILL_TEMPLATES[index % len(STILL_TEMPLATES)]
    looks = " and ".join(_looks(thing, with_size, with_texture) for thing in scene.objects)
    return template.format(a=looks, b=background_words(scene))


def motion_text(scene: Scene, index: int = 0, named: bool = True) -> str:
    """Return a true caption that only several frames can confirm; `named=False` omits the objects' looks."""
    if scene.passing and index % 2:
        first, second = _subjects(scene, named)
        return f"{first} and {second} {PASSING_PHRASES[index // 2 % len(PASSING_PHRASES)]}"
    joiner = f" {JOINERS[index % len(JOINERS)]} "
    parts = zip(_subjects(scene, named), scene.objects, strict=True)
    return joiner.join(f"{subject} {motion_phrase(thing.motion, index)}" for subject, thing in parts)


def spoken_sentences(scene: Scene, rng: np.random.Generator, num_words: int = 20) -> list[str]:
    """Return a narrator's punctuated sentences about the scene, at most `num_words` words in all.

    The first one or two sentences describe looks and motion, or the motion alone if both do not fit; further ones
    repeat the motion in other words while they fit. The list is empty if not even the motion fits.
    """
    openings = [
        [_spoken(scene, rng, SPOKEN_STILL), _spoken(scene, rng, SPOKEN_MOTION)],
        [_spoken(scene, rng, SPOKEN_MIXED)],
    ]
    if rng.random() < 0.3:
        openings.reverse()
    openings += [[_spoken(scene, rng, SPOKEN_MOTION)], [_spoken(scene, rng, SPOKEN_BRIEF)]]
    sentences = next((o for o in openings if sum(map(num_words_in, o)) <= num_words), [])
    room = num_words - sum(map(num_words_in, sentences))
    for _ in range(8 if sentences else 0):
        further = _spoken(scene, rng, SPOKEN_AGAIN)
        if num_words_in(further) <= room:
            sentences.append(further)
            room -= num_words_in(further)
    return sentences


def filler_sentence(rng: np.random.Generator) -> str:
    """Return a sentence that describes nothing in the picture."""
    return _pick(rng, FILLER)


def background_words(scene: Scene) -> str:
    return f"{scene.background.texture} {scene.background.colour}"


def motion_phrase(motion: str, index: int = 0) -> str:
    phrases = MOTION_PHRASES[motion]
    return phrases[index % len(phrases)]


def facts(scene: Scene) -> dict:
    """Return all facts about the scene that an evaluation may use, as JSON types."""
    names = ("shape", "colour", "size", "texture", "motion")
    return {
        "background": {"colour": scene.background.colour, "texture": scene.background.texture},
        "objects": [{name: getattr(thing, name) for name in names} for thing in scene.objects],
        "passing": scene.passing,
    }


def words_of(text: str) -> list[str]:
    """Return lower-case words without punctuation, as YouTube's speech recogniser writes them."""
    return re.findall(r"[a-z']+", text.lower())


def num_words_in(text: str) -> int:
    return len(words_of(text))


def _looks(thing: Thing, with_size: bool, with_texture: bool) -> str:
    size = [thing.size] if with_size else []
    texture = [thing.texture] if with_texture and thing.texture != "solid" else []
    words = " ".join([*size, *texture, thing.colour, thing.shape])
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _subjects(scene: Scene, named: bool) -> list[str]:
    return [f"the {thing.name}" if named else UNNAMED[n] for n, thing in enumerate(scene.objects)]


def _spoken(scene: Scene, rng: np.random.Generator, templates: Sequence[str]) -> str:
    looks = " and ".join(_looks(thing, True, rng.random() < 0.7) for thing in scene.objects)
    motion = motion_text(scene, int(rng.integers(12)))
    sentence = _pick(rng, templates).format(a=looks, b=background_words(scene), m=motion)
    return sentence[0].upper() + sentence[1:]


def _words_in(*texts: str) -> set[str]:
    return {word for text in texts for word in words_of(re.sub(r"{.}", "", text))}


# Words that a captioner of single frames needs.
STILL_VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        _words_in(*STILL_TEMPLATES, "a an and", *COLOURS, *SHAPES, *SIZES, *TEXTURES)
        | _words_in(*BACKGROUND_COLOURS, *BACKGROUND_TEXTURES)
    )
)
# All words of the world, including filler.
VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        set(STILL_VOCABULARY)
        | _words_in("the", *JOINERS, *PASSING_PHRASES, *UNNAMED, *FILLER)
        | _words_in(*(phrase for phrases in MOTION_PHRASES.values() for phrase in phrases))
        | _words_in(*SPOKEN_STILL, *SPOKEN_MOTION, *SPOKEN_MIXED, *SPOKEN_AGAIN)
    )
)
