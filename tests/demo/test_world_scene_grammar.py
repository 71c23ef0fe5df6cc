"""The scene grammar: all combinations occur, texts are true and in the vocabulary, one frame does not reveal motion."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.demo import grammar
from pipeline.demo.grammar import (
    COLOURS,
    MOTION_PHRASES,
    MOTIONS,
    SHAPES,
    STILL_VOCABULARY,
    VOCABULARY,
    Scene,
    held_out,
    motion_text,
    sample_scene,
    spoken_sentences,
    still_text,
    words_of,
)
from pipeline.demo.render import locate, render_frame
from tests.helpers.worlds import scene_from_dict

ALL_COMBINATIONS = set(itertools.product(COLOURS, SHAPES, MOTIONS))
FRAMES = st.sampled_from([(320, 240), (426, 240), (240, 320), (640, 360), (64, 64)])
seeds = st.integers(0, 2**32 - 1)


def scenes(count: int, seed: int = 0, **kwargs) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **kwargs) for _ in range(count)]


def test_every_colour_shape_motion_combination_occurs():
    seen = {thing.combination for scene in scenes(9000) for thing in scene.objects}
    assert seen == ALL_COMBINATIONS


def test_held_out_combinations_stay_out_and_are_the_asked_share():
    kept = {c for c in ALL_COMBINATIONS if held_out(c, 0.15, seed=3)}
    assert 0.10 < len(kept) / len(ALL_COMBINATIONS) < 0.20
    assert kept != {c for c in ALL_COMBINATIONS if held_out(c, 0.15, seed=4)}
    seen = scenes(300, allowed=lambda c: c not in kept)
    unseen = scenes(100, allowed=lambda c: c in kept)
    assert not kept & {thing.combination for scene in seen for thing in scene.objects}
    assert {thing.combination for scene in unseen for thing in scene.objects} <= kept
    assert any(len(scene.objects) == 2 for scene in unseen)


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_all_words_are_in_the_vocabulary(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    index = int(rng.integers(60))
    still, motion = still_text(scene, index), motion_text(scene, index, named=bool(index % 3))
    assert set(words_of(still)) <= set(STILL_VOCABULARY)
    spoken = [*spoken_sentences(scene, rng, int(rng.integers(5, 40))), grammar.filler_sentence(rng)]
    assert set(words_of(" ".join([still, motion, *spoken]))) <= set(VOCABULARY)
    assert still == still.lower() and motion == motion.lower()
    assert all(text[0].isupper() and text[-1] in ".?" for text in spoken)


def test_the_vocabulary_is_small():
    assert len(VOCABULARY) <= 155
    assert len(STILL_VOCABULARY) <= 50


@pytest.mark.parametrize("index", range(6))
def test_texts_say_what_the_facts_say(index):
    for scene in scenes(200, seed=index):
        still, motion, facts = still_text(scene, index), motion_text(scene, index), grammar.facts(scene)
        for thing in facts["objects"]:
            assert f"{thing['colour']} {thing['shape']}" in still
            assert thing["size"] in still
            assert (thing["texture"] == "solid") or thing["texture"] in still
            if not (facts["passing"] and "other" in motion):
                assert any(
                    f"the {thing['colour']} {thing['shape']} {phrase}" in motion
                    for phrase in MOTION_PHRASES[thing["motion"]]
                )
        assert f"{facts['background']['texture']} {facts['background']['colour']}" in still


def test_a_still_text_gives_no_motion_away_and_an_unnamed_motion_text_no_looks():
    motion_words = {word for phrases in MOTION_PHRASES.values() for phrase in phrases for word in words_of(phrase)}
    looks = {*COLOURS, *SHAPES, *grammar.BACKGROUND_COLOURS, *grammar.TEXTURES, *grammar.SIZES}
    shared = {"and", "of", "to", "in", "the", "from"}
    for n, scene in enumerate(scenes(300)):
        assert not (set(words_of(still_text(scene, n))) - shared) & motion_words
        assert not set(words_of(motion_text(scene, n, named=False))) & looks


def test_motions_have_phrases_of_their_own():
    phrases = [phrase for phrases in MOTION_PHRASES.values() for phrase in phrases]
    assert len(set(phrases)) == len(phrases)
    assert set(MOTION_PHRASES) == set(MOTIONS)


def test_narration_keeps_to_its_number_of_words_and_mixes_looks_and_motion():
    rng = np.random.default_rng(5)
    for scene in scenes(200):
        for num_words in (4, 8, 16, 30):
            spoken = spoken_sentences(scene, rng, num_words)
            assert sum(map(grammar.num_words_in, spoken)) <= num_words
    text = " ".join(spoken_sentences(scenes(1)[0], rng, 60))
    assert "background" in text
    assert any(phrase in text for phrases in MOTION_PHRASES.values() for phrase in phrases)


@given(seeds, FRAMES, st.floats(0, 60))
@settings(max_examples=300, deadline=None)
def test_objects_stay_inside_the_frame_and_apart(seed, frame, t_s):
    scene = sample_scene(np.random.default_rng(seed), duration_s=10.0)
    places = [locate(thing, t_s, *frame) for thing in scene.objects]
    for x, y, radius in places:
        assert radius <= x <= frame[0] - radius
        assert radius <= y <= frame[1] - radius
    if len(places) == 2:
        (x0, y0, r0), (x1, y1, r1) = places
        assert max(abs(x0 - x1), abs(y0 - y1)) >= r0 + r1


@given(seeds, st.floats(0, 30))
@settings(max_examples=200, deadline=None)
def test_a_size_word_holds_at_every_moment(seed, t_s):
    for thing in sample_scene(np.random.default_rng(seed), duration_s=10.0).objects:
        radius = locate(thing, t_s, 320, 240)[2] / 240
        assert radius < 0.13 if thing.size == "small" else radius > 0.16


@pytest.mark.parametrize(
    ("motion", "opposite", "axis"), [("left", "right", 0), ("up", "down", 1), ("growing", "shrinking", 2)]
)
def test_one_frame_does_not_tell_a_motion_from_its_opposite(motion, opposite, axis):
    """Positions (or sizes) at one moment have the same distribution, by the two-sample Kolmogorov–Smirnov distance."""
    for t_s in (0.0, 2.0):
        samples = {motion: [], opposite: []}
        for scene in scenes(12_000, seed=11, duration_s=5.0):
            thing = scene.objects[0]
            if thing.motion in samples and thing.size == "small":
                samples[thing.motion].append(locate(thing, t_s, 320, 240)[axis])
        first, second = (np.sort(values) for values in samples.values())
        grid = np.concatenate([first, second])
        gaps = np.searchsorted(first, grid) / len(first) - np.searchsorted(second, grid) / len(second)
        assert len(first) > 500
        assert np.abs(gaps).max() < 1.63 * np.sqrt((len(first) + len(second)) / (len(first) * len(second)))  # 1 % level


def test_passing_objects_are_level_in_the_middle_of_each_pass():
    passing = [scene for scene in scenes(400, duration_s=10.0) if scene.passing]
    assert len(passing) > 20
    for scene in passing:
        first, second = scene.objects
        t_s = (1.5 - first.phase) * first.period_s
        places = [locate(thing, t_s, 320, 240) for thing in (first, second)]
        along = 0 if first.motion in ("left", "right") else 1
        assert abs(places[0][along] - places[1][along]) < 1.0


def test_a_scene_survives_json():
    for scene in scenes(20):
        assert scene_from_dict(json.loads(json.dumps(dataclasses.asdict(scene)))) == scene


def test_a_frame_is_a_function_of_the_scene():
    scene = scenes(1, seed=9)[0]
    first = render_frame(scene, 1.5, 320, 240)
    render_frame(scenes(1, seed=10)[0], 0.0, 320, 240)
    assert np.array_equal(first, render_frame(scene, 1.5, 320, 240))
    assert first.shape == (240, 320, 3) and first.dtype == np.uint8
